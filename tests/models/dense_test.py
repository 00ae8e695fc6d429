"""Dense networks: sizes, first weights, losses, and their partitions."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax import models
from tests import many_devices

PLAIN_CODE = True


@pytest.mark.multidevice
def test_partitions_change_no_value_and_exchange_the_least():
    script = pathlib.Path(__file__).with_name("dense_mesh_check.py")
    lines = many_devices.run(script, XLA_FLAGS=many_devices.PLAIN_CODE)
    # Four sums of [128, 2560], and two numbers per example for the softmax.
    least = 4 * 128 * (4 * 2560 + 2)
    assert lines == ["models 5", f"speech {least}", "drawn in place"]


def test_speech_is_the_network_of_the_paper():
    shapes = models.speech().shapes["layers"]
    assert [shapes[i]["kernel"].shape for i in range(5)] == [
        (440, 2560),
        (2560, 2560),
        (2560, 2560),
        (2560, 2560),
        (2560, 8192),
    ]
    assert models.speech().num_parameters == 41_777_152


def test_it_computes_what_plain_numpy_does():
    model = models.dense((5, 7, 6, 3))
    params = model.init(jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    layers = [params["layers"][i] for i in range(3)]
    expected = x
    for layer in layers[:2]:
        expected = 1 / (1 + np.exp(-(expected @ layer["kernel"] + layer["bias"])))
    expected = expected @ layers[2]["kernel"] + layers[2]["bias"]
    outputs = model.apply(params, x)
    np.testing.assert_allclose(outputs, expected, 1e-4, 1e-5)
    labels = np.array([0, 2, 1, 2])
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    np.testing.assert_allclose(model.loss(params, (x, labels)), losses.mean(), 1e-6)


def test_a_label_of_few_bits_finds_its_class():
    outputs = np.zeros((1, 300), np.float32)
    outputs[0, 44] = 9.0  # 300 classes do not fit in uint8; 300 - 256 is 44
    loss = models.dense((2, 300)).losses(jnp.asarray(outputs), jnp.uint8([44]))
    assert 0 < float(loss[0]) < 0.1


@pytest.mark.parametrize(("gain", "least", "most"), [(4, 0.15, 0.4), (1, 0, 0.02)])
def test_four_sigmoid_layers_pass_on_the_signal_only_with_a_gain(gain, least, most):
    params = models.dense((400, *[400] * 4, 10), gain=gain).init(jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((64, 400)).astype(np.float32)
    spread = []
    for i in range(4):
        layer = params["layers"][i]
        x = jax.nn.sigmoid(x @ layer["kernel"] + layer["bias"])
        spread.append(float(x.std(0).mean()))  # over examples
        assert not layer["bias"].any()
    assert least < spread[3] / spread[0] < most


def test_two_classes_are_a_logistic_function_and_more_a_softmax():
    model = models.logistic_regression(3)
    params = {
        "layers": {
            0: {"kernel": np.float32([[1], [-2], [0.5]]), "bias": np.float32([0.25])}
        }
    }
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1, 0])
    logits = x @ params["layers"][0]["kernel"][:, 0] + 0.25
    expected = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    params = jax.tree.map(jnp.asarray, params)
    np.testing.assert_allclose(model.loss(params, (x, labels)), expected, 1e-6)
    for classes in (2, 5):
        model = models.logistic_regression(3, classes=classes)
        params = model.init(jax.random.key(0))
        outputs = model.apply(params, x)
        assert outputs.shape == (6, classes) and not np.any(outputs)
        np.testing.assert_allclose(
            model.loss(params, (x, labels)), np.log(classes), 1e-6
        )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: models.dense((4,)), r"sizes=\(4,\)"),
        (lambda: models.dense((4, 0, 2)), r"sizes=\(4, 0, 2\)"),
        (lambda: models.logistic_regression(0), "features=0"),
        (lambda: models.logistic_regression(3, classes=1), "classes=1"),
    ],
)
def test_a_network_that_cannot_be_is_an_error(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_downpour_trains_one_and_keeps_it_in_a_checkpoint(tmp_path):
    model = models.dense((8, 16, 4))
    random = np.random.default_rng(0)
    x = random.standard_normal((256, 8)).astype(np.float32)
    label = (x @ random.standard_normal((8, 4))).argmax(1)
    data = dbjax.from_arrays({"x": x, "label": label}, batch_size=16)
    params = model.init(jax.random.key(0))

    def train():
        return dbjax.downpour.train(
            model.loss, params, data, optimizer=dbjax.adagrad(0.1), replicas=4,
            shards=2, steps=160, checkpoint_dir=tmp_path, per_shard=True,
        )  # fmt: skip

    run = train()
    jax.tree.map(np.testing.assert_array_equal, run.params, train().params)
    whole = {"x": x, "label": label}
    loss = jax.jit(model.loss)
    assert loss(run.params, whole) < 0.5 * loss(params, whole)
