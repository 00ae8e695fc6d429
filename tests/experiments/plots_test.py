import dataclasses

import numpy as np
import pytest

import dbjax
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


def test_the_title_names_who_is_sooner(two):
    two["sgd"], two["downpour"] = trace([0] * 60, 0.25), trace([3] * 60, 1.0)
    left = plots.curves(two, "toy").axes[0]
    assert left.get_title(loc="left") == "toy: sgd is at 96 % 4x sooner"


def test_no_legend_covers_a_curve_and_nothing_is_clipped(two):
    pictures = [
        plots.curves(two, "toy"),
        plots.staleness(two["downpour"], "downpour"),
        plots.timeline(two["downpour"], "downpour"),
    ]
    for picture in pictures:
        picture.canvas.draw()
        page = picture.bbox
        for panel in picture.axes:
            for text in (panel.title, panel._left_title, panel.xaxis.label):
                extent = text.get_window_extent()
                assert page.x0 <= extent.x0 and extent.x1 <= page.x1
            for legend in picture.legends:
                frame = panel.get_window_extent()
                assert not frame.overlaps(legend.get_window_extent())


@pytest.mark.parametrize("low", [1e-5, 0.3, 0.9, 7.0, 40.0])
@pytest.mark.parametrize("factor", [1.001, 1.05, 1.3, 3.0, 30.0, 1e4, 1e30])
def test_a_logarithmic_axis_has_a_few_plain_numbers(low, factor):
    panel = plots.plt.figure().add_subplot(yscale="log", ylim=(low, low * factor))
    plots.tick_logarithmic(panel.yaxis)
    marks = panel.yaxis.get_majorticklocs()
    assert 3 <= len(marks) <= 9
    assert (marks >= low).all() and (marks <= low * factor).all()
    plots.plt.close()


def test_a_timeline_begins_when_all_are_at_work():
    made = dbjax.simulate(
        dbjax.Cluster(step_time=1.0), replicas=3, steps=40, warmstart_steps=10
    )
    begin, length, unit = plots._window(made, turns=4.0)
    assert begin >= 10.0 and length == 4.0 and unit == 1.0
    quick = dbjax.Cluster(step_time=0.001)
    assert plots._window(dbjax.simulate(quick, replicas=3, steps=40), 4.0)[2] == 1000


def test_failures_are_marked():
    failures = dbjax.Failures(dbjax.Exponential(5.0), dbjax.Exponential(1.0))
    cluster = dbjax.Cluster(failures=failures)
    picture = plots.timeline(dbjax.simulate(cluster, replicas=3, steps=60), "downpour")
    assert len(picture.legends) == 1


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
