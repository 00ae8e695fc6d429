"""dbjax: DistBelief (Dean et al., 2012) for JAX, with runs you can replay."""

from dbjax import downpour as downpour
from dbjax import models as models
from dbjax import sandblaster as sandblaster
from dbjax import schedules as schedules
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
from dbjax.downpour.probe import probe as probe
from dbjax.downpour.protocol import asynchronous as asynchronous
from dbjax.downpour.protocol import delay_threshold as delay_threshold
from dbjax.downpour.protocol import ssp as ssp
from dbjax.downpour.protocol import synchronous as synchronous
from dbjax.downpour.replay import replay as replay
from dbjax.downpour.simulate import simulate as simulate
from dbjax.downpour.sweep import sweep as sweep
from dbjax.mesh import make_mesh as make_mesh
from dbjax.mesh import shard_params as shard_params
from dbjax.models import from_linen as from_linen
from dbjax.models import from_nnx as from_nnx
from dbjax.optim import adagrad as adagrad
from dbjax.optim import delay_gradients as delay_gradients
from dbjax.optim import lbfgs as lbfgs
from dbjax.optim import scale_by_lbfgs as scale_by_lbfgs
from dbjax.optim import stale as stale
from dbjax.optim import stale_params as stale_params
from dbjax.runtime.emulated import Emulated as Emulated
from dbjax.runtime.ray import Ray as Ray
from dbjax.runtime.threads import Threads as Threads
from dbjax.sandblaster import LBFGS as LBFGS
from dbjax.sandblaster import OWLQN as OWLQN
from dbjax.sandblaster import BoxLBFGS as BoxLBFGS
from dbjax.sandblaster import ConjugateGradient as ConjugateGradient
from dbjax.sandblaster import FullBatch as FullBatch
from dbjax.sandblaster import GradientDescent as GradientDescent
from dbjax.sandblaster import MultiBatch as MultiBatch
from dbjax.sandblaster import ProgressiveBatch as ProgressiveBatch
from dbjax.trace import Trace as Trace

__all__ = [
    "BoxLBFGS",
    "Cluster",
    "ConjugateGradient",
    "Constant",
    "Empirical",
    "Emulated",
    "Exponential",
    "Failures",
    "FullBatch",
    "Gamma",
    "GradientDescent",
    "LBFGS",
    "LogNormal",
    "MultiBatch",
    "OWLQN",
    "Pareto",
    "ProgressiveBatch",
    "Ray",
    "Slow",
    "Slowness",
    "Threads",
    "Trace",
    "adagrad",
    "asynchronous",
    "delay_gradients",
    "delay_threshold",
    "downpour",
    "from_arrays",
    "from_iterators",
    "from_linen",
    "from_nnx",
    "lbfgs",
    "make_mesh",
    "models",
    "probe",
    "replay",
    "sandblaster",
    "scale_by_lbfgs",
    "schedules",
    "shard_params",
    "simulate",
    "ssp",
    "stale",
    "stale_params",
    "sweep",
    "synchronous",
]
