"""Batches from any loader: one iterator per replica, read forwards."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dbjax.data import checks
from dbjax.typing import Batch


class IteratorData:
    """One iterator per replica, read forwards; made by `from_iterators`.

    An iterator is made when its replica first asks. Different replicas may be served
    from different threads; one replica must not ask from two at a time.
    """

    def __init__(self, make: Callable[[int, int], Iterable[Batch]]):
        """See `from_iterators`."""
        if not callable(make):
            raise TypeError(
                f"make={make!r}: allowed is a function (replica, replicas) -> iterator"
            )
        self._make = make
        self._replicas = 0
        self._streams: dict[int, _Stream] = {}

    def start(self, replicas: int) -> None:
        """Begin every replica's stream anew, for a run of so many `replicas`."""
        self._replicas = checks.positive("replicas", replicas)
        self._streams = {}

    def batch(self, replica: int, step: int) -> Batch:
        """Advance `replica`'s iterator to its batch number `step` and give that.

        Args:
            replica: below the `replicas` that were started.
            step: from 0; that of the newest batch, or a later one.

        Returns:
            The batch; arrays but JAX's are copied, as a loader may write over them.

        Raises:
            ValueError: `step` lies behind the newest batch (that one may be asked for
              again), the iterator ended, or `replica` is not one of those started.
        """
        replica, step = checks.natural("replica", replica), checks.natural("step", step)
        if not self._replicas:
            raise ValueError("call start(replicas) before the first batch")
        if replica >= self._replicas:
            raise ValueError(
                f"replica={replica}: start({self._replicas}) allows 0 to "
                f"{self._replicas - 1}"
            )
        return self._stream(replica).advance(step)

    def get_state(self) -> dict[str, Any]:
        """Say where every stream stands; JSON-able when the iterators' states are."""
        return {
            "replicas": self._replicas,
            "streams": {str(r): s.get_state() for r, s in self._streams.items()},
        }

    def state_after(self, counts: Sequence[int]) -> dict[str, Any] | None:
        """Give `get_state` for a checkpoint in which so many batches have been used.

        Args:
            counts: batches used, by replica.

        Returns:
            The state; None where an iterator has been read further than that, or its
            state is not JSON-able: who resumes then reads again from the beginning.
        """
        state = self.get_state()
        read = {int(r): stream["count"] for r, stream in state["streams"].items()}
        if any(read.get(r, 0) != count for r, count in enumerate(counts)):
            return None
        try:
            json.dumps(state)
        except (TypeError, ValueError):
            return None
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to where `get_state` was called, with fresh iterators.

        An iterator with its own `get_state` and `set_state` (grain's have them) is
        set; any other is replayed from its beginning, which it must repeat.

        Args:
            state: what `get_state` gave.
        """
        self.start(state["replicas"])
        for replica, saved in state["streams"].items():
            self._stream(int(replica)).set_state(saved)

    def _stream(self, replica: int) -> "_Stream":
        if replica not in self._streams:
            made = self._make(replica, self._replicas)
            self._streams[replica] = _Stream(replica, made)
        return self._streams[replica]


class _Stream:
    """One replica's iterator, how many batches it gave, and the newest of them."""

    def __init__(self, replica: int, made: Iterable[Batch]):
        self._replica = replica
        self._iterator: Iterator[Batch] = iter(made)
        self._count = 0
        self._newest: Batch = None
        self._holds_newest = False

    def advance(self, step: int) -> Batch:
        while self._count <= step:
            self._next(step)
        if step < self._count - 1 or not self._holds_newest:
            raise ValueError(
                f"replica {self._replica} asked for its batch {step}, but its iterator "
                f"stands at {self._count} and reads forwards only"
            )
        return self._newest

    def _next(self, step: int) -> None:
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"the iterator of replica {self._replica} ended after {self._count} "
                f"batches, before step {step}: make it endless, or ask for fewer steps"
            ) from None
        self._newest = jax.tree.map(_own, batch)
        self._count += 1
        self._holds_newest = True

    def get_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"count": self._count}
        if hasattr(self._iterator, "get_state"):
            own = self._iterator.get_state()
            if isinstance(own, bytes):  # grain's DataLoader
                state["bytes"] = base64.b64encode(own).decode()
            else:
                state["own"] = own
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        if "bytes" in state:
            self._iterator.set_state(base64.b64decode(state["bytes"]))  # type: ignore[attr-defined]
        elif "own" in state:
            self._iterator.set_state(state["own"])  # type: ignore[attr-defined]
        elif state["count"]:
            self.advance(state["count"] - 1)
        self._count = state["count"]


def from_iterators(make: Callable[[int, int], Iterable[Batch]]) -> IteratorData:
    """Serve minibatches from any loader, one iterator per replica.

    Args:
        make: `make(replica, replicas)` gives the replica's iterator over batches. The
          states of iterators that have `get_state` and `set_state` are honoured.

    Returns:
        An `IteratorData`; a run starts it with the number of its replicas.

    Raises:
        TypeError: `make` is not a function.

    Examples:
        >>> import itertools
        >>> from dbjax.data import from_iterators
        >>> data = from_iterators(lambda r, replicas: itertools.count(r, replicas))
        >>> data.start(replicas=4)
        >>> int(data.batch(replica=1, step=2))
        9
    """
    return IteratorData(make)


def _own(leaf: Any) -> Any:
    """Copy what a loader may overwrite with its next batch."""
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)
