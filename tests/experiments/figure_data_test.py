"""Frames of one's own and digits in figures 4 and 5."""

import csv
import dataclasses
import math

import numpy as np
import pytest

from experiments import figure4, figure_data, figure_study
from tests.experiments.figures_test import TINY, TINY_TASK

PLAIN_CODE = True


def _save(path, **columns):
    rng = np.random.default_rng(0)
    state = rng.integers(0, 5, size=2_000)
    frame = rng.normal(size=(2_000, 7)) + 3.0 * np.eye(5, 7)[state]
    np.savez(path, **({"frame": frame, "state": state} | columns))
    return str(path)


def test_a_file_is_cut_into_parts_that_share_nothing(tmp_path):
    file = _save(tmp_path / "mine.npz", frame=np.arange(4_000.0).reshape(2_000, 2))
    task = figure_data.task_of(file, TINY_TASK)
    assert (task.states, task.bands, task.data) == (5, 2, file)
    assert (task.training, task.validation, task.test) == (1_700, 100, 200)
    sets = figure_data.sets(task)
    frames = np.concatenate([part.frame[:, 0] for part in sets[:3]])
    assert len(np.unique(frames)) == 2_000
    assert abs(sets.training.frame.mean()) < 1e-3
    assert sets.training.frame.dtype == np.float32 and math.isnan(sets.best)


def test_no_more_is_trained_on_than_is_asked_for(tmp_path):
    file = _save(tmp_path / "mine.npz")
    like = dataclasses.replace(TINY_TASK, training=500)
    task = figure_data.task_of(file, like)
    assert len(figure_data.sets(task).training.state) == task.training == 500


def test_digits_of_the_test_are_others_than_those_of_training():
    task = figure_data.task_of("digits", TINY_TASK)
    sets = figure_data.sets(task)
    assert task.model.num_parameters == 64 * 8 + 8 + 8 * 10 + 10
    assert [len(part.state) for part in sets[:3]] == [4_000, 300, 600]
    assert all(set(part.state) == set(range(10)) for part in sets[:3])


def test_figure_4_of_a_file(tmp_path, monkeypatch):
    once = dataclasses.replace(TINY, seeds=1, trials=1, clusters=1)
    monkeypatch.setattr(figure4, "SMOKE_STUDY", once)
    file = _save(tmp_path / "mine.npz")
    figure4.main(["--smoke", f"--data={file}", f"--out={tmp_path}"])
    text = (tmp_path / "figure4.csv").read_text()
    assert "mine.npz" in text and "the best possible accuracy is not known" in text
    rows = list(csv.DictReader(line for line in text.splitlines() if line[0] != "#"))
    assert {row["method"] for row in rows} == {m.name for m in figure_study.FIGURE4}


def test_a_file_that_has_changed_is_noticed(tmp_path):
    file = _save(tmp_path / "mine.npz")
    task = figure_data.task_of(file, TINY_TASK)
    _save(tmp_path / "mine.npz", state=np.zeros(2_000, int))
    with pytest.raises(ValueError, match="mine.npz has changed"):
        figure_data.sets(task)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"frame": np.zeros(2_000)}, "allowed are floats"),
        ({"frame": np.zeros((2_000, 3), int)}, "allowed are floats"),
        ({"state": np.zeros(1_999, int)}, "allowed are floats"),
        ({"state": np.zeros(2_000)}, "integers from 0"),
        ({"state": np.full(2_000, -1)}, "integers from 0"),
        ({"frame": np.full((2_000, 3), np.nan)}, r"frame\[0\] is not finite"),
    ],
)
def test_a_file_that_is_not_right_is_named(tmp_path, columns, message):
    file = _save(tmp_path / "mine.npz", **columns)
    with pytest.raises(ValueError, match=message) as caught:
        figure_data.task_of(file, TINY_TASK)
    assert "mine.npz" in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match='allowed are a file and "digits"'):
        figure_data.task_of(str(tmp_path / "none.npz"), TINY_TASK)
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text.npz: not a NumPy archive"):
        figure_data.task_of(str(tmp_path / "text.npz"), TINY_TASK)
