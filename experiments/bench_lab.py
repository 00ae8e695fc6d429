"""Measure what delay-aware rules cost in a replay, beside the rule without them.

    python -m experiments.bench_lab --out=runs/bench_lab
    python -m experiments.bench_lab --only=rules --sizes=670k

Each rule replays the same Trace as the plain optimizer that it is chained with, segment
by segment in turn, as in `bench_downpour`: a ratio is the median over the rounds of the
ratios within a round, and what compiles comes before the first round.
"""

import math
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import optax

import dbjax
from dbjax import optim
from dbjax.downpour.compiled import chunk_rows
from dbjax.downpour.plan import make_plan
from dbjax.downpour.problem import make_problem
from dbjax.downpour.replay import make_machine
from experiments.bench_downpour import walker
from experiments.bench_problems import SIZES, examples, initial, interleave, loss_fn
from experiments.bench_table import Options, Row, list_of, make_parser, run

STALENESS, STALE = ("staleness",), ("stale_params",)
LIMITS: dict[tuple[str, ...], float] = {STALENESS: 1.05, STALE: 1.2}


class Rule(NamedTuple):
    """A rule, what it asks for, and what it is compared with."""

    optimizer: optax.GradientTransformation
    provide: tuple[str, ...]
    plain: str


SGD, MOMENTUM = optax.sgd(1e-3), optax.sgd(1e-3, momentum=0.9)
PLAIN = {"SGD": SGD, "momentum": MOMENTUM, "Adagrad": dbjax.adagrad(1e-2)}
RULES = {
    "staleness-scaled SGD": Rule(
        optax.chain(optim.scale_by_staleness(), SGD), STALENESS, "SGD"
    ),
    "staleness-scaled Adagrad": Rule(
        optax.chain(optim.scale_by_staleness(), PLAIN["Adagrad"]), STALENESS, "Adagrad"
    ),
    "AdaDelay": Rule(optim.adadelay(100.0, 1.0), STALENESS, "SGD"),
    "DC-ASGD, constant": Rule(
        optax.chain(optim.compensate_delay(0.04), SGD), STALE, "SGD"
    ),
    "DC-ASGD, adaptive": Rule(
        optax.chain(optim.compensate_delay(2.0, decay=0.95), SGD), STALE, "SGD"
    ),
    "gap-aware momentum": Rule(
        optax.chain(optim.scale_by_gap(1e-3), MOMENTUM), STALE, "momentum"
    ),
}


def rules(options: Options) -> list[Row]:
    """A replayed update with each rule, against its plain optimizer."""
    return [row for name in options.sizes for row in _rules(name, options)]


def _rules(name: str, options: Options) -> list[Row]:
    size = SIZES[name]
    params, data = initial(size.widths), examples(size.widths)
    wanted = min(size.segment, 512) if options.quick else size.segment
    steps = (options.rounds + 2) * (wanted + 512 if wanted > 100 else wanted + 30)
    trace = dbjax.simulate(dbjax.Cluster(), replicas=size.replicas, steps=steps)
    plan, chunk, executor = make_plan(trace), 1, ""
    runs: dict[str, Any] = {}
    sides = {label: (rule, ()) for label, rule in PLAIN.items()}
    sides |= {label: (rule.optimizer, rule.provide) for label, rule in RULES.items()}
    for label, (optimizer, provide) in sides.items():
        problem = make_problem(
            loss_fn, params, data, optimizer=optimizer, shards=1,
            replicas=size.replicas, provide=provide,
        )  # fmt: skip
        machine, executor = make_machine(plan, problem, exact=False)
        chunk = min(chunk_rows(plan, problem), wanted)
        runs[label] = walker(machine)
    segment = math.ceil(wanted / chunk) * chunk
    warm = math.ceil(max(segment, plan.slots + 4) / chunk) * chunk
    times = interleave(runs, segment, warm, options.rounds)
    rows = []
    for label, rule in RULES.items():
        ratios = times.ratios(label, rule.plain)
        rows.append(
            Row("rules", f"{label}; {name}, {size.replicas} replicas, {executor}",
                f"{times.median(label) * 1e6:,.0f} us",
                f"{rule.plain}, {times.median(rule.plain) * 1e6:,.0f} us",
                statistics.median(ratios), f"<= {LIMITS[rule.provide]}",
                f"{min(ratios):.2f} to {max(ratios):.2f}")
        )  # fmt: skip
    return rows


def battery(options: Options) -> list[Row]:
    """The smoke battery from nothing to its page, and once more when all is known."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "experiments.battery", "--smoke"),
            *("--rule=experiments/rules/compensate.py", f"--out={folder}/out"),
            f"--cache={folder}/cells",
        ]
        for what, limit in {"from nothing": "<= 180 s", "again": ""}.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds = time.perf_counter() - begin
            row = f"the smoke battery, {what}", f"{seconds:.0f} s", "", None, limit
            rows.append(Row("battery", *row))
    return rows


SECTIONS = {f.__name__: f for f in (rules, battery)}


def main() -> None:
    """Run the sections asked for."""
    parser = make_parser("What the laboratory costs.", SECTIONS)
    parser.add_argument("--sizes", type=list_of(SIZES), default=["10k", "670k", "4.6M"])
    run(SECTIONS, parser.parse_args())


if __name__ == "__main__":
    main()
