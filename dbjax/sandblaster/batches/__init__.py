"""Which portions an iteration sees: all, a changing sample, or a growing one."""

from dbjax.sandblaster.batches.base import Batches as Batches
from dbjax.sandblaster.batches.base import mean as mean
from dbjax.sandblaster.batches.full import FullBatch as FullBatch
from dbjax.sandblaster.batches.full import FullBatchState as FullBatchState
from dbjax.sandblaster.batches.multi import MultiBatch as MultiBatch
from dbjax.sandblaster.batches.multi import MultiBatchState as MultiBatchState
from dbjax.sandblaster.batches.progressive import ProgressiveBatch as ProgressiveBatch
from dbjax.sandblaster.batches.progressive import (
    ProgressiveBatchState as ProgressiveBatchState,
)
