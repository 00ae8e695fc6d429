"""Sandblaster: batch methods whose vectors live on shards and whose batch is portions.

The coordinator sees scalars only: `coordinator` runs a method of `methods`, `batches`
says which portions it sees, `portions` hands these out, and `vectors` gives commands to
the shards. `emulated` and `live` are who computes: the latter with a `hand` for each
replica, `threaded` or `remote`. `schedule` says how long a batch takes on an emulated
cluster.
"""

from dbjax.sandblaster.batches import FullBatch as FullBatch
from dbjax.sandblaster.batches import MultiBatch as MultiBatch
from dbjax.sandblaster.batches import ProgressiveBatch as ProgressiveBatch
from dbjax.sandblaster.methods import LBFGS as LBFGS
from dbjax.sandblaster.methods import OWLQN as OWLQN
from dbjax.sandblaster.methods import BoxLBFGS as BoxLBFGS
from dbjax.sandblaster.methods import ConjugateGradient as ConjugateGradient
from dbjax.sandblaster.methods import GradientDescent as GradientDescent
from dbjax.sandblaster.minimize import minimize as minimize
from dbjax.sandblaster.run import Run as Run
from dbjax.sandblaster.run import RunInfo as RunInfo
from dbjax.sandblaster.schedule import Schedule as Schedule
from dbjax.sandblaster.schedule import schedule as schedule
