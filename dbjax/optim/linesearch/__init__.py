"""How far to go along a direction: line searches as pure state machines on scalars."""

from dbjax.optim.linesearch.backtracking import BacktrackingState as BacktrackingState
from dbjax.optim.linesearch.backtracking import backtracking as backtracking
from dbjax.optim.linesearch.more_thuente import MoreThuenteState as MoreThuenteState
from dbjax.optim.linesearch.more_thuente import more_thuente as more_thuente
from dbjax.optim.linesearch.transform import (
    ScaleByLineSearchState as ScaleByLineSearchState,
)
from dbjax.optim.linesearch.transform import (
    scale_by_line_search as scale_by_line_search,
)
from dbjax.optim.linesearch.words import LineSearch as LineSearch
