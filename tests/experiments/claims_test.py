"""What is written of figures 4 and 5, and of phases, is what their numbers say."""

import csv
import math
import pathlib
import re

import numpy as np
import pytest

from experiments.figure_curves import crossing

HERE = pathlib.Path(__file__).parents[2] / "experiments"
TEXT = (HERE / "README.md").read_text()


def _read(name):
    lines = (HERE / "figures" / name).read_text().splitlines()
    notes = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    rows = [line for line in lines if not line.startswith("#")]
    return notes, list(csv.DictReader(rows))


NOTES4, ROWS4 = _read("figure4.csv")
NOTES5, ROWS5 = _read("figure5.csv")
TARGET = float(re.search(r"Target: ([\d.]+) %", "\n".join(NOTES4)).group(1))


def _hours(method):
    """The median of its seeds."""
    if method == "SGD [1]":  # figure 5 has no point of it
        rows = [r for r in ROWS4 if r["method"] == method]
        columns = [[float(row[name]) for row in rows] for name in ("hours", "test")]
        return crossing(*map(np.array, columns), TARGET)
    rows = [row for row in ROWS5 if row["method"] == method]
    assert [row["seed"] for row in rows] == list("01234")
    return float(np.median([float(row["hours"]) for row in rows]))


def _written():
    table = TEXT[TEXT.index("| hours to the target") :].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {name: hours for name, _, hours in rows}


@pytest.mark.parametrize("method", _written())
def test_the_table_of_figure_4(method):
    hours = _hours(method)
    written = _written()[method]
    if written == "never":
        assert math.isinf(hours)
    else:
        assert hours == pytest.approx(float(written), abs=0.06)


def test_the_target_that_is_written():
    assert f"ours, {TARGET:.1f} %" in TEXT


@pytest.mark.parametrize(
    ("sooner", "later", "share"),
    [
        ("Downpour [200], Adagrad", "L-BFGS [2000]", 73),
        ("L-BFGS [2000]", "Downpour [20], Adagrad", 42),
        ("Downpour [20], Adagrad", "Downpour [20]", 100),
        ("Downpour [20]", "SGD [1]", 100),
    ],
)
def test_the_orderings_of_figure_4(sooner, later, share):
    claim = f"{sooner} before {later}: holds; with 100 % of seeds, on {share} % of"
    assert any(note.startswith(claim) for note in NOTES4)
    assert share == 100 or f"{share} %" in TEXT


def test_adagrad_is_ahead_at_every_count_of_replicas():
    for n in (10, 20, 200, 400):
        claim = f"Downpour [{n}], Adagrad before Downpour [{n}]: holds; with 100 % of "
        assert any(
            note.startswith(claim) and "on 100 % of plausible" in note
            for note in NOTES5
        )


def test_adagrad_is_ahead_of_every_lbfgs():
    shares = []
    for n in (500, 1000, 2000, 5000):
        claim = (
            rf"Downpour \[200\], Adagrad before L-BFGS \[{n}\]: holds; with 100 % of"
        )
        (found,) = (match for note in NOTES5 if (match := re.match(claim, note)))
        shares.append(int(re.search(r"on (\d+) % of plausible", found.string).group(1)))
    assert f"{min(shares)} to {max(shares)} % of plausible" in TEXT


def test_lbfgs_gets_slower_on_the_most_machines():
    def hours(count):
        return _hours(f"L-BFGS [{count}]")

    assert abs(hours(500) - hours(1000)) < 2
    assert hours(5000) > 1.5 * hours(2000)


def test_lbfgs_alone_overfits():
    for method in {row["method"] for row in ROWS4}:
        test = [
            float(r["test"]) for r in ROWS4 if (r["method"], r["seed"]) == (method, "0")
        ]
        falls = max(test) - test[-1] > 1.0
        assert falls == method.startswith("L-BFGS"), method


PHASES = _read("phases.csv")[1]


def _losses(rule, along="staleness"):
    """Loss by rate, by the axis' value; infinite where it failed."""
    found = {}
    for row in PHASES:
        if (row["rule"], row["figure"]) == (rule, along):
            loss = math.inf if row["failed"] == "1" else float(row["train_loss"])
            rates = found.setdefault(round(float(row[along])), {})
            rates[float(row["learning_rate"])] = loss
    return found


def _best(rule, along="staleness"):
    return {at: min(one, key=one.get) for at, one in _losses(rule, along).items()}


def test_best_rates_follow_the_limit_of_theory():
    rates = sorted(_losses("SGD")[0])
    best = _best("SGD")
    for row in PHASES:
        key = row["rule"], row["figure"], row["learning_rate"]
        if key == ("SGD", "staleness", "0.001") and float(row["staleness"]) >= 1:
            place = rates.index(best[round(float(row["staleness"]))])
            around = rates[max(place - 1, 0)], [*rates, 9.0][place + 1]
            assert around[0] < float(row["limit_at_start"]) < around[1]


@pytest.mark.parametrize(
    ("rule", "times"), [("SGD, momentum 0.9", 55), ("SGD", 25), ("Adagrad", 11)]
)
def test_best_rates_shrink_as_it_is_written(rule, times):
    best = _best(rule)
    assert best[0] / best[64] == pytest.approx(times, rel=0.02)


def test_what_is_written_of_losses_under_staleness():
    rules = {row["rule"] for row in PHASES if row["figure"] == "staleness"}
    lowest = {
        name: {at: min(one.values()) for at, one in _losses(name).items()}
        for name in rules
    }
    for at, loss in lowest["Adagrad, warm start"].items():
        assert loss <= min(one[at] for one in lowest.values())
        assert at == 0 or loss < lowest["Adagrad"][at]
    for name, loss in (("Adagrad, warm start", 0.18), ("Adagrad", 0.30), ("SGD", 0.34)):
        assert lowest[name][16] == pytest.approx(loss, abs=0.006)
    alone = _best("SGD")[0]
    aware = {"SGD, rate / staleness", "SGD, gap-aware"}
    for name in aware:
        assert all(math.isfinite(one[alone]) for one in _losses(name).values())
    replicas = _losses("SGD, gap-aware", "replicas")
    assert [n for n, one in replicas.items() if math.isinf(one[alone])] == [64]
    for name in aware | {"SGD, DC-ASGD", "AdaDelay"}:
        for at in (one for one in lowest["SGD"] if one > 0):
            assert lowest[name][at] > 0.78 * lowest["SGD"][at]


def test_what_is_written_of_the_price_of_replicas():
    seconds, paid = {}, {}
    for row in (row for row in PHASES if row["figure"] == "cost"):
        key = row["rule"], int(row["replicas"])
        seconds[key], paid[key] = (
            float(row["wall_seconds"]),
            float(row["replica_seconds"]),
        )
    for rule in {rule for rule, _ in seconds}:
        assert 2.45 < seconds[rule, 1] / seconds[rule, 32] < 3.65
        assert 9 < paid[rule, 32] / paid[rule, 1] < 13
        assert seconds[rule, 64] > 0.99 * seconds[rule, 32]
    busy = {
        row["shards"]: float(row["utilisation"])
        for row in PHASES
        if row["figure"] == "saturation" and row["replicas"] == "10000"
    }
    assert busy == {
        "1": pytest.approx(0.10, abs=0.005),
        "4": pytest.approx(0.39, abs=0.005),
    }
