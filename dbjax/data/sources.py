"""Examples that are read when asked for: a source is indexed, and has no state.

As with arrays in memory, a batch is a pure function of (seed, replica, step), so a run
that goes on, or is replayed, finds the same batches without anything saved. The order
of the examples is computed, not kept (`shuffle`), as there may be very many.
"""

import operator
from typing import Protocol

import numpy as np

from dbjax.data import checks
from dbjax.data.shuffle import KEYS, shuffle
from dbjax.typing import Batch

_SUBSETS_KEY = 2**64 - 1  # the Philox stream of the split; no replica has this index


class Source(Protocol):
    """What is indexed like an array: the same rows, the same batch, everywhere."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, rows: np.ndarray) -> Batch:
        """Read the examples `rows`, `[B]` integers, as one batch."""
        ...


class SourceData:
    """Minibatches and portions of a source; made by `from_source`.

    A replica's stream is its own seeded orders of its examples, laid end to end and cut
    into batches, so within an epoch no example is dropped or doubled. Pickles, if its
    source does, and is as safe to use from several threads.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        subsets: int | None = None,
        portion_size: int | None = None,
    ):
        """See `from_source`."""
        self.source, self.num_examples = source, len(source)
        self.batch_size, self.seed, self.subsets, self.portion_size = checks.sizes(
            self.num_examples, batch_size, seed, subsets, portion_size
        )

    def batch(self, replica: int, step: int) -> Batch:
        """Give the `step`-th minibatch of `replica`'s own stream.

        Args:
            replica: from 0; any number of them.
            step: from 0, counted by each replica for itself.

        Returns:
            What the source reads: a pytree with leaves `[B, ...]`.
        """
        replica, step = checks.natural("replica", replica), checks.natural("step", step)
        return self.source[self._rows(replica, step)]

    @property
    def num_portions(self) -> int:
        """How many portions the examples make; the last one may be short."""
        return -(-self.num_examples // self.portion_size)

    def portion(self, i: int) -> Batch:
        """Read the `i`-th contiguous slice of all examples.

        Args:
            i: from 0 to `num_portions - 1`.

        Returns:
            A pytree with leaves `[portion_size, ...]`; the last may be short.

        Raises:
            IndexError: there is no such portion.
        """
        if not 0 <= operator.index(i) < self.num_portions:
            raise IndexError(f"portion {i}: allowed are 0 to {self.num_portions - 1}")
        start = i * self.portion_size
        end = min(start + self.portion_size, self.num_examples)
        return self.source[np.arange(start, end)]

    def _rows(self, replica: int, step: int) -> np.ndarray:
        """Which examples make the batch `[B]`; it may run over the end of an epoch."""
        subset, total = replica % self.subsets, self.num_examples
        begin, end = (total * (subset + i) // self.subsets for i in range(2))
        count = end - begin
        epoch, start = divmod(step * self.batch_size, count)
        index = np.arange(start, start + self.batch_size)
        parts = [
            shuffle(part - turn * count, count, self._keys(replica, epoch + turn))
            for turn, part in enumerate((index[index < count], index[index >= count]))
            if part.size
        ]
        rows = np.concatenate(parts)
        if self.subsets == 1:
            return rows
        return shuffle(rows + begin, total, self._keys(_SUBSETS_KEY, 0))

    def _keys(self, stream: int, epoch: int) -> np.ndarray:
        bits = np.random.Philox(
            key=np.array([self.seed, stream], np.uint64),
            counter=np.array([0, 0, 0, epoch], np.uint64),
        )
        return bits.random_raw(KEYS)


def from_source(
    source: Source,
    batch_size: int,
    *,
    seed: int = 0,
    subsets: int | None = None,
    portion_size: int | None = None,
) -> SourceData:
    """Serve minibatches and portions of examples that are read when asked for.

    Args:
        source: `len(source)` examples; `source[rows]` reads those of the integers
          `rows` `[B]` as one batch. It must not change.
        batch_size: `B`, at most the examples of the smallest subset.
        seed: of the orders; each replica has its own.
        subsets: cut the examples into so many disjoint subsets, equal to one example;
          replica `r` draws from subset `r % subsets` (the paper's way). By default
          every replica draws from all examples.
        portion_size: examples per portion, by default `batch_size`.

    Returns:
        A `SourceData`.

    Raises:
        ValueError: a size is not allowed.

    Examples:
        >>> import numpy as np
        >>> from dbjax.data import from_source
        >>> class Squares:
        ...     def __len__(self):
        ...         return 6
        ...     def __getitem__(self, rows):
        ...         return {"x": rows**2}
        >>> data = from_source(Squares(), batch_size=2)
        >>> epoch = [data.batch(replica=3, step=step)["x"] for step in range(3)]
        >>> np.sort(np.concatenate(epoch))
        array([ 0,  1,  4,  9, 16, 25])
    """
    return SourceData(
        source, batch_size, seed=seed, subsets=subsets, portion_size=portion_size
    )
