"""The paper's figure 3, speed-up over machines, and a model of machines beside it.

  python -m experiments.figure3
  python -m experiments.figure3 --no-measure --out=runs/figure3

The model is `dbjax.cluster.partitions`. Its machines are found in two ways:

- fitted: one set of bandwidth, latency and spread of paces for all four curves. How
  well it tells a curve that it has not seen is shown too, each left out in turn.
- measured: one core of this machine, and messages between two, which takes a minute.
  That says what machines of this kind would do, not what the paper's did. A network on
  one and two devices, which have a core each, checks the model.

The paper states neither its machines nor its mini-batches. Assumed are `BATCH` examples
and 20 cores of 2e9 operations a second; speed-ups only depend on ratios, so with others
the fit is the same and its bandwidth and latency are others. Plain SGD's update of the
parameters, and their fetches and pushes, are left out.

It leaves `figure3.png` and `figure3.csv`, and prints how far off the model is.
"""

import argparse
import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table

from dbjax.cluster import layers as layers_lib
from dbjax.cluster import partitions
from dbjax.cluster.distributions import Constant
from experiments import measure_machine, plots, plots_figure3
from experiments.figure3_fit import (
    BATCH,
    Fit,
    Paper,
    assumptions,
    describe,
    error,
    fit,
    predict,
    read,
    shortcomings,
)
from experiments.measure_machine import Measured

WIDTHS = (440, 1024, 1024, 1024, 2048)  # of the network that is measured here
SMOKE: dict[str, Any] = {"widths": (32, 128, 128), "rounds": 3, "repeats": 1}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, measure, draw and say how far off it is."""
    parser = argparse.ArgumentParser(description="The paper's figure 3 and a model.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("figures"))
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure this machine too, which takes a minute",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="measure a tiny network, to try it out"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console()
    paper = read()
    found = fit(paper)
    measured = None
    if options.measure:
        how = SMOKE if options.smoke else {"widths": WIDTHS}
        with console.status("measuring this machine"):
            measured = measure_machine.measure(batch=BATCH, **how)
    write(paper, found, measured, options.out / "figure3.csv")
    (file,) = plots.save(
        {"figure3": plots_figure3.draw(paper, found, measured)}, options.out
    )
    report(paper, found, measured, console)
    console.print(f"Wrote {file} and {file.with_suffix('.csv')}.")


def write(
    paper: Paper, found: Fit, measured: Measured | None, file: pathlib.Path
) -> None:
    """Leave every point and what is predicted for it as CSV, assumptions on top."""
    notes = [*paper.about, *assumptions(paper, found)]
    notes += check(measured) if measured else []
    with file.open("w", newline="") as out:
        out.writelines(f"# {note}\n" for note in notes)
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(
            ("network", "machines", "paper", "fitted", "fitted_without_it", "measured")
        )
        for point in paper.points:
            machines = [found.machine, found.without[point.network]]
            machines += [measured.machine] if measured else []
            told = [f"{predict(paper, machine, point):.3f}" for machine in machines]
            told += [""] * (3 - len(told))
            rows.writerow((point.network, point.machines, point.speed_up, *told))


def report(
    paper: Paper, found: Fit, measured: Measured | None, console: rich.console.Console
) -> None:
    """Print how far off the model is, and what it cannot explain."""
    table = rich.table.Table(
        "median (worst) of", "fitted", "left out", *(["measured"] if measured else []),
        title="How far predicted speed-ups are off those of figure 3",
    )  # fmt: skip
    for name in paper.networks:
        machines = [found.machine, found.without[name]]
        machines += [measured.machine] if measured else []
        cells = []
        for machine in machines:
            off = error(paper, name, machine)
            cells.append(
                f"{100 * off.median:.0f} % ({100 * off.worst:.0f} % at {off.machines})"
            )
        table.add_row(name, *cells)
    console.print(table)
    for note in (*assumptions(paper, found), *shortcomings(paper, found)):
        console.print(f"- {note}")
    if measured:
        for note in check(measured):
            console.print(f"- {note}")


def check(measured: Measured) -> list[str]:
    """Compare the measured machine's predictions with what ran here."""
    machine, steps = measured.machine, measured.steps
    network = layers_lib.network(measured.layers, measured.batch)
    # The best times are those in which nobody waited for a slower one.
    steady = dataclasses.replace(machine, pace=Constant(1.0))
    told = {n: partitions.step_time(steady, network(n), n) for n in steps}
    times = ", ".join(
        f"{1e3 * told[n]:.3g} ms on {n} (measured {1e3 * steps[n]:.3g} ms)"
        for n in steps
    )
    widths = "-".join(map(str, measured.widths))
    sent = sum(work.bytes for work in network(2))
    return [
        f"Measured here, the best of several times: a core does {machine.flops:.3g} "
        f"operations a second, and starts in {machine.grain / machine.flops:.2g} s; "
        f"{describe(machine)}, which includes what other programs did meanwhile.",
        f"Check, a gradient of {widths} with {measured.batch} examples, predicted: "
        f"{times}; speed-up {told[1] / told[2]:.2f} (measured "
        f"{steps[1] / steps[2]:.2f}). The model knows nothing of memory that cores "
        f"share. More than {os.cpu_count()} devices have no core each here, and cannot "
        "be checked.",
        f"Each of two sends {sent:,.0f} bytes by the model, {measured.sent:,.0f} by "
        "the compiled program.",
    ]


if __name__ == "__main__":
    main()
