"""Two figures of Sandblaster: a straggling cluster, and a batch that grows.

    python -m experiments.bench_lbfgs --only=cluster,progressive

`cluster` emulates: its figures are the same on every machine. `progressive` takes wall
time: both sides in turn, in rounds that each have first parameters and an order of the
portions of their own; the ratio is the median over the rounds of the ratios within one.
"""

import dataclasses
import inspect
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbjax
from dbjax.cluster import Slow
from dbjax.sandblaster.arguments import check_arguments
from dbjax.sandblaster.batches import Batches, FullBatch, ProgressiveBatch
from dbjax.sandblaster.minimize import minimize
from dbjax.sandblaster.running import Running
from dbjax.sandblaster.schedule import STRATEGIES, Schedule, ideal_seconds, schedule
from dbjax.typing import Batch, Params
from experiments import streams
from experiments.bench_table import Options, Row

# cluster

EVALUATIONS = 4  # one after another: who is late in one is late for the next
NEAR = dbjax.Cluster.slow_tail()
FAR = dataclasses.replace(NEAR, latency=0.005, bandwidth=1e9, shard_service=1e-4)


def cluster(options: Options) -> list[Row]:
    """2,000 replicas, 2 % of them ten times slower: seconds over the ideal."""
    replicas = 200 if options.quick else 2000
    cases = [("near", NEAR, 20), ("far", FAR, 50)]
    rows = []
    for where, machines, each in cases:
        for strategy in STRATEGIES:
            begin = time.perf_counter()
            result = schedule(
                machines,
                replicas=replicas,
                portions=replicas * each,
                shards=1 if where == "near" else 8,
                evaluations=EVALUATIONS,
                strategy=strategy,
                parameter_bytes=0 if where == "near" else 16_000_000,
            )
            seconds = time.perf_counter() - begin
            what = f"{where}, {replicas:,} replicas x {each} portions, {strategy}"
            rows.append(_cluster_row(what, strategy, result, seconds))
    rows += _equal(replicas) + _minimized(max(50, replicas // 10))
    return [*rows, _events(replicas)]


def _cluster_row(what: str, strategy: str, result: Schedule, wall: float) -> Row:
    ratios = result.seconds / result.ideal
    info = result.info
    return Row(
        "cluster",
        what,
        f"{np.median(result.seconds):.2f} s an evaluation",
        f"ideal {result.ideal:.2f} s",
        float(np.max(ratios)),
        "<= 1.15" if strategy == "backups" else "",
        f"the slowest of {len(ratios)} evaluations; first {ratios[0]:.3f}, median "
        f"{np.median(ratios):.3f}; backups {info.backups}, dropped {info.dropped}; "
        f"{len(result.trace) / wall:,.0f} events/s",
    )


def _equal(replicas: int) -> list[Row]:
    """What backups cost where nobody is slow."""
    means = {}
    for strategy in ("backups", "portions"):
        result = schedule(
            dbjax.Cluster(), replicas=replicas, portions=20 * replicas,
            evaluations=EVALUATIONS, strategy=strategy,
        )  # fmt: skip
        means[strategy] = float(result.seconds.mean())
    return [
        Row(
            "cluster",
            f"equal machines, {replicas:,} replicas x 20 portions, backups",
            f"{means['backups']:.2f} s an evaluation",
            "without backups",
            means["backups"] / means["portions"],
            "<= 1.02",
        )
    ]


def _minimized(replicas: int) -> list[Row]:
    """The same within a run of L-BFGS, which also asks the shards for scalars."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20 * replicas, 8)).astype(np.float32)
    y = (x @ np.arange(8) + rng.standard_normal(len(x))).astype(np.float32)
    data = dbjax.from_arrays({"x": x, "y": y}, batch_size=1)
    slow = Slow(factor=10.0, replicas=range(0, replicas, 50))
    emulated = dbjax.Emulated(dataclasses.replace(FAR, slow=slow), seed=0)

    def loss(w: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean((jnp.tanh(batch["x"] @ w) - jnp.tanh(batch["y"])) ** 2)

    run = minimize(
        loss, jnp.full(8, 0.1), data, replicas=replicas, shards=8, iterations=8,
        runtime=emulated,
    )  # fmt: skip
    ideal = ideal_seconds(emulated.cluster, replicas, data.num_portions, emulated.seed)
    ideal *= run.evaluations / run.iterations
    return [
        Row(
            "cluster",
            f"far, minimize, {replicas:,} replicas x 20 portions, {strategy}",
            f"{seconds:.2f} s an iteration",
            f"ideal {ideal:.2f} s",
            seconds / ideal,
            "<= 1.15" if strategy == "backups" else "",
            f"{run.evaluations} evaluations in {run.iterations} iterations",
        )
        for strategy, seconds in run.info.seconds_per_iteration.items()
    ]


def _events(replicas: int) -> Row:
    begin = time.perf_counter()
    result = schedule(NEAR, replicas=replicas, portions=50 * replicas)
    seconds = time.perf_counter() - begin
    return Row(
        "cluster",
        f"{replicas:,} replicas x {50 * replicas:,} portions in all, one evaluation",
        f"{len(result.trace) / seconds:,.0f} events/s",
        notes=f"{len(result.trace):,} events in {seconds:.1f} s",
    )


# progressive

PORTION = 500
IN_A_ROW = 3  # iterations at the target, so that no lucky one counts


class Reach(NamedTuple):
    """When a run was at the target.

    Attributes:
      seconds: since its beginning; inf: never.
      iteration: of that moment.
      examples: seen until then, each as often as it was.
    """

    seconds: float
    iteration: int
    examples: int


def progressive(options: Options) -> list[Row]:
    """Time to a test accuracy on a fixed set: a growing batch against all of it."""
    nets, count, target = [(64, 128, 10), (64, 512, 512, 10)], 50_000, 0.98
    if options.quick:
        nets, count, target = nets[:1], 10_000, 0.95
    data, test = _digits(count)
    rounds = [options.rounds, min(options.rounds, 3)]  # the large one takes minutes
    return [
        _growing(net, data, test, target, turns)
        for net, turns in zip(nets, rounds, strict=False)
    ]


def _growing(
    widths: tuple[int, ...], data: Any, test: Batch, target: float, rounds: int
) -> Row:
    sides: dict[str, list[Reach]] = {"full": [], "progressive": []}
    first = {}
    for turn in range(-1, rounds):  # the first compiles, and does not count
        seed = max(turn, 0)
        growing = ProgressiveBatch(portions=4, seed=seed)
        rules = {"full": FullBatch(), "progressive": growing}
        for name, rule in rules.items():
            begin = time.perf_counter()
            reach = _reach(_initial(widths, seed), data, test, target, rule)
            if turn < 0:
                first[name] = time.perf_counter() - begin
            else:
                sides[name].append(reach)
    pairs = list(zip(sides["full"], sides["progressive"], strict=True))
    ratios = [a.seconds / b.seconds for a, b in pairs]
    work = [a.examples / b.examples for a, b in pairs]
    return Row(
        "progressive",
        f"{data.num_examples:,} augmented digits, {'-'.join(map(str, widths))}, "
        f"L-BFGS, to {target:.0%} of the test {IN_A_ROW} iterations running",
        _seconds(sides["progressive"]),
        f"full batch {_seconds(sides['full'])}",
        statistics.median(ratios),
        ">= 2",
        f"speedup, {min(ratios):.1f} to {max(ratios):.1f} over {rounds} seeds; "
        f"gradients of examples {statistics.median(work):.1f} times fewer; iterations "
        f"{_iterations(sides['progressive'])} against {_iterations(sides['full'])}; "
        f"first runs, compilation included, {first['progressive']:.1f} and "
        f"{first['full']:.1f} s",
    )


def _seconds(side: list[Reach]) -> str:
    return f"{statistics.median(r.seconds for r in side):.2f} s"


def _iterations(side: list[Reach]) -> str:
    return f"{statistics.median(r.iteration for r in side):.0f}"


class _Reached(Exception):
    """Nothing more is wanted of the run."""


def _reach(
    params: Params, data: Any, test: Batch, target: float, rule: Batches
) -> Reach:
    """Run until the target is reached; the time of the tests does not count."""
    tested, in_a_row, found = 0.0, 0, None

    def judge(params: Params, step: int, _: float) -> dict[str, float]:
        nonlocal tested, in_a_row, found
        jax.block_until_ready(params)
        now = time.perf_counter()
        accuracy = float(_accuracy(params, test))
        in_a_row = in_a_row + 1 if accuracy >= target else 0
        if in_a_row == IN_A_ROW:
            examples = running.rows[-1]["portions"] * PORTION
            found = Reach(now - begin - tested, step, examples)
            raise _Reached
        tested += time.perf_counter() - now
        return {"accuracy": accuracy}

    running = _compiled(params, data, rule, judge)
    begin = time.perf_counter()
    try:
        running.to_the_end()
    except _Reached:
        pass
    return found or Reach(float("inf"), -1, 1)


def _compiled(params: Params, data: Any, rule: Batches, judge: Any) -> Running:
    """Prepare `minimize` and compile its gradient, which belongs to one run."""
    parameters = inspect.signature(minimize).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    given |= {"batches": rule, "iterations": 200, "tolerance": 0.0, "eval_fn": judge}
    given |= {"runtime": dbjax.Emulated()}
    options = {"rng": given.pop("rng"), "has_aux": given.pop("has_aux")}
    arguments = check_arguments(**given)
    running = Running(_loss, params, data, arguments, **options)
    problem, accrued = running.problem, None
    for _ in range(2):  # the first of a sum, and another
        accrued, *_ = problem.both(
            accrued, running.vectors.get("x"), problem.portion(0), 0,
            float(problem.examples[0]), rule.squares,
        )  # fmt: skip
    jax.block_until_ready(accrued)
    return running


def _digits(count: int) -> tuple[Any, Batch]:
    """Images moved, turned and made noisy once and for all; others as the test."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:497], order[497:]
    stream = streams.AugmentedImages(images[train], labels[train], count)
    data = dbjax.from_arrays(stream.batch(0, 0), batch_size=PORTION)
    flat = images[test].reshape(len(test), -1) - stream.mean
    return data, {"image": jnp.asarray(flat), "label": jnp.asarray(labels[test])}


def _initial(widths: tuple[int, ...], seed: int) -> Params:
    rng = np.random.default_rng(seed)
    return [
        {
            "w": (rng.standard_normal((a, b)) * np.sqrt(2 / a)).astype(np.float32),
            "b": np.zeros(b, np.float32),
        }
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]


def _scores(params: Params, images: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        images = jax.nn.relu(images @ layer["w"] + layer["b"])
    return images @ params[-1]["w"] + params[-1]["b"]


def _loss(params: Params, batch: Batch) -> jax.Array:
    scores, labels = _scores(params, batch["image"]), batch["label"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


@jax.jit
def _accuracy(params: Params, test: Batch) -> jax.Array:
    return jnp.mean(_scores(params, test["image"]).argmax(-1) == test["label"])
