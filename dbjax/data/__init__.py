"""Batches: a pure function of (seed, replica, step), or anybody's iterators.

Whatever fits in memory is an `ArrayData`: it has no state, so nothing has to be saved
and a recorded run finds the very same batches again. So is a `SourceData`, of examples
that are read when asked for; `files` reads the formats people have. Anything else comes
from iterators, one per replica (`IteratorData`). Nothing here knows of runs or clocks.

Letters: `N` examples, `B` batch, `K` batches stacked.
"""

from dbjax.data.arrays import ArrayData, from_arrays
from dbjax.data.iterators import IteratorData, from_iterators
from dbjax.data.sources import Source, SourceData, from_source
from dbjax.data.stacking import stack

__all__ = [
    "ArrayData",
    "IteratorData",
    "Source",
    "SourceData",
    "from_arrays",
    "from_iterators",
    "from_source",
    "stack",
]
