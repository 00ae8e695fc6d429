"""Measure Downpour's speed and memory, each figure a ratio within one run.

    python -m experiments.bench_downpour --only=replay,exact --out=runs/bench

What is compared runs in turn, A B C A B C ..., a segment each; a ratio is the median
over the rounds of the ratios within a round, so that a slow moment of the machine hits
both sides. Compilation, checks and planning come before the first round: each side
first runs a segment that is not counted (its time is reported), long enough that every
version slot of an emulation has its memory. `machine.run`, which is timed then, is the
whole of what `dbjax.replay` does for each row.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dbjax
from dbjax.downpour.compiled import chunk_rows
from dbjax.downpour.plan import make_plan
from dbjax.downpour.problem import make_problem
from dbjax.downpour.replay import make_machine
from dbjax.downpour.run import peak_copies
from dbjax.trace import COMPUTE, Trace
from experiments.bench_children import child
from experiments.bench_problems import (
    BATCH,
    SIZES,
    examples,
    host_loop,
    initial,
    interleave,
    loss_fn,
    scan_loop,
)
from experiments.bench_table import Options, Row, list_of, make_parser, run

# replay, exact


def replay(options: Options, exact: bool = False) -> list[Row]:
    """An emulated update against a plain optax step on the same minibatches."""
    return [row for name in options.sizes for row in _updates(name, exact, options)]


def exact(options: Options) -> list[Row]:
    """The same with the executor that reproduces recorded runs bit for bit."""
    return replay(options, exact=True)


def _updates(name: str, exact: bool, options: Options) -> list[Row]:
    size = SIZES[name]
    params, data, tx = initial(size.widths), examples(size.widths), dbjax.adagrad(0.05)
    wanted = min(size.segment, 512) if options.quick else size.segment
    # Enough for the rounds, the warm-up, and a segment that is rounded up.
    steps = (options.rounds + 2) * (wanted + 512 if wanted > 100 else wanted + 30)
    runs: dict[str, Callable[[int], None]] = {}
    sides = {}
    chunk, slots, segment = 1, 0, wanted
    for shards in (1, 4):
        problem = make_problem(
            loss_fn, params, data, optimizer=tx, shards=shards, replicas=size.replicas
        )
        trace = dbjax.simulate(
            dbjax.Cluster(), replicas=size.replicas, shards=shards, steps=steps
        )
        plan = make_plan(trace)
        machine, executor = make_machine(plan, problem, exact)
        if not runs:
            chunk = min(chunk_rows(plan, problem), wanted)
            segment = math.ceil(wanted / chunk) * chunk
            runs["host loop"] = host_loop(params, data, plan, tx)
            runs["scan"] = scan_loop(params, data, plan, tx, chunk)
        sides[f"{executor}, {shards} shard" + "s" * (shards > 1)] = machine
        slots = max(slots, plan.slots)
    runs |= {label: walker(machine) for label, machine in sides.items()}
    warm = math.ceil(max(segment, slots + 4) / chunk) * chunk
    times = interleave(runs, segment, warm, options.rounds)
    base = min(("host loop", "scan"), key=times.median)
    limit = 1.3 if exact else size.limit
    rows = []
    for label in runs:
        ratios = times.ratios(label, base)
        cpu = statistics.median(times.ratios(label, base, cpu=True))
        rows.append(
            Row(
                "exact" if exact else "replay",
                f"{name}, {size.replicas} replicas, {label}",
                f"{times.median(label) * 1e6:,.0f} us",
                base,
                statistics.median(ratios),
                f"<= {limit}" if label in sides else "",
                f"{min(ratios):.2f} to {max(ratios):.2f}, CPU time {cpu:.2f}, "
                f"first {warm} rows {times.first[label]:.1f} s",
            )
        )
    return rows


def walker(machine: Any) -> Callable[[int], None]:
    """Give what walks so many rows more, and waits for them."""
    # Shards in step are cut up once, at the very end.
    machine = getattr(machine, "machine", machine)

    def run(rows: int) -> None:
        machine.run(machine.row + rows)
        jax.block_until_ready(machine.shards)

    return run


# simulate


def simulate(options: Options) -> list[Row]:
    """Events a second, and a large cluster in a process of its own."""
    steps = 50_000 if options.quick else 500_000
    cases = {
        "20 replicas": (20, steps, dbjax.Cluster(), 1e6),
        "1,000 replicas": (1000, steps, dbjax.Cluster(), 1e6),
        "20 replicas, shards queue": (
            *(20, steps // 5, dbjax.Cluster(shard_service=0.04), 250e3),
        ),
        "1,000 replicas, shards queue": (
            *(1000, steps // 5, dbjax.Cluster(shard_service=0.0008), 250e3),
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, (replicas, count, cluster, _) in cases.items():
            begin = time.perf_counter()
            trace = dbjax.simulate(cluster, replicas=replicas, steps=count)
            rates[name].append(len(trace) / (time.perf_counter() - begin))
    rows = []
    for name, (_, count, _, least) in cases.items():
        rate = statistics.median(rates[name])
        rows.append(
            Row(
                "simulate",
                f"{name}, {count:,} steps",
                f"{rate:,.0f} events/s",
                "events/s wanted",
                rate / least,
                ">= 1",
            )
        )
    each = 100 if options.quick else 1000
    big = child("large_cluster", each=each)
    return [
        *rows,
        Row(
            "simulate",
            f"10,000 replicas x {each:,} steps, one shard",
            f"{big['seconds']:.1f} s",
            "45 s",
            big["seconds"] / 45,
            "<= 1",
            f"{big['rows']:,} events, peak RSS {big['peak'] / 2**30:.1f} GiB",
        ),
    ]


# sweep


def sweep(options: Options) -> list[Row]:
    """64 learning rates at once against compiled replays in turn.

    Compilation and set-up go out by differencing two lengths, on both sides.
    """
    lengths = (512, 1536) if options.quick else (1024, 5120)
    size = SIZES["10k"]
    params, data = initial(size.widths), examples(size.widths)
    rates = np.geomspace(1e-3, 1e-1, 64).astype(np.float32)
    short, long = (
        dbjax.simulate(dbjax.Cluster(), replicas=size.replicas, steps=n)
        for n in lengths
    )

    def swept(trace: Trace) -> float:
        begin = time.perf_counter()
        dbjax.sweep(trace, loss_fn, params, data, dbjax.adagrad, rates)
        return time.perf_counter() - begin

    def replayed(trace: Trace, rate: float) -> float:
        begin = time.perf_counter()
        tx = dbjax.adagrad(rate)
        run = dbjax.replay(trace, loss_fn, params, data, optimizer=tx, exact=False)
        jax.block_until_ready(run.params)
        return time.perf_counter() - begin

    # A part of the settings stands for all: they cost the same.
    some = [float(rate) for rate in rates[:: 32 if options.quick else 8]]
    steady, whole, seconds = [], [], []
    for _ in range(options.rounds):
        ours = swept(short), swept(long)
        theirs = [(replayed(short, r), replayed(long, r)) for r in some]
        turn = [64 * statistics.mean(t[i] for t in theirs) for i in range(2)]
        steady.append((turn[1] - turn[0]) / (ours[1] - ours[0]))
        whole.append(turn[1] / ours[1])
        seconds.append(ours[1])
    common = f"64 learning rates, 10k, {lengths[1]:,} steps"
    took = f"{statistics.median(seconds):.1f} s"
    turn_name = f"64 replays in turn (from {len(some)})"
    return [
        Row("sweep", f"{common}, set-up excluded", "", turn_name,
            statistics.median(steady), ">= 1.8",
            f"{min(steady):.2f} to {max(steady):.2f}"),
        Row("sweep", f"{common}, set-up included", took, turn_name,
            statistics.median(whole)),
    ]  # fmt: skip


# threads


def threads(options: Options) -> list[Row]:
    """Updates a second on threads, over what this machine could do at best."""
    size = SIZES["670k"]
    params, data, tx = initial(size.widths), examples(size.widths), dbjax.adagrad(0.05)
    steps = 200 if options.quick else 1000
    cases = [(shards, replicas) for shards in (1, 4) for replicas in (2, 4, 8)]
    shares: dict[Any, list[float]] = {case: [] for case in cases}
    rates: dict[Any, list[float]] = {case: [] for case in cases}
    bounds: list[float] = []
    gradient = jax.jit(jax.grad(loss_fn))
    held = jax.tree.map(jnp.asarray, params)
    batch = jax.tree.map(jnp.asarray, data.batch(0, 0))
    nbytes = 20 * sum(leaf.size for leaf in jax.tree.leaves(params))
    for _ in range(options.rounds):
        for case in cases:
            seconds = _seconds(lambda: gradient(held, batch)), nbytes / _bandwidth()
            bounds.append(1 / sum(seconds))
            run = dbjax.downpour.train(
                loss_fn, params, data, optimizer=tx, replicas=case[1], shards=case[0],
                steps=steps, runtime=dbjax.Threads(),
            )  # fmt: skip
            rates[case].append(_steady_rate(run.trace))
            shares[case].append(rates[case][-1] / bounds[-1])
    parallel = [child("data_parallel", steps=steps) for _ in range(3)]
    synchronous = statistics.median(run["rate"] for run in parallel)
    rows = []
    for shards, replicas in cases:
        rate = statistics.median(rates[shards, replicas])
        rows.append(
            Row(
                "threads",
                f"670k, {replicas} replicas, {shards} shard" + "s" * (shards > 1),
                f"{rate:,.0f} updates/s",
                f"limit {statistics.median(bounds):,.0f}/s",
                statistics.median(shares[shards, replicas]),
                ">= 0.9" if shards == 1 else ">= 0.8",
                f"{rate / synchronous:.2f} of synchronous data-parallel optax",
            )
        )
    name = "670k, synchronous data-parallel optax, 2 devices"
    return [*rows, Row("threads", name, f"{synchronous:,.0f} updates/s")]


def _steady_rate(trace: Trace) -> float:
    """Minibatches a second in the middle 80 % of a run: start-up does not count."""
    done = np.sort(trace.time[trace.kind == COMPUTE])
    middle = done[len(done) // 10 : -len(done) // 10]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def _seconds(call: Callable[[], Any], times: int = 30) -> float:
    jax.block_until_ready(call())
    seen = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seen.append(time.perf_counter() - begin)
    return statistics.median(seen)


def _bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    array = jnp.ones(1 << 24, jnp.float32)
    twice = jax.jit(lambda out, x: x + 1, donate_argnums=0, keep_unused=True)
    out = jnp.copy(array)
    seen = []
    for _ in range(10):
        begin = time.perf_counter()
        out = jax.block_until_ready(twice(out, array))
        seen.append(time.perf_counter() - begin)
    return 2 * array.nbytes / statistics.median(seen)


# memory


def memory(options: Options) -> list[Row]:
    """Copies held at most, as planned and as the process grows."""
    replicas, rows = 20, []
    for n_push in (1, 2, 5):
        trace = dbjax.simulate(
            dbjax.Cluster(), replicas=replicas, steps=2000, n_push=n_push
        )
        copies = peak_copies(make_plan(trace))
        most = replicas + 4 if n_push == 1 else 2 * replicas + 4
        rows.append(
            Row(
                "memory",
                f"{replicas} replicas, n_push={n_push}, planned",
                f"{copies} copies",
                "R + 4" if n_push == 1 else "2R + 4",
                copies / most,
                "<= 1",
            )
        )
    for exact in (True, False):
        seen = child("emulate_memory", size="4.6M", replicas=20, steps=60, exact=exact)
        rows.append(_memory_row("4.6M, 20 replicas", seen, limit=24))
    if options.full:
        seen = child(
            "emulate_memory", size="42M", replicas=200, steps=420, exact=False,
            version_dtype="bfloat16",
        )  # fmt: skip
        rows.append(_memory_row("42M, 200 replicas, bfloat16 versions", seen, limit=0))
    return rows


def _memory_row(what: str, seen: dict[str, Any], limit: int) -> Row:
    """Growth in parameter copies, the optimizer's state taken off."""
    copies = (seen["grown"] - seen["state"]) / seen["params"]
    note = f"{seen['copies']} copies reported, {seen['seconds']:.0f} s"
    return Row(
        "memory",
        f"{what}, {seen['executor']}, measured",
        f"{seen['grown'] / 2**30:.2f} GiB grown, peak {seen['peak'] / 2**30:.2f} GiB",
        "R + 4 copies" if limit else "24 GiB",
        copies / limit if limit else seen["peak"] / (24 * 2**30),
        "<= 1",
        f"{copies:.1f} copies without optimizer state; {note}",
    )


# The script.

SECTIONS = {f.__name__: f for f in (replay, exact, simulate, sweep, threads, memory)}


def main() -> None:
    """Run the sections asked for."""
    parser = make_parser("Downpour's speed and memory.", SECTIONS)
    parser.add_argument("--sizes", type=list_of(SIZES), default=list(SIZES))
    parser.add_argument(
        "--full", action="store_true", help="200 replicas at 42M as well"
    )
    run(SECTIONS, parser.parse_args(), about={"batch": BATCH})


if __name__ == "__main__":
    main()
