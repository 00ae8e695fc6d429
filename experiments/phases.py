"""Phase diagrams of asynchrony on handwritten digits, and what replicas cost.

  python -m experiments.phases --out=runs/phases
  python -m experiments.phases --out=runs/phases --smoke

Learning rate x staleness (a constant delay), and learning rate x replicas (emulated,
equal machines), one `dbjax.sweep` for each rule. A run has failed that ends with a loss
not below the start's, or whose numbers were not finite. Where theory has a limit of
stability, it is drawn for two curvatures: at the start, and the largest at the end of
any run without staleness.

Then the price: wall time and replica-seconds to a target loss, and the same kind of
cluster with up to 10,000 replicas, until the shards saturate.

It leaves `phases_staleness.png`, `phases_replicas.png`, `phases_cost.png`,
`phases_saturation.png`, `phases.csv` with all their numbers, and `phases_probe.png`:
one of these runs, push by push.
"""

import argparse
import csv
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import rich.console
import rich.progress

import dbjax
from dbjax import optim
from dbjax.downpour.probe import PROBES, Probes
from dbjax.downpour.sweep import Sweep
from dbjax.trace import Trace
from experiments import phase_costs, plots, plots_phases, plots_probe, workloads
from experiments.phase_costs import Cost, Load
from experiments.phase_rules import RULES, Rule
from experiments.workload import Workload

EXAMPLES = 2_000  # of which the curvature is
SAMPLES = 200  # pushes that are looked at


@dataclasses.dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
      rules: names among `RULES`.
      rates: learning rates.
      delays: staleness, in updates.
      replicas: how many.
      steps: minibatches of each run of a diagram.
      warm: of these, those of a warm start.
      hidden: units of the network's hidden layer.
      examples: augmented images to train on.
      priced: rules, without a warm start, that are timed to the target.
      target: the training loss that time is measured to.
      longest: minibatches after which a target counts as not reached.
      few: the best rates of a diagram that are tried for that.
      crowd: replicas of the clusters that are only simulated.
      turns: minibatches of each of these.
    """

    rules: tuple[str, ...] = tuple(RULES)
    rates: tuple[float, ...] = tuple(np.geomspace(0.001, 3.0, 11).tolist())
    delays: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)
    replicas: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    steps: int = 1_000
    warm: int = 200
    hidden: int = 128
    examples: int = 10_000
    priced: tuple[str, ...] = ("SGD", "SGD, momentum 0.9", "Adagrad", "SGD, DC-ASGD")
    target: float = 0.5
    longest: int = 4_000
    few: int = 3
    crowd: tuple[int, ...] = (10, 30, 100, 300, 1_000, 2_000, 4_000, 10_000)
    turns: int = 20


SMOKE = Study(
    rules=("SGD", "Adagrad, warm start"), rates=(0.01, 0.1, 10.0), delays=(0, 2, 8),
    replicas=(1, 4), steps=60, warm=20, hidden=16,
    examples=2_000, priced=("SGD",), target=2.2, longest=60, few=1,
    crowd=(10, 100, 1_000), turns=8,
)  # fmt: skip


class Diagram(NamedTuple):
    """A phase diagram of one rule: `T` Traces and `H` rates.

    Attributes:
      rule: its name.
      values: `[T]` what the Traces differ in.
      rates: `[H]` learning rates.
      staleness: `[T]` mean over the second half of each run.
      loss: `[T, H]` training loss at the end.
      accuracy: `[T, H]` on the test.
      failed: `[T, H]` not finite, or no better than the start.
      limits: `[2, T]` the largest stable rates, by the curvature at the start and the
        largest at the end; None where theory has none.
      traces: the Traces.
    """

    rule: str
    values: np.ndarray
    rates: np.ndarray
    staleness: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    failed: np.ndarray
    limits: np.ndarray | None
    traces: list[Trace]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, draw, and say what came out."""
    parser = argparse.ArgumentParser(description="Phase diagrams of asynchrony.")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/phases"))
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny study, to try it out"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    study = SMOKE if options.smoke else Study()
    console = rich.console.Console()
    # A fixed set, so that minibatches cost next to nothing.
    workload = workloads.digits(
        seed=0, hidden=(study.hidden,), train_on="fixed", fixed_examples=study.examples
    )
    by_delay, by_replicas = diagrams(study, workload, console)
    with console.status("time to the target"):
        costs = phase_costs.costs(study, workload, by_replicas)
    with console.status("large clusters"):
        loads = phase_costs.saturation(study)
    with console.status("push by push"):
        seen = pushes(workload, by_replicas[0])
    figures = {
        "phases_probe": plots_probe.draw(seen),
        "phases_staleness": plots_phases.draw(by_delay, "staleness (updates)"),
        "phases_replicas": plots_phases.draw(by_replicas, "replicas"),
        "phases_cost": plots_phases.draw_costs(costs, study.target),
        "phases_saturation": plots_phases.draw_saturation(loads),
    }
    files = plots.save(figures, options.out)
    write(by_delay, by_replicas, costs, loads, options.out / "phases.csv")
    console.print(*(f"Wrote {file}." for file in files), sep="\n")
    console.print(f"Wrote {options.out / 'phases.csv'}.")


def diagrams(
    study: Study, workload: Workload, console: rich.console.Console
) -> tuple[list[Diagram], list[Diagram]]:
    """Sweep every rule over delays, and over replicas."""
    curvatures: tuple[float, float] | None = None
    made: dict[str, list[Diagram]] = {"staleness": [], "replicas": []}
    jobs = [(along, name) for along in made for name in study.rules]
    for along, name in rich.progress.track(jobs, "sweeping", console=console):
        rule = RULES[name]
        values = study.delays if along == "staleness" else study.replicas
        traces = [
            trace_of(study, along, value, study.warm if rule.warm else 0)
            for value in values
        ]
        swept = dbjax.sweep(
            traces, workload.loss, workload.init(0), workload.data,
            lambda learning_rate, make=rule.make: make(learning_rate),
            {"learning_rate": np.array(study.rates)},
            metrics_fn=workload.evaluate, provide=rule.provide,
        )  # fmt: skip
        start = workload.evaluate(workload.init(0))["train_loss"]
        loss = swept.metrics["train_loss"]
        failed = swept.diverged | ~(loss < start)
        if curvatures is None:
            curvatures = sharpest(workload, swept, failed)
        staleness = np.array([late_staleness(trace) for trace in traces])
        diagram = Diagram(
            name, np.array(values), swept.axes["learning_rate"], staleness, loss,
            swept.metrics["test_accuracy"], failed,
            limits(rule, staleness, curvatures), traces,
        )  # fmt: skip
        made[along].append(diagram)
    return made["staleness"], made["replicas"]


def trace_of(study: Study, along: str, value: int, warm: int) -> Trace:
    """Make the Trace of a constant delay, or of a number of replicas."""
    if along == "staleness":
        since = np.maximum(np.arange(study.steps) - warm, 0)
        return Trace.from_delays(np.minimum(since, value))
    return dbjax.simulate(
        dbjax.Cluster(), replicas=value, steps=study.steps, warmstart_steps=warm
    )


def late_staleness(trace: Trace) -> float:
    """Give the mean staleness of a run's second half."""
    staleness = trace.staleness()
    return float(staleness[len(staleness) // 2 :].mean())


def sharpest(
    workload: Workload, swept: Sweep, failed: np.ndarray
) -> tuple[float, float]:
    """Give the curvature at the start, and the largest at the end of fresh runs."""
    assert workload.fixed is not None
    batch = {name: values[:EXAMPLES] for name, values in workload.fixed.items()}
    find = jax.jit(functools.partial(optim.sharpness, workload.loss))
    start = float(find(workload.init(0), batch))
    ends = [
        float(find(jax.tree.map(lambda x, i=i: x[0, i], swept.params), batch))
        for i in np.flatnonzero(~failed[0])
    ]
    return start, max(ends, default=start)


def pushes(workload: Workload, diagram: Diagram) -> Probes:
    """Probe SGD at its best rate, with so many replicas as two thirds of all have."""
    place = 2 * len(diagram.traces) // 3
    loss = np.where(diagram.failed[place], np.inf, diagram.loss[place])
    rate = float(diagram.rates[loss.argmin()])
    assert workload.fixed is not None
    trace = diagram.traces[place]
    return dbjax.probe(
        trace, workload.loss, workload.init(0), workload.data,
        optimizer=optax.sgd(rate), probes=PROBES,
        learning_rate=rate, every=max(1, len(trace.staleness()) // SAMPLES),
        batch={name: values[:EXAMPLES] for name, values in workload.fixed.items()},
    )  # fmt: skip


def limits(
    rule: Rule, staleness: np.ndarray, curvatures: tuple[float, float]
) -> np.ndarray | None:
    """Give the largest stable rates, `[2, T]`, if theory has any."""
    if rule.limit is None:
        return None
    return np.stack([rule.limit(staleness) / curvature for curvature in curvatures])


COLUMNS = (
    "figure", "rule", "staleness", "replicas", "shards", "learning_rate", "train_loss",
    "test_accuracy", "failed", "limit_at_start", "limit_sharpest", "wall_seconds",
    "replica_seconds", "updates_per_second", "most_updates_per_second", "utilisation",
)  # fmt: skip


def write(
    by_delay: Sequence[Diagram],
    by_replicas: Sequence[Diagram],
    costs: Sequence[Cost],
    loads: Sequence[Load],
    file: pathlib.Path,
) -> None:
    """Leave all numbers as one CSV; what a row does not have is empty."""
    with file.open("w", newline="") as out:
        rows = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        rows.writeheader()
        for diagram in by_delay:
            rows.writerows(_cells(diagram, "staleness"))
        for diagram in by_replicas:
            rows.writerows(_cells(diagram, "replicas"))
        for name, each in (("cost", costs), ("saturation", loads)):
            for one in each:
                rows.writerow({"figure": name, **_rounded(one._asdict())})


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Give floats with five digits."""
    return {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}


def _cells(diagram: Diagram, along: str) -> list[dict[str, Any]]:
    """Give a row for each cell of a diagram."""
    rows = []
    for t, h in np.ndindex(*diagram.loss.shape):
        row: dict[str, Any] = {
            "figure": along,
            "rule": diagram.rule,
            "staleness": float(diagram.staleness[t]),
            "learning_rate": float(diagram.rates[h]),
            "train_loss": float(diagram.loss[t, h]),
            "test_accuracy": float(diagram.accuracy[t, h]),
            "failed": int(diagram.failed[t, h]),
        }
        if along == "replicas":
            row["replicas"] = int(diagram.values[t])
        if diagram.limits is not None:
            start, end = diagram.limits[:, t].tolist()
            row |= {"limit_at_start": start, "limit_sharpest": end}
        rows.append(_rounded(row))
    return rows


if __name__ == "__main__":
    main()
