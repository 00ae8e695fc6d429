"""A random order of very many numbers, computed where it is asked for.

A table of 16 million numbers for each replica and epoch is megabytes to keep and a
second to make. A Feistel network needs neither: it scrambles the halves of a number's
bits with each other, which can be undone, so no two numbers meet; what leaves the range
is scrambled again until it is back.
"""

import numpy as np

_ROUNDS = 6
KEYS = _ROUNDS  # how many 64-bit keys make an order


def shuffle(index: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Say which numbers stand at `index` in an order of `0 .. count - 1`.

    Args:
        index: `[B]` integers below `count`.
        count: how many numbers are in order, from 1.
        keys: `[KEYS]` unsigned 64-bit numbers; each choice is an order of its own.

    Returns:
        `[B]` integers below `count`; different ones for different `index`.

    Examples:
        >>> keys = np.random.Philox(0).random_raw(KEYS)
        >>> sorted(shuffle(np.arange(7), 7, keys).tolist())
        [0, 1, 2, 3, 4, 5, 6]
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    numbers = _scramble(np.asarray(index, np.uint64), half, keys)
    while (outside := numbers >= count).any():
        numbers[outside] = _scramble(numbers[outside], half, keys)
    return numbers.astype(np.int64)


def _scramble(numbers: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """Permute the numbers of `2 * half` bits."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = numbers >> shift, numbers & mask
    for key in keys.astype(np.uint64):
        left, right = right, left ^ (_hash(right ^ key) & mask)
    return (left << shift) | right


def _hash(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits, as the generator SplitMix64 does at its end."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
