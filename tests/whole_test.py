"""What counts as a whole number, and what the error says of the rest."""

import numpy as np
import pytest

from dbjax.whole import whole


@pytest.mark.parametrize("value", [2, np.int64(2), np.array(2)])
def test_an_integer_becomes_an_int(value):
    assert type(whole("steps", value, 2)) is int


@pytest.mark.parametrize("value", [1, -3, True, 2.0, "2", None, np.array([2, 3])])
def test_whatever_else_is_named(value):
    with pytest.raises(ValueError, match="steps must be .*at least 2; got "):
        whole("steps", value, 2)
