"""Where parameters lie: rules from paths to specs, the first that is found decides."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import dbjax
from dbjax import mesh as mesh_lib

PARAMS = {
    "layers": [{"bias": np.zeros(4), "kernel": np.ones((8, 4))}],
    "scale": np.ones(()),
}


def specs(params, rules=None):
    shardings = mesh_lib.shardings(params, dbjax.make_mesh(data=1, model=1), rules)
    return jax.tree.map(lambda s: s.spec, shardings)


def test_axes_have_the_names_and_sizes_asked_for():
    mesh = dbjax.make_mesh(replica=1, model=1)
    assert mesh.shape == {"replica": 1, "model": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert mesh.devices.ravel().tolist() == jax.devices()[:1]
    assert (
        dbjax.make_mesh(jax.devices()[-1:], data=1).devices.item() == jax.devices()[-1]
    )


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        ({}, "axes={}"),
        ({"data": 0}, "'data': 0"),
        ({"data": -2}, "'data': -2"),
        ({"data": 10_000}, "needs 10000 devices; there are"),
        ({"data": 2, "devices": jax.devices()[:1]}, "needs 2 devices; there are 1"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_an_error(axes, match):
    with pytest.raises(ValueError, match=match):
        dbjax.make_mesh(**axes)


def test_the_first_rule_that_is_found_in_the_path_decides():
    model, data = PartitionSpec("model"), PartitionSpec("data")
    got = specs(PARAMS, [("layers/0/k", model), ("kernel", data), ("layers", data)])
    assert got["layers"][0] == {"kernel": model, "bias": data}
    assert got["scale"] == PartitionSpec(), "no rule: whole on every device"
    got = specs(PARAMS, [("kernel", data), ("layers/0/k", model)])
    assert got["layers"][0] == {"kernel": data, "bias": PartitionSpec()}
    got = specs(PARAMS, [(r"^kernel$", data), ("scale", PartitionSpec())])
    assert got["layers"][0]["kernel"] == PartitionSpec(), "paths are looked at whole"


def test_rules_of_which_none_is_found_are_for_other_parameters():
    with pytest.raises(ValueError, match="none of.*nothing.*layers/0/bias.*scale"):
        specs(PARAMS, [("nothing", PartitionSpec("model"))])
    assert specs(PARAMS, [])["scale"] == PartitionSpec()


def test_examples_are_shared_by_the_axes_that_no_rule_names():
    mesh = dbjax.make_mesh(data=1, model=1)
    batch = {"x": np.zeros((4, 3)), "step": np.zeros(())}

    def of(rules):
        made = mesh_lib.batch_sharding(batch, mesh, rules)
        return made["x"].spec, made["step"].spec

    everywhere = PartitionSpec()
    assert of(None) == (PartitionSpec(("data", "model")), everywhere)
    assert of([("kernel", PartitionSpec(None, "model"))]) == (
        PartitionSpec(("data",)),
        everywhere,
    )
    assert of([("a", PartitionSpec(("data", "model")))]) == (everywhere, everywhere)


def test_each_replica_has_its_own_part_of_a_mesh():
    mesh = dbjax.make_mesh(replica=1, model=1)
    (part,) = mesh_lib.sub_meshes(mesh)
    assert part.axis_names == ("model",)
    assert part.devices.shape == (1,)
    alone = dbjax.make_mesh(model=1)
    assert mesh_lib.sub_meshes(alone) == (alone,)
    (part,) = mesh_lib.sub_meshes(dbjax.make_mesh(replica=1))
    assert part.axis_names == ("model",) and part.size == 1


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (PartitionSpec(None, None, "model"), "rules: layers/0/bias does not fit"),
        (PartitionSpec("nowhere"), "rules: layers/0/bias does not fit.*nowhere"),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error_that_names_the_leaf(spec, match):
    with pytest.raises(ValueError, match=match):
        specs(PARAMS, [("bias", spec)])


def test_parameters_are_put_where_the_rules_say_and_keep_their_values():
    mesh = dbjax.make_mesh(data=1)
    placed = dbjax.shard_params(PARAMS, mesh, [("kernel", PartitionSpec("data"))])
    want = mesh_lib.shardings(PARAMS, mesh, [("kernel", PartitionSpec("data"))])
    for leaf, sharding, before in zip(
        *map(jax.tree.leaves, (placed, want, PARAMS)), strict=True
    ):
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf, before)


@pytest.mark.multidevice
def test_without_rules_leaves_are_cut_evenly_over_all_devices():
    """Along the first axis that all devices divide; the examples of a batch likewise."""
    script = """
        import jax, numpy as np, dbjax
        from dbjax import mesh as mesh_lib
        from jax.sharding import PartitionSpec as P
        mesh = dbjax.make_mesh(data=2, model=2)
        both = ("data", "model")
        shapes = {"a": (8, 3), "b": (3, 4), "c": (5,), "d": (), "e": (2, 2)}
        params = {name: np.zeros(shape) for name, shape in shapes.items()}
        got = {k: s.spec for k, s in mesh_lib.shardings(params, mesh).items()}
        assert got == {"a": P(both), "b": P(None, both), "c": P(), "d": P(), "e": P()}, got
        batch = {"x": np.zeros((8, 3)), "y": np.zeros(6), "z": np.zeros(())}
        got = {k: s.spec for k, s in mesh_lib.batch_sharding(batch, mesh).items()}
        assert got == {"x": P(both), "y": P(), "z": P()}, got
        placed = dbjax.shard_params(params, mesh)
        assert {s.data.shape for s in placed["a"].addressable_shards} == {(2, 3)}
        try:
            mesh_lib.shardings(params, mesh, [("c", P("data"))])
        except ValueError as error:
            assert "rules: c does not fit" in str(error), error
        else:
            raise AssertionError("5 numbers on 2 devices")
        print("ok")
    """
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "NPROC": "64"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ok"]


def test_anything_with_a_shape_has_a_sharding():
    shapes = jax.eval_shape(lambda: {"w": jnp.zeros((4, 2))})
    assert specs(shapes)["w"] == PartitionSpec(("data", "model"))
