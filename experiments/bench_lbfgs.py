"""Measure `dbjax.lbfgs` against its peers, each figure a ratio within one run.

    python -m experiments.bench_lbfgs --only=loss,direction,sharded --out=runs/lbfgs

Needs the `bench` extra. What is compared runs in turn, A B C A B C ...; a ratio is the
median over the rounds of the ratios within a round, so that a slow moment of the
machine hits all sides. Compilation comes before the first round and does not count.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dbjax
from dbjax import trees
from dbjax.typing import Params
from experiments.bench_children import child
from experiments.bench_classic import problems
from experiments.bench_lbfgs_peers import SIDES, Outcome
from experiments.bench_lbfgs_problems import PROBLEMS
from experiments.bench_problems import SIZES, Times, initial, interleave
from experiments.bench_sandblaster import cluster, progressive
from experiments.bench_table import Options, Row, Section, list_of, make_parser, run

MEMORIES = (5, 10, 20, 40)
DEFAULT = 10  # of all sides
DIRECTIONS = {"10M": (800, 2400, 2400, 960), "42M": SIZES["42M"].widths}

# loss


def loss(options: Options) -> list[Row]:
    """Seconds and evaluations to the same loss."""
    return [
        row for name in options.problems for row in _to_the_same_loss(name, options)
    ]


def _to_the_same_loss(name: str, options: Options) -> list[Row]:
    problem = PROBLEMS[name]()
    memories = MEMORIES[1:3] if options.quick else MEMORIES
    solvers = {
        (side, m): jax.block_until_ready(SIDES[side](problem, m))
        for m in memories
        for side in SIDES
    }
    outcomes: dict[Any, Outcome] = {}

    def solve(key: Any, rows: int) -> None:
        del rows
        outcomes[key] = jax.block_until_ready(solvers[key]())

    runs = {key: functools.partial(solve, key) for key in solvers}
    tried = interleave(runs, 1, 1, 1 if options.quick else 2)
    best = {s: (s, min(memories, key=lambda m: min(tried.wall[s, m]))) for s in SIDES}
    finalists = {*best.values(), *((side, DEFAULT) for side in SIDES)}
    times = interleave({k: runs[k] for k in sorted(finalists)}, 1, 1, options.rounds)
    for key, outcome in outcomes.items():
        if not outcome.value <= problem.target:
            print(
                f"{name}: {key} ended at {float(outcome.value):.6f}, above the target"
            )

    ours, peers = best["dbjax"], [side for side in SIDES if side != "dbjax"]
    rival = min((best[side] for side in peers), key=times.median)
    rows = [_loss_row(name, problem.target, ours, times, outcomes)]
    for key in dict.fromkeys(
        [*(best[s] for s in peers), *((s, DEFAULT) for s in peers)]
    ):
        limits = [">= 1.3"] * (key == rival) + [">= 1.5"] * (key[1] == DEFAULT)
        row = _loss_row(name, problem.target, key, times, outcomes, ours)
        rows.append(row._replace(limit=", ".join(limits)))
    return rows + [_evaluations_row(name, m, outcomes) for m in memories]


def _loss_row(
    name: str,
    target: float,
    key: Any,
    times: Times,
    outcomes: dict[Any, Outcome],
    ours: Any = None,
) -> Row:
    outcome = outcomes[key]
    row = Row(
        "loss",
        f"{name} to {target}, {key[0]}, memory {key[1]}",
        f"{times.median(key):.3f} s",
        notes=f"{int(outcome.iterations)} iterations, "
        f"{int(outcome.evaluations)} evaluations, first {times.first[key]:.2f} s",
    )
    if ours is None:
        return row
    ratios = times.ratios(key, ours)
    cpu = statistics.median(times.ratios(key, ours, cpu=True))
    return row._replace(
        baseline=f"dbjax, memory {ours[1]}",
        ratio=statistics.median(ratios),
        notes=f"{row.notes}, {min(ratios):.2f} to {max(ratios):.2f}, CPU {cpu:.2f}",
    )


def _evaluations_row(name: str, m: int, outcomes: dict[Any, Outcome]) -> Row:
    spent = {side: int(outcomes[side, m].evaluations) for side in SIDES}
    ours = spent.pop("dbjax")
    rival = min(spent, key=lambda side: spent[side])
    return Row(
        "loss",
        f"{name}, evaluations at memory {m}",
        str(ours),
        f"{rival}, the fewest of the peers",
        spent[rival] / ours,
        ">= 1",
        ", ".join(f"{side} {count}" for side, count in spent.items()),
    )


# direction


def direction(options: Options) -> list[Row]:
    """One update of `scale_by_lbfgs` at memory 10, in place."""
    sizes = ["10M"] if options.quick else DIRECTIONS
    return [row for name in sizes for row in _direction(name, options)]


def _direction(name: str, options: Options) -> list[Row]:
    params = jax.tree.map(jnp.asarray, initial(DIRECTIONS[name]))
    # Two points to go to and fro between, with positive curvature.
    moved = jax.tree.map(lambda x: 0.999 * x + 1e-4, params)
    points = [(p, jax.tree.map(lambda x: x + 0.5 * x**3, p)) for p in (params, moved)]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    rules = {
        "dbjax": dbjax.scale_by_lbfgs(DEFAULT),
        "dbjax, by leaf": dbjax.scale_by_lbfgs(DEFAULT, scaling="leaf"),
        "optax": optax.scale_by_lbfgs(DEFAULT),
    }
    reads = jnp.ones((DEFAULT, size)), jnp.ones(size)
    product = jax.jit(trees.rows_vdot)

    def read(rows: int) -> None:
        for _ in range(rows):
            jax.block_until_ready(product(*reads))

    runs = {rule: _updates(made, points) for rule, made in rules.items()}
    times = interleave(runs | {"read": read}, 4, 2 * DEFAULT, options.rounds)
    # The history twice, for products and for the combination; parameters and gradient,
    # new and old; a pair, the new ones and the direction written.
    vectors = 4 * DEFAULT + 4 + 5
    needed = [vectors * t / (DEFAULT + 1) for t in times.wall["read"]]
    share = [n / t for n, t in zip(needed, times.wall["dbjax"], strict=True)]
    rows = []
    for rule in rules:
        ratios = times.ratios("optax", rule)
        cpu = statistics.median(times.ratios("optax", rule, cpu=True))
        rows.append(
            Row(
                "direction",
                f"{name}, {size:,} parameters, memory {DEFAULT}, {rule}",
                f"{times.median(rule) * 1e3:.0f} ms",
                "optax",
                statistics.median(ratios),
                ">= 2.5" if rule == "dbjax" else "",
                f"{min(ratios):.2f} to {max(ratios):.2f}, CPU time {cpu:.2f}",
            )
        )
    limit = f"{statistics.median(needed) * 1e3:.0f} ms"
    what = f"{name}, traffic of {vectors} vectors at the speed of reading"
    notes = "the limit over dbjax's time"
    row = Row("direction", what, limit, "dbjax", statistics.median(share), "", notes)
    return [*rows, row]


def _updates(rule: Any, points: list[tuple[Params, Params]]) -> Callable[[int], None]:
    """Updates in place, to and fro between the points."""
    update = jax.jit(rule.update, donate_argnums=1)
    state, turn = jax.jit(rule.init)(points[0][0]), 0

    def run(rows: int) -> None:
        nonlocal state, turn
        for _ in range(rows):
            params, grad = points[turn % 2]
            found, state = update(grad, state, params)
            turn += 1
            jax.block_until_ready(found)

    return run


# sharded


def sharded(options: Options) -> list[Row]:
    """Collectives in the compiled direction, and memory a device, on 8 devices."""
    del options
    rows = []
    cases = itertools.product(
        ("Auto", "Explicit"), ("eager", "jitted"), ("whole", "leaf")
    )
    for kind, init, scaling in cases:
        seen = child(
            "lbfgs_on_devices", kind=kind, jitted=init == "jitted", scaling=scaling
        )
        what = f"8 devices, {kind} mesh, {init} init, scaling {scaling}"
        others = seen["others"]
        rows += [
                Row("sharded", f"{what}, all-reduces", str(seen["all_reduces"]),
                    "one", float(seen["all_reduces"]), "= 1",
                    f"other collectives {others}; optax: {seen['optax']}"),
                Row("sharded", f"{what}, state on a device",
                    f"{seen['largest'] / 2**20:.2f} MiB", "an eighth of the whole",
                    seen["largest"] * 8 / seen["whole"], "= 1", "after init"),
            ]  # fmt: skip
    return rows


# The script.

SECTIONS: dict[str, Section] = {
    f.__name__: f for f in (loss, direction, sharded, problems, cluster, progressive)
}


def main() -> None:
    """Run the sections asked for."""
    parser = make_parser("L-BFGS against its peers.", SECTIONS, rounds=5)
    parser.add_argument("--problems", type=list_of(PROBLEMS), default=list(PROBLEMS))
    run(SECTIONS, parser.parse_args())


if __name__ == "__main__":
    main()
