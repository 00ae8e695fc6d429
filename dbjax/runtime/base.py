"""What a runtime is given: a program, that is an actor, its periods and its desk."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Requests(NamedTuple):
    """The words in which an actor asks, as its state's `asked`.

    Attributes:
      ticket: may I take another minibatch?
      fetch: all shards' parameters.
      compute: the gradient of a minibatch.
      push: the accrued gradients.
      stop: nothing more.
    """

    ticket: str
    fetch: str
    compute: str
    push: str
    stop: str


class Program(NamedTuple):
    """An algorithm, ready to be run once; runtimes know no more of it than this.

    Attributes:
      begin: `(state) -> state`, the state in which a replica starts, or starts again.
      advance: `(state, periods, ticket=None) -> state`, after a request is served.
      state: the state before the beginning.
      periods: of each replica, given to `advance`; with `overlap` a fetch is not
        awaited.
      tickets: the desk, used up by one run.
      wait: the desk's answer that means: ask again later.
      requests: the actor's words.
      replicas: the number of replicas.
      shards: the number of shards.
    """

    begin: Callable[[Any], Any]
    advance: Callable[..., Any]
    state: Any
    periods: Sequence[Any]
    tickets: Any
    wait: int
    requests: Requests
    replicas: int
    shards: int


MOST_REJECTED = 100
"""So many pushes in a row that are not finite, whoever sends them, end a run."""


class RejectedTooOften(RuntimeError):
    """Training has come apart: no push is finite any more.

    Args:
      times: pushes in a row that were not finite.
      replica: who sent the last of them.
      step: the newest ticket in it.
    """

    def __init__(self, times: int, replica: int, step: int) -> None:
        super().__init__(
            f"{times} pushes in a row were not finite, the last by replica {replica} "
            f"at step {step}: lower the learning rate"
        )
