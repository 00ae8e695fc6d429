import jax
import jax.numpy as jnp
import pytest

from dbjax.optim import status
from dbjax.optim.status import Status, status_of


@pytest.mark.parametrize("member", Status)
def test_codes_and_words_are_one_list(member):
    assert getattr(status, member.name) == member.code
    assert status_of(jnp.int32(member.code)) is member
    assert member.message
    assert jax.jit(lambda code: code == member.code)(member.code)


@pytest.mark.parametrize("code", [-1, 7])
def test_what_is_no_code_is_named(code):
    with pytest.raises(ValueError, match=f"code={code}: allowed are 0 to 6"):
        status_of(code)
