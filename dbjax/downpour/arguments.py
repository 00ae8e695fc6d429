"""The plain arguments of a Downpour run, checked before anything runs."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dbjax.downpour.protocol import Protocol
from dbjax.typing import EvalFn
from dbjax.whole import whole


class Arguments(NamedTuple):
    """What `train` was asked for, apart from the problem and the runtime.

    Attributes:
      replicas: number of model replicas.
      shards: number of shards of the parameter server.
      steps: minibatches processed by all replicas together.
      n_fetch: minibatches between a replica's fetches, of all or of each.
      n_push: minibatches between its pushes, likewise.
      overlap: whether both run beside the next minibatch.
      warmstart_steps: steps that replica 0 takes alone.
      protocol: who may go on, and whose push is taken.
      eval_fn: as for `train`, as are the following.
      eval_every: minibatches between evaluations.
      checkpoint_dir: where checkpoints are.
      checkpoint_every: minibatches between them.
    """

    replicas: int
    shards: int
    steps: int
    n_fetch: int | tuple[int, ...]
    n_push: int | tuple[int, ...]
    overlap: bool
    warmstart_steps: int
    protocol: Protocol
    eval_fn: EvalFn | None = None
    eval_every: int | None = None
    checkpoint_dir: pathlib.Path | None = None
    checkpoint_every: int | None = None

    def of_each(self, period: int | tuple[int, ...]) -> tuple[int, ...]:
        """Give `n_fetch` or `n_push` of each replica, `[R]`."""
        return (period,) * self.replicas if isinstance(period, int) else period

    def describe(self) -> dict[str, Any]:
        """Those that decide the order of a run, JSON-able."""
        return {
            "replicas": self.replicas,
            "shards": self.shards,
            "steps": self.steps,
            "n_fetch": _plain(self.n_fetch),
            "n_push": _plain(self.n_push),
            "overlap": self.overlap,
            "warmstart_steps": self.warmstart_steps,
            "protocol": self.protocol.name,
        }


def _plain(period: int | tuple[int, ...]) -> int | list[int]:
    return period if isinstance(period, int) else list(period)


def _period(name: str, value: Any, replicas: int) -> int | tuple[int, ...]:
    """Check a period, or those of all replicas; where all are the same it is one."""
    if not isinstance(value, Sequence | np.ndarray) or np.ndim(value) == 0:
        return whole(name, value, 1)
    if len(value) != replicas:
        raise ValueError(
            f"{name} must be one number, or one for each of the {replicas} replicas; "
            f"got {len(value)}."
        )
    each = tuple(whole(f"{name}[{r}]", one, 1) for r, one in enumerate(value))
    return each[0] if len(set(each)) == 1 else each


def check_arguments(**given: Any) -> Arguments:
    """Check and complete the arguments.

    Args:
      **given: the attributes of `Arguments`; those with a default may be left out.

    Returns:
      The arguments.

    Raises:
      ValueError: naming the argument, its value, and what is allowed.
    """
    for name in ("replicas", "shards", "steps"):
        given[name] = whole(name, given[name], 1)
    for name in ("n_fetch", "n_push"):
        given[name] = _period(name, given[name], given["replicas"])
    given["warmstart_steps"] = whole("warmstart_steps", given["warmstart_steps"], 0)
    for name in ("eval_every", "checkpoint_every"):
        if given.get(name) is not None:
            given[name] = whole(name, given[name], 1)
    if not isinstance(given["overlap"], bool):
        raise ValueError(f"overlap must be True or False; got {given['overlap']!r}.")
    if not isinstance(given["protocol"], Protocol):
        raise ValueError(
            f"protocol must be a Protocol, say asynchronous(); got "
            f"{given['protocol']!r}."
        )
    if given["protocol"].by_push and given["n_push"] != 1:
        raise ValueError(
            f"n_push must be 1 where the protocol is {given['protocol'].name}; got "
            f"{given['n_push']}."
        )
    if given["protocol"].by_push and given["overlap"]:
        raise ValueError(
            f"overlap must be False where the protocol is {given['protocol'].name}."
        )
    eval_fn, directory = given.get("eval_fn"), given.get("checkpoint_dir")
    if eval_fn is not None and not callable(eval_fn):
        raise ValueError(f"eval_fn must be a function; got {eval_fn!r}.")
    if given.get("checkpoint_every") is None:
        given["checkpoint_every"] = max(1, given["steps"] // 10)
    if directory is not None:
        if not isinstance(directory, str | os.PathLike):
            raise ValueError(f"checkpoint_dir must be a path; got {directory!r}.")
        given["checkpoint_dir"] = pathlib.Path(directory)
    return Arguments(**given)
