"""What is written of figures 4 and 5 is what their numbers say."""

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
    """The median of its seeds' sustained crossings."""
    reached = []
    for seed in range(5):
        rows = [r for r in ROWS4 if (r["method"], r["seed"]) == (method, str(seed))]
        columns = [[float(row[name]) for row in rows] for name in ("hours", "test")]
        reached.append(crossing(*map(np.array, columns), TARGET))
    return float(np.median(reached))


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


def test_lbfgs_gets_slower_on_the_most_machines():
    def hours(count):
        rows = [row for row in ROWS5 if row["method"] == f"L-BFGS [{count}]"]
        return np.median([float(row["hours"]) for row in rows])

    assert abs(hours(500) - hours(1000)) < 2
    assert hours(5000) > 1.5 * hours(2000)


def test_lbfgs_alone_overfits():
    for method in {row["method"] for row in ROWS4}:
        test = [
            float(r["test"]) for r in ROWS4 if (r["method"], r["seed"]) == (method, "0")
        ]
        falls = max(test) - test[-1] > 1.0
        assert falls == method.startswith("L-BFGS"), method
