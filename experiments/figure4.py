"""The paper's figure 4, accuracy over time, by six methods: ours beside theirs.

  python -m experiments.figure4
  python -m experiments.figure4 --smoke --out=runs/figure4

What is trained, on what machines, and how methods are tuned stands in `figure_task`,
`figure_cluster` and `figure_study`, and in this folder's README. Every run is kept in a
folder beside the figure, so that a call that was stopped goes on where it was.

It leaves `figure4.png`, `figure4.csv` with every evaluation of every seed, and
`figure4_tuning.csv` with every setting that was tried.
"""

import argparse
import csv
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import rich.console
import rich.table

from experiments import (
    figure_data,
    figure_regime,
    figure_runs,
    figure_study,
    figure_task,
    plots,
    plots_figure4,
)
from experiments.figure_curves import Result
from experiments.figure_orderings import (
    Times,
    check,
    times,
    verdict,
)
from experiments.figure_regime import Regime
from experiments.figure_study import (
    FIGURE4,
    SMOKE_STUDY,
    Calibrated,
    Lab,
    Method,
    Study,
)
from experiments.figure_tuning import Tuned

_BY_NAME = {method.name: method for method in FIGURE4}
ORDER = (  # of the paper, the first to reach 16 % first
    "Downpour [200], Adagrad",
    "L-BFGS [2000]",
    "Downpour [20], Adagrad",
    "Downpour [20]",
    "SGD [1]",
)
CLAIMS = [(_BY_NAME[a], _BY_NAME[b]) for a, b in itertools.pairwise(ORDER)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has not been run, draw, and say what came out."""
    options = parse("The paper's figure 4 and ours.", arguments)
    study = study_of(options)
    console = rich.console.Console()
    lab = Lab(study, options.out / "curves", console)
    found = figure_study.calibrate(lab)
    tuned = figure_study.tune_all(lab, found, FIGURE4)
    tuned = {method: tuned[method] for method in FIGURE4}
    results = figure_study.curves(lab, found, tuned)
    reached = {m: times(each, found.target) for m, each in results.items()}
    with console.status("checking orderings on plausible clusters"):
        claims = check(CLAIMS, study, found, tuned, reached)
    best = figure_task.make(study.task).best
    notes = [*assumptions(study, found, best), *map(verdict, claims)]
    regimes = {
        m: regime(lab, found, m, tuned[m], results[m], reached[m])
        for m in FIGURE4
        if m.kind in ("downpour", "adagrad")
    }
    notes += describe_regimes(regimes)
    write(results, notes, options.out / "figure4.csv")
    write_tuning(tuned, options.out / "figure4_tuning.csv")
    paper = figure_study.read()
    picture = plots_figure4.draw(paper, results, found, best)
    (file,) = plots.save({"figure4": picture}, options.out)
    console.print(report(results, tuned, reached))
    for note in notes:
        console.print(f"- {note}")
    console.print(f"Wrote {file}, {file.with_suffix('.csv')} and figure4_tuning.csv.")


def parse(about: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read what figures 4 and 5 are called with, and make the folder."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("figures"))
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny study, to try it out"
    )
    parser.add_argument("--data", help='a file of frames, or "digits"; see figure_data')
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def study_of(options: argparse.Namespace) -> Study:
    """Give the study that is asked for."""
    study = SMOKE_STUDY if options.smoke else Study()
    if options.data is None:
        return study
    task = figure_data.task_of(options.data, study.task)
    return dataclasses.replace(study, task=task)


def regime(
    lab: Lab,
    found: Calibrated,
    method: Method,
    tuned: Tuned,
    results: Sequence[Result],
    reached: Times,
) -> Regime:
    """Say how far a method is from trouble, at the end of the warm start."""
    curve = figure_study.curve_of(lab.study, found, method, tuned.best, seed=0)
    params, scale = figure_runs.steps_at_start(curve, lab.folder)
    curvature = figure_regime.sharpness(lab.study.task, params, scale)
    staleness = float(np.mean([result.staleness for result in results]))
    # Until the target, or to the end where it is not reached.
    there = np.isfinite(reached.middle)
    steps = float(np.median(reached.steps)) if there else float(results[0].steps[-1])
    hours = reached.middle if there else float(results[0].hours[-1])
    updates = steps / tuned.best["n_push"]
    rate = tuned.best["rate"] * tuned.best["n_push"]  # pushes are sums
    return Regime(staleness, staleness / updates, hours, rate * curvature * staleness)


def describe_regimes(regimes: Mapping[Method, Regime]) -> list[str]:
    """Say it in words."""
    return [
        f"{method.name}: a push misses {r.staleness:.0f} updates, {100 * r.of_run:.2g} "
        f"% of those in {r.hours:.0f} h; eta x lambda x tau is {r.product:.2g} at the "
        "end of the warm start, where about 1.6 is the most that is stable."
        for method, r in regimes.items()
    ]


def assumptions(study: Study, found: Calibrated, best: float) -> list[str]:
    """Say what is assumed, and what is fitted."""
    task, machines = study.task, found.clock.machines
    a, sizes = machines.assumed, (task.bands, *task.hidden, task.states)
    frames = task.data or "generated speech-like frames"
    known = f"{100 * best:.1f} % is the best possible"
    if math.isnan(best):
        known = "the best possible accuracy is not known"
    too_small = "A smoke run: far too small and too briefly tuned to say anything."
    return [
        *([too_small] if study.steps == SMOKE_STUDY.steps else []),
        f"Task: {task.states} states of {frames}, network "
        f"{'-'.join(map(str, sizes))} of sigmoids, {task.model.num_parameters:,} "
        f"parameters, minibatches of {task.batch}; {task.training:,} examples to train "
        f"on, {task.validation:,} to tune by and {task.test:,} for the test, on which "
        f"{known}. {study.seeds} seeds.",
        f"Clock: 120 h are {found.steps:,} minibatches of SGD[1], so that one stands "
        f"for {found.clock.compression:.3g} of the paper's. Fitted to the curve of "
        f"SGD[1]: relative to its end, ours is {100 * found.mismatch:.1f} percentage "
        "points off (root mean square).",
        f"Target: {100 * found.target:.2f} %, which is to SGD[1]'s end on validation "
        "what 16 % is to its end in the paper.",
        f"Machines: {machines.bandwidth / 1e6:.0f} MB/s each way, fitted to figure 3; "
        f"speed-ups on 2, 4 and 8 machines as drawn there. Assumed: minibatches of "
        f"{a.batch}, {a.servers} servers, {a.few} machines to a replica of Downpour up "
        f"to 20 replicas and {a.many} above, 1 to one of Sandblaster, times of "
        f"{100 * a.spread:.0f} % spread, fetches and pushes "
        f"{'beside' if a.overlap else 'before and after'} the minibatch.",
        f"The GPU is SGD on a machine {figure_study.GPU_SPEED} times as fast as "
        "SGD[1]'s 8: the one number that is read off figure 4 beside SGD[1]'s curve.",
        "Adagrad's sums begin with the warm start; L-BFGS begins without a history, "
        "its batch is the first examples; all seeds share one schedule of replicas.",
    ]


def _hours(one: Times) -> str:
    return f"{one.middle:.1f} h" if np.isfinite(one.middle) else "never"


def report(
    results: Mapping[Method, Sequence[Result]],
    tuned: Mapping[Method, Tuned],
    reached: Mapping[Method, Times],
) -> rich.table.Table:
    """Put the methods side by side."""
    table = rich.table.Table(
        "method", "to the target", "seeds there", "test at the end", "setting", "flags"
    )
    for method, each in results.items():
        ends = [100 * float(np.mean(r.test[-3:])) for r in each]
        there = np.isfinite(reached[method].hours)
        setting = ", ".join(f"{k} {v:g}" for k, v in tuned[method].best.items())
        table.add_row(
            method.name, _hours(reached[method]), f"{there.sum()} of {len(there)}",
            f"{np.mean(ends):.1f} % at {each[0].hours[-1]:.0f} h", setting,
            "; ".join(tuned[method].edges) or "-",
        )  # fmt: skip
    return table


def write(
    results: Mapping[Method, Sequence[Result]],
    notes: Sequence[str],
    file: pathlib.Path,
) -> None:
    """Leave every evaluation as CSV, notes on top."""
    with file.open("w", newline="") as out:
        out.writelines(f"# {note}\n" for note in notes)
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(("method", "seed", "hours", "steps", "training", "test"))
        for method, each in results.items():
            for seed, r in enumerate(each):
                columns = zip(r.hours, r.steps, r.training, r.test, strict=True)
                for hours, steps, training, test in columns:
                    rows.writerow(
                        (method.name, seed, f"{hours:.3f}", f"{steps:.0f}",
                         f"{100 * training:.3f}", f"{100 * test:.3f}")
                    )  # fmt: skip


def write_tuning(tuned: Mapping[Method, Tuned], file: pathlib.Path) -> None:
    """Leave every trial as CSV."""
    with file.open("w", newline="") as out:
        out.write("# Trials in their order; one that is later than the best ends.\n")
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(
            ("method", "trial", "setting", "hours_to_target", "validation", "best",
             "flags")
        )  # fmt: skip
        for method, one in tuned.items():
            for place, trial in enumerate(one.trials, 1):
                chosen = trial.setting == one.best
                hours = trial.score[0] if len(trial.score) > 1 else np.inf
                setting = " ".join(f"{k}={v:g}" for k, v in trial.setting.items())
                rows.writerow(
                    (method.name, place, setting, f"{hours:.2f}",
                     f"{-100 * trial.score[-1]:.2f}", int(chosen),
                     "; ".join(one.edges) if chosen else "")
                )  # fmt: skip


if __name__ == "__main__":
    main()
