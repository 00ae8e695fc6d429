"""Figures 4 and 5: their parts, and the smallest study there can be."""

import csv
import dataclasses
import io
import math

import numpy as np
import pytest
import rich.console

from experiments import (
    figure4,
    figure5,
    figure_cluster,
    figure_curves,
    figure_orderings,
    figure_runs,
    figure_study,
    figure_task,
    figure_tuning,
    plots,
    plots_figure4,
    plots_figure5,
)
from experiments.figure_curves import Curve, crossing
from experiments.figure_study import FIGURE4, Lab, Study, adagrad, downpour, lbfgs

PLAIN_CODE = True

TINY_TASK = figure_task.Task(
    states=8, sounds=1, bands=12, channel=1.0, noise=0.5, hidden=(8,), batch=4,
    training=4_000, validation=300, test=600,
)  # fmt: skip
TINY = Study(
    TINY_TASK, steps=300, rate=0.4, seeds=2, trials=2, horizon=30.0, hours=30.0,
    reach=30.0, points=12, clusters=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], 2.0),
        ([0, 3, 1, 2, 3, 3], 3.0),  # the first crossing does not hold
        ([0, 0, 0, 0, 3, 3], math.inf),  # nor can it be seen to
        ([0, 0, 0, 1, 3, 3], math.inf),
        ([2, 2, 2, 2, 2, 2], 0.0),
        ([0, 4, 4, 4, 0, 0], 0.5),
    ],
)
def test_a_target_is_reached_when_it_holds(accuracy, expected):
    assert crossing(np.arange(6.0), np.array(accuracy, float), 2.0) == expected


def test_a_cache_knows_everything_that_a_curve_depends_on():
    clock = figure_cluster.clock_for(300)
    curve = Curve(TINY_TASK, clock, "downpour", replicas=20, rate=0.1)
    others = [
        dataclasses.replace(curve, rate=0.2),
        dataclasses.replace(curve, seed=1),
        dataclasses.replace(curve, task=dataclasses.replace(TINY_TASK, noise=0.6)),
        dataclasses.replace(curve, clock=figure_cluster.clock_for(301)),
        dataclasses.replace(
            curve, clock=figure_cluster.clock_for(300, figure_cluster.Assumed(batch=99))
        ),
    ]
    assert len({figure_curves.key(one) for one in [curve, *others]}) == 6
    assert figure_curves.key(curve) == figure_curves.key(dataclasses.replace(curve))
    with pytest.raises(ValueError, match="kind must be one of"):
        Curve(TINY_TASK, clock, "adam")


def test_the_clock_puts_the_paper_s_hours_onto_our_minibatches():
    clock = figure_cluster.clock_for(1_000)
    assert clock.hours(1_000 * clock.machines.sgd) == pytest.approx(120)
    assert clock.warm_hours == pytest.approx(10.55, abs=0.06)


def test_machines_are_those_of_figure_3():
    machines = figure_cluster.machines()
    one, eight = machines.minibatch(1), machines.minibatch(8)
    assert one / eight == pytest.approx(2.23)
    # The points of figure 5 that figure 4's curves are.
    assert machines.total("downpour", 20) == 336
    assert machines.total("adagrad", 200) == 656
    assert machines.total("lbfgs", 2000) == 2256
    # More replicas are faster, if never in proportion; messages cost most of a turn.
    gain = {n: machines.sgd / machines.update(n) for n in (1, 20, 200, 400)}
    assert gain[1] < 1 < gain[20] < 20 * gain[1] * 1.01
    assert gain[20] < gain[200] < gain[400] < 2 * gain[200]
    # Fetches of all at once keep the servers busy however small the batch is.
    assert machines.evaluation(2000, 1e4) == pytest.approx(
        2 * 2000 * machines.parameter_bytes / (256 * machines.bandwidth), rel=0.05
    )


def test_plausible_machines_are_repeatable_and_varied():
    drawn = figure_cluster.plausible(5)
    assert drawn == figure_cluster.plausible(5)
    assert len({one.assumed for one in drawn}) == 5
    assert all(one.assumed.many <= one.assumed.few for one in drawn)


def test_a_search_climbs_spends_its_trials_and_flags_edges():
    def score(setting, best):
        asked.append(best)
        return (abs(setting["rate"] - 8) + abs(setting["n"] - 1),)

    asked = []
    axes = {"rate": (1, 2, 4, 8, 16), "n": (1, 2)}
    found = figure_tuning.search(score, axes, {"rate": 2, "n": 1}, 6, limits=("n",))
    assert found.best == {"rate": 8, "n": 1}
    assert found.edges == ["n not bracketed"] or not found.edges
    assert len(found.trials) == 6 and asked[0] is None and asked[-1] == (0,)
    short = figure_tuning.search(score, axes, {"rate": 2, "n": 1}, 2)
    assert short.edges == ["rate not bracketed", "n at the end of its grid"]
    top = figure_tuning.search(lambda s, _: (-s["x"],), {"x": (1, 2)}, {"x": 1}, 9)
    assert top.best == {"x": 2} and top.edges == ["x at the end of its grid"]
    assert len(top.trials) == 2
    with pytest.raises(ValueError, match="starts with rate=3"):
        figure_tuning.search(score, axes, {"rate": 3, "n": 1}, 2)


def test_the_best_accuracy_is_that_of_the_posterior():
    sets = figure_task.make(TINY_TASK)
    assert 0.5 < sets.best <= 1
    # Without noise nobody errs; with very much nobody knows more than frequencies.
    clear = dataclasses.replace(TINY_TASK, noise=0.02, channel=0.1)
    assert figure_task.make(clear).best == 1.0
    deaf = dataclasses.replace(TINY_TASK, noise=100.0)
    most = 1 / 5 / sum(1 / (k + 5) for k in range(8))
    assert figure_task.make(deaf).best == pytest.approx(most, abs=0.06)


def test_the_paper_s_curves_are_there():
    paper = figure_study.read()
    assert set(paper.test) == {method.name for method in FIGURE4}
    assert figure_study.mean_end(*paper.test["SGD [1]"].T) == pytest.approx(15.4, abs=0.2)  # fmt: skip
    shape = paper.test["SGD [1]"].T
    relative = shape[1] / figure_study.mean_end(*shape)
    assert figure_study.mismatch(shape[0], relative, paper.test["SGD [1]"]) < 1e-9
    points = plots_figure5.read()
    assert {kind: len(p) for kind, p in points.items()} == {"downpour": 4, "adagrad": 4, "lbfgs": 4, "sgd": 1}  # fmt: skip


def test_the_longest_run_that_fits_as_well_is_taken():
    def fit(share, mismatch):
        return figure_study.Fit(share, [0.3], 0, mismatch)

    fits = [fit(0.25, 0.030), fit(0.5, 0.036), fit(1.0, 0.045)]
    assert figure_study.choose(fits).share == 0.5


def test_orderings_count_seeds_and_clusters():
    def at(*hours):
        return figure_orderings.Times(np.array(hours), np.array(hours))

    first, second = adagrad(20), downpour(20)
    reached = {first: at(1.0, 2.0, 9.0), second: at(3.0, 4.0, math.inf)}
    on = [{first: 1.0, second: 2.0}, {first: 3.0, second: 2.0}]
    (claim,) = figure_orderings.orderings([(first, second)], reached, on)
    assert claim.holds and claim.seeds == 1.0 and claim.clusters == 0.5
    never = {first: at(math.inf), second: at(math.inf)}
    (claim,) = figure_orderings.orderings([(first, second)], never, on)
    assert not claim.holds and claim.seeds == 0.0


def test_lbfgs_of_more_replicas_is_the_same_run_on_another_clock(tmp_path):
    curve = Curve(
        TINY_TASK, figure_cluster.clock_for(300), "lbfgs", replicas=2000, seed=1,
        examples=2_000, warm_rate=0.4, hours=40.0, points=12,
    )  # fmt: skip
    many = figure_runs.run(curve, tmp_path)
    few = figure_runs.run(dataclasses.replace(curve, replicas=500), tmp_path)
    same = min(len(many.steps), len(few.steps))
    assert same > 3 and len(list(tmp_path.glob("batch-*"))) == 1
    np.testing.assert_array_equal(many.validation[:same], few.validation[:same])
    assert many.hours[0] == few.hours[0] == pytest.approx(curve.clock.warm_hours)
    # A batch so small is fetching and pushing, and fewer replicas fetch less.
    assert many.hours[same - 1] > few.hours[same - 1]


@pytest.mark.slow
def test_a_tiny_study_leaves_figures_and_numbers_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(figure4, "SMOKE_STUDY", TINY)
    monkeypatch.setattr(figure5, "SMOKE_COUNTS", ((10, 20), (2000,)))
    figure4.main(["--smoke", f"--out={tmp_path}"])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("curves/*.npz")}
    text = (tmp_path / "figure4.csv").read_text()
    figure4.main(["--smoke", f"--out={tmp_path}"])
    assert (tmp_path / "figure4.csv").read_text() == text
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("curves/*.npz")}  # fmt: skip
    rows = list(csv.DictReader(line for line in text.splitlines() if line[0] != "#"))
    assert {row["method"] for row in rows} == {method.name for method in FIGURE4}
    assert {row["seed"] for row in rows} == {"0", "1"}
    for words in (
        "Assumed",
        "is the best possible",
        "eta x lambda x tau",
        "% of seeds",
    ):
        assert words in text
    assert len((tmp_path / "figure4_tuning.csv").read_text().splitlines()) == 2 + 2 * 6
    figure5.main(["--smoke", f"--out={tmp_path}"])
    for figure in ("figure4", "figure5"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 30_000
    assert "L-BFGS [2000]" in (tmp_path / "figure5.csv").read_text()


def test_a_point_that_was_not_reached_is_shown():
    never = figure_orderings.Times(np.array([math.inf]), np.array([math.inf]))
    points = {
        downpour(20): figure5.Point(336, 100.0, never),
        lbfgs(2000): figure5.Point(2256, 9000.0, never),
    }
    found = figure_study.Calibrated(
        figure_cluster.clock_for(300),
        300,
        figure_tuning.Tuned({}, [], []),
        0.0,
        0.3,
        0.31,
    )
    picture = plots_figure5.draw(plots_figure5.read(), points, 80.0, found)
    crosses = [line for line in picture.axes[2].lines if line.get_marker() == "x"]
    assert sum(len(line.get_xdata()) for line in crosses) == 2
    plots.plt.close("all")
    assert plots_figure4.LOOKS.keys() == {method.name for method in FIGURE4}


def test_progress_is_quiet_where_nobody_looks(tmp_path):
    console = rich.console.Console(file=io.StringIO())
    lab = Lab(TINY, tmp_path, console)
    assert lab.spread("work", lambda x: 2 * x, [1, 2, 3]) == [2, 4, 6]
