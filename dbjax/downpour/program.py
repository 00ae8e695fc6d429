"""The Downpour program: actor, periods and ticket desk, ready for a runtime."""

from collections.abc import Sequence

from dbjax.downpour.protocol import Protocol
from dbjax.downpour.replica import (
    COMPUTE,
    FETCH,
    PUSH,
    STOP,
    TICKET,
    Periods,
    ReplicaState,
    advance,
    begin,
)
from dbjax.downpour.tickets import WAIT, Tickets
from dbjax.runtime.base import Program, Requests


def make_program(
    replicas: int,
    shards: int,
    steps: int,
    n_fetch: int,
    n_push: int,
    overlap: bool,
    warmstart_steps: int,
    protocol: Protocol,
    first: int = 0,
    again: Sequence[int] = (),
) -> Program:
    """Make the program of one run; see `Tickets` for `first` and `again`."""
    return Program(
        begin,
        advance,
        ReplicaState(),
        Periods(n_fetch, n_push, overlap),
        Tickets(steps, protocol, warmstart_steps, first, again),
        WAIT,
        Requests(TICKET, FETCH, COMPUTE, PUSH, STOP),
        replicas,
        shards,
    )
