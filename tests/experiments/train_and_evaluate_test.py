import importlib
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import rich.console

from experiments import dry_run, metrics, registry, train, workloads
from experiments.methods import METHODS
from tests.experiments import file_sets

PLAIN_CODE = True

OTHERS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")
    # `finished` is `digits_downpour`, and `ray_test.py` has `digits_ray`.
    if path.stem not in ("__init__", "digits_downpour", "digits_ray")
)
SIZES = {
    "digits": {"hidden": (8,), "batch_size": 4},
    "breast_cancer": {"batch_size": 4},
    "speech_frames": {"hidden": (8,), "states": 4, "batch_size": 4},
    "speech": {"hidden": (8, 8), "states": 4, "batch_size": 4},
    "vision": {
        "classes": 4,
        "maps": (4,),
        "pools": ((4, 4),),
        "batch_size": 4,
        "test_size": 20,
    },
    **file_sets.SMALL,
}
SANDBLASTER = {
    "replicas": 2,
    "shards": 1,
    "portion_size": 20,
    "iterations": 4,
    "memory_size": 2,
    "batch_portions": 2,
    "checkpoint_every": 2,
}


def toy(name="digits_downpour"):
    """A config of the house, shrunk to a few steps of a tiny network."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.workload.update(SIZES[config.workload.name])
    config.workload.update(file_sets.places(config.workload.name))
    if "steps" in config:
        config.update(steps=40, eval_every=10, checkpoint_every=20)
    if "downpour" in config:
        config.downpour.update(replicas=3)
    if "sandblaster" in config:
        config.sandblaster.update(SANDBLASTER)
    if config.workload.get("train_on") == "fixed":
        config.workload.fixed_examples = 40
    if "mesh" in config:  # of one device here; `mesh_test.py` has four
        config.mesh = dict.fromkeys(config.mesh, 1)
        config.methods = ("downpour",)  # what the mesh is for
    config.cluster.slow_replicas = ()
    return config.lock()


def run(config, workdir):
    text = io.StringIO()
    console = rich.console.Console(file=text, width=100)
    outcomes = train.train_and_evaluate(config, workdir, console=console)
    return outcomes, text.getvalue()


def rows(workdir):
    """What was measured, without the time it took."""
    found = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "wall"} for row in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "digits"
    return workdir, *run(toy(), workdir)


def test_a_workdir_holds_all_there_is_to_know(finished):
    workdir, outcomes, text = finished
    assert (
        json.loads((workdir / "config.json").read_text())["downpour"]["replicas"] == 3
    )
    for name in ("accuracy", "downpour_staleness", "downpour_timeline"):
        assert (workdir / f"{name}.png").stat().st_size > 5_000
    for method in ("sgd", "downpour"):
        assert (workdir / method / "trace.npz").exists()
        assert any((workdir / method / "checkpoints").iterdir())
        steps = [row["step"] for row in rows(workdir) if row["method"] == method]
        assert steps == [10, 20, 30, 40]
        assert outcomes[method].result["step"] == 40 and method in text


def test_downpour_is_sooner_and_stale_where_sgd_is_neither(finished):
    _, outcomes, _ = finished
    sgd, downpour = outcomes["sgd"], outcomes["downpour"]
    assert sgd.result["time"] > 2 * downpour.result["time"]
    assert sgd.trace.staleness().max() == 0 < downpour.trace.staleness().mean()


def test_a_second_call_reruns_nothing(finished, monkeypatch):
    workdir, outcomes, text = finished
    before = rows(workdir)

    def rerun(*_):
        raise AssertionError("a finished method ran again")

    for name in METHODS:
        monkeypatch.setitem(METHODS, name, METHODS[name]._replace(run=rerun))
    again, said = run(toy(), workdir)
    assert rows(workdir) == before
    assert all(f"{name}: finished by an earlier call" in said for name in outcomes)
    assert said.splitlines()[-5:] == text.splitlines()[-5:]
    for name, outcome in again.items():
        assert outcome.trace.diff(outcomes[name].trace) is None
        assert outcome.result == outcomes[name].result


def test_a_run_that_broke_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    real, broken = metrics.Writer.write, []

    def write(self, step, *rest):
        if step == 30 and self._method == "downpour" and not broken:
            broken.append(step)
            raise OSError("no space left")
        real(self, step, *rest)

    monkeypatch.setattr(metrics.Writer, "write", write)
    with pytest.raises(OSError, match="no space left"):
        run(toy(), tmp_path)
    assert rows(tmp_path)[-1]["step"] == 20
    assert (tmp_path / "accuracy.png").exists()  # of sgd, which had finished
    outcomes, said = run(toy(), tmp_path)
    assert "downpour: goes on from its checkpoint of step" in said
    assert "wall: downpour since step" in said
    assert rows(tmp_path) == rows(finished[0])
    for name, outcome in outcomes.items():
        assert outcome.trace.diff(finished[1][name].trace) is None


def test_another_config_is_told_apart_by_its_first_key(finished):
    config = toy()
    config.downpour.replicas = 50
    with pytest.raises(registry.ConfigError) as error:
        run(config, finished[0])
    assert "downpour.replicas is 3 there and 50 here" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("replicas", 0), ("shards", 0), ("shards", 10**6), ("n_fetch", -1), ("n_push", 0)],
)
def test_bad_numbers_are_refused_before_anything_runs(tmp_path, key, value):
    config = toy()
    config.downpour[key] = value
    with pytest.raises(ValueError, match=key):
        run(config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["steps", "eval_every", "checkpoint_every"])
def test_counts_are_checked_before_anything_runs(tmp_path, key):
    config = toy()
    config[key] = 0
    with pytest.raises(registry.ConfigError, match=f"{key} is 0"):
        run(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_what_the_library_refuses_names_the_part(tmp_path):
    config = toy()
    config.cluster.step_time = -1.0
    with pytest.raises(registry.ConfigError, match="^cluster: .*got -1"):
        run(config, tmp_path)


@pytest.fixture
def spoilt(finished, tmp_path):
    """A finished workdir whose sgd has lost its result, and its checkpoints are bad."""
    shutil.copytree(finished[0], tmp_path / "spoilt")
    (tmp_path / "spoilt/sgd/result.json").unlink()
    for folder in (tmp_path / "spoilt/sgd/checkpoints").iterdir():
        (folder / "manifest.json").write_text("torn")
    return tmp_path / "spoilt"


def test_damaged_checkpoints_are_an_error_that_says_what_to_do(spoilt):
    with pytest.warns(UserWarning, match="damaged"):
        with pytest.raises(registry.ConfigError, match="^sgd: .*remove them"):
            run(toy(), spoilt)
    shutil.rmtree(spoilt / "sgd/checkpoints")
    assert run(toy(), spoilt)[0]["sgd"].result["info"]["steps"] == 40


def test_a_damaged_trace_is_an_error_that_says_what_to_do(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "spoilt")
    path = tmp_path / "spoilt/downpour/trace.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(registry.ConfigError, match="cannot be read .* remove"):
        run(toy(), tmp_path / "spoilt")
    (tmp_path / "spoilt/downpour/result.json").unlink()
    outcomes, _ = run(toy(), tmp_path / "spoilt")
    assert outcomes["downpour"].trace.diff(finished[1]["downpour"].trace) is None


def test_a_workdir_where_nothing_was_trained_takes_another_config(tmp_path):
    config = toy()
    train.claim(tmp_path, config)
    config.downpour.replicas = 50
    train.claim(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text('{"method": "sgd", "step": 0}\n')
    with pytest.raises(registry.ConfigError, match="replicas is 50 there and 3 here"):
        train.claim(tmp_path, toy())


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (("sgd", "downpor"), "did you mean 'downpour'"),
        ((), "one or more"),
        (("sgd", "sgd"), "each once"),
    ],
)
def test_methods_are_checked_before_anything_runs(tmp_path, methods, words):
    config = toy()
    config.methods = methods
    with pytest.raises(registry.ConfigError, match=words):
        run(config, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["optimizer", "runtime"])
def test_other_names_are_checked_too(tmp_path, name):
    config = toy()
    if name == "optimizer":
        config.sgd.optimizer = "adagard"
    else:
        config.runtime = "emulate"
    with pytest.raises(registry.ConfigError, match="did you mean '(adagrad|emulated)'"):
        run(config, tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_config_runs(tmp_path, name):
    outcomes, _ = run(toy(name), tmp_path)
    for outcome in outcomes.values():
        assert np.isfinite(outcome.result["test_loss"])


def test_on_threads_too(tmp_path):
    config = toy()
    config.runtime, config.methods = "threads", ("downpour",)
    outcomes, _ = run(config, tmp_path)
    assert outcomes["downpour"].result["step"] == 40


def test_a_dry_run_says_what_is_needed_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = io.StringIO()
    needs = dry_run.show(toy(), rich.console.Console(file=text, width=100))
    size = 4 * workloads.make(toy().workload, 0).num_parameters
    assert needs["downpour"].parameters == size
    assert needs["downpour"].memory == 7 * size + size  # R + 4, and Adagrad's sums
    clocks = [needs[name].clock or 0.0 for name in ("sgd", "downpour")]
    assert clocks[0] > 2 * clocks[1] > 0
    assert "downpour" in text.getvalue()
    assert not any(tmp_path.iterdir())
