"""The network for images: sizes, loss, first activations, training, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.models.vision import PRESETS, one_vs_all, vision

PLAIN_CODE = True


def images(count, classes, seed):
    """Noise over a pattern that belongs to the class, at any of nine places."""
    patterns = np.random.default_rng(0).standard_normal((classes, 16, 16, 3))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    noise = rng.standard_normal((count, 18, 18, 3))
    places = rng.integers(3, size=(count, 2))
    for image, label, at in zip(noise, labels, places, strict=True):
        i, j = at
        image[i : i + 16, j : j + 16] += patterns[label]
    return noise.astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize(
    ("preset", "millions"), [("80M", 80.2), ("330M", 330.9), ("1.7B", 1696.9)]
)
def test_the_sizes_are_those_of_the_paper(preset, millions):
    model, sizes = vision(preset), PRESETS[preset]
    assert round(model.num_parameters / 1e6, 1) == millions
    assert (sizes.image, sizes.patch, sizes.classes) == (100, 10, 21_000)
    assert min(sizes.maps) >= 8 and max(sizes.maps) <= 36
    assert all(grid % 8 == 0 for grid in sizes.grids)
    # G * G * (patch^2 * maps below + 1) * maps, and the logistic units.
    below = (3, *sizes.maps)
    stages = zip(sizes.grids[:3], below[:3], sizes.maps, strict=True)
    by_hand = sum(g * g * (100 * c + 1) * m for g, c, m in stages)
    by_hand += (sizes.grids[-1] ** 2 * sizes.maps[-1] + 1) * 21_000
    assert model.num_parameters == by_hand


def test_the_loss_is_a_sum_of_binary_log_losses():
    outputs = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    labels = np.array([0, 4, 2])
    p = 1 / (1 + np.exp(-outputs.astype(float)))
    right = np.arange(5) == labels[:, None]
    expected = -np.sum(np.where(right, np.log(p), np.log(1 - p)), axis=1)
    np.testing.assert_allclose(one_vs_all(outputs, labels), expected, rtol=1e-5)
    extreme = one_vs_all(jnp.array([[200.0, -200.0]]), jnp.array([1]))
    np.testing.assert_allclose(extreme, [400.0])


def test_it_learns_from_generated_images():
    model = vision("small", classes=8)
    optimizer = dbjax.adagrad(0.02)
    params = jax.jit(model.init)(jax.random.key(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        gradients = jax.grad(model.loss)(params, batch)
        sizes = [jnp.std(stage["kernel"]) for stage in gradients["stages"].values()]
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, sizes

    for i in range(100):
        params, state, sizes = step(params, state, images(32, 8, seed=1 + i))
        if i == 0:  # no stage's gradients vanish or explode beside another's
            assert len(sizes) == 3 and max(sizes) < 10 * min(sizes)
    inputs, labels = images(256, 8, seed=1000)
    prior = np.log(8) + 7 * np.log(8 / 7)  # all units say 1 / 8
    outputs = jax.jit(model.apply)(params, inputs)
    loss = float(jnp.mean(one_vs_all(outputs, labels)))
    accuracy = np.mean(np.argmax(outputs, axis=1) == labels)
    assert loss < 0.2 * prior, (loss, prior)
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preset": "2B"}, "'2B': allowed are '80M', '330M', '1.7B', 'small'"),
        ({"image": 9, "grid": 9}, "9x9 is smaller than the patch, 10x10"),
        ({"grid": 88}, "grid=88: patches of 10 in images of 100 have 91 to 109"),
        ({"image": 32}, "grid=96: patches of 10 in images of 32 have 23 to 41"),
        ({"window": 4}, "window=4: allowed are odd"),
        ({"pools": ((8, 8), (2, 2), (1, 1))}, "12x12|6x6 is smaller than the patch"),
        ({"maps": (8, 0, 8)}, "maps=.*allowed are numbers from 1"),
        ({"classes": 0}, "classes=0: allowed are numbers from 1"),
        ({"maps": (8, 8)}, "2 stages.*has 3"),
        ({"pools": ((2, 2), (2, 2), (7, 7))}, "must divide the 24 rows"),
    ],
)
def test_errors_say_what_does_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        vision(**kwargs)


def test_other_sizes():
    model = vision("small", image=16, channels=1, maps=(4, 4, 4), classes=10)
    params = jax.eval_shape(model.init, jax.random.key(0))
    outputs = jax.eval_shape(
        functools.partial(model.apply, inputs=jnp.zeros((2, 16, 16, 1))), params
    )
    assert outputs.shape == (2, 10)
