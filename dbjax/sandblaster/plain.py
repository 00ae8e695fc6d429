"""The coordinator's state as a value that JSON can hold, and back.

Only types that are listed here are written by name; nothing is ever executed to read.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dbjax.optim import linesearch, vector_free
from dbjax.optim.linesearch import words
from dbjax.optim.status import Status
from dbjax.sandblaster import batches, coordinator, messages, portions
from dbjax.sandblaster.methods import conjugate_gradient, gradient_descent

_MODULES = (
    batches, conjugate_gradient, coordinator, gradient_descent, linesearch, messages,
    portions, vector_free, words,
)  # fmt: skip
_TYPES = {
    name: kind
    for module in _MODULES
    for name, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, tuple) and hasattr(kind, "_fields")
}


def encode(value: Any) -> Any:
    """Write a value of tuples, named tuples, dicts, scalars and small arrays.

    Raises:
      TypeError: there is something else in it.

    >>> decode(encode((1.5, Status.LIMIT, np.arange(2.0))))
    (1.5, <Status.LIMIT: 'limit'>, array([0., 1.]))
    """
    if isinstance(value, Status):
        return {"status": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    if type(value).__name__ in _TYPES:
        return {"is": type(value).__name__, "of": [encode(each) for each in value]}
    if isinstance(value, tuple | list):
        return [encode(each) for each in value]
    if isinstance(value, Mapping):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    try:
        return {"dtype": jnp.dtype(value).name}
    except TypeError:
        raise TypeError(
            f"a {type(value).__name__} cannot be saved in a checkpoint: a method's "
            "state must be made of dbjax's own states, tuples, dicts and numbers"
        ) from None


def decode(value: Any) -> Any:
    """Read what `encode` wrote; lists have become tuples."""
    if isinstance(value, list):
        return tuple(decode(each) for each in value)
    if not isinstance(value, dict):
        return value
    if "status" in value:
        return Status(value["status"])
    if "array" in value:
        return np.array(value["array"], value["dtype"])[()]
    if "is" in value:
        return _TYPES[value["is"]](*map(decode, value["of"]))
    if "dict" in value:
        return {decode(k): decode(v) for k, v in value["dict"]}
    return jnp.dtype(value["dtype"])
