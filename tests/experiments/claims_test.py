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
