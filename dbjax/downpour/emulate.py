"""An emulated run: simulate the order, execute it exactly, save and resume anywhere."""

import zlib
from typing import Any

import numpy as np

from dbjax import checkpoint
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.exact import Exact
from dbjax.downpour.plan import make_plan
from dbjax.downpour.problem import Problem
from dbjax.downpour.provenance import check_same, describe_machine, describe_problem
from dbjax.downpour.replay import finish, walk
from dbjax.downpour.run import Run
from dbjax.downpour.simulate import simulate
from dbjax.runtime import interrupts
from dbjax.runtime.emulated import Emulated
from dbjax.trace import COMPUTE, Trace

DIGEST_EVERY = 100
"""Every so many versions of each shard are checksummed into the Trace."""


def run_emulated(problem: Problem, a: Arguments, runtime: Emulated) -> Run:
    """Simulate the order, then execute it exactly."""
    trace = simulate(
        runtime.cluster, replicas=a.replicas, shards=a.shards, steps=a.steps,
        n_fetch=a.n_fetch, n_push=a.n_push, seed=runtime.seed, protocol=a.protocol,
        overlap=a.overlap, warmstart_steps=a.warmstart_steps,
        parameter_bytes=problem.layout.nbytes,
    )  # fmt: skip
    trace.header.update(describe_machine(problem))
    plan = make_plan(trace)
    machine = Exact(plan, problem, DIGEST_EVERY)
    evaluations: list[dict[str, Any]] = []
    fingerprint = _fingerprint(trace)
    resumed_at = 0
    if a.checkpoint_dir is not None and (saved := checkpoint.latest(a.checkpoint_dir)):
        check_same(saved.note, a, problem, "emulated", fingerprint)
        machine.restore(saved.leaves, saved.note["machine"])
        evaluations, resumed_at = saved.note["evaluations"], saved.step

    def save(step: int, evaluations: list[dict[str, Any]]) -> None:
        if a.checkpoint_dir is None or step == resumed_at:
            return
        leaves, note = machine.leaves()
        note = {"machine": note, "evaluations": evaluations, "kind": "emulated",
                "arguments": a.describe(), "problem": describe_problem(problem),
                "fingerprint": fingerprint}  # fmt: skip
        checkpoint.save(a.checkpoint_dir, step, leaves, note)

    def interrupt() -> None:
        machine.interrupted = True

    try:
        with interrupts.deferred(lambda: machine.torn, interrupt):
            walk(
                machine, plan, trace, a.eval_fn, a.eval_every, save,
                a.checkpoint_every, evaluations,
            )  # fmt: skip
    except BaseException:
        # Nothing that was trained is lost: Ctrl-C, or an error of the user's own code.
        step = int(np.count_nonzero(plan.compute[: machine.row]))
        if step > resumed_at and not machine.torn:
            save(step, evaluations)
        raise
    digests = np.zeros(len(trace), np.uint64)
    for row, value in machine.digests:
        digests[row] = value
    run = finish(trace, machine, plan, "exact", evaluations, resumed_at)
    trace = Trace.from_columns(
        run.trace.header,
        run.trace.evaluations,
        **run.trace.columns() | {"digest": digests},
    )
    return run._replace(trace=trace)


def _fingerprint(trace: Trace) -> str:
    """A checksum of the order of events: a resumed run must have the same."""
    value = 0
    for name in ("kind", "replica", "shard", "step", "batch", "version", "base"):
        value = zlib.crc32(np.ascontiguousarray(getattr(trace, name)).tobytes(), value)
    return f"{len(trace)}-{np.count_nonzero(trace.kind == COMPUTE)}-{value:08x}"
