"""The Downpour program: actor, periods and ticket desk, ready for a runtime."""

from collections.abc import Sequence

from dbjax.downpour import replica
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.tickets import WAIT, Tickets
from dbjax.runtime.base import Program, Requests


def make_program(
    arguments: Arguments, first: int = 0, again: Sequence[int] = ()
) -> Program:
    """Make the program of one run, on whichever runtime.

    Args:
      arguments: checked.
      first: the first new step, see `Tickets`.
      again: steps below it that are still to be computed, see `Tickets`.

    Returns:
      The program; its desk is used up by the run.
    """
    a = arguments
    return Program(
        begin=replica.begin,
        advance=replica.advance,
        state=replica.ReplicaState(),
        periods=[
            replica.Periods(n_fetch, n_push, a.overlap)
            for n_fetch, n_push in zip(
                a.of_each(a.n_fetch), a.of_each(a.n_push), strict=True
            )
        ],
        tickets=Tickets(a.steps, a.protocol, a.warmstart_steps, first, again),
        wait=WAIT,
        requests=Requests(
            ticket=replica.TICKET,
            fetch=replica.FETCH,
            compute=replica.COMPUTE,
            push=replica.PUSH,
            stop=replica.STOP,
        ),
        replicas=a.replicas,
        shards=a.shards,
    )
