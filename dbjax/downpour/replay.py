"""`replay`: Trace and problem in, parameters out; exactly, or compiled."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from dbjax.downpour.compiled import Loop
from dbjax.downpour.exact import Exact
from dbjax.downpour.in_step import InStep, is_in_step
from dbjax.downpour.plan import Plan, make_plan
from dbjax.downpour.problem import Problem, make_problem
from dbjax.downpour.recycled import Recycled
from dbjax.downpour.run import Run, make_info, peak_copies
from dbjax.mesh import Rules
from dbjax.optim.local import LocalRule
from dbjax.runtime.base import MOST_REJECTED, RejectedTooOften
from dbjax.trace import COMPUTE, NOT_FINITE, PUSH, TAKEN, Trace
from dbjax.typing import Data, EvalFn, LossFn, Params

LOOP_BYTES = 8 << 20
"""Parameters up to this size may run in one XLA loop; above it a row is a program of
its own, whose versions need not be copied in and out of a ring."""
RING_BYTES = 512 << 10
"""Where all shards are as one, the ring costs more than the programs from here on."""


def replay(
    trace: Trace,
    loss_fn: LossFn,
    params: Params,
    data: Data,
    *,
    optimizer: optax.GradientTransformation,
    exact: bool = True,
    verify: bool = False,
    provide: tuple[str, ...] = (),
    local_optimizer: optax.GradientTransformation | LocalRule | None = None,
    split: str = "even",
    per_shard: bool = False,
    version_dtype: Any = None,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    eval_fn: EvalFn | None = None,
    eval_every: int | None = None,
) -> Run:
    """Execute a Trace: recorded, simulated, or made by hand.

    Args:
      trace: who fetched, computed and pushed what, in which order.
      loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch.
      params: the initial parameters, any pytree of float arrays.
      data: gives `batch(replica, step)`; the same as in the recorded run to reproduce
        it.
      optimizer: any optax transformation; need not be the recorded run's.
      exact: call the same jitted functions as live replicas do, so that a recorded run
        is reproduced bit for bit; False compiles the Trace, equal to rounding and
        faster.
      verify: check the parameters against the digests in the Trace.
      provide: extra arguments for the optimizer's update, as in `train`.
      local_optimizer: the replica's own step between fetches, or a `LocalRule`.
      split: as in `train`.
      per_shard: as in `train`.
      version_dtype: keep versions in flight in this dtype, say bfloat16.
      rng: as in `train`.
      has_aux: as in `train`.
      seed: as in `train`.
      mesh: as in `train`; one replica's devices are enough. Needs `exact=True`.
      rules: as in `train`.
      eval_fn: `eval_fn(params, step, time) -> {name: scalar}`.
      eval_every: minibatches between evaluations; the end is always evaluated.

    Returns:
      The run; its Trace is `trace` with this replay's rejected pushes and evaluations.

    Raises:
      ValueError: the Trace does not fit, a digest differs, or an argument is wrong.
      RejectedTooOften: training has come apart.
    """
    check_trace(trace)
    if verify and not exact:
        raise ValueError(
            "verify=True needs exact=True: compiled replay differs by rounding"
        )
    if verify and not np.any(trace.digest):
        raise ValueError("verify=True, but the Trace holds no digests to check against")
    if mesh is not None and not exact:
        raise ValueError("a mesh needs exact=True: compiled replay has one device")
    problem = make_problem(
        loss_fn, params, data, optimizer=optimizer, shards=int(trace.header["shards"]),
        replicas=int(trace.header["replicas"]), provide=provide,
        local_optimizer=local_optimizer, split=split, per_shard=per_shard,
        version_dtype=version_dtype, rng=rng, has_aux=has_aux, seed=seed, mesh=mesh,
        rules=rules,
    )  # fmt: skip
    plan = make_plan(trace)
    machine, name = make_machine(plan, problem, exact, 1 if verify else 0)
    if verify and isinstance(machine, Exact):
        machine.digest_rows = set(np.flatnonzero(trace.digest).tolist())
    evaluations = walk(machine, plan, trace, eval_fn, eval_every)
    if verify and isinstance(machine, Exact):
        _verify(trace, machine.digests)
    return finish(trace, machine, plan, name, evaluations)


def make_machine(
    plan: Plan, problem: Problem, exact: bool, digest_every: int = 0
) -> tuple[Any, str]:
    """Choose the executor for a plan, and say which."""
    if exact:
        return Exact(plan, problem, digest_every), "exact"
    small = sum(problem.layout.nbytes) <= LOOP_BYTES
    reason = None
    if plan.restarts:
        reason = "it holds a shard that was restored from a snapshot"
    elif problem.local_optimizer is not None:
        reason = "replicas step locally between fetches"
    elif not plan.direct and not small:
        reason = "its shards handle pushes in different orders, or pushes hold several"
        reason += " gradients, and the parameters are too large for one loop"
    elif not plan.direct and problem.version_dtype is not None:
        reason = "version_dtype needs one gradient a push"
    if reason:
        warnings.warn(
            f"the Trace is replayed exactly, not compiled: {reason}", stacklevel=3
        )
        return Exact(plan, problem, digest_every), "exact"
    in_step = is_in_step(plan, problem)
    if plan.direct and (in_step or plan.shards == 1):
        small = sum(problem.layout.nbytes) <= min(RING_BYTES, LOOP_BYTES)
    recycled = not small or problem.version_dtype is not None
    make, name = (Recycled, "recycled") if recycled else (Loop, "loop")
    return (InStep(plan, problem, make) if in_step else make(plan, problem)), name


def walk(
    machine: Any,
    plan: Plan,
    trace: Trace,
    eval_fn: EvalFn | None,
    eval_every: int | None,
    pause: Callable[[list[dict[str, Any]]], None] | None = None,
    pause_every: int | None = None,
    evaluations: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Run a machine to the end, stopping to evaluate and to save.

    `pause(evaluations)` is called every `pause_every` minibatches.
    """
    evaluations = [] if evaluations is None else evaluations
    computes = np.flatnonzero(trace.kind == COMPUTE)
    total = len(computes)
    evals = _every(eval_every, total) if eval_fn is not None else set()
    pauses = _every(pause_every, total) if pause is not None else set()
    lead = _lead(plan)
    for step in sorted(evals | pauses):
        # After the turn in which this minibatch was finished: before the next COMPUTE.
        row = int(computes[step]) if step < total else len(trace)
        stop = int(np.searchsorted(lead, row)) if step < total else len(plan)
        if stop < machine.row or (evaluations and evaluations[-1]["step"] >= step):
            continue
        machine.run(stop)
        if step in evals:
            time = float(trace.time[row - 1])
            scalars = eval_fn(machine.params(), step, time)  # type: ignore[misc]
            evaluations.append(
                {"step": step, "time": time}
                | {name: float(value) for name, value in scalars.items()}
            )
        if step in pauses and pause is not None:
            pause(evaluations)
    machine.run(len(plan))
    if not isinstance(machine, Exact):
        _check_rejected(trace, plan, machine.not_finite)
    return evaluations


def _check_rejected(trace: Trace, plan: Plan, not_finite: list[int]) -> None:
    """Raise, as live and exact runs do, where too many pushes were not finite."""
    rows = plan.row[plan.row >= 0]
    names = np.stack([trace.replica[rows], trace.id[rows]])
    pushes = rows[np.sort(np.unique(names, axis=1, return_index=True)[1])]
    place = np.arange(len(pushes))
    finite = ~np.isin(pushes, not_finite)
    in_a_row = place - np.maximum.accumulate(np.where(finite, place, -1))
    if (in_a_row >= MOST_REJECTED).any():
        last = pushes[int((in_a_row >= MOST_REJECTED).argmax())]
        replica, step = int(trace.replica[last]), int(trace.step[last])
        raise RejectedTooOften(MOST_REJECTED, replica, step)


def _every(every: int | None, total: int) -> set[int]:
    return set(range(every, total, every)) | {total} if every else {total}


def _lead(plan: Plan) -> np.ndarray:
    """For each plan row, the first Trace row by which it or a later one is due."""
    return np.minimum.accumulate(plan.due[::-1])[::-1]


def finish(
    trace: Trace,
    machine: Any,
    plan: Plan,
    executor: str,
    evaluations: list[dict[str, Any]],
    resumed_at: int = 0,
) -> Run:
    """Put the result together."""
    status = np.where(trace.status == NOT_FINITE, TAKEN, trace.status).astype(np.uint8)
    status[machine.not_finite] = NOT_FINITE
    trace = dataclasses.replace(trace, status=status, evaluations=tuple(evaluations))
    return Run(
        machine.params(),
        tuple(shard[1] for shard in machine.shards),
        trace,
        make_info(
            trace,
            executor,
            peak_copies(plan) + getattr(machine, "ahead", 0),
            resumed_at,
        ),
    )


def check_trace(trace: Trace) -> None:
    """Raise unless this is a Trace that can be replayed."""
    if not isinstance(trace, Trace):
        raise TypeError(f"trace must be a dbjax.Trace, got a {type(trace).__name__}")
    trace.validate()
    if not np.any(trace.kind == PUSH):
        raise ValueError("the Trace holds no PUSH row: nothing was trained")


def _verify(trace: Trace, digests: list[tuple[int, int]]) -> None:
    """Raise at the first digest that differs from the Trace's."""
    agreed = "the start"
    for row, digest in sorted(digests):
        name = f"version {trace.version[row]} of shard {trace.shard[row]}"
        if int(trace.digest[row]) not in (0, digest):
            raise ValueError(
                f"replay diverges from the recorded run at {name} (row {row}, step "
                f"{trace.step[row]}): other parameters than were recorded. They last "
                f"agreed at {agreed}"
            )
        if trace.digest[row]:
            agreed = name
