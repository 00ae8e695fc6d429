"""An emulated run: simulate the order, execute it exactly, save and resume anywhere."""

import dataclasses
import zlib
from typing import Any

import numpy as np

from dbjax import checkpoint
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.exact import Exact
from dbjax.downpour.plan import make_plan
from dbjax.downpour.problem import Problem
from dbjax.downpour.provenance import (
    check_same,
    describe_machine,
    describe_run,
    restore_streams,
    stream_state,
)
from dbjax.downpour.replay import finish, walk
from dbjax.downpour.run import Run
from dbjax.downpour.simulate import simulate_run
from dbjax.runtime import interrupts
from dbjax.runtime.emulated import Emulated
from dbjax.trace import COMPUTE, Trace

DIGEST_EVERY = 100
"""Every so many versions, a shard's parameters are checksummed into the Trace."""


def run_emulated(problem: Problem, arguments: Arguments, runtime: Emulated) -> Run:
    """Simulate the order, then execute it exactly.

    Args:
      problem: what is trained.
      arguments: checked; they say where to resume and when to save.
      runtime: the cluster and its seed.

    Returns:
      The run, with a digest of every `DIGEST_EVERY`-th version in its Trace.

    Raises:
      RejectedTooOften: training has come apart.
      ValueError: the checkpoint is of another run.
    """
    a = arguments
    trace = simulate_run(a, runtime.cluster, runtime.seed, problem.layout.nbytes)
    trace.header.update(describe_machine(problem))
    plan = make_plan(trace)
    machine = Exact(plan, problem, DIGEST_EVERY)
    evaluations: list[dict[str, Any]] = []
    mine = describe_run(a, problem, "emulated", _fingerprint(trace))
    resumed_at = 0
    if a.checkpoint_dir is not None and (saved := checkpoint.latest(a.checkpoint_dir)):
        check_same(saved.note, mine, a.checkpoint_dir)
        machine.restore(saved.leaves, saved.note["machine"])
        restore_streams(problem, saved.note["streams"])
        evaluations, resumed_at = saved.note["evaluations"], saved.step

    saved_at = resumed_at

    def save(evaluations: list[dict[str, Any]]) -> None:
        nonlocal saved_at
        # What is on its way to a shard is computed again after a resume.
        step = int(np.count_nonzero(plan.compute[: machine.row]))
        if a.checkpoint_dir is None or step <= saved_at:
            return
        leaves, note = machine.leaves()
        done = np.flatnonzero(plan.compute[: machine.row])
        counts = np.zeros(a.replicas, np.int64)
        np.maximum.at(counts, plan.replica[done], plan.batch[done] + 1)
        note = mine | {
            "machine": note,
            "evaluations": evaluations,
            "streams": stream_state(problem, counts.tolist()),
        }
        checkpoint.save(a.checkpoint_dir, step, leaves, note)
        saved_at = step

    def interrupt() -> None:
        machine.interrupted = True

    try:
        with interrupts.deferred(lambda: machine.torn, interrupt):
            walk(
                machine,
                plan,
                trace,
                a.eval_fn,
                a.eval_every,
                pause=save,
                pause_every=a.checkpoint_every,
                evaluations=evaluations,
            )
    except BaseException:
        # Nothing that was trained is lost: Ctrl-C, or an error of the user's own code.
        if not machine.torn:
            save(evaluations)
        raise
    run = finish(trace, machine, plan, "exact", evaluations, resumed_at)
    digests = np.zeros(len(trace), np.uint64)
    for row, value in machine.digests:
        digests[row] = value
    return run._replace(trace=dataclasses.replace(run.trace, digest=digests))


def _fingerprint(trace: Trace) -> str:
    """A checksum of the order of events: a resumed run must have the same."""
    value = 0
    names = "kind replica shard step batch version base status time"
    for name in names.split():
        value = zlib.crc32(np.ascontiguousarray(getattr(trace, name)).tobytes(), value)
    return f"{len(trace)}-{np.count_nonzero(trace.kind == COMPUTE)}-{value:08x}"
