"""Whole numbers as arguments: checked in one place, and named in the error."""

import operator
from typing import Any


def whole(name: str, value: Any, least: int) -> int:
    """Check that an argument is an integer of at least `least`.

    Args:
      name: what it is called in the error.
      value: the argument.
      least: the least value allowed.

    Returns:
      The value as an int.

    Raises:
      ValueError: it is no integer, or below `least`.

    >>> whole("steps", 3, 1)
    3
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name} must be an integer of at least {least}; got {value!r}."
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}.")
    return number
