"""Phase diagrams: what is in a cell, that its limit is right, and the pictures."""

import csv
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt

from dbjax.optim import stability_limit
from dbjax.trace import COMPUTE
from experiments import phase_costs, phases, plots_phases
from experiments.phase_costs import Cost, Load
from experiments.phase_rules import RULES
from experiments.phases import Diagram, Study

PLAIN_CODE = True

TINY = dataclasses.replace(
    phases.SMOKE, rules=("SGD",), rates=(0.1, 100.0), delays=(0, 4), replicas=(1, 2),
    steps=30, warm=10, hidden=8, examples=500,
    longest=30, crowd=(10, 100),
)  # fmt: skip


def test_the_smallest_study_leaves_every_number_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "SMOKE", TINY)
    phases.main([f"--out={tmp_path}", "--smoke"])
    for name in ("staleness", "replicas", "cost", "saturation", "probe"):
        assert (tmp_path / f"phases_{name}.png").stat().st_size > 5_000
    rows = list(csv.DictReader((tmp_path / "phases.csv").read_text().splitlines()))
    counts = {name: 0 for name in ("staleness", "replicas", "cost", "saturation")}
    for row in rows:
        counts[row["figure"]] += 1
    assert counts == {"staleness": 4, "replicas": 4, "cost": 2, "saturation": 4}
    cells = [row for row in rows if row["figure"] == "staleness"]
    assert [float(row["staleness"]) for row in cells] == [0, 0, 4, 4]
    # A hundred is too much and a tenth is not, and so say the limits.
    assert [row["failed"] for row in cells] == ["0", "1"] * 2
    for row in cells:
        stable = float(row["learning_rate"]) < float(row["limit_sharpest"])
        assert stable == (row["failed"] == "0")
    for row in (row for row in rows if row["figure"] == "cost"):
        seconds, count = float(row["wall_seconds"]), int(row["replicas"])
        assert float(row["replica_seconds"]) == pytest.approx(count * seconds, rel=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_nobody_late_is_the_plain_rule(name):
    """And whoever asks for something works when given just that."""
    rule, params, g = RULES[name], jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    asked = {"staleness": 0, "stale_params": params}
    extra = {key: asked[key] for key in rule.provide}

    @jax.jit
    def first(rate):
        tx = rule.make(rate)
        return tx.update(g, tx.init(params), params, **extra)[0]

    want = -0.1 * np.sign(g) if "Adagrad" in name else -0.1 * g
    np.testing.assert_allclose(first(0.1), want, rtol=1e-5)


@pytest.mark.parametrize("along", ["staleness", "replicas"])
@pytest.mark.parametrize("warm", [0, 40])
@pytest.mark.parametrize("value", [1, 5])
def test_traces_are_of_the_same_length_and_late_as_they_should_be(along, warm, value):
    study = Study(steps=200)
    trace = phases.trace_of(study, along, value, warm)
    assert (trace.kind == COMPUTE).sum() == 200
    late = value if along == "staleness" else value - 1
    assert phases.late_staleness(trace) == pytest.approx(late, abs=0.1)
    assert (trace.staleness()[:warm] == 0).all()


def test_limits_are_of_each_curvature_and_only_where_there_is_theory():
    tau = np.array([0.0, 3.0])
    plain = phases.limits(RULES["SGD"], tau, (2.0, 4.0))
    np.testing.assert_allclose(plain, stability_limit(tau) / [[2.0], [4.0]])
    slow = phases.limits(RULES["SGD, rate / staleness"], tau, (2.0, 4.0))
    np.testing.assert_allclose(slow, plain * [1, 3])
    assert phases.limits(RULES["Adagrad"], tau, (2.0, 4.0)) is None


def test_shards_fill_up_and_no_more():
    loads = phase_costs.saturation(Study(crowd=(100, 2_000), turns=6))
    by = {(load.shards, load.replicas): load for load in loads}
    for load in loads:
        assert load.updates_per_second <= 1.001 * load.most_updates_per_second
    assert by[1, 100].updates_per_second == pytest.approx(100, rel=0.1)
    assert by[1, 2_000].updates_per_second == pytest.approx(1_000, rel=1e-3)
    assert by[4, 2_000].updates_per_second == pytest.approx(2_000, rel=0.1)
    assert by[1, 2_000].utilisation < 0.6 < by[4, 2_000].utilisation


def diagram(rule, limits=None):
    loss = np.array([[0.9, 0.2, 1.0], [0.8, 0.5, np.nan]])
    failed = np.array([[0, 0, 0], [0, 0, 1]], bool)
    return Diagram(
        rule, np.array([0, 8]), np.array([0.01, 0.1, 1.0]), np.array([0.0, 8.0]),
        loss, loss, failed, limits, [],
    )  # fmt: skip


def assert_nothing_is_clipped(picture):
    picture.draw_without_rendering()
    box = picture.get_tightbbox()
    assert box.x0 > -0.05 and box.y0 > -0.05
    assert box.x1 < picture.get_figwidth() + 0.05
    assert box.y1 < picture.get_figheight() + 0.05
    plt.close(picture)


def test_a_picture_of_several_rules():
    limits = np.array([[2.0, 0.2], [1.0, 0.1]])
    some = [diagram(name) for name in ("a", "b", "c")] + [diagram("d", limits)]
    picture = plots_phases.draw(some, "staleness (updates)")
    shown = [panel for panel in picture.axes if panel.get_visible()]
    *panels, bar = shown
    assert [panel.get_title(loc="left") for panel in panels] == list("abcd")
    assert "(nats)" in bar.get_ylabel()
    (mesh,) = panels[0].collections
    # The failed lane is not coloured; rates go up, values to the right.
    np.testing.assert_array_equal(mesh.get_array().mask, some[0].failed.T)
    assert mesh.get_array()[1, 0] == 0.2
    assert len(panels[0].lines) == 1 and len(panels[3].lines) == 3
    best = panels[0].lines[0].get_xydata()
    np.testing.assert_allclose(best, [[0, 0.1], [1, 0.1]])
    assert any(panel.get_xlabel() == "staleness (updates)" for panel in panels)
    assert_nothing_is_clipped(picture)


def test_pictures_of_costs_and_of_saturation():
    costs = [Cost("SGD", n, 0.1, w, n * w) for n, w in ((1, 80.0), (4, 30.0))]
    costs.append(Cost("SGD", 8, 0.1, math.inf, math.inf))
    picture = plots_phases.draw_costs(costs, 0.5)
    left, right = picture.axes
    assert "(s)" in left.get_ylabel() and "replica-seconds" in right.get_ylabel()
    assert right.lines[0].get_xdata().tolist() == [1, 4]
    assert right.lines[1].get_xdata().tolist() == [8]
    assert "not reached" in left.get_legend_handles_labels()[1]
    assert_nothing_is_clipped(picture)
    picture = plots_phases.draw_costs(costs[2:], 0.5)
    assert "nobody" in picture.axes[0].texts[0].get_text()
    assert_nothing_is_clipped(picture)
    loads = [Load(n, 1, min(n, 50.0), 50.0, n - 1.0, 0.9) for n in (10, 100, 1_000)]
    picture = plots_phases.draw_saturation(loads)
    assert "1 / service" in picture.axes[0].get_legend_handles_labels()[1]
    assert_nothing_is_clipped(picture)
