"""Run by `dense_test` with eight devices: dense networks in 1, 2, 4 and 8 partitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose as close

import dbjax
from dbjax import models
from dbjax.mesh import costs, shardings
from dbjax.models.dense import SPEECH_SIZES

B = 24
# First and last layers cut by columns and by rows; one layer; one output.
MODELS = {
    (8, 32, 16, 64, 8): models.dense((8, 32, 16, 64, 8)),
    (16, 24, 8, 40): models.dense((16, 24, 8, 40), activation=jnp.tanh, gain=1.0),
    (8, 16, 128): models.dense((8, 16, 128)),
    (24, 8): models.logistic_regression(24, classes=8),
    (24, 1): models.logistic_regression(24),
}


def by_path(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs}


def compiled(model, batch_size, partitions, transform=jax.value_and_grad):
    """The program of a step in `partitions`, made of shapes alone."""
    mesh = dbjax.make_mesh(model=partitions)
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=where
        ),
        model.shapes,
        shardings(model.shapes, mesh, model.rules),
    )
    an_array = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
    batch = {
        "x": an_array((batch_size, *model.input_shape), np.float32),
        "label": an_array((batch_size,), np.int32),
    }
    with jax.set_mesh(mesh):
        return jax.jit(transform(model.loss)).lower(params, batch).compile()


def check_bytes(program, sizes, batch_size, partitions):
    """It exchanges what the mathematics asks for, and nothing else."""
    read = costs.partition_costs(program)
    expected = models.exchanged_bytes(sizes, batch_size, partitions)
    where = (sizes, partitions, read.by_kind())
    assert set(read.by_kind()) == ({"all-reduce"} if partitions > 1 else set()), where
    assert read.total.result_bytes == expected, (expected, where)


def check_model(sizes, model):
    """Neither loss nor gradient depends on the partitions."""
    rng = np.random.default_rng(0)
    # Not the first ones: among zeros a lost share of a sum could hide.
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), model.shapes
    )
    batch = {
        "x": rng.standard_normal((B, *model.input_shape)).astype(np.float32),
        "label": rng.integers(0, model.classes, B).astype(np.int32),
    }
    for partitions in (1, 2, 4, 8):
        step = compiled(model, B, partitions)
        check_bytes(step, sizes, B, partitions)
        mesh = dbjax.make_mesh(model=partitions)
        placed = dbjax.shard_params(params, mesh, model.rules)
        whole = jax.device_put(batch, NamedSharding(mesh, PartitionSpec()))
        value, gradient = jax.block_until_ready(step(placed, whole))
        there, got = by_path(placed), by_path(gradient)
        if partitions == 1:
            expected, unpartitioned = value, got
        where = f"{sizes}, {partitions} partitions"
        close(value, expected, 1e-6, err_msg=where)
        for path, leaf in got.items():
            close(leaf, unpartitioned[path], 1e-4, 1e-6, err_msg=where)
            # Each part of a gradient lies where the parameters are that it is for.
            same = leaf.sharding.is_equivalent_to(there[path].sharding, leaf.ndim)
            assert same, (where, path)


def check_first_parameters():
    """A model too large for one device is drawn where it lies, in any partition."""
    model = models.dense((64, 512, 512, 256))
    mesh = dbjax.make_mesh(model=8)
    where = shardings(model.shapes, mesh, model.rules)
    init = jax.jit(model.init, out_shardings=where).lower(jax.random.key(3)).compile()
    params = jax.block_until_ready(init(jax.random.key(3)))
    whole = by_path(jax.jit(model.init)(jax.random.key(3)))
    for path, leaf in by_path(params).items():
        close(leaf, whole[path], 1e-5, 1e-7, err_msg=path)
    memory = init.memory_analysis()
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert held < 4 * model.num_parameters / 2, held


def main():
    assert jax.device_count() == 8
    for sizes, model in MODELS.items():
        check_model(sizes, model)
    print("models", len(MODELS))
    for partitions in (2, 4):
        check_bytes(
            compiled(models.speech(), 128, partitions), SPEECH_SIZES, 128, partitions
        )
    # The gradient alone needs no loss: one number per example less.
    program = compiled(models.speech(), 128, 2, jax.grad)
    less = models.exchanged_bytes(SPEECH_SIZES, 128, 2) - 4 * 128
    assert costs.partition_costs(program).total.result_bytes == less
    print("speech", less)
    check_first_parameters()
    print("drawn in place")


if __name__ == "__main__":
    main()
