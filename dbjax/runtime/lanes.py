"""Independent pieces of work, spread over this machine's cores and devices."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

T = TypeVar("T")
U = TypeVar("U")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spread(work: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """Apply `work` to each item, several at a time, item `i` on device `i mod devices`.

    On CPU a small program keeps one core busy, and XLA runs one program at a time per
    calling thread: so there is a thread a core. `work` must not use collectives.

    Args:
      work: called as `work(item)`, in any order.
      items: the arguments.

    Returns:
      The results, in the items' order.

    >>> spread(lambda x: x * x, [1, 2, 3])
    [1, 4, 9]
    """
    devices = jax.local_devices()
    threads = len(devices)
    if devices[0].platform == "cpu":
        threads = max(threads, cores())

    def one(index: int) -> U:
        with jax.default_device(devices[index % len(devices)]):
            return jax.block_until_ready(work(items[index]))

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(len(items))))
