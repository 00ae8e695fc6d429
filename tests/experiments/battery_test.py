"""The battery: settings, cells that are kept, comparisons, and the smallest one there is."""

import csv
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from experiments import (
    battery,
    battery_clusters,
    battery_page,
    battery_rules,
    battery_runs,
    battery_study,
    battery_workloads,
)
from experiments.battery_cells import Cell, Outcome, Size
from experiments.battery_rules import BASELINES, Rule, settings
from experiments.battery_runs import Curve
from experiments.battery_study import Judged

TINY = Size(steps=48, replicas=4, points=4, budget=2, seeds=2)
ARGUMENTS = ["--smoke", "--only=logistic", "--clusters=failing"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The smallest battery: one baseline beside the rule."""
    monkeypatch.setattr(battery, "SMOKE", TINY)
    monkeypatch.setattr(battery, "BASELINES", BASELINES[:1])

    def run(text, *more):
        (tmp_path / "mine.py").write_text(
            "import jax, jax.numpy as jnp, optax\n" + text
        )
        return battery.main(
            [f"--rule={tmp_path / 'mine.py'}", f"--out={tmp_path / 'out'}",
             f"--cache={tmp_path / 'cells'}", *ARGUMENTS, *more]
        )  # fmt: skip

    return run


def rows_of(folder):
    with (folder / "cells.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 16])
@pytest.mark.parametrize("others", [(), (1,), (2,), (3,), (2, 3), (5, 7)])
def test_every_rule_gets_as_many_settings(budget, others):
    search = {f"h{i}": list(range(n)) for i, n in enumerate(others)}
    found, note = settings(search, budget)
    assert len(found) == budget == len({json.dumps(one) for one in found})
    assert found == settings(search, budget)[0]
    assert all(one.keys() == {"learning_rate", *search} for one in found)
    sampled = math.prod(others) * len({s["learning_rate"] for s in found}) > budget
    assert ("sampled" in note) or not sampled
    counts = np.unique([one["learning_rate"] for one in found], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    if not others and budget > 1:  # a grid from end to end
        rates = [one["learning_rate"] for one in found]
        assert (rates[0], rates[-1]) == battery_rules.RATES
        np.testing.assert_allclose(
            np.diff(np.log(rates)), np.log(rates[1] / rates[0]), rtol=0.02
        )


def test_a_run_is_that_of_replay():
    workload = battery_workloads.logistic(training=256)
    machines = battery_clusters.clusters(12)["failing"]
    trace = battery_clusters.record(machines, 4, 48, seed=3)
    rule = next(one for one in BASELINES if one.name == "gap-aware")
    program = battery_runs.make_program(workload, rule, {"learning_rate": 1.0})
    schedule = battery_runs.lay_out(workload, trace, 3, points=4)
    curve, params = battery_runs.run_to_params(
        program, schedule, {"learning_rate": 0.1}
    )
    again = dbjax.replay(
        trace, workload.loss_fn, workload.init(3), workload.data(3),
        optimizer=rule.optimizer_fn(0.1), provide=rule.provide,
    )  # fmt: skip
    for one, other in zip(*map(jax.tree.leaves, (params, again.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        [curve.losses[-1], curve.accuracies[-1]],
        workload.measure(again.params),
        rtol=1e-4,
    )
    assert len(curve.losses) == len(curve.seconds) == 5 and curve.seconds[0] == 0
    assert (
        curve.seconds == sorted(curve.seconds) and curve.seconds[-1] <= curve.duration
    )
    assert curve.pushes == len(trace.staleness())
    assert curve.staleness == trace.staleness().mean()


def test_a_rule_is_judged_by_what_it_shows():
    rule = Rule(
        "still",
        optax.sgd,
        shown=lambda state, params: jax.tree.map(jnp.zeros_like, params),
    )
    workload = battery_workloads.logistic(training=256)
    trace = battery_clusters.record(
        battery_clusters.clusters(12)["equal"], 4, 48, seed=0
    )
    program = battery_runs.make_program(workload, rule, {"learning_rate": 0.1})
    schedule = battery_runs.lay_out(workload, trace, 0, points=4)
    losses = battery_runs.run(program, schedule, {"learning_rate": 0.1}).losses
    np.testing.assert_allclose(losses, math.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", battery_workloads.WORKLOADS)
def test_workloads_are_the_same_every_time_and_start_far_from_the_target(name):
    make = battery_workloads.WORKLOADS[name]
    one, again = make(), make.__wrapped__()
    for first, second in zip(
        *(jax.tree.leaves((w.training, w.held_out)) for w in (one, again)),
        strict=True,
    ):
        np.testing.assert_array_equal(first, second)
    loss, accuracy = np.asarray(jax.jit(one.measure)(one.init(0)))
    assert loss > 1.5 * one.target and 0 <= accuracy < 0.7
    held_out = {row.tobytes() for row in next(iter(one.held_out.values()))}
    if name != "language":  # a short one says some sentences twice
        assert not held_out & {
            row.tobytes() for row in next(iter(one.training.values()))
        }


def test_clusters_are_what_they_are_called():
    machines = battery_clusters.clusters(100)
    traces = {
        n: battery_clusters.record(m, 8, 800, seed=0) for n, m in machines.items()
    }
    worst = {name: trace.staleness().max() for name, trace in traces.items()}
    assert (
        worst["equal"] < worst["heavy_tailed"] and worst["equal"] < worst["slow_tail"]
    )
    fails = {
        name: bool((trace.kind == dbjax.trace.RESTART).any())
        for name, trace in traces.items()
    }
    assert fails == {
        "equal": False,
        "heavy_tailed": False,
        "slow_tail": False,
        "failing": True,
    }


def test_a_cell_s_file_knows_everything_that_it_depends_on():
    cell = Cell(
        BASELINES[0], "digits", "equal", "tune", 0, {"learning_rate": 0.1}, TINY
    )
    others = [
        cell._replace(rule=dataclasses.replace(cell.rule, source="other")),
        cell._replace(rule=BASELINES[1]), cell._replace(workload="local"),
        cell._replace(cluster="failing"), cell._replace(stage="report"),
        cell._replace(seed=1), cell._replace(setting={"learning_rate": 0.2}),
        *(cell._replace(size=dataclasses.replace(TINY, **{name: 7}))
          for name in ("steps", "replicas", "points")),
    ]  # fmt: skip
    assert len({one.file for one in [cell, *others]}) == 11
    for name in ("budget", "seeds"):  # more of them leave what there is
        assert (
            cell._replace(size=dataclasses.replace(TINY, **{name: 7})).file == cell.file
        )


def curve(*losses):
    seconds = [float(i) for i in range(len(losses))]
    return Curve(seconds, list(losses), [0.5] * len(losses), 10, 0, 1.0, 9.0)


def judged(*ends, rule=BASELINES[0], error=""):
    workload = dataclasses.replace(battery_workloads.logistic(), target=0.5)
    size = Size(seeds=len(ends), budget=3)
    cells = [
        Cell(rule, "logistic", "equal", "report", seed, {"learning_rate": 0.1}, size)
        for seed in range(len(ends))
    ]
    runs = [
        Outcome(c, curve(1.0, end, end, end))
        for c, end in zip(cells, ends, strict=True)
    ]
    trials = [
        Outcome(cells[0]._replace(setting={"learning_rate": rate}), curve(1.0))
        for rate in (0.01, 0.1)
    ]
    machines = battery_clusters.clusters(1)["equal"]
    return Judged(rule, workload, machines, trials, runs, "", error)


def test_nothing_that_fails_is_left_out():
    late = judged(0.4, 0.4, 0.6, 0.6, 0.6)
    assert late.time.middle == late.time.high == math.inf and late.time.low < 1
    assert "2 of 5 runs reach it" in battery_page.time_of(late)
    assert battery_page.time_of(judged(0.6, 0.7)) == "never, 0 of 2 runs"
    apart = judged(0.4, math.inf, 0.4)
    assert apart.diverged == 1 and apart.loss.middle == math.inf
    assert battery_page.interval(apart.loss) == "diverged"
    error = battery_study._error(apart.trials, apart.runs)
    assert error == "diverged: 1 of 3 runs with the best setting"
    assert not battery_study._error(late.trials, late.runs)
    gone = judged(0.4, 1.5, 0.4)
    assert gone.worse == 1 and "1 of 3 runs end above" in battery_page._row(gone)[-1]
    assert "grid" in late.edge and "largest" in late.edge


def test_intervals_cover_the_truth_as_often_as_they_say():
    chance = np.random.default_rng(0)
    found = [battery_study.mean_of(chance.standard_normal(5)) for _ in range(2_000)]
    assert 0.93 < np.mean([one.low < 0 < one.high for one in found]) < 0.97
    medians = [
        battery_study.median_of(chance.standard_normal(9), 200) for _ in range(300)
    ]
    assert np.mean([one.low <= 0 <= one.high for one in medians]) > 0.88
    assert all(one.low <= one.middle <= one.high for one in medians)


def test_rules_are_compared_seed_by_seed():
    noise = np.array([0.1, -0.2, 0.3, 0.0, -0.1])
    one, other = judged(*(0.4 + noise)), judged(*(0.45 + noise * 1.01))
    assert battery_study.compare(one, other).verdict == "better"
    assert battery_study.compare(other, one).verdict == "worse"
    assert (
        battery_study.compare(one, judged(*(0.4 - noise))).verdict
        == "no difference seen"
    )
    bad = judged(0.1, 0.1, 0.1, 0.1, 0.1, error="raises: x")
    assert battery_study.compare(bad, one).verdict == "worse"
    assert battery_study.compare(one, bad).verdict == "better"


def test_the_smallest_battery_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    started = []
    real = battery_runs.run

    def run(*args):
        started.append(args[2])
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(battery_runs, "run", run)
    monkeypatch.setattr(battery_study, "cores", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        tiny("rule = optax.sgd")
    assert len(started) == 3
    assert tiny("rule = optax.sgd") == 0
    assert len(started) == 3 + 8 - 2  # a rule and a baseline, 2 + 2 cells each
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 8 and {row["status"] for row in rows} == {"finished"}
    assert [row["rule"] for row in rows] == 4 * ["mine"] + 4 * ["sgd"]
    # Equal rules have equal cells, and are not told apart.
    names = ("setting", "held_out_loss", "seconds_to_target")
    halves = [
        [[row[name] for name in names] for row in part] for part in (rows[:4], rows[4:])
    ]
    assert halves[0] == halves[1]
    for part in (rows[:4], rows[4:]):
        ends = [float(row["held_out_loss"]) for row in part if row["stage"] == "report"]
        for row in part:
            low, mean, high = (
                float(row[f"mean_loss{end}"]) for end in ("_low", "", "_high")
            )
            assert low < mean < high and mean == pytest.approx(np.mean(ends), rel=1e-5)
            low, mean, high = (
                float(row[f"median_seconds{e}"]) for e in ("_low", "", "_high")
            )
            assert low <= mean <= high
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img alt=") == 1 and "data:image/png;base64," in page
    assert "no difference seen" in page and "This rule is bad" not in page
    assert "src='http" not in page and "<script" not in page
    # Another rule finds the baseline's cells.
    assert tiny("rule = optax.sgd  # otherwise") == 0
    assert len(started) == 3 + 8 - 2 + 4
    # One more seed is one more cell each.
    assert tiny("rule = optax.sgd  # otherwise", "--seeds=3") == 0
    assert len(started) == 3 + 8 - 2 + 4 + 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x = 1", "no rule: "),
        (  # good where it is examined, and not on a vector of 40
            """
def rule(learning_rate):
    def update(g, state, params=None):
        if "weights" in g and g["weights"].shape == (40,) and state.ndim:
            raise RuntimeError("forty")
        return jax.tree.map(lambda x: -learning_rate * x, g), state
    return optax.GradientTransformation(lambda p: jnp.zeros(len(p) - 2), update)
""",
            "raises: ",
        ),
        (
            """
def rule(learning_rate):
    def update(g, state, params=None):
        new = jax.tree.map(lambda x: jnp.where(state > 20, jnp.inf, -x), g)
        return new, state + 1
    return optax.GradientTransformation(lambda p: jnp.int32(0), update)
""",
            "diverged: all 2 settings",
        ),
    ],
    ids=["no rule", "raises", "diverges"],
)
def test_a_bad_rule_is_told_everywhere_and_the_rest_goes_on(
    text, why, tiny, tmp_path, capsys
):
    assert tiny(text) == 1
    assert "BAD RULE mine" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    assert "This rule is bad" in page and why in page
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows if row["rule"] == "sgd"] == 4 * ["finished"]
    mine = [row["status"] for row in rows if row["rule"] == "mine"]
    assert mine and all(status == "diverged" or why in status for status in mine)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--only=digit", "'digit' is none of logistic, digits"),
        ("--clusters=equal,fast", "'fast' is none of equal"),
        ("--seeds=0", "allowed are numbers from 1"),
    ],
)
def test_wrong_arguments_are_named(argument, message, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import optax\nrule = optax.sgd")
    with pytest.raises(SystemExit) as left:
        battery.main([f"--rule={file}", argument])
    assert left.value.code == 2 and message in capsys.readouterr().err
