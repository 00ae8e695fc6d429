"""Why a minimisation ended: int32 codes for jitted loops, words for people.

A loop inside jit carries a code; whoever reads a result has a `Status`. The two are one
list: `status_of(CONVERGED) is Status.CONVERGED`.
"""

import enum
from typing import Any

RUNNING = 0
CONVERGED = 1
SMALL_STEP = 2
SEARCH_FAILED = 3
NOT_FINITE = 4
LIMIT = 5
INCONSISTENT = 6


class Status(enum.StrEnum):
    """How a minimisation ended; `code` is what a jitted loop carries.

    Examples:
        >>> from dbjax.optim.status import LIMIT, Status, status_of
        >>> print(status_of(LIMIT))
        limit
        >>> Status.LIMIT.code == LIMIT, Status.LIMIT.message
        (True, 'max_iterations reached')
    """

    RUNNING = "running"
    """It has not ended."""
    CONVERGED = "converged"
    """No gradient entry exceeds the tolerance."""
    SMALL_STEP = "small step"
    """The value has stopped falling, or what is left to gain is lost in rounding."""
    SEARCH_FAILED = "line search failed"
    """No smaller value along the direction, nor along the gradient."""
    NOT_FINITE = "not finite"
    """The value or the gradient at the start, or after a step, is not finite."""
    LIMIT = "limit"
    """The iterations are used up."""
    INCONSISTENT = "inconsistent gradient"
    """As `SEARCH_FAILED`, and the gradient says otherwise: it is not the value's."""

    @property
    def code(self) -> int:
        """The constant of this module with the same name."""
        return _ORDER.index(self)

    @property
    def message(self) -> str:
        """What happened, in a sentence."""
        return _MESSAGES[self]


def status_of(code: Any) -> Status:
    """Give the status of a code: an int, or a concrete integer array with one entry.

    Raises:
        ValueError: it is no code.
    """
    number = int(code)
    if not 0 <= number < len(_ORDER):
        raise ValueError(f"code={number}: allowed are 0 to {len(_ORDER) - 1}")
    return _ORDER[number]


_ORDER = tuple(Status)  # by code
_MESSAGES = {
    Status.RUNNING: "still running",
    Status.CONVERGED: "converged: no gradient entry exceeds gradient_tolerance",
    Status.SMALL_STEP: "the value has stopped falling",
    Status.SEARCH_FAILED: "line search failed: no smaller value along the gradient",
    Status.NOT_FINITE: "value or gradient not finite",
    Status.LIMIT: "max_iterations reached",
    Status.INCONSISTENT: "line search failed: the gradient is not that of the value",
}
