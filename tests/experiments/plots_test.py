import dataclasses

import numpy as np
import pytest

from dbjax.trace import Trace
from experiments import plots


def trace(delays, seconds):
    steps = len(delays)
    made = Trace.from_delays(np.minimum(delays, np.arange(steps)))
    marks = range(0, steps + 1, 10)
    rows = tuple(
        {
            "step": step,
            "time": seconds * step,
            "test_accuracy": 1 - 0.9 * 0.5 ** (step / 10),
            "test_loss": 0.5 ** (step / 10),
        }
        for step in marks
    )
    return dataclasses.replace(made, evaluations=rows)


@pytest.fixture
def two():
    return {"sgd": trace([0] * 60, 1.0), "downpour": trace([3] * 60, 0.25)}


def test_figures_are_written_for_what_there_is_to_see(two, tmp_path):
    files = plots.draw(two, tmp_path, title="toy")
    names = ["accuracy.png", "downpour_staleness.png", "downpour_timeline.png"]
    assert [file.name for file in files] == names
    assert all(file.stat().st_size > 5_000 for file in files)


def test_axes_are_labelled_with_units_and_methods_told_apart(two):
    left, right = plots.curves(two, "toy").axes
    assert "(s)" in left.get_xlabel() and "(%)" in left.get_ylabel()
    assert "4x sooner" in left.get_title(loc="left")
    assert "minibatches" in right.get_xlabel()
    labels = left.get_legend_handles_labels()[1]
    assert labels == ["sgd, 1 replica", "downpour, 4 replicas"]


def test_time_to_an_accuracy(two):
    assert plots.time_to(two["sgd"], 0.5) == 10.0
    assert plots.time_to(two["sgd"], 0.999) == np.inf


def test_the_histogram_holds_every_push(two):
    panel = plots.staleness(two["downpour"], "downpour").axes[0]
    shares = [bar.get_height() for bar in panel.containers[0]]
    assert sum(shares) == pytest.approx(100)


def test_a_bar_has_the_staleness_of_its_own_push(two):
    made = two["downpour"]
    work = made.take(made.kind == 1)
    carried = plots._carried(made, work)
    assert carried[10] == 3
    assert np.isfinite(carried).all()


def test_a_diverged_run_still_draws(two, tmp_path):
    last = {**two["sgd"].evaluations[-1], "test_loss": float("nan")}
    rows = (*two["sgd"].evaluations[:-1], last)
    two["sgd"] = dataclasses.replace(two["sgd"], evaluations=rows)
    assert plots.draw(two, tmp_path, title="toy")
