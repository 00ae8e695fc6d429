"""Measure Downpour on Ray: updates, where their time goes, large shards, predictions.

  python -m experiments.bench_ray --out=runs/bench_ray
  python -m experiments.bench_ray --only=updates,where --rounds=5
  python -m experiments.bench_ray --quick --rounds=1

Needs the extra `ray`, and a machine that nobody else uses. Each section has a cluster
of its own, on this machine, with `dbjax.Ray` as it comes; processes are kept from one
run to the next. Sides take turns, and a ratio is the median over the rounds of the
ratios within a round. Each side first trains a little, which compiles and does not
count. A rate is that of the middle 80 % of a run's minibatches, by when each was
finished: starting and stopping count on neither side.
"""

import contextlib
import dataclasses
import mmap
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import ray

import dbjax
from dbjax.runtime.lanes import cores
from dbjax.runtime.parcels import to_wire
from dbjax.runtime.ray import Session
from dbjax.runtime.transport import SIDE, Address
from dbjax.trace import COMPUTE, FETCH, PUSH, Trace
from experiments.bench_problems import BATCH, SIZES, examples, initial
from experiments.bench_ray_hosted import (
    OPTIMIZER,
    Exchanger,
    Probe,
    exchange,
    host,
    host_shard,
    median_seconds,
    message_bytes,
    problem_of,
)
from experiments.bench_ray_peer import Peer, relu_loss
from experiments.bench_table import Options, Row, Section, make_parser, run

WIDTHS = SIZES["670k"].widths
NETWORK = f"784-512-512-10 relu, batch {BATCH}, SGD"

EXTERNAL = {1: 124, 2: 152}
"""Steps a second of PyTorch's single-server Downpour on a machine of 2 cores.

An external figure, by number of replicas; nothing of it is measured here.
"""

_TIMEOUT = 600.0


class Problem(NamedTuple):
    """What both sides train."""

    params: Any
    data: Any

    def train(
        self, runtime: dbjax.Ray, replicas: int, steps: int, overlap: bool = False
    ) -> Trace:
        """Train on Ray, one shard, a fetch and a push each minibatch."""
        return dbjax.downpour.train(
            relu_loss, self.params, self.data, optimizer=OPTIMIZER, replicas=replicas,
            steps=steps, overlap=overlap, runtime=runtime,
        ).trace  # fmt: skip


def _problem() -> Problem:
    return Problem(initial(WIDTHS), examples(WIDTHS))


def _steps(options: Options) -> int:
    return 60 if options.quick else 1000


def _rate(done: np.ndarray) -> float:
    """Minibatches a second in the middle 80 % of a run."""
    done = np.sort(done)
    middle = done[len(done) // 10 : -len(done) // 10]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def _computed(trace: Trace) -> np.ndarray:
    return trace.time[trace.kind == COMPUTE]


def _spread(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _replicas(count: int) -> str:
    return f"{count} replica" + "s" * (count > 1)


# updates


def updates(options: Options) -> list[Row]:
    """Updates a second, against the parameter server of Ray's documentation."""
    problem, steps, rows = _problem(), _steps(options), []
    with dbjax.Ray() as runtime:
        peer = Peer(relu_loss, *problem, OPTIMIZER, most=2)
        for replicas in (1, 2):
            sides: dict[str, Callable[[int], np.ndarray]] = {
                "Ray's example": lambda n, r=replicas: peer.run(r, n),
                "dbjax": lambda n, r=replicas: _computed(problem.train(runtime, r, n)),
                "dbjax, overlap": lambda n, r=replicas: _computed(
                    problem.train(runtime, r, n, overlap=True)
                ),
            }
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for side in sides.values():
                side(max(30, steps // 4))
            for _ in range(options.rounds):
                for name, side in sides.items():
                    rates[name].append(_rate(side(steps)))
            rows += _update_rows(replicas, steps, rates)
        peer.close()
    return rows


def _update_rows(replicas: int, steps: int, rates: dict[str, list[float]]) -> list[Row]:
    rows, base = [], "Ray's example"
    for name, seen in rates.items():
        what = f"{name}: {_replicas(replicas)}, one shard; {NETWORK}"
        rate = statistics.median(seen)
        value, notes = f"{rate:,.1f} updates/s", f"{steps:,} minibatches a run"
        external = EXTERNAL[replicas]
        if name == base:
            rows.append(Row("updates", what, value, "", None, "", notes))
            continue
        ratios = [a / b for a, b in zip(seen, rates[base], strict=True)]
        median = statistics.median(ratios)
        rows += [
            Row("updates", what, value, base, median, ">= 1.3", _spread(ratios)),
            Row("updates", what, value, f"PyTorch, external, {external}/s",
                rate / external, ">= 1", notes),
        ]  # fmt: skip
    return rows


# where


_PARTS = (
    "gradient: minibatch, gradient, check",
    "push: split, copied, sent, opened",
    "shard: check, update",
    "answer: copied, sent, opened, installed",
    "between: until the next gradient",
)


def where(options: Options) -> list[Row]:
    """Where the time of an update goes: by the Trace, and part by part alone."""
    problem, steps, rows = _problem(), _steps(options), []
    with dbjax.Ray() as runtime, runtime.session() as session:
        alone = _alone(session, problem, 5 if options.quick else 200)
        for replicas in (1, 2):
            problem.train(runtime, replicas, max(30, steps // 4))
            cycles, whole = [], []
            for _ in range(options.rounds):
                trace = problem.train(runtime, replicas, steps)
                for replica in range(replicas):
                    parts = _cycles(trace, replica)
                    cycles.append(parts)
                    mine = trace.replica == replica
                    whole += [1e3 / _rate(_computed(trace.take(mine)))] * len(parts)
            # Means, since means of parts add up to the mean of the whole.
            means = 1e3 * np.concatenate(cycles).mean(axis=0)
            rows += _where_rows(replicas, means, statistics.mean(whole), alone)
    what = {
        "empty": "an empty call and its answer",
        "put": "ray.put of the parameters",
        "get": "ray.get of them",
        "take": "a call that carries them",
        "give": "an empty call whose answer carries them",
        "shared": "a copy of them into memory that is shared, and an empty call",
        "gradient": "a gradient",
        "update": "a shard's update",
    }
    return rows + [
        Row("where", f"alone: {what[name]}, 670k", f"{1e3 * seconds:.2f} ms")
        for name, seconds in alone.items()
    ]


def _where_rows(
    replicas: int,
    means: np.ndarray,
    whole: float,
    alone: dict[str, float],
) -> list[Row]:
    """A row a part; their ratios are shares, and add up."""
    one_way = alone["empty"] / 2
    counterparts = (
        alone["gradient"],
        alone["take"] - one_way,
        alone["update"],
        alone["give"] - one_way,
        0.0,
    )
    about = f"{_replicas(replicas)}, 670k"
    baseline = f"an update of a replica, {whole:.2f} ms"
    rows = []
    for part, mean, other in zip(_PARTS, means, counterparts, strict=True):
        notes = f"alone: {1e3 * other:.2f} ms" if other else ""
        rows.append(
            Row("where", f"{about}, {part}", f"{mean:.2f} ms", baseline,
                mean / whole, "", notes)
        )  # fmt: skip
    total = float(means.sum())
    rows.append(
        Row("where", f"{about}, all of these", f"{total:.2f} ms", baseline,
            total / whole, "= 1", "the driver's orders are beside these"),
    )  # fmt: skip
    return rows


def _cycles(trace: Trace, replica: int) -> np.ndarray:
    """Cut the middle of a replica's run into seconds of `_PARTS`, `[updates, 5]`."""
    rows = {
        kind: np.flatnonzero((trace.kind == kind) & (trace.replica == replica))
        for kind in (COMPUTE, PUSH, FETCH)
    }
    by_step = {kind: at[np.argsort(trace.step[at])] for kind, at in rows.items()}
    computed, pushed = by_step[COMPUTE], by_step[PUSH]
    fetched = by_step[FETCH]
    if not len(computed) == len(pushed) == len(fetched):
        raise ValueError("an update must be a fetch, a gradient and a push")
    ends = [
        trace.start[computed][:-1],
        trace.time[computed][:-1],
        trace.start[pushed][:-1],
        trace.time[pushed][:-1],
        trace.time[fetched][1:],
        trace.start[computed][1:],
    ]
    middle = slice(len(computed) // 10, -len(computed) // 10)
    return np.diff(np.stack(ends, axis=1), axis=1)[middle]


def _alone(session: Session, problem: Problem, times: int) -> dict[str, float]:
    """Seconds of the parts, one at a time while nothing else runs."""
    params, batch = to_wire(problem.params), problem.data.batch(0, 0)
    make = lambda: Probe(params, batch)  # noqa: E731
    probe = host(session, "probe", make, kind="replica")

    def ask(method: str, *args: Any) -> Any:
        return probe.ask(method, *args).result(_TIMEOUT)

    reference = ray.put(params)
    flat = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])
    memory = np.frombuffer(mmap.mmap(-1, flat.nbytes), flat.dtype)

    def through_memory() -> None:
        np.copyto(memory, flat)
        ask("nothing")

    seen = {
        "empty": median_seconds(lambda: ask("nothing"), times),
        "put": median_seconds(lambda: ray.put(params) and None, times),
        "get": median_seconds(lambda: ray.get(reference), times),
        "take": median_seconds(lambda: ask("take", params), times),
        "give": median_seconds(lambda: ask("give"), times),
        "shared": median_seconds(through_memory, times),
        "gradient": ask("gradient_seconds", times),
        "update": ask("update_seconds", times),
    }
    session.kill(probe)
    return seen


# large


def large(options: Options) -> list[Row]:
    """A fetch and a push of one large shard, against copying its memory."""
    name = "670k" if options.quick else "42M"
    problem = problem_of(name)
    with _exchangers(name, problem, 1) as (_, [replica]):
        calls = {
            "push: sent, updated, acknowledged": ("push", (), 1, ">= 0.35"),
            "fetch of a new version": ("fetch_new", (), 1, ">= 0.35"),
            "the same version once more": ("fetch", (), 1, ""),
            "push that fetches": ("push", (True,), 2, ">= 0.35"),
            "push that changes nothing": ("push", (False, False), 1, ""),
        }
        seen: dict[str, list[float]] = {what: [] for what in calls}
        copies: list[float] = []
        warm = 3 if options.quick else 8  # it compiles, and shared memory is new
        for turn in range(warm + options.rounds):
            copy = replica.ask("copy").result(_TIMEOUT)
            for what, (method, args, _, _) in calls.items():
                seconds = replica.ask(method, *args).result(_TIMEOUT)
                if turn >= warm:
                    seen[what].append(seconds)
            copies += [copy] * (turn >= warm)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    baseline = f"a copy, {1e3 * statistics.median(copies):.1f} ms"
    rows = []
    for what, (_, _, count, limit) in calls.items():
        ratios = [count * a / b for a, b in zip(copies, seen[what], strict=True)]
        rows.append(
            Row("large", f"{what}; {name}, {size / 1e6:.0f} MB, one shard, SGD",
                f"{1e3 * statistics.median(seen[what]):.1f} ms",
                baseline if count == 1 else f"{count} of: {baseline}",
                statistics.median(ratios), limit, _spread(ratios))
        )  # fmt: skip
    parcel, answer = exchange(problem)
    for what, message in {
        "a push": parcel,
        "an answer that brings parameters": answer,
        "what a fetch refers to": answer.params,
    }.items():
        sent = message_bytes(message)
        rows.append(
            Row("large", f"bytes of {what}; {name}", f"{sent:,}",
                f"the parameters, {size:,}", sent / size, "<= 1.01",
                f"{sent - size:,} more")
        )  # fmt: skip
    return rows


@contextlib.contextmanager
def _exchangers(
    name: str, problem: Any, count: int
) -> Iterator[tuple[Address, list[Address]]]:
    """A cluster with one shard, and replicas that only push and fetch."""
    shapes = jax.eval_shape(lambda: problem.params)
    with dbjax.Ray() as runtime, runtime.session() as session:
        shard = host_shard(session, problem)
        replicas = [
            host(
                session,
                f"replica {replica}",
                lambda r=replica: Exchanger(shard, shapes, r),
                kind="replica",
            )
            for replica in range(count)
        ]
        yield shard, replicas


# latency


def latency(options: Options) -> list[Row]:
    """A fetch while another replica's pushes are handled, against a quiet moment."""
    names, times = (("670k",), 5) if options.quick else (("670k", "4.6M"), 100)
    return [row for name in names for row in _latency(name, times, options)]


def _latency(name: str, times: int, options: Options) -> list[Row]:
    seen: dict[str, list[np.ndarray]] = {"same": [], "new": [], "busy": []}
    pushes = []
    with _exchangers(name, problem_of(name), 2) as (_, [me, other]):

        def fetches(new: bool) -> np.ndarray:
            return np.array(me.ask("fetches", times, new).result(_TIMEOUT))

        for turn in range(1 + options.rounds):
            quiet = {"same": fetches(new=False), "new": fetches(new=True)}
            pushing = other.ask("keep_pushing")
            busy = fetches(new=False)
            other.ask("stop", lane=SIDE).result(_TIMEOUT)
            handled, seconds = pushing.result(_TIMEOUT)
            if turn:
                pushes.append(handled / seconds)
                for case, found in (quiet | {"busy": busy}).items():
                    seen[case].append(found)
    what = {
        "same": "nobody pushes, a version fetched before",
        "new": "nobody pushes, a new version each time",
        "busy": f"another replica pushes, {statistics.median(pushes):.0f}/s",
    }
    rows = []
    for case, arrays in seen.items():
        for measure, percentile in (("median", 50), ("p95", 95)):
            each = [float(np.percentile(array, percentile)) for array in arrays]
            quiet = [float(np.percentile(array, percentile)) for array in seen["new"]]
            ratios = [a / b for a, b in zip(each, quiet, strict=True)]
            # Where nobody pushes there is nothing to fetch anew: a busy moment's
            # counterpart is a quiet one after a push.
            compared = case != "new"
            rows.append(
                Row("latency", f"fetch, {what[case]}; {name}, {measure}",
                    f"{1e3 * statistics.median(each):.2f} ms",
                    f"{what['new']}, {measure}" if compared else "",
                    statistics.median(ratios) if compared else None,
                    "<= 1.5" if case == "busy" else "",
                    f"{_spread(ratios)}, {times} a round" if compared else "")
            )  # fmt: skip
    return rows


# prediction


def prediction(options: Options) -> list[Row]:
    """What one replica's record says of two, against two."""
    problem, steps = _problem(), _steps(options)
    rates: dict[str, list[float]] = {}
    work = []
    with dbjax.Ray() as runtime:
        for replicas in (1, 2):
            problem.train(runtime, replicas, max(30, steps // 4))
        for _ in range(options.rounds):
            # Two lengths: what starting and stopping cost goes out.
            short, before = steps // 4, _busy()
            problem.train(runtime, 1, short)
            between = _busy()
            trace = problem.train(runtime, 1, steps)
            longer = _busy() - between - (between - before)
            work.append(max(longer, 1e-9) / (steps - short))
            two = problem.train(runtime, 2, steps)
            # A replica has a number there, and another machine's is not known.
            fitted = dataclasses.replace(dbjax.Cluster.fit(trace), speeds=1.0)
            found = {
                "one": _rate(_computed(trace)),
                "one, fitted": _simulated(fitted, 1, steps),
                "two": _rate(_computed(two)),
                "two, fitted": _simulated(fitted, 2, steps),
            }
            most = cores() / work[-1]
            found["two, on these cores"] = min(found["two, fitted"], most)
            for name, rate in found.items():
                rates.setdefault(name, []).append(rate)
    each = 1e3 * statistics.median(work)
    rows = []
    for name, how in {
        "one, fitted": "Cluster.fit",
        "two, fitted": "Cluster.fit: to it each replica has a machine of its own",
        "two, on these cores": f"the same, and an update keeps a core busy for "
        f"{each:.1f} ms: there are {cores()}",
    }.items():
        base = name.split(",")[0]
        ratios = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
        what = _replicas(1 if base == "one" else 2)
        rows.append(
            Row("prediction", f"{what}, from one's record, {how}; {NETWORK}",
                f"{statistics.median(rates[name]):,.1f} updates/s",
                f"measured, {statistics.median(rates[base]):,.1f}/s",
                statistics.median(ratios), "0.9 to 1.1" if base == "two" else "",
                _spread(ratios))
        )  # fmt: skip
    return rows


def _simulated(cluster: dbjax.Cluster, replicas: int, steps: int) -> float:
    return _rate(_computed(dbjax.simulate(cluster, replicas=replicas, steps=steps)))


def _busy() -> float:
    """Seconds that this machine's cores have worked, all together, for anybody."""
    line = pathlib.Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _, _, *others = map(int, line.split()[1:])
    return (user + nice + system + sum(others[:2])) / os.sysconf("SC_CLK_TCK")


# The script.

SECTIONS: dict[str, Section] = {
    f.__name__: f for f in (updates, where, large, latency, prediction)
}


def main() -> None:
    """Run the sections asked for."""
    parser = make_parser("Downpour on Ray.", SECTIONS, rounds=5)
    run(SECTIONS, parser.parse_args(), about={"batch": BATCH, "ray": ray.__version__})


if __name__ == "__main__":
    main()
