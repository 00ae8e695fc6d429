"""What a Sandblaster run brings home."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dbjax.optim.status import Status
from dbjax.sandblaster.portions import PortionsInfo
from dbjax.trace import Trace
from dbjax.typing import Params


class RunInfo(NamedTuple):
    """Diagnostics of a run; whatever was done twice or ignored is counted here.

    Attributes:
      gradient_norm: at the parameters returned, of the last batch; what L1 or bounds
        leave of it where there are such.
      portions_evaluated: portions that counted, over all evaluations.
      examples: in the whole batch.
      portions: what was done beyond computing each portion once.
      method: counts of the method's own, such as pairs skipped and damped.
      seconds_per_iteration: on an emulated cluster, by strategy: `"backups"`,
        `"portions"` (without backups) and `"static"` (without load balancing); the
        same evaluations were emulated with each. Empty elsewhere.
      resumed_at: the iteration from which a checkpoint was taken up, 0 if none was.
    """

    gradient_norm: float
    portions_evaluated: int
    examples: int
    portions: PortionsInfo
    method: Mapping[str, int]
    seconds_per_iteration: Mapping[str, float]
    resumed_at: int = 0


class Run(NamedTuple):
    """The result of `minimize`.

    Attributes:
      params: where it ended: the best point found, but for samples of the batch.
      value: of all portions there, with what the method adds to the loss.
      status: why it ended.
      iterations: steps taken.
      evaluations: of a batch, of whatever size, the first included.
      trace: what happened; its evaluations have a row an iteration.
      info: diagnostics.
      method_state: the method's scalars, such as the products of its history.
    """

    params: Params
    value: float
    status: Status
    iterations: int
    evaluations: int
    trace: Trace
    info: RunInfo
    method_state: Any
