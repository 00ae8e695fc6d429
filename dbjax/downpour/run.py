"""What a run brings home."""

from typing import Any, NamedTuple

import numpy as np

from dbjax.downpour.plan import Plan
from dbjax.trace import PUSH, Trace
from dbjax.typing import Params


class RunInfo(NamedTuple):
    """Diagnostics of a run; whatever was lost is counted here.

    Attributes:
      steps: minibatches computed.
      pushes: pushes that all shards have handled, taken or not.
      not_finite: pushes rejected because they held a NaN or an infinity.
      dropped: pushes that the protocol did not take, on any shard.
      lost_gradients: accrued gradients that failed replicas took with them.
      mean_staleness, max_staleness: over all pushes and shards.
      executor: `"exact"`, `"loop"` or `"recycled"` (compiled), or `"live"`.
      peak_copies: the most parameter copies held at once (versions, accrued gradients
        and working memory; the optimizer's state comes on top).
      resumed_at: the step from which a checkpoint was taken up, 0 if none was.
      lost_updates: updates that failed shards took with them.
    """

    steps: int
    pushes: int
    not_finite: int
    dropped: int
    lost_gradients: int
    mean_staleness: float
    max_staleness: int
    executor: str
    peak_copies: int
    resumed_at: int = 0
    lost_updates: int = 0


class Run(NamedTuple):
    """The result of `train` and `replay`.

    Attributes:
      params: the parameters at the end.
      optimizer_state: a tuple, one entry per shard.
      trace: what happened, with the evaluations beside it.
      info: diagnostics.
    """

    params: Params
    optimizer_state: tuple[Any, ...]
    trace: Trace
    info: RunInfo


def make_info(trace: Trace, executor: str, peak: int, resumed_at: int = 0) -> RunInfo:
    """Read the diagnostics off a Trace.

    Args:
      trace: of a finished run.
      executor: what executed it, see `RunInfo`.
      peak: the most parameter copies held at once.
      resumed_at: the step from which it was taken up.

    Returns:
      The diagnostics.
    """
    staleness, lost = trace.staleness(), trace.lost()
    known = staleness[staleness >= 0]
    pushes = int(np.count_nonzero(trace.kind == PUSH)) // max(1, trace.header["shards"])
    return RunInfo(
        steps=int(trace.minibatches_per_replica().sum()),
        pushes=pushes,
        not_finite=lost["not_finite"],
        dropped=lost["dropped"],
        lost_gradients=lost["gradients"],
        mean_staleness=float(known.mean()) if known.size else 0.0,
        max_staleness=int(known.max(initial=0)),
        executor=executor,
        peak_copies=peak,
        resumed_at=resumed_at,
        lost_updates=lost["updates"],
    )


def peak_copies(plan: Plan) -> int:
    """Parameter copies held at once: versions, accrued gradients, working memory."""
    accrued = 0 if plan.direct else plan.gradient_slots
    working = 1 + (plan.shards > 1)  # a gradient, and the whole that shards make up
    return plan.slots + accrued + working
