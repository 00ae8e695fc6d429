"""Keyed draws: a counter-based hash in place of a generator with a state.

The same key gives the same number in every process, block and order of asking.
"""

import enum
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the odd increments keep neighbouring keys apart
_SILVER = 0xD1342543DE82EF95
_BLOCK = 1 << 15  # elements worked on at a time: 256 KiB stay in the cache


class Purpose(enum.IntEnum):
    """What a draw is for; different purposes are independent streams."""

    COMPUTE = 1
    SPEED = 2
    SLOW = 3
    SLOWNESS = 4
    LATENCY_TO = 5
    LATENCY_BACK = 6
    SERVICE = 7
    JOIN = 8
    UPTIME = 9
    DOWNTIME = 10


def _mix(bits: np.ndarray) -> np.ndarray:
    """Scramble `bits` in place with the finaliser of splitmix64."""
    shifted = bits >> np.uint64(30)
    bits ^= shifted
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(bits, np.uint64(27), out=shifted)
    bits ^= shifted
    bits *= np.uint64(0x94D049BB133111EB)
    np.right_shift(bits, np.uint64(31), out=shifted)
    bits ^= shifted
    return bits


def _counter(values: ArrayLike, increment: int) -> np.ndarray:
    """Spread integers over the 64-bit words: `(values + 1) * increment`."""
    counter = np.array(values, dtype=np.int64, ndmin=1).astype(np.uint64)
    counter += np.uint64(1)
    counter *= np.uint64(increment)
    return counter


def draw(
    quantile: Callable[[np.ndarray], np.ndarray],
    seed: int,
    purpose: int,
    replica: ArrayLike,
    step: ArrayLike,
    shard: ArrayLike = 0,
) -> np.ndarray:
    """Draw from a distribution: its inverse CDF at uniforms hashed from the key.

    Args:
      quantile: the inverse CDF, elementwise on an array within (0, 1).
      seed: the seed of the run, an integer of at least 0.
      purpose: what the draw is for, see `Purpose`.
      replica: integers of at least 0, as are `step` and `shard`; the three broadcast.
      step: the step of that replica.
      shard: the shard.

    Returns:
      A new float64 array of the broadcast shape.

    >>> lines = draw(np.log, 0, Purpose.COMPUTE, np.arange(2)[:, None], np.arange(100))
    >>> one = draw(np.log, 0, Purpose.COMPUTE, 1, 70)
    >>> bool(one[()] == lines[1, 70])
    True
    """
    shape = np.broadcast_shapes(np.shape(replica), np.shape(step), np.shape(shard))
    word = (int(seed) * _SILVER + int(purpose) * _GOLDEN) & _WORD
    key = _mix(np.array([word], dtype=np.uint64))
    key = _mix(key + _counter(replica, _GOLDEN))
    key = _mix(key + _counter(shard, _SILVER))
    # Only this last sum has the full shape: the step is mixed in block by block,
    # and each block's draws take the place of its bits.
    bits = np.ascontiguousarray(key + _counter(step, _GOLDEN)).reshape(-1)
    draws = bits.view(np.float64)
    for begin in range(0, bits.size, _BLOCK):
        block = _mix(bits[begin : begin + _BLOCK])
        # 52 bits and a half: never 0, and 1 - 2**-53 at most.
        uniforms = (block >> np.uint64(12)).astype(np.float64)
        uniforms += 0.5
        uniforms *= 2.0**-52
        draws[begin : begin + _BLOCK] = quantile(uniforms)
    return draws.reshape(shape)


def uniform(
    seed: int,
    purpose: int,
    replica: ArrayLike,
    step: ArrayLike,
    shard: ArrayLike = 0,
) -> np.ndarray:
    """Draw uniforms in the open interval (0, 1); the arguments are those of `draw`."""
    return draw(lambda uniforms: uniforms, seed, purpose, replica, step, shard)
