import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console
from ml_collections import ConfigDict

from configs import breast_cancer_sandblaster, speech_downpour, vision_downpour
from dbjax.trace import Trace
from experiments import dry_run, meshes, registry, train, workloads
from tests import many_devices

PLAIN_CODE = True

ROOT = pathlib.Path(__file__).parents[2]


def speech(**mesh):
    config = speech_downpour.get_config("laptop")
    config.workload.update(hidden=(8, 8), states=4, batch_size=4)
    config.mesh = mesh
    config.methods = ("downpour",)
    return config


@pytest.mark.multidevice
def test_a_run_is_partitioned_and_says_what_that_costs(tmp_path):
    """The command makes the devices; its process may have only one, as here."""
    options = {
        **{"methods": "downpour", "steps": 8, "eval_every": 4, "runtime": "threads"},
        **{"workload.hidden": "(8, 8)", "workload.states": 4, "workload.batch_size": 4},
    }
    environment = {name: os.environ[name] for name in os.environ if name != "NPROC"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.main", f"--workdir={tmp_path}"),
            "--config=configs/speech_downpour.py:laptop",
            *(f"--config.{key}={value}" for key, value in options.items()),
        ],
        cwd=ROOT,
        env=environment | {"XLA_FLAGS": many_devices.PLAIN_CODE},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "mesh: replica 2 x model 2, 4 cpu devices" in done.stdout
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mesh"] == {"replica": 2, "model": 2}
    trace = Trace.load(tmp_path / "downpour/trace.npz")
    assert trace.header["mesh"] == {"model": 2} and trace.header["meshes"] == 2
    said = (tmp_path / "downpour/partitions.txt").read_text()
    assert said in done.stdout
    assert "speech on model 2, per step, each of 2 devices" in said
    assert "all-reduce" in said and "partition 1" in said


@pytest.mark.parametrize("mesh", [None, {}])
def test_without_a_mesh_there_is_none(mesh):
    config = ConfigDict({} if mesh is None else {"mesh": mesh})
    workload = workloads.breast_cancer(seed=0)
    assert meshes.make(config) is None
    assert meshes.arguments(config, workload) == {}


def test_replicas_come_first_on_a_mesh_whatever_the_order_of_keys():
    config = ConfigDict({"mesh": {"model": 2, "data": 3, "replica": 4}})
    assert list(meshes.axes_of(config)) == ["replica", "data", "model"]


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"replica": 64, "model": 2}, "replica 64 x model 2 and needs 128 devices"),
        ({"model": 0}, "mesh.model is 0; it must be 1 or more"),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error(tmp_path, mesh, words):
    with pytest.raises(registry.ConfigError, match=words):
        train.train_and_evaluate(speech(**mesh), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mesh", "shards", "words"),
    [
        ({"model": 1}, 2, "sandblaster.shards is 2: vectors lie on the mesh"),
        ({"model": 1}, 1, None),
        ({"replica": 1, "model": 1}, 2, None),
    ],
)
def test_sandblaster_has_shards_where_replicas_have_devices(mesh, shards, words):
    config = breast_cancer_sandblaster.get_config()
    config.mesh, config.sandblaster.shards = mesh, shards
    config.methods = ("sandblaster_lbfgs",)
    if words is None:
        plan = train.prepare(config)[1]["sandblaster_lbfgs"]
        assert plan.mesh.axis_names == ("model",)
    else:
        with pytest.raises(registry.ConfigError, match=words):
            train.prepare(config)


def test_rules_that_do_not_fit_the_mesh_are_refused_before_anything_runs():
    with pytest.raises(registry.ConfigError, match="downpour: rules: .* does not fit"):
        train.prepare(speech(data=1))


def needs(config, **options):
    console = rich.console.Console(file=io.StringIO(), width=100)
    return dry_run.show(config, console, **options)


def test_a_dry_run_says_what_each_device_of_a_replica_holds():
    need = needs(speech(replica=1, model=1))["downpour"]
    assert need.each.total == need.memory and need.each.optimizer == need.optimizer


def test_a_dry_run_refuses_what_does_not_fit(monkeypatch):
    config = vision_downpour.get_config("1.7B")
    config.workload.test_size = 1
    config.mesh = {"replica": 1, "model": 1}

    def run(*_):
        raise AssertionError("parameters were made")

    monkeypatch.setattr(dry_run, "estimate", run)
    with pytest.raises(registry.ConfigError, match="^sgd is not part.*Leave it out"):
        needs(config, budget=16 * 2**30)
    config.methods = ("downpour",)
    words = "^downpour: .* there are 16.0 GiB: 4 partitions .* would fit, 11.1 GiB"
    with pytest.raises(registry.ConfigError, match=words):
        needs(config, budget=16 * 2**30)


def test_a_gradient_on_one_device_exchanges_nothing():
    config = speech(model=1)
    workload = workloads.make(config.workload, 0)
    costs = meshes.costs(meshes.of_a_replica(config), workload, seed=0)
    assert costs.devices == 1 and not costs.collectives
    size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(workload.init(0)))
    assert costs.output_bytes >= 4 * size
