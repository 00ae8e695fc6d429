"""How gradients become steps: optax transformations, pure and not distributed."""

from dbjax.optim.accumulating import delayed_nesterov as delayed_nesterov
from dbjax.optim.accumulating import elastic as elastic
from dbjax.optim.accumulating import softsync as softsync
from dbjax.optim.adagrad import ScaleByAdagradState as ScaleByAdagradState
from dbjax.optim.adagrad import adagrad as adagrad
from dbjax.optim.adagrad import scale_by_adagrad as scale_by_adagrad
from dbjax.optim.delay_aware import adadelay as adadelay
from dbjax.optim.delay_aware import compensate_delay as compensate_delay
from dbjax.optim.delay_aware import predict_params as predict_params
from dbjax.optim.delay_aware import scale_by_gap as scale_by_gap
from dbjax.optim.delay_aware import scale_by_staleness as scale_by_staleness
from dbjax.optim.delay_aware import without_prediction as without_prediction
from dbjax.optim.lbfgs import LBFGSState as LBFGSState
from dbjax.optim.lbfgs import ScaleByLBFGSState as ScaleByLBFGSState
from dbjax.optim.lbfgs import lbfgs as lbfgs
from dbjax.optim.lbfgs import scale_by_lbfgs as scale_by_lbfgs
from dbjax.optim.local import LocalRule as LocalRule
from dbjax.optim.minimize import MinimizeResult as MinimizeResult
from dbjax.optim.minimize import minimize as minimize
from dbjax.optim.stale import DelayGradientsState as DelayGradientsState
from dbjax.optim.stale import StaleState as StaleState
from dbjax.optim.stale import delay_gradients as delay_gradients
from dbjax.optim.stale import stale as stale
from dbjax.optim.stale import stale_params as stale_params
from dbjax.optim.status import Status as Status
