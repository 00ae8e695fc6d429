"""Sums and comparisons within the rows of equal keys, a whole column at a time."""

import numpy as np

Keys = tuple[np.ndarray, ...]


def combine(keys: Keys) -> np.ndarray:
    """One int64 per row, `[n]`, equal where all keys are equal."""
    result = np.zeros(len(keys[0]), np.int64)
    if not len(result):
        return result
    most = 0
    for key in keys:
        low, high = int(key.min()), int(key.max())
        width = high - low + 1
        if (most + 1) * width > np.iinfo(np.int64).max:  # too wide: number what occurs
            result = np.unique(result, return_inverse=True)[1].astype(np.int64)
            distinct, key = np.unique(key, return_inverse=True)
            low, width, most = 0, len(distinct), int(result.max())
        result = result * width + (key.astype(np.int64) - low)
        most = (most + 1) * width - 1
    return result


def groups(keys: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by key, stably, and where a new key begins, both `[n]`."""
    key = combine(keys)
    if key.max(initial=0) < 2**16:
        key = key.astype(np.uint16)  # numpy sorts these in linear time
    order = np.argsort(key, kind="stable")
    key = key[order]
    begins = np.ones(len(key), bool)
    begins[1:] = key[1:] != key[:-1]
    return order, begins


def first(keys: Keys) -> np.ndarray:
    """Marks the first row of each group; bool `[n]`.

    >>> first((np.array([7, 8, 7]),))
    array([ True,  True, False])
    """
    order, begins = groups(keys)
    result = np.empty(len(order), bool)
    result[order] = begins
    return result


def running_sum(keys: Keys, values: np.ndarray) -> np.ndarray:
    """Sums `values` `[n]` up to and with each row, within its group; int64 `[n]`.

    >>> running_sum((np.array([7, 8, 7]),), np.array([1, 10, 2]))
    array([ 1, 10,  3])
    """
    order, begins = groups(keys)
    values = values[order].astype(np.int64)
    total = np.cumsum(values)
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    result = np.empty_like(total)
    result[order] = total - (total - values)[first]
    return result


def not_rising(keys: Keys, values: np.ndarray, least: int) -> np.ndarray:
    """Marks rows less than `least` above the row before in the group; bool `[n]`.

    >>> not_rising((np.array([7, 8, 7]),), np.array([4, 0, 4]), least=1)
    array([False, False,  True])
    """
    order, begins = groups(keys)
    result = np.zeros(len(order), bool)
    result[order[1:]] = (np.diff(values[order]) < least) & ~begins[1:]
    return result
