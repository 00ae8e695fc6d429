"""The paper's figure 5, time to a fixed accuracy over machines and over cores.

  python -m experiments.figure5
  python -m experiments.figure5 --smoke --out=runs/figure5

The study is that of `figure4`, whose curves and trials it takes over if they are there,
with more counts of replicas. Each point is tuned on its own, with as many trials.

It leaves `figure5.png`, `figure5.csv` and `figure5_tuning.csv`.
"""

import csv
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import rich.console
import rich.table

from experiments import figure4, figure_study, plots, plots_figure5
from experiments.figure_orderings import (
    Ordering,
    Times,
    check,
    step_seconds,
    times,
    verdict,
)
from experiments.figure_study import (
    FIGURE4,
    GPU,
    Calibrated,
    Lab,
    Method,
    Study,
    adagrad,
    downpour,
    lbfgs,
)
from experiments.figure_tuning import Tuned

FEW_AND_MANY = (10, 20, 200, 400)  # replicas of Downpour, on the paper's machines
BATCH = (500, 1000, 2000, 5000)  # of Sandblaster
SMOKE_COUNTS = (20, 200), (1000, 2000)
GPU_CORES = 513  # that the paper counts a GPU as
MARGIN = 1.03  # curves end when validation is so far above the target


class Point(NamedTuple):
    """A point of the figure.

    Attributes:
      machines: those of the server included.
      cores: in use, as `Machines.busy`.
      times: to the target, of each seed.
    """

    machines: int
    cores: float
    times: Times


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has not been run, draw, and say what came out."""
    options = figure4.parse("The paper's figure 5 and ours.", arguments)
    study = figure4.study_of(options)
    console = rich.console.Console()
    lab = Lab(study, options.out / "curves", console)
    found = figure_study.calibrate(lab)
    counts = SMOKE_COUNTS if options.smoke else (FEW_AND_MANY, BATCH)
    methods = methods_of(*counts)
    tuned = figure_study.tune_all(lab, found, methods)
    tuned = {method: tuned[method] for method in methods}
    reached = run(lab, found, tuned)
    points = {
        method: point(study, found, method, tuned[method], one)
        for method, one in reached.items()
    }
    with console.status("checking orderings on plausible clusters"):
        claims = check(claims_of(tuned, points), study, found, tuned, reached)
    notes = describe(study, found, claims)
    write(points, tuned, notes, options.out / "figure5.csv")
    figure4.write_tuning(tuned, options.out / "figure5_tuning.csv")
    picture = plots_figure5.draw(plots_figure5.read(), points, study.reach, found)
    (file,) = plots.save({"figure5": picture}, options.out)
    console.print(report(points, tuned))
    for note in notes:
        console.print(f"- {note}")
    console.print(f"Wrote {file}, {file.with_suffix('.csv')} and figure5_tuning.csv.")


def methods_of(minibatches: Sequence[int], batch: Sequence[int]) -> list[Method]:
    """The methods of all points."""
    kinds = [downpour(n) for n in minibatches] + [adagrad(n) for n in minibatches]
    return [GPU, *kinds, *(lbfgs(n) for n in batch)]


def run(
    lab: Lab, found: Calibrated, tuned: Mapping[Method, Tuned]
) -> dict[Method, Times]:
    """Run the curves until they reach the target; figure 4's as they are there."""
    shared = {m: one for m, one in tuned.items() if m in FIGURE4}
    others = {m: one for m, one in tuned.items() if m not in FIGURE4}
    results = figure_study.curves(lab, found, shared)
    results |= figure_study.curves(
        lab, found, others, hours=lab.study.reach, target=MARGIN * found.target
    )
    return {method: times(results[method], found.target) for method in tuned}


def point(
    study: Study, found: Calibrated, method: Method, tuned: Tuned, reached: Times
) -> Point:
    """Place a method on the figure."""
    machines = found.clock.machines
    count = machines.total(method.kind, method.replicas)
    if method.kind == "sgd":
        return Point(count, GPU_CORES, reached)
    seconds = step_seconds(machines, method, tuned.best, study)
    if method.kind == "lbfgs":
        each = machines.assumed.batch / study.task.batch
        work = machines.alone * each * tuned.best["examples"] / method.replicas
        return Point(count, method.replicas * machines.busy(work / seconds), reached)
    few = machines.of_a_replica(method.replicas)
    computing = machines.minibatch(few) / (method.replicas * seconds)
    return Point(count, method.replicas * machines.busy(computing, few), reached)


def claims_of(
    tuned: Mapping[Method, Tuned], points: Mapping[Method, Point]
) -> list[tuple[Method, Method]]:
    """Claim that Adagrad is ahead of the fixed rate, and of L-BFGS, everywhere.

    L-BFGS is compared with the replicas, on no more machines, that were the fastest
    when rates were tuned.
    """
    pairs = [(adagrad(m.replicas), m) for m in tuned if m.kind == "downpour"]
    for batch in (m for m in tuned if m.kind == "lbfgs"):
        few = [
            m
            for m in tuned
            if m.kind == "adagrad" and points[m].machines <= points[batch].machines
        ]
        best = min(few, key=lambda m: min(trial.score for trial in tuned[m].trials))
        pairs.append((best, batch))
    return pairs


def describe(study: Study, found: Calibrated, claims: Sequence[Ordering]) -> list[str]:
    """Say what is shown, and which orderings came out."""
    machines = found.clock.machines
    said = [
        f"Time to {100 * found.target:.2f} % on the test, to stay; medians of "
        f"{study.seeds} seeds. All else as in figure 4.",
        f"Machines: {machines.assumed.servers} of the server, and those of the "
        "replicas. Cores: those that compute, on average; the server's are left out. "
        f"The GPU counts as {GPU_CORES} cores, as in the paper.",
    ]
    return [*said, *map(verdict, claims)]


def report(
    points: Mapping[Method, Point], tuned: Mapping[Method, Tuned]
) -> rich.table.Table:
    """Put the points side by side."""
    table = rich.table.Table("method", "machines", "cores", "hours", "setting", "flags")
    for method, one in points.items():
        hours = one.times.middle
        setting = ", ".join(f"{k} {v:g}" for k, v in tuned[method].best.items())
        table.add_row(
            method.name, f"{one.machines:,}", f"{one.cores:,.0f}",
            f"{hours:.1f}" if math.isfinite(hours) else "never", setting,
            "; ".join(tuned[method].edges) or "-",
        )  # fmt: skip
    return table


def write(
    points: Mapping[Method, Point],
    tuned: Mapping[Method, Tuned],
    notes: Sequence[str],
    file: pathlib.Path,
) -> None:
    """Leave every seed of every point as CSV, notes on top."""
    with file.open("w", newline="") as out:
        out.writelines(f"# {note}\n" for note in notes)
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(("method", "machines", "cores", "seed", "hours", "setting"))
        for method, one in points.items():
            setting = " ".join(f"{k}={v:g}" for k, v in tuned[method].best.items())
            for seed, hours in enumerate(np.asarray(one.times.hours)):
                cores = f"{one.cores:.0f}"
                rows.writerow(
                    (method.name, one.machines, cores, seed, f"{hours:.2f}", setting)
                )


if __name__ == "__main__":
    main()
