"""Run by `partition_test` with eight devices: rows cut over 1, 2, 4 and 8 of them."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dbjax.mesh import make_mesh, shardings
from dbjax.mesh.costs import collectives_of
from dbjax.models import halo
from dbjax.models.locally_connected import (
    Geometry,
    arrange,
    locally_connected,
    named_padding,
)
from dbjax.models.vision import PRESETS, vision

NETWORK = {"maps": (8, 6), "pools": ((4, 2), (3, 1))}  # two stages compile sooner


def permuted_bytes(program):
    """What one device is sent in all collective-permutes of a compiled program."""
    results = re.findall(r"= \(?f32\[([\d,]*)\].* collective-permute", program)
    assert program.count(" collective-permute") == len(results)
    return sum(4 * math.prod(map(int, shape.split(","))) for shape in results)


def run(function, *args):
    """One program at a time: those in flight together may wait for each other."""
    compiled = jax.jit(function).lower(*args).compile()
    return jax.device_get(jax.block_until_ready(compiled(*args))), compiled.as_text()


def assert_near(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def check_network():
    model, batch = vision("small", **NETWORK), 4
    sizes = dataclasses.replace(PRESETS["small"], **NETWORK)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    images = jax.random.normal(jax.random.key(1), (batch, *model.input_shape))
    data = jax.device_get((images, jnp.arange(batch)))
    expected, program = run(jax.value_and_grad(model.loss), params, data)
    assert permuted_bytes(program) == sizes.halo_bytes(batch, 1) == 0
    for parts in (1, 2, 4, 8):
        mesh = make_mesh(model=parts)
        places = shardings(params, mesh, model.rules)
        with jax.set_mesh(mesh):
            if parts == 8:
                placed = jax.jit(model.init, out_shardings=places)(jax.random.key(0))
                for a, b in zip(*map(jax.tree.leaves, (placed, params)), strict=True):
                    np.testing.assert_array_equal(a, b)
            else:
                placed = jax.device_put(params, places)
            found, program = run(jax.value_and_grad(model.loss), placed, data)
        assert_near(found, expected)
        assert permuted_bytes(program) == sizes.halo_bytes(batch, parts)
        # What is gathered are features, at most; outputs have 16 numbers an example.
        gathered = re.findall(r"= f32\[([\d,]*)\][^=]* all-gather", program)
        elements = [math.prod(map(int, shape.split(","))) for shape in gathered]
        assert elements == [batch * sizes.features] * (parts > 1)
        sent = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
        for one in collectives_of(program):
            if one.kind != "collective-permute":
                sent[one.kind] += one.sent_bytes
        features = sizes.feature_bytes(batch, parts)
        assert sent["all-gather"] + sent["reduce-scatter"] == features
        assert sent["all-reduce"] <= 2 * 4 * batch, sent  # the losses, in a ring
    print("network agrees")

    mesh = make_mesh(data=2, model=4)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh, model.rules))
        data = jax.device_put(data, NamedSharding(mesh, PartitionSpec("data")))
        found, program = run(jax.value_and_grad(model.loss), params, data)
    assert_near(found, expected)
    assert permuted_bytes(program) == sizes.halo_bytes(2, 4)
    print("examples may be cut too")


def check_layer(rows, patch, stride, parts):
    """A layer alone; borders may reach over several devices."""
    below = (rows * stride, 12)
    zeros = named_padding("SAME", patch, stride)
    geometry = Geometry(below, patch, stride, zeros)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((*geometry.positions, patch, patch, 2, 3))
    x = rng.standard_normal((*below, 2, 2)).astype(np.float32)
    bias = rng.standard_normal((*geometry.positions, 3)).astype(np.float32)
    target = rng.standard_normal((*geometry.positions, 2, 3)).astype(np.float32)
    kernel = arrange(weights.astype(np.float32), stride=stride, left=zeros[1][0])

    def loss(x, kernel, bias):
        y = locally_connected(x, kernel, bias, stride=stride)
        return jnp.vdot(y, target)

    function = jax.value_and_grad(loss, (0, 1, 2))
    args = (x, np.asarray(kernel), bias)
    expected, _ = run(function, *args)
    mesh = make_mesh(model=parts)
    with jax.set_mesh(mesh):
        cut = NamedSharding(mesh, PartitionSpec("model"))
        found, program = run(function, *jax.device_put(args, cut))
    assert_near(found, expected)
    border = halo.halo_bytes(below[0], *zeros[0], parts, 4 * 12 * 2 * 2)
    # The value of a linear function is not needed for its gradient; both are asked for.
    assert permuted_bytes(program) == 2 * border > 0


def refused(function, *args, **kwargs):
    try:
        jax.eval_shape(functools.partial(function, **kwargs), *args)
    except ValueError as error:
        return str(error)
    raise AssertionError("it was not refused")


def check_errors():
    kernel = jnp.zeros((6, 9, 8, 4, 5))
    model = vision("small", grid=18, image=18, pools=((2, 2), (1, 1), (1, 1)))
    with jax.set_mesh(make_mesh(model=4)):
        why = refused(locally_connected, jnp.zeros((6, 9, 1, 2)), kernel)
        assert "6 rows cannot be cut over 4 devices" in why, why
        why = refused(model.apply, model.shapes, jnp.zeros((1, 18, 18, 3)))
        assert "18 rows cannot be cut over 4 devices" in why, why
    with jax.set_mesh(make_mesh(model=2)):
        x = jnp.zeros((9, 12, 1, 2))
        why = refused(locally_connected, x, kernel, padding="VALID")
        assert "6 rows and 3 rows of padding; they are 9 and 0" in why, why
    print("errors say why")


def main():
    assert jax.device_count() == 8
    check_network()
    for rows, patch, stride, parts in (
        (8, 4, 1, 2),
        (8, 4, 2, 4),
        (16, 10, 1, 8),  # borders of four and five rows, two on each device
        (16, 9, 3, 8),
    ):
        check_layer(rows, patch, stride, parts)
    print("layers agree")
    check_errors()


if __name__ == "__main__":
    main()
