"""What `delays` may be, and which delays each leaf of the parameters gets from it."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from dbjax.trace import PUSH, TAKEN, Trace
from dbjax.typing import Array, Params

Schedule: TypeAlias = int | Sequence[int] | Array | Trace
# One for all leaves, a prefix tree of them, or a leaf's by its path.
Delays: TypeAlias = Schedule | Any | Callable[[str], int]


class LeafDelays(NamedTuple):
    """Delays that have been checked.

    Attributes:
        shared: int32 `[entries]`, if all leaves have the same; the last one holds.
        of: the delays of each leaf of a tree like the parameters, in their order.
    """

    shared: np.ndarray | None
    of: Callable[[Params], list[np.ndarray]]


def read_delays(delays: Delays, name: str = "delays") -> LeafDelays:
    """Check delays as early as can be.

    Args:
        delays: an int, an int array or a list of integers, one per step, or a Trace,
            for all leaves; or a prefix tree of those; or a function from a leaf's path.
        name: of the argument, for messages.

    Returns:
        The delays by leaf.

    Raises:
        TypeError: a delay is not made of integers, or is a tracer.
        ValueError: a delay is negative, there are none, or a Trace is not one delay per
            step; from `of` if they do not fit the parameters.

    Examples:
        >>> delays = read_delays({"deep": 2, "shallow": [0, 1]})
        >>> delays.of({"deep": (0.0, 0.0), "shallow": 0.0})
        [array([2], dtype=int32), array([2], dtype=int32), array([0, 1], dtype=int32)]
    """
    if callable(delays):
        return LeafDelays(None, lambda params: _by_path(delays, name, params))
    if _is_schedule(delays):
        shared = _schedule(delays, name)

        def same(params: Params) -> list[np.ndarray]:
            _check_meaning(delays, name, params)
            return [shared] * len(jax.tree.leaves(params))

        return LeafDelays(shared, same)

    def checked(path: Any, leaf: Any) -> np.ndarray:
        return _schedule(leaf, name + jax.tree_util.keystr(path))

    prefix = jax.tree_util.tree_map_with_path(checked, delays, is_leaf=_is_schedule)
    if not jax.tree.leaves(prefix):
        raise ValueError(f"{name}={delays!r} holds no delay: allowed is one per leaf")

    def spread(params: Params) -> list[np.ndarray]:
        try:
            return jax.tree.leaves(jax.tree.broadcast(prefix, params))
        except ValueError as error:
            raise ValueError(
                f"{name} must be a prefix of the parameters' tree, which has the "
                f"leaves {_paths(params)}: {error}"
            ) from None

    return LeafDelays(None, spread)


def _is_schedule(delays: Any) -> bool:
    """Whether this is one leaf's delays, of any type, and not a tree of delays."""
    if isinstance(delays, list | tuple) and not hasattr(delays, "_fields"):
        return all(
            isinstance(entry, numbers.Integral) or getattr(entry, "shape", 0) == ()
            for entry in delays
        )
    return delays is not None and jax.tree_util.all_leaves([delays])


def _check_meaning(delays: Any, name: str, params: Params) -> None:
    """Raise where a list could be one delay a step as well as one an entry."""
    lists = isinstance(delays, list | tuple) and type(delays) is type(params)
    if lists and len(delays) == len(params):
        raise ValueError(
            f"{name}={delays!r} may be one per step or one per entry of the "
            f"parameters, a {type(params).__name__} as long: give an int array for "
            "steps, a function from a leaf's path for leaves"
        )


def _by_path(
    delay_of: Callable[[str], int], name: str, params: Params
) -> list[np.ndarray]:
    return [_schedule(delay_of(path), f"{name}({path!r})") for path in _paths(params)]


def _paths(params: Params) -> list[str]:
    """Give the leaves' paths as rules have them, such as `layers/0/kernel`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def _schedule(delays: Any, name: str) -> np.ndarray:
    """Give the delays as int32 `[steps]`, one entry if they are constant."""
    if isinstance(delays, jax.core.Tracer):
        raise TypeError(f"{name} is a tracer: the largest delay must be known")
    if isinstance(delays, Trace):
        delays = _trace_delays(delays)
    schedule = np.asarray(delays)
    if not np.issubdtype(schedule.dtype, np.integer):
        raise TypeError(
            f"{name}={delays!r}: allowed are an int, an int array [steps], a Trace, or "
            "a tree of these"
        )
    if not schedule.ndim:
        if schedule < 0:
            raise ValueError(f"{name}={schedule}: allowed are integers from 0")
    elif schedule.ndim != 1 or not schedule.size:
        raise ValueError(
            f"{name} has shape {schedule.shape}: allowed is one entry per step"
        )
    elif schedule.min() < 0:
        step = int(schedule.argmin())
        raise ValueError(
            f"{name}[{step}]={schedule[step]}: allowed are integers from 0"
        )
    if schedule.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{name}={delays!r}: allowed is what fits an int32")
    return np.atleast_1d(schedule).astype(np.int32)


def _trace_delays(trace: Trace) -> np.ndarray:
    """Give the staleness of each push, if one delay per step tells the whole run."""
    pushes = trace.kind == PUSH
    if (trace.count[pushes] != 1).any() or (trace.status[pushes] != TAKEN).any():
        raise ValueError(
            "the Trace has pushes that sum several gradients or were not taken, which "
            "no delay per step describes: use dbjax.replay"
        )
    staleness = trace.staleness()
    unknown = (staleness < 0).any(axis=1)
    if unknown.any():
        push = int(unknown.argmax())
        raise ValueError(
            f"push {push} of the Trace did not reach a shard, or its base is not known"
        )
    differs = (staleness != staleness[:, :1]).any(axis=1)
    if differs.any():
        step = int(differs.argmax())
        raise ValueError(
            f"push {step} of the Trace is {staleness[step].tolist()} versions stale on "
            "its shards, which no delay per step describes: use dbjax.replay"
        )
    return staleness[:, 0]
