"""Examples in memory, served by index: no state to save, nothing to wait for."""

import functools
import operator
from collections.abc import Sequence

import jax
import numpy as np

from dbjax.data import checks
from dbjax.typing import Batch

_CACHE_BYTES = 256 * 2**20
_SUBSETS_KEY = 2**64 - 1  # the Philox stream of the split; no replica has this index


class ArrayData:
    """Examples in memory; `batch(replica, step)` is the same in every process.

    Made by `from_arrays`. A replica's stream is its own seeded permutations of its
    examples, laid end to end and cut into batches, so within an epoch no example is
    dropped or doubled. Safe to use from several threads, and pickles.
    """

    def __init__(
        self,
        arrays: Batch,
        batch_size: int,
        *,
        seed: int = 0,
        subsets: int | None = None,
        portion_size: int | None = None,
    ):
        """See `from_arrays`."""
        self._arrays = jax.tree.map(np.asarray, arrays)
        self.num_examples = _shared_length(self._arrays)
        self.batch_size, self.seed, self.subsets, self.portion_size = checks.sizes(
            self.num_examples, batch_size, seed, subsets, portion_size
        )
        # Small indices halve the memory of the cached permutations.
        self._index = np.int32 if self.num_examples < 2**31 else np.int64
        self._members = self._split()
        entry = self._members[0].nbytes
        # A permutation is pure, so a cache that forgets costs time and nothing else.
        self._epoch = functools.lru_cache(max(2, _CACHE_BYTES // entry))(self._permute)

    def __reduce__(self):
        """Pickle what made it: the cache stays behind."""
        keywords = {
            "seed": self.seed,
            "subsets": self.subsets,
            "portion_size": self.portion_size,
        }
        made = functools.partial(ArrayData, **keywords)
        return made, (self._arrays, self.batch_size)

    def batch(self, replica: int, step: int) -> Batch:
        """Give the `step`-th minibatch of `replica`'s own stream.

        Args:
            replica: from 0; any number of them.
            step: from 0, counted by each replica for itself.

        Returns:
            The arrays' pytree with numpy leaves `[B, ...]`, new ones.
        """
        replica, step = checks.natural("replica", replica), checks.natural("step", step)
        index = self._rows(replica, step)
        return jax.tree.map(lambda a: a.take(index, axis=0), self._arrays)

    def batches(self, replicas: Sequence[int], steps: Sequence[int]) -> Batch:
        """Give `K` minibatches at once.

        Args:
            replicas: `[K]` integers.
            steps: `[K]` integers, each a step of the replica beside it.

        Returns:
            The arrays' pytree with numpy leaves `[K, B, ...]`.
        """
        pairs = checks.pairs(replicas, steps)
        index = np.empty((len(pairs), self.batch_size), self._index)
        for row, (replica, step) in enumerate(pairs):
            index[row] = self._rows(replica, step)
        return jax.tree.map(lambda a: a.take(index, axis=0), self._arrays)

    @property
    def num_portions(self) -> int:
        """How many portions the examples make; the last one may be short."""
        return -(-self.num_examples // self.portion_size)

    def portion(self, i: int) -> Batch:
        """Give the `i`-th contiguous slice of all examples.

        Args:
            i: from 0 to `num_portions - 1`.

        Returns:
            Read-only views `[portion_size, ...]` of the arrays; the last may be short.

        Raises:
            IndexError: there is no such portion.
        """
        if not 0 <= operator.index(i) < self.num_portions:
            raise IndexError(f"portion {i}: allowed are 0 to {self.num_portions - 1}")
        start = i * self.portion_size
        return jax.tree.map(
            lambda a: _read_only(a[start : start + self.portion_size]), self._arrays
        )

    def _rows(self, replica: int, step: int) -> np.ndarray:
        """Which examples make the batch `[B]`; it may run over the end of an epoch."""
        n = len(self._members[replica % self.subsets])
        epoch, start = divmod(step * self.batch_size, n)
        rows = self._epoch(replica, epoch)[start : start + self.batch_size]
        missing = self.batch_size - len(rows)
        if missing:
            rows = np.concatenate([rows, self._epoch(replica, epoch + 1)[:missing]])
        return rows

    def _permute(self, replica: int, epoch: int) -> np.ndarray:
        """The order in which `replica` sees its examples in `epoch`."""
        bits = np.random.Philox(
            key=np.array([self.seed, replica], np.uint64),
            counter=np.array([0, 0, 0, epoch], np.uint64),
        )
        members = self._members[replica % self.subsets]
        return np.random.Generator(bits).permutation(members)

    def _split(self) -> list[np.ndarray]:
        """Disjoint subsets whose sizes differ by at most one, drawn by the seed."""
        everything = np.arange(self.num_examples, dtype=self._index)
        if self.subsets == 1:
            return [everything]
        bits = np.random.Philox(key=np.array([self.seed, _SUBSETS_KEY], np.uint64))
        np.random.Generator(bits).shuffle(everything)
        return np.array_split(everything, self.subsets)


def from_arrays(
    arrays: Batch,
    batch_size: int,
    *,
    seed: int = 0,
    subsets: int | None = None,
    portion_size: int | None = None,
) -> ArrayData:
    """Serve minibatches and portions of arrays in memory.

    Args:
        arrays: pytree of arrays `[N, ...]` that share axis 0. They are not copied and
          must not change.
        batch_size: `B`, at most the examples of the smallest subset.
        seed: of the permutations; each replica has its own.
        subsets: cut the examples into so many disjoint subsets, equal to one example;
          replica `r` draws from subset `r % subsets` (the paper's way). By default
          every replica draws from all examples.
        portion_size: examples per portion, by default `batch_size`.

    Returns:
        An `ArrayData`.

    Raises:
        ValueError: the leaves differ in length, there are none, or a size is not
          allowed.

    Examples:
        >>> import numpy as np
        >>> from dbjax.data import from_arrays
        >>> data = from_arrays({"x": np.arange(6)}, batch_size=2)
        >>> epoch = [data.batch(replica=3, step=step)["x"] for step in range(3)]
        >>> np.sort(np.concatenate(epoch))
        array([0, 1, 2, 3, 4, 5])
    """
    return ArrayData(
        arrays, batch_size, seed=seed, subsets=subsets, portion_size=portion_size
    )


def _read_only(view: np.ndarray) -> np.ndarray:
    """Protect the user's arrays from whoever gets this view."""
    view.flags.writeable = False
    return view


def _shared_length(arrays: Batch) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if not leaves:
        raise ValueError("arrays has no leaves: give a pytree of arrays")
    lengths = {}
    for path, leaf in leaves:
        if leaf.ndim == 0:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"arrays{name} is a scalar: axis 0 must be the examples")
        lengths[jax.tree_util.keystr(path)] = len(leaf)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arrays differ in their number of examples: {lengths}")
    return len(leaves[0][1])
