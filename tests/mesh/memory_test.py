"""Memory from shapes: what a model of any size needs, without taking it."""

import jax
import optax
import pytest
from jax.sharding import PartitionSpec

import dbjax
from dbjax.mesh.memory import check_memory, estimate_memory

SHAPES = {
    "kernel": jax.ShapeDtypeStruct((1 << 20, 1024), "float32"),  # 4 GiB
    "bias": jax.ShapeDtypeStruct((1024,), "float32"),
}
RULES = [("kernel", PartitionSpec(None, "model"))]
GIB = 2**30


def test_each_purpose_is_counted():
    need = estimate_memory(SHAPES, optimizer=optax.adam(1e-3), versions=2)
    one = 4 * GIB + 4096
    assert (need.parameters, need.gradients) == (one, one)
    assert need.optimizer == 2 * one + 4  # both moments and a count
    assert need.versions == 2 * one
    assert need.total == 6 * one + 4
    assert estimate_memory(SHAPES).total == 2 * one


def test_partitions_divide_what_the_rules_divide():
    need = estimate_memory(SHAPES, {"model": 4}, RULES, optimizer=dbjax.adagrad(0.1))
    assert need.parameters == GIB + 4096  # the bias is whole everywhere
    assert need.optimizer == pytest.approx(need.parameters, abs=64)
    assert estimate_memory(SHAPES, {"model": 4}).parameters == GIB + 1024


def test_a_mesh_of_devices_and_its_sizes_say_the_same():
    assert estimate_memory(SHAPES, dbjax.make_mesh(model=1), RULES) == estimate_memory(
        SHAPES, {"model": 1}, RULES
    )


def test_what_does_not_fit_is_refused_with_advice():
    assert check_memory(9 * GIB, SHAPES, rules=RULES) == estimate_memory(SHAPES)
    with pytest.raises(ValueError) as error:
        check_memory(3 * GIB, SHAPES, rules=RULES)
    assert "needs 8.0 GiB (parameters 4.0 GiB, gradients 4.0 GiB)" in str(error.value)
    assert "there are 3.0 GiB: 4 partitions on as many machines" in str(error.value)
    with pytest.raises(ValueError, match="8 partitions .* 1.0 GiB on each"):
        check_memory(1.1 * GIB, SHAPES, {"data": 2, "model": 4}, RULES)
    with pytest.raises(ValueError, match="no number of partitions"):
        check_memory(1000, SHAPES, rules=RULES)


def test_versions_cannot_be_negative():
    with pytest.raises(ValueError, match="versions must be at least 0; got -1"):
        estimate_memory(SHAPES, versions=-1)
