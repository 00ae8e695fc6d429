"""What is allowed as a size, a replica or a step."""

import operator
from collections.abc import Sequence

import numpy as np


def pairs(
    replicas: Sequence[int] | np.ndarray, steps: Sequence[int] | np.ndarray
) -> list[tuple[int, int]]:
    """Check two integer arrays of one length and pair them as Python ints.

    >>> pairs(np.array([0, 1]), [4, 5])
    [(0, 4), (1, 5)]
    """
    r, s = np.asarray(replicas), np.asarray(steps)
    if r.ndim != 1 or r.shape != s.shape:
        raise ValueError(
            f"replicas and steps have shapes {r.shape} and {s.shape}: allowed are two "
            "1-d arrays of one length"
        )
    if r.size and min(r.min(), s.min()) < 0:
        raise ValueError("replicas and steps must not be negative")
    return list(zip(r.tolist(), s.tolist(), strict=True))


def positive(name: str, value: int) -> int:
    """Give `value` as an int, or say that it must be at least 1."""
    if _integer(name, value) < 1:
        raise ValueError(f"{name}={value}: allowed are integers from 1")
    return int(value)


def natural(name: str, value: int) -> int:
    """Give `value` as an int, or say that it must not be negative."""
    if _integer(name, value) < 0:
        raise ValueError(f"{name}={value}: allowed are integers from 0")
    return int(value)


def sizes(
    num_examples: int,
    batch_size: int,
    seed: int,
    subsets: int | None,
    portion_size: int | None,
) -> tuple[int, int, int, int]:
    """Check how examples are to be drawn, see `from_arrays`.

    Returns:
        `batch_size`, `seed`, `subsets` and `portion_size`, defaults filled in.

    >>> sizes(10, 2, 0, None, None)
    (2, 0, 1, 2)
    """
    batch_size = positive("batch_size", batch_size)
    subsets = 1 if subsets is None else positive("subsets", subsets)
    if portion_size is None:
        portion_size = batch_size
    portion_size, seed = positive("portion_size", portion_size), operator.index(seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: allowed are integers from 0 to 2**64 - 1")
    smallest = num_examples // subsets
    if batch_size > smallest:
        raise ValueError(
            f"batch_size={batch_size}: a batch must fit in the examples it is drawn "
            f"from; {num_examples} examples in {subsets} subset(s) leave {smallest}"
        )
    return batch_size, seed, subsets, portion_size


def _integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r}: allowed are integers")
    return operator.index(value)
