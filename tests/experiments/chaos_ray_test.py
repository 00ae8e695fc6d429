import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import chaos_ray
from experiments.chaos_ray import Life, Place, check_accuracy, complete, spared

ROOT = pathlib.Path(__file__).parents[2]
PLACES = {
    "replica 0": Place(1, "a"),
    "shard 0": Place(2, "a"),
    "standby 0": Place(3, "b"),
    "shard 1": Place(4, "b"),
    "standby 1": Place(5, "b"),
}


@pytest.mark.slow
@pytest.mark.ray
def test_a_small_run_survives_two_kills():
    pytest.importorskip("ray")
    script = [sys.executable, "-m", "experiments.chaos_ray", "--runs=1", "--kills=2"]
    size = ["--replicas=2", "--shards=1", "--nodes=1", "--steps=120", "--seed=1"]
    ended = subprocess.run(
        [*script, *size, "--undisturbed=0", "--limit=120"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 runs disturbed: all ended, and nothing was lost." in ended.stdout


def test_the_next_kill_waits_for_every_standby():
    assert complete(PLACES, shards=2)
    assert not complete(PLACES, shards=3)
    for name in PLACES:
        assert not complete({k: v for k, v in PLACES.items() if k != name}, shards=2)
    promoted = PLACES | {"shard 0": PLACES["standby 0"]}
    assert not complete(promoted, shards=2)


def test_a_node_with_a_shard_and_its_standby_is_spared():
    assert spared(PLACES, shards=2) == {"b"}
    assert spared(PLACES, shards=1) == set()


def test_only_processes_of_ray_count_as_alive(tmp_path):
    path = tmp_path / "places"
    assert chaos_ray.read(path) == {}
    row = {"name": "replica 0", "pid": os.getpid(), "node": "a"}  # a number used again
    path.write_text(json.dumps(row) + "\n" + '{"name": "torn')
    assert chaos_ray.read(path) == {}


def test_an_accuracy_below_the_noise_is_found():
    assert check_accuracy(0.1, []) == []  # nothing to compare with
    assert check_accuracy(0.981, [0.98, 0.984]) == []
    assert check_accuracy(0.999, [0.98, 0.984]) == []
    assert "undisturbed at least 97.2%" in check_accuracy(0.96, [0.98, 0.984])[0]


def test_a_row_says_who_was_killed_and_whether_it_failed():
    result = {"accuracy": 0.98, "lost": 0, "promotions": 1}
    life = Life(["shard 0", "driver"], 41.6, result, [])
    row = ("3", "2", "42", "0", "1", "98.0%", "shard 0, driver")
    assert chaos_ray.describe("3", life) == row
    failed = Life([], 400.0, {}, ["it has not ended after 400 s"])
    assert chaos_ray.describe("4", failed)[3:] == ("-", "-", "-", " FAILED")


def test_the_seed_decides_who_is_killed():
    def draws(seed):
        rng, chances = np.random.default_rng(seed), chaos_ray.VICTIMS
        return rng.choice([*chances], size=50, p=[*chances.values()]).tolist()

    assert draws(0) == draws(0) != draws(1)
    assert set(draws(0)) == set(chaos_ray.VICTIMS)


@pytest.mark.parametrize("word", ["--replicas=0", "--steps=0", f"--keep={ROOT}"])
def test_what_cannot_be_is_an_error(word, capsys):
    with pytest.raises(SystemExit):
        chaos_ray.parse([word])
    assert word.split("=")[0] in capsys.readouterr().err
