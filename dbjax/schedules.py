"""Schedules of delays: how old the parameters of each step's gradient are.

Each is an int array `[steps]` with `0 <= delays[t] <= t`, for `dbjax.stale`,
`dbjax.delay_gradients` and `dbjax.Trace.from_delays`; `per_stage` has a column a stage,
and `pipeline` a delay for each leaf. Letters: `t` a step, counted from 0.
"""

import heapq
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np

from dbjax.whole import whole


def constant(steps: int, delay: int) -> np.ndarray:
    r"""Every gradient is equally late, as where replicas take turns.

    .. math::
      \tau(t) = \min(t, \text{delay})

    Args:
      steps: how many, at least 1.
      delay: steps, at least 0.

    Returns:
      Delays, int64 `[steps]`.

    Raises:
      ValueError: an argument is not allowed; named.

    Source: Zinkevich, Smola and Langford 2009 (Slow learners are fast), round robin.

    >>> constant(6, 2)
    array([0, 1, 2, 2, 2, 2])
    """
    whole("delay", delay, 0)
    return _possible(np.full(whole("steps", steps, 1), delay))


def cyclic(steps: int, period: int) -> np.ndarray:
    r"""One version serves for `period` steps, then the newest one does.

    .. math::
      \tau(t) = t \bmod \text{period}

    With SGD, and a number of steps that `period` divides, these are steps on the sums
    of `period` gradients each.

    Args:
      steps: how many, at least 1.
      period: steps on one version, at least 1.

    Returns:
      Delays, int64 `[steps]`.

    Raises:
      ValueError: an argument is not allowed; named.

    >>> cyclic(6, 3)
    array([0, 1, 2, 0, 1, 2])
    """
    return np.arange(whole("steps", steps, 1)) % whole("period", period, 1)


def bursts(steps: int, delay: int, every: int, length: int = 1) -> np.ndarray:
    """Replicas are silent, and then push what they computed long ago, all at once.

    Of each `every` steps the last `length` are `delay` late, the others fresh.

    Args:
      steps: how many, at least 1.
      delay: of those that are late, at least 0.
      every: steps from one burst to the next, at least 1.
      length: pushes in a burst, from 0 to `every`.

    Returns:
      Delays, int64 `[steps]`.

    Raises:
      ValueError: an argument is not allowed; named.

    >>> bursts(8, delay=3, every=4, length=2)
    array([0, 0, 2, 3, 0, 0, 3, 3])
    """
    whole("delay", delay, 0)
    whole("every", every, 1)
    if not 0 <= operator.index(length) <= every:
        raise ValueError(f"length={length}: allowed are integers from 0 to {every}")
    late = np.arange(whole("steps", steps, 1)) % every >= every - length
    return _possible(np.where(late, delay, 0))


def straggler(steps: int, delay: int) -> np.ndarray:
    """One replica is always `delay` late, while all others are fresh.

    It pushes as often as one that computes a gradient at a time can. Most gradients are
    fresh, and still the largest delay bounds a constant learning rate: the case that
    tells methods apart that go by the mean delay from those that go by the largest.

    Args:
      steps: how many, at least 1.
      delay: the slow replica's, at least 0.

    Returns:
      Delays, int64 `[steps]`.

    Raises:
      ValueError: an argument is not allowed; named.

    Source: Koloskova, Stich and Jaggi 2022 (arXiv 2206.08307) and Mishchenko and others
    2022 (arXiv 2206.07638) set mean against largest delay; cited from memory.

    >>> straggler(9, 3)
    array([0, 0, 0, 3, 0, 0, 0, 3, 0])
    """
    return bursts(steps, delay, whole("delay", delay, 0) + 1)


def growing(steps: int, fraction: float, most: int) -> np.ndarray:
    r"""Delays that grow with time up to a bound.

    .. math::
      \tau(t) = \min(\lfloor \text{fraction} \cdot t \rfloor, \text{most})

    Args:
      steps: how many, at least 1.
      fraction: of the time, from 0 to 1.
      most: the bound, at least 0.

    Returns:
      Delays, int64 `[steps]`.

    Raises:
      ValueError: an argument is not allowed; named.

    Source: Zhou and others 2018 (ICML, Distributed asynchronous optimization with
    unbounded delays: how slow can you go?) let delays grow with time; from memory.

    >>> growing(9, 0.5, 3)
    array([0, 0, 1, 1, 2, 2, 3, 3, 3])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction}: allowed are numbers from 0 to 1")
    grown = np.floor(fraction * np.arange(whole("steps", steps, 1)))
    return _possible(np.minimum(grown.astype(np.int64), whole("most", most, 0)))


def geometric(steps: int, mean: float, seed: int) -> np.ndarray:
    r"""Random delays, independent and of a geometric distribution.

    .. math::
      P(\tau = k) = (1 - p)^k p, \qquad p = 1 / (1 + \text{mean})

    A draw above `t` is `t`, so that the mean is a little lower in the first steps. This
    is what a queue of replicas with exponential times makes.

    Args:
      steps: how many, at least 1.
      mean: of the delays, at least 0.
      seed: of the draws, at least 0.

    Returns:
      Delays, int64 `[steps]`.

    Raises:
      ValueError: an argument is not allowed; named.

    Source: the staleness of Mitliagkas and others 2016 (Asynchrony begets momentum).

    >>> geometric(10_000, mean=4.0, seed=0).mean().round(1)
    np.float64(4.0)
    """
    if not 0 <= mean < math.inf:
        raise ValueError(f"mean={mean}: allowed are finite numbers from 0")
    random = np.random.default_rng(whole("seed", seed, 0))
    draws = random.geometric(1 / (1 + mean), whole("steps", steps, 1))
    return _possible(draws - 1)


def worst_first(delays: Sequence[int] | np.ndarray) -> np.ndarray:
    """The same delays in another order: each step has the largest that it can have.

    No histogram and no mean tells the two apart; only the order does.

    Args:
      delays: int array `[steps]`, `0 <= delays[t] <= t`.

    Returns:
      Delays, int64 `[steps]`.

    Raises:
      ValueError: naming the step whose delay is not possible.

    >>> worst_first([0, 1, 0, 2, 0, 1])
    array([0, 1, 2, 1, 0, 0])
    """
    delays = np.asarray(delays)
    if delays.ndim != 1 or not delays.size or delays.dtype.kind not in "iu":
        raise ValueError(
            f"delays is {delays.dtype} of shape {delays.shape}: allowed is an int "
            "array [steps]"
        )
    wrong = (delays < 0) | (delays > np.arange(len(delays)))
    if wrong.any():
        step = int(wrong.argmax())
        raise ValueError(
            f"delays[{step}] is {delays[step]}: allowed are integers from 0 to {step}"
        )
    # As many delays up to t as there are steps up to t: there is always one to take.
    waiting = sorted(delays.tolist(), reverse=True)
    able: list[int] = []  # negative, as a heap gives the smallest
    taken = []
    for step in range(len(delays)):
        while waiting and waiting[-1] <= step:
            heapq.heappush(able, -waiting.pop())
        taken.append(-heapq.heappop(able))
    return np.array(taken, np.int64)


def per_stage(steps: int, stages: int) -> np.ndarray:
    r"""Delays of a pipeline's stages, of which each is a shard.

    .. math::
      \tau(t, r) = \min(t, \text{stages} - r - 1)

    for stage `r`, counted from the input: PipeDream's, where the backward pass uses the
    version of the forward pass. The first stage is
    the latest: its gradient has the longest way.

    Args:
      steps: how many, at least 1.
      stages: how many, at least 1.

    Returns:
      Delays, int64 `[steps, stages]`, for `dbjax.Trace.from_delays`.

    Raises:
      ValueError: an argument is not allowed; named.

    Source: Narayanan and others 2019 (PipeDream), weight stashing.

    >>> per_stage(4, 3)
    array([[0, 0, 0],
           [1, 1, 0],
           [2, 1, 0],
           [2, 1, 0]])
    """
    late = np.arange(whole("stages", stages, 1))[::-1]
    return np.minimum(late, np.arange(whole("steps", steps, 1))[:, None])


def pipeline(stages: int, rank_of: Callable[[str], int]) -> Callable[[str], int]:
    """Delays of the leaves of a model that is spread over a pipeline's stages.

    A leaf of stage `rank`, counted from the input, is `stages - rank - 1` steps late
    (PipeDream). With two buffered versions (PipeDream-2BW) each is 1 late: that is
    `dbjax.stale(optimizer, 1)`.

    Args:
      stages: how many, at least 1.
      rank_of: gives the stage of a leaf, from 0, by its path, such as `layers/0/w`.

    Returns:
      The delay of a leaf by its path, for `dbjax.stale` and `dbjax.delay_gradients`.

    Raises:
      ValueError: `stages` is not positive, or, when it is used, a rank is not allowed.

    Source: Narayanan and others 2019 (PipeDream) and 2021 (PipeDream-2BW).

    >>> delay = pipeline(3, lambda path: int(path.split("/")[0]))
    >>> delay("0/w"), delay("1/w"), delay("2/w")
    (2, 1, 0)
    """
    whole("stages", stages, 1)

    def delay(path: str) -> int:
        rank = operator.index(rank_of(path))
        if not 0 <= rank < stages:
            raise ValueError(
                f"rank_of({path!r}) is {rank}: allowed are integers from 0 to "
                f"{stages - 1}"
            )
        return stages - rank - 1

    return delay


def _possible(delays: np.ndarray) -> np.ndarray:
    """No gradient is older than its own step."""
    return np.minimum(delays, np.arange(len(delays)))
