import pickle
import sys

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

import dbjax
from experiments import registry, workload, workloads
from tests import data_files
from tests.experiments import file_sets

PLAIN_CODE = True

SMALL = {
    "digits": {"hidden": (16,), "batch_size": 8},
    "breast_cancer": {"batch_size": 8},
    "speech_frames": {"hidden": (8,), "states": 4, "test_size": 50, "batch_size": 8},
    "speech": {"hidden": (8, 8), "states": 4, "test_size": 50, "batch_size": 8},
    "vision": {
        "size": "small",
        "classes": 4,
        "maps": (4,),
        "pools": ((4, 4),),
        "test_size": 50,
        "batch_size": 8,
    },
    **file_sets.SMALL,
}


def small(name, seed=0, **options):
    places = file_sets.places(name)
    return workloads.make(
        ConfigDict({"name": name, **SMALL[name], **places, **options}), seed
    )


def test_every_workload_is_tested():
    assert set(SMALL) == set(workloads.WORKLOADS)


@pytest.mark.parametrize("name", SMALL)
def test_a_few_steps_lower_the_loss(name):
    workload = small(name)
    params = workload.init(0)
    first = workload.evaluate(params)
    gradient = jax.jit(jax.grad(workload.loss))
    for step in range(60):
        slope = gradient(params, workload.data.batch(0, step))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
    last = workload.evaluate(params)
    assert set(last) >= {"test_loss", "test_accuracy"}
    assert last["test_loss"] < first["test_loss"]
    assert 0 <= last["test_accuracy"] <= 1


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_is_a_mean_of_scalars_per_example(name):
    workload = small(name)
    params = workload.init(1)
    batch = workload.data.batch(0, 0)
    assert len(jax.tree.leaves(batch)[0]) == workload.batch_size
    loss_fn = jax.jit(workload.loss)
    loss = loss_fn(params, batch)
    assert loss.shape == () and loss.dtype == np.float32
    doubled = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    np.testing.assert_allclose(loss_fn(params, doubled), loss, rtol=1e-5)


def test_the_test_split_is_the_same_for_every_seed_and_never_trained_on():
    train, test = workload.split(1797, 497)
    assert len(test) == 497 and not set(train) & set(test)
    params = small("digits").init(0)
    measured = [small("digits", seed).evaluate(params) for seed in (0, 1)]
    assert measured[0] == measured[1]


def test_full_sizes_are_those_of_the_paper_and_the_readme():
    assert workloads.digits(seed=0).num_parameters == 9_610
    paper = workloads.speech_frames(
        seed=0, states=8192, hidden=(2560,) * 4, test_size=1
    )
    assert paper.num_parameters == 41_777_152
    assert "41,777,152 parameters" in paper.describe()
    assert workloads.speech(seed=0, test_size=1).num_parameters == 41_777_152


@pytest.mark.parametrize("name", ["speech", "vision", "mnist", "kaldi"])
def test_networks_of_the_paper_can_be_partitioned(name):
    workload = small(name)
    mesh = dbjax.make_mesh(model=1)
    params = dbjax.shard_params(workload.init(0), mesh, workload.rules)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    assert specs and all("model" in spec for spec in specs)


def test_painted_shapes_can_be_told_apart():
    workload = small("vision")
    params, rule = workload.init(0), dbjax.adagrad(0.05)
    state = rule.init(params)

    @jax.jit
    def update(params, state, batch):
        updates, state = rule.update(jax.grad(workload.loss)(params, batch), state)
        return optax.apply_updates(params, updates), state

    for step in range(200):
        params, state = update(params, state, workload.data.batch(0, step))
    assert workload.evaluate(params)["test_accuracy"] > 0.7  # by chance: 0.25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "digit"}, "did you mean 'digits'"),
        ({"name": "digits", "batchsize": 3}, "did you mean 'batch_size'"),
        ({"name": "digits", "train_on": "fix"}, "train_on .* did you mean 'fixed'"),
        ({"name": "digits", "activation": "sigmoids"}, "did you mean 'sigmoid'"),
    ],
)
def test_what_does_not_exist_names_the_nearest(options, words):
    with pytest.raises(registry.ConfigError, match=words):
        workloads.make(ConfigDict(options), 0)


def test_breast_cancer_is_convex_and_starts_at_zero():
    workload = small("breast_cancer")
    zero = workload.init(7)
    assert all(not leaf.any() for leaf in jax.tree.leaves(zero))
    np.testing.assert_allclose(workload.evaluate(zero)["test_loss"], np.log(2), 1e-6)
    # Its features are standardised, so a unit step size is of the right order.
    norm = optax.tree.norm(jax.grad(workload.loss)(zero, workload.data.batch(0, 0)))
    assert 0.1 < norm < 10


def digits(**options):
    return workloads.make(
        ConfigDict({"name": "digits", **SMALL["digits"], **options}), 0
    )


def test_a_fixed_set_is_the_beginning_of_the_stream():
    stream, fixed = digits(), digits(train_on="fixed", fixed_examples=20)
    assert stream.fixed is None and len(fixed.fixed["label"]) == 20
    for name, values in fixed.fixed.items():
        seen = [stream.data.batch(0, step)[name] for step in range(3)]
        np.testing.assert_array_equal(values, np.concatenate(seen)[:20])
    rows = {row.tobytes() for row in fixed.fixed["image"]}
    assert {row.tobytes() for row in fixed.data.batch(3, 5)["image"]} <= rows


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_train_loss_is_what_is_minimised(name):
    options = {"train_on": "images"} if name == "digits" else {}
    workload = workloads.make(ConfigDict({"name": name, **SMALL[name], **options}), 0)
    params = jax.tree.map(lambda x: x + 0.1, workload.init(0))
    loss = workload.loss(params, workload.fixed)
    np.testing.assert_allclose(workload.evaluate(params)["train_loss"], loss, 1e-5)


@pytest.mark.parametrize("name", file_sets.SMALL)
def test_data_in_files_pickles_and_is_the_same_everywhere(name):
    data = small(name, seed=3).data
    want = data.batch(2, 5)
    for other in (pickle.loads(pickle.dumps(data)), small(name, seed=3).data):
        jax.tree.map(np.testing.assert_array_equal, other.batch(2, 5), want)


@pytest.mark.parametrize("name", ["mnist", "cifar", "arrays"])
def test_all_examples_are_there_for_batch_methods(name):
    workload = small(name)
    lengths = {len(leaf) for leaf in jax.tree.leaves(workload.fixed)}
    assert lengths == {workload.data.num_examples}


def test_frames_may_be_spliced_all_at_once():
    stream, fixed = small("kaldi"), small("kaldi", train_on="fixed")
    assert stream.fixed is None
    rows = np.arange(stream.data.num_examples)
    want = stream.data.source[rows]
    jax.tree.map(np.testing.assert_array_equal, fixed.fixed, want)


def test_what_is_held_out_is_not_trained_on():
    workload = small("image_folder")
    assert workload.data.data.num_examples == 24 - 6
    workload = small("arrays", held_out=0.25)
    assert workload.data.num_examples == 60


def test_a_folder_may_have_its_own_validation(tmp_path):
    for part, count in (("train", 5), ("val", 2)):
        data_files.write_images(tmp_path / part, count=count)
    workload = small("image_folder", path=str(tmp_path))
    assert "15 images of 3 classes" in workload.describe()
    (tmp_path / "val" / "n0002").rename(tmp_path / "val" / "n0009")
    with pytest.raises(ValueError, match="train and val differ in .*'n0002', 'n0009'"):
        small("image_folder", path=str(tmp_path))


@pytest.mark.parametrize("name", file_sets.SMALL)
def test_files_that_are_not_there_are_an_error_of_the_config(name, tmp_path):
    place = str(tmp_path / "none.npz")
    with pytest.raises(registry.ConfigError, match=f"workload {name}: .*none.npz") as e:
        small(name, path=place)
    assert "Say where it is with workload.path" in str(e.value)


def test_a_package_that_is_missing_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaldiio", None)
    with pytest.raises(registry.ConfigError, match=r"pip install 'dbjax\[speech\]'"):
        small("kaldi")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(registry.ConfigError, match=r"pip install 'dbjax\[images\]'"):
        small("image_folder")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("arrays", {"inputs": "image"}, "no array 'image', but x, y; say which with"),
        ("arrays", {"labels": "x"}, r"x is \[80, 4, 2\] of float64; labels are"),
        ("arrays", {"held_out": 1.0}, "held_out=1.0 of 80: allowed is a part"),
        ("kaldi", {"states": 2}, "states=2: .*ali.ark has 3, from 0"),
        ("kaldi", {"train_on": "fix"}, "did you mean 'fixed'"),
        ("cifar", {"kind": "cifar"}, "kind='cifar': allowed are"),
    ],
)
def test_options_that_do_not_fit_the_files_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        small(name, **options)
