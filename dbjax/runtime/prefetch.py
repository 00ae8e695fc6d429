"""Reading ahead: minibatches are made in threads before they are asked for.

As a batch is a pure function of (seed, replica, step), reading ahead changes when it is
made and nothing else: a run gives the same bits without it, and needs nothing saved to
go on.
"""

import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dbjax.data import checks
from dbjax.typing import Batch, Data


class Prefetched:
    """Data whose next batches are already being made; see `prefetch`."""

    def __init__(self, data: Data, ahead: int, threads: int, most: int):
        """See `prefetch`."""
        if not callable(getattr(data, "batch", None)) or hasattr(data, "start"):
            raise TypeError(
                f"data is a {type(data).__name__}: allowed is what gives a batch for "
                "any replica and step, as from_source does; iterators read ahead by "
                "themselves"
            )
        self.data = data
        self.ahead = checks.positive("ahead", ahead)
        self.threads = checks.positive("threads", threads)
        self.most = checks.positive("most", most)
        self._lock = threading.Lock()
        # Of each replica, step -> the batch to come.
        self._coming: dict[int, dict[int, Future[Batch]]] = {}
        self._pool = ThreadPoolExecutor(self.threads, "dbjax-prefetch")
        # When nobody holds the data any more, nothing else is begun.
        self.close = weakref.finalize(
            self, self._pool.shutdown, wait=False, cancel_futures=True
        )

    def __reduce__(self) -> Any:
        """Pickle what made it: batches to come, and threads, stay behind."""
        return Prefetched, (self.data, self.ahead, self.threads, self.most)

    def batch(self, replica: int, step: int) -> Batch:
        """Give a minibatch, and begin with those that follow it.

        Args:
            replica: from 0.
            step: from 0; any, though those that follow each other are ready sooner.

        Returns:
            What `data.batch(replica, step)` gives.
        """
        replica, step = checks.natural("replica", replica), checks.natural("step", step)
        with self._lock:
            mine = self._coming.setdefault(replica, {})
            ready = mine.pop(step, None)
            for other in [s for s in mine if not step < s <= step + self.ahead]:
                mine.pop(other).cancel()
            if self.close.alive:
                self._begin(mine, replica, range(step + 1, step + self.ahead + 1))
        return self.data.batch(replica, step) if ready is None else ready.result()

    def _begin(
        self, mine: dict[int, Future[Batch]], replica: int, steps: range
    ) -> None:
        room = self.most - sum(map(len, self._coming.values()))
        for step in [s for s in steps if s not in mine][: max(0, room)]:
            # Not a method of this object: a thread must not keep it alive.
            mine[step] = self._pool.submit(self.data.batch, replica, step)


def prefetch(
    data: Data, *, ahead: int = 2, threads: int = 2, most: int = 64
) -> Prefetched:
    """Read ahead in threads, for data that takes time to read or to decode.

    Args:
        data: gives a batch for any replica and step, from any thread.
        ahead: minibatches that are made before a replica asks for them.
        threads: that make them.
        most: minibatches that wait to be asked for, of all replicas together. Where
          replicas are more, those beyond read theirs when they ask.

    Returns:
        The same data; `close()` stops the threads, and it serves without them.

    Raises:
        TypeError: `data` reads forwards only, or is no data.
        ValueError: a number is below 1.

    Examples:
        >>> import numpy as np, dbjax
        >>> data = dbjax.from_arrays({"x": np.arange(6)}, batch_size=2)
        >>> ahead = prefetch(data)
        >>> bool((ahead.batch(0, 1)["x"] == data.batch(0, 1)["x"]).all())
        True
    """
    return Prefetched(data, ahead, threads, most)
