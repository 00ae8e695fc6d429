"""What configs and metrics know of Ray."""

import io
import json

import numpy as np
import pytest
import rich.console

import dbjax
from configs import digits_ray
from dbjax.runtime.ray import Progress
from experiments import dry_run, metrics, registry, runtimes, train

SMALL = {
    "steps": 60,
    "eval_every": 20,
    "checkpoint_every": 30,
    "workload.batch_size": 4,
    "workload.hidden": (8,),
    "workload.fixed_examples": 40,
    "downpour.replicas": 2,
    "downpour.shards": 1,
    "sandblaster.replicas": 1,
    "sandblaster.shards": 1,
    "sandblaster.portion_size": 20,
    "sandblaster.iterations": 4,
    "sandblaster.eval_every": 2,
    "ray.timeout": 60.0,
}


def small(**changes):
    config = digits_ray.get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return config.lock()


def quiet():
    return rich.console.Console(file=io.StringIO(), width=100)


def writer(folder, file=None):
    console = rich.console.Console(file=file or io.StringIO())
    return metrics.Writer(folder, "downpour", steps=40, batch_size=8, console=console)


def how_it_goes(step):
    return Progress(step, float(step), 12.0, 1.5, replicas=2, deaths=1)


@pytest.fixture
def installed(monkeypatch):
    """Nothing here looks further than whether Ray could be imported."""
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: name)


def test_a_config_says_where_and_how(installed):
    changes = {"ray.address": "auto", "ray.standby": 1, "ray.working_dir": "."}
    config = small(**changes, **{"ray.replica_cpus": 2.0, "ray.replica_gpus": 1.0})
    machines, seen = runtimes.make_cluster(config), []
    ray = runtimes.make_runtime(config, machines, seen.append)
    assert isinstance(ray, dbjax.Ray)
    assert (ray.address, ray.standby, ray.timeout) == ("auto", 1, 60.0)
    assert (ray.replica_cpus, ray.shard_cpus, ray.replica_gpus) == (2.0, 0.0, 1.0)
    assert ray.runtime_env == {"working_dir": "."}
    ray.watch(how_it_goes(3))
    assert seen == [how_it_goes(3)]
    batch = runtimes.make_runtime(config, machines, seen.append, minibatches=False)
    assert batch.standby == 0 and batch.watch is None  # which Downpour only has


@pytest.mark.parametrize(
    ("key", "value"), [("standby", 2), ("timeout", 0.0), ("address", "")]
)
def test_what_cannot_be_is_an_error_before_anything_starts(installed, key, value):
    with pytest.raises(registry.ConfigError, match=f"ray: {key}"):
        train.prepare(small(**{f"ray.{key}": value}))


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(registry.ConfigError, match=r"pip install 'dbjax\[ray\]'"):
        train.prepare(small())


def test_a_dry_run_starts_nothing(installed, monkeypatch):
    def session(self):
        raise AssertionError("it connects")

    monkeypatch.setattr(dbjax.Ray, "session", session)
    needs = dry_run.show(small(), quiet())
    assert set(needs) == {"downpour", "sandblaster_lbfgs"}
    assert all(need.clock is None for need in needs.values())


def test_how_a_run_goes_stands_beside_its_evaluations(tmp_path):
    file = io.StringIO()
    scores = {"test_accuracy": 0.5, "test_loss": 1.0}
    with writer(tmp_path, file) as out:
        for step in (8, 16, 24):
            out.watch(how_it_goes(step))
        for step in (10, 20):  # an evaluation may come late
            out.write(step, step, scores)
        out.complete([{"step": step, "value": 1.0} for step in (10, 16, 20)])
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [8, 16, 24, 10, 20]
    assert rows[0].pop("wall") >= 0
    expected = {"method": "downpour", "step": 8, "time": 8.0, "examples": 64}
    pace = {"updates_per_second": 12.0, "staleness": 1.5, "replicas": 2, "deaths": 1}
    assert rows[0] == {**expected, **pace}
    assert "value" not in rows[1] and rows[3]["value"] == 1.0
    assert "50.0%, 12 updates/s, staleness 1.5, 2 replicas, 1 death" in file.getvalue()


def test_a_resumed_run_replaces_what_was_said_of_it(tmp_path):
    scores = {"test_accuracy": 0.5, "test_loss": 1.0}
    with writer(tmp_path) as out:
        out.write(10, 1.0, scores)
        for step in (8, 16, 24):
            out.watch(how_it_goes(step))
    with writer(tmp_path) as out:
        out.watch(how_it_goes(12))
    steps = [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")]
    assert steps == [10, 8, 12]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_config_runs_on_ray(tmp_path):
    outcomes = train.train_and_evaluate(small(), tmp_path, console=quiet())
    for name, steps in (("downpour", 60), ("sandblaster_lbfgs", 4)):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["step"] == steps and np.isfinite(result["test_loss"])
        assert outcomes[name].trace.header["runtime"] == "Ray"
