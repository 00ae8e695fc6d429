"""The plain arguments of a Downpour run, checked before anything runs."""

import operator
import os
import pathlib
from typing import Any, NamedTuple

from dbjax.downpour.protocol import Protocol
from dbjax.typing import EvalFn


class Arguments(NamedTuple):
    """What `train` was asked for, apart from the problem and the runtime."""

    replicas: int
    shards: int
    steps: int
    n_fetch: int
    n_push: int
    overlap: bool
    warmstart_steps: int
    protocol: Protocol
    eval_fn: EvalFn | None
    eval_every: int | None
    checkpoint_dir: pathlib.Path | None
    checkpoint_every: int | None

    def describe(self) -> dict[str, Any]:
        """Those that make a run what it is, JSON-able."""
        return {
            "replicas": self.replicas,
            "shards": self.shards,
            "steps": self.steps,
            "n_fetch": self.n_fetch,
            "n_push": self.n_push,
            "overlap": self.overlap,
            "warmstart_steps": self.warmstart_steps,
            "protocol": self.protocol.name,
        }


def whole(name: str, value: Any, least: int) -> int:
    """Check that an argument is an integer of at least `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be an integer of at least {least}; got {value!r}."
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}.")
    return number


def check_arguments(**given: Any) -> Arguments:
    """Check and complete the arguments.

    Raises:
      ValueError: naming the argument, its value, and what is allowed.
    """
    for name in ("replicas", "shards", "steps", "n_fetch", "n_push"):
        given[name] = whole(name, given[name], 1)
    given["warmstart_steps"] = whole("warmstart_steps", given["warmstart_steps"], 0)
    for name in ("eval_every", "checkpoint_every"):
        if given[name] is not None:
            given[name] = whole(name, given[name], 1)
    if not isinstance(given["overlap"], bool):
        raise ValueError(f"overlap must be True or False; got {given['overlap']!r}.")
    if not isinstance(given["protocol"], Protocol):
        raise ValueError(
            f"protocol must be a Protocol, say asynchronous(); got "
            f"{given['protocol']!r}."
        )
    if given["eval_fn"] is not None and not callable(given["eval_fn"]):
        raise ValueError(f"eval_fn must be a function; got {given['eval_fn']!r}.")
    if given["checkpoint_every"] is None:
        given["checkpoint_every"] = max(1, given["steps"] // 10)
    if given["checkpoint_dir"] is not None:
        if not isinstance(given["checkpoint_dir"], str | os.PathLike):
            raise ValueError(
                f"checkpoint_dir must be a path; got {given['checkpoint_dir']!r}."
            )
        given["checkpoint_dir"] = pathlib.Path(given["checkpoint_dir"])
    return Arguments(**given)
