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


def _integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r}: allowed are integers")
    return operator.index(value)
