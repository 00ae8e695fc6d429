"""Verdicts on published orderings follow from the numbers, and a study runs."""

import csv
import math
import pathlib
import re

import numpy as np
import pytest

from experiments import orderings, orderings_rules, orderings_runs, orderings_task
from experiments.orderings import verdict
from experiments.orderings_task import Size, Study

PLAIN_CODE = True

INF = math.inf
FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("logarithmic", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_verdict_is_on_the_side_of_the_interval(logarithmic, seed):
    rng = np.random.default_rng(seed)
    less = np.exp(0.1 * rng.standard_normal(6))
    more = 2 * less + 0.01 * rng.standard_normal(6)
    said, mean, half = verdict(more, less, logarithmic)
    assert said == "as published" and mean > half > 0
    if logarithmic:
        assert np.exp(mean) == pytest.approx(2.0, rel=0.05)
    said, other, _ = verdict(less, more, logarithmic)
    assert said == "the other way round" and other == pytest.approx(-mean)
    noise = np.exp(rng.standard_normal(6))
    assert verdict(noise, np.roll(noise, 1), logarithmic)[0] == "no difference seen"
    assert verdict(less, less, logarithmic)[:2] == ("no difference seen", 0.0)


@pytest.mark.parametrize(
    ("more", "less", "said"),
    [
        ([INF] * 5, [1.0] * 5, "as published"),
        ([1.0] * 5, [INF] * 5, "the other way round"),
        ([INF] * 5, [INF] * 5, "no difference seen"),
        ([INF, 1.0, 1.0, 1.0, 1.0], [1.0] * 5, "no difference seen"),
        ([INF], [1.0], "no difference seen"),
    ],
)
def test_runs_that_never_get_there_are_counted(more, less, said):
    assert verdict(more, less, True)[0] == said
    table = orderings.table(
        {"one": Study("time", {"a": more, "b": less}, [("a", "b", "-")])}
    )
    assert f"never: {np.isinf(more).sum()} and {np.isinf(less).sum()} of" in table


def test_what_is_written_is_what_the_numbers_say():
    with (FOLDER / "figures/orderings.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = (FOLDER / "README.md").read_text()
    written = re.findall(
        rf"^\| ({'|'.join(orderings.STUDIES)}) \| (.+) \| (.+) \| (.+) \| "
        r"(.+ \d{4}) \| (.+) \| (.+) \|$",
        text,
        re.MULTILINE,
    )
    studies = {name for name, *_ in written}
    assert studies == orderings.STUDIES.keys() - {"rounds"}  # which claims nothing
    for name, measure, more, less, source, *_ in written:
        values = {
            method: [
                float(row["value"])
                for row in rows
                if (row["study"], row["method"]) == (name, method)
            ]
            for method in (more, less)
        }
        logarithmic = name != "best_momentum"
        study = Study(measure, values, [(more, less, source)], logarithmic)
        assert orderings.table({name: study}).splitlines()[-1] in text


@pytest.mark.parametrize("seed", range(3))
def test_settings_are_chosen_with_the_seeds_that_tune(seed):
    size = Size(seeds=(1, 2, 3), tuning=(11, 12))
    found = np.exp(np.random.default_rng(seed).standard_normal((3, 4, 5)))
    found[..., 2:] *= 1e-6  # whatever these are, they have no say
    found[1, 2, :2], found[0, 0, 0] = 1e-3, INF
    assert orderings_task.best(found, size) == (1, 2)
    assert orderings_task.reported(found, size) == found[1, 2, 2:].tolist()
    assert orderings_task.reported(found, size, (2, 0)) == found[2, 0, 2:].tolist()


def test_a_method_is_tuned_by_runs_with_the_seeds_that_tune(monkeypatch):
    size, asked = Size(seeds=(1, 2), tuning=(11, 12)), []

    def run_to(size, seed, cluster, settings, target, every):
        asked.append((seed, settings["rate"], target, every))
        return abs(settings["rate"] - 0.2) + 0.1 * settings["other"] + 1e-3 * seed

    monkeypatch.setattr(orderings_task, "run_to", run_to)
    found = orderings_task.tuned(
        size, None, lambda a, b: {"rate": a, "other": b}, [(0.1, 0.2), (1, 2)], 0.4, 3
    )
    np.testing.assert_allclose(found, [0.101, 0.102])
    tries = [(seed, rate) for rate in (0.1, 0.1, 0.2, 0.2) for seed in (11, 12)]
    ends = [(1, 0.2), (2, 0.2)]
    assert asked == [(*one, 0.4, 3) for one in tries + ends]


@pytest.mark.parametrize("name", ["seldom", "agn", "easgd"])
def test_replicas_of_their_own_learn(name):
    settings = getattr(orderings_runs, name)(0.1, replicas=2, every=5)
    size = Size(steps=200)
    assert orderings_task.run_to(size, 1, orderings_runs.EVEN, settings) < 1.8  # of 2.3
    seconds = orderings_task.run_to(size, 1, orderings_runs.EVEN, settings, 1.8, 10)
    assert 0 < seconds < 200
    assert orderings_task.run_to(size, 1, orderings_runs.EVEN, settings, 0.0) == INF


def test_seeds_have_their_own_examples_and_clusters():
    problem = orderings_task.digits()
    first, other = (problem.data(seed).batch(0, 0)["x"] for seed in (1, 2))
    assert not np.array_equal(first, other)
    traces = [orderings_rules.simulated([4], 40, seed)[0] for seed in (1, 1, 2)]
    assert np.array_equal(traces[0].staleness(), traces[1].staleness())
    assert not np.array_equal(traces[0].staleness(), traces[2].staleness())


def test_the_smallest_study_leaves_its_table_numbers_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(orderings, "SMOKE", Size(20, (1, 2), (11,), (0.03, 0.3)))
    orderings.main([f"--out={tmp_path}", "--smoke", "--only=momentum"])
    with (tmp_path / "orderings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["1", "2"] * 4
    assert all(math.isfinite(float(row["value"])) for row in rows)
    assert "Mitliagkas" in (tmp_path / "orderings.md").read_text()
    assert (tmp_path / "orderings.png").stat().st_size > 5_000
