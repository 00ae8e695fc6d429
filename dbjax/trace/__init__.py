"""The Trace: what a run did, event by event, as a struct of arrays."""

from dbjax.trace.columns import (
    COMPUTE,
    DROPPED,
    FAIL,
    FETCH,
    JOIN,
    KIND_NAMES,
    LEAVE,
    NOT_FINITE,
    PUSH,
    RESTART,
    SCHEMA,
    STATUS_NAMES,
    TAKEN,
)
from dbjax.trace.table import Trace

__all__ = [
    "COMPUTE",
    "DROPPED",
    "FAIL",
    "FETCH",
    "JOIN",
    "KIND_NAMES",
    "LEAVE",
    "NOT_FINITE",
    "PUSH",
    "RESTART",
    "SCHEMA",
    "STATUS_NAMES",
    "TAKEN",
    "Trace",
]
