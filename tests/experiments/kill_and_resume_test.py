import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import kill_and_resume
from experiments.kill_and_resume import Job, Life, check_life, same_bits

ROOT = pathlib.Path(__file__).parents[2]
JOB = Job("emulated", steps=20, checkpoint_every=5, n_fetch=1, n_push=1)
ORDER = [(step % 6, step // 6) for step in range(20)]


def life(begun, saved, finished=False):
    return Life(begun, saved, None, 1.0, finished)


def following(saved):
    done = [replica for replica, _ in ORDER[:saved]]
    return [done.count(replica) for replica in range(6)]


@pytest.mark.slow
def test_two_kills_change_nothing():
    script = [sys.executable, "-m", "experiments.kill_and_resume"]
    options = ["--kills=2", "--steps=30", "--seed=2"]
    ended = subprocess.run(
        [*script, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Killed 2 times; the same bits" in ended.stdout
    assert "(finished)" in ended.stdout


@pytest.mark.parametrize(
    ("lived", "saved", "complaint"),
    [
        (life(ORDER[:7], 5), 0, None),
        (life([], 5), 5, None),
        (life(ORDER[5:], 20, finished=True), 5, None),
        (life(ORDER[:7], 5), 5, "went on with"),  # began anew
        (life(ORDER[6:9], 5), 5, "are not the reference's"),  # left one out
        (life(ORDER[:7], 0), 0, "checkpoint 5 was due"),
        (life(ORDER[10:12], 5), 10, "checkpoint 10 is gone"),
        (life([ORDER[6], ORDER[5]], 5), 5, "are not the reference's"),
        (life(ORDER[5:19], 15, finished=True), 5, "19 minibatches were computed"),
    ],
)
def test_what_a_child_did_wrong_is_found(lived, saved, complaint):
    faults = check_life(lived, saved, following(saved), ORDER, JOB)
    assert bool(faults) == bool(complaint)
    assert complaint is None or any(complaint in fault for fault in faults)


def test_a_single_bit_is_found():
    one = {"w": np.zeros(3, np.float32), "n": np.array(1)}
    assert same_bits(one, {name: value.copy() for name, value in one.items()}) == []
    negative = {**one, "w": np.array([0, 0, -0.0], np.float32)}
    assert same_bits(one, negative) == ["w differs in its bits"]
    wide = {**one, "w": np.zeros(3)}
    assert same_bits(one, wide) == ["w has another dtype or shape"]
    assert same_bits(one, {"w": one["w"]}) == ["n is in one of the two only"]


def test_moments_are_drawn_by_the_seed():
    def draws(seed):
        rng = np.random.default_rng(seed)
        return [kill_and_resume.draw(rng) for _ in range(50)]

    assert draws(0) == draws(0) != draws(1)
    assert {moment.what for moment in draws(0)} == {"starting", "computing", "writing"}
