"""A Model: batches it takes and refuses, and shapes that cost nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import dbjax
from dbjax import models

MODEL = models.dense((4, 6, 3))
PARAMS = MODEL.init(jax.random.key(0))
X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1, 0])


def test_a_batch_is_a_pair_or_a_mapping_whatever_the_inputs_are_called():
    expected = MODEL.loss(PARAMS, (X, LABELS))
    for name in ("x", "image", "a"):
        assert MODEL.loss(PARAMS, {name: X, "label": LABELS}) == expected
    assert MODEL.loss(PARAMS, [jnp.asarray(X), jnp.asarray(LABELS)]) == expected


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"x": X}, r"label.*got \['x'\]"),
        ({"x": X, "y": X, "label": LABELS}, r"got \['label', 'x', 'y'\]"),
        ({"label": LABELS}, r"got \['label'\]"),
        (X, "got ndarray"),
        ((X, LABELS, LABELS), "got tuple"),
        ((X, LABELS.astype(np.float32)), "labels must be integers, got float32"),
        ((X, LABELS[:, None]), r"labels \(5, 1\) for inputs \(5, 4\)"),
        ((X, LABELS[:3]), r"labels \(3,\) for inputs \(5, 4\)"),
        ((X, LABELS - 1), "from 0 to 2, got -1 to 1"),
        ((X, LABELS + 1), "from 0 to 2, got 1 to 3"),
        ((X[:, :3], LABELS), r"inputs must have shape \[B, 4\], got \(5, 3\)"),
        ((X[:, None], LABELS), r"inputs must have shape \[B, 4\], got \(5, 1, 4\)"),
    ],
)
def test_another_batch_is_an_error_that_says_what_it_got(batch, match):
    with pytest.raises(ValueError, match=f"^dense: .*{match}"):
        MODEL.loss(PARAMS, batch)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_under_jit_a_label_out_of_range_makes_loss_and_gradient_nan(wrong):
    step = jax.jit(jax.value_and_grad(MODEL.loss))
    labels = LABELS.copy()
    loss, gradient = step(PARAMS, (X, labels))
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    labels[2] = wrong
    loss, gradient = step(PARAMS, (X, labels))
    assert np.isnan(loss)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_a_run_refuses_labels_out_of_range():
    data = dbjax.from_arrays({"x": X, "label": LABELS + 1}, batch_size=5)
    with pytest.raises(ValueError, match="on the first minibatch"):
        dbjax.downpour.train(
            MODEL.loss, PARAMS, data, optimizer=dbjax.adagrad(0.1), steps=2
        )


def test_parameters_of_another_structure_are_an_error():
    for params in (PARAMS["layers"], {"layers": {0: PARAMS["layers"][0]}}):
        with pytest.raises(ValueError, match="dense: params must have the structure"):
            MODEL.apply(params, X)


def test_shapes_are_those_of_the_first_parameters_and_allocate_nothing():
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), MODEL.shapes)
    got = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), PARAMS)
    assert shapes == got and MODEL.num_parameters == 4 * 6 + 6 + 6 * 3 + 3
    # A network that no machine could hold.
    assert models.dense((10**6, 10**7, 2)).num_parameters == 10**13 + 3 * 10**7 + 2


def test_init_is_a_function_of_its_key():
    same = MODEL.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, PARAMS, same)
    other = MODEL.init(jax.random.key(1))
    assert np.any(other["layers"][0]["kernel"] != PARAMS["layers"][0]["kernel"])


@pytest.mark.parametrize("axes", [{"replica": 1}, {"data": 1, "model": 1}])
def test_a_loss_takes_any_mesh_with_the_axis_model_or_without(axes):
    mesh = dbjax.make_mesh(**axes)
    params = dbjax.shard_params(PARAMS, mesh, MODEL.rules if "model" in axes else [])
    batch = jax.device_put((X, LABELS), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        loss = jax.jit(MODEL.loss)(params, batch)
    np.testing.assert_allclose(loss, MODEL.loss(PARAMS, (X, LABELS)), 1e-6)
