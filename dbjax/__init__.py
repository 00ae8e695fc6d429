"""dbjax: DistBelief (Dean et al., 2012) for JAX, with runs you can replay."""

from dbjax import downpour as downpour
from dbjax.cluster import Cluster as Cluster
from dbjax.cluster import Constant as Constant
from dbjax.cluster import Empirical as Empirical
from dbjax.cluster import Exponential as Exponential
from dbjax.cluster import Failures as Failures
from dbjax.cluster import Gamma as Gamma
from dbjax.cluster import LogNormal as LogNormal
from dbjax.cluster import Pareto as Pareto
from dbjax.cluster import Slow as Slow
from dbjax.cluster import Slowness as Slowness
from dbjax.data import from_arrays as from_arrays
from dbjax.data import from_iterators as from_iterators
from dbjax.downpour.protocol import asynchronous as asynchronous
from dbjax.downpour.protocol import synchronous as synchronous
from dbjax.downpour.replay import replay as replay
from dbjax.downpour.simulate import simulate as simulate
from dbjax.downpour.sweep import sweep as sweep
from dbjax.optim import adagrad as adagrad
from dbjax.optim import delay_gradients as delay_gradients
from dbjax.optim import lbfgs as lbfgs
from dbjax.optim import scale_by_lbfgs as scale_by_lbfgs
from dbjax.optim import stale as stale
from dbjax.optim import stale_params as stale_params
from dbjax.runtime.emulated import Emulated as Emulated
from dbjax.runtime.threads import Threads as Threads
from dbjax.trace import Trace as Trace

__all__ = [
    "Cluster",
    "Constant",
    "Empirical",
    "Emulated",
    "Exponential",
    "Failures",
    "Gamma",
    "LogNormal",
    "Pareto",
    "Slow",
    "Slowness",
    "Threads",
    "Trace",
    "adagrad",
    "asynchronous",
    "delay_gradients",
    "downpour",
    "from_arrays",
    "from_iterators",
    "lbfgs",
    "replay",
    "scale_by_lbfgs",
    "simulate",
    "stale",
    "stale_params",
    "sweep",
    "synchronous",
]
