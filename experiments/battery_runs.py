"""How a cell of the battery is run: one compiled program a rule and workload.

`dbjax.sweep` gives parameters at the end; here the same loop is stopped at a few points
to see how far it is, so that there is a time to a target. Settings are traced numbers,
Traces and minibatches are arguments, so nothing is compiled twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.downpour.compiled import (
    Kind,
    LoopState,
    Rows,
    make_loop,
    start_state,
    take_rows,
)
from dbjax.downpour.plan import Plan, make_plan
from dbjax.downpour.problem import Problem, make_problem
from dbjax.trace import Trace
from dbjax.typing import Params
from experiments.battery_rules import Rule, Setting
from experiments.battery_workloads import Workload


class Curve(NamedTuple):
    """What a run came to.

    Attributes:
      seconds: simulated, of the evaluations; the first is before any push.
      losses: held-out, at these; inf where it is not finite, and there the run ends.
      accuracies: likewise.
      pushes: how many there were.
      not_finite: how many of these were rejected as not finite.
      staleness: the mean over pushes.
      duration: simulated seconds of the whole run.
    """

    seconds: list[float]
    losses: list[float]
    accuracies: list[float]
    pushes: int
    not_finite: int
    staleness: float
    duration: float

    @property
    def diverged(self) -> bool:
        """Whether it ended because a loss was not finite."""
        return not np.isfinite(self.losses[-1])


class Schedule(NamedTuple):
    """A run's order, its minibatches, and when what was done; shared by all rules."""

    plan: Plan
    chunks: tuple[Rows, ...]
    counts: tuple[int, ...]
    seconds: tuple[float, ...]
    params: Params


class Program(NamedTuple):
    """A rule on a workload, compiled at its first use.

    Attributes:
      problem: the workload, on one shard.
      begin: `begin(params, setting)` gives the optimizer's state.
      advance: `advance(state, rows, n, setting) -> state, rejected, measured [2]`;
        consumes the state.
      measure: `measure(params) -> [2]`.
    """

    problem: Problem
    begin: Callable[..., Any]
    advance: Callable[..., tuple[LoopState, jax.Array, jax.Array]]
    measure: Callable[..., jax.Array]


def lay_out(workload: Workload, trace: Trace, seed: int, points: int) -> Schedule:
    """Put together what a run needs that does not depend on the rule.

    Args:
      workload: what is trained.
      trace: the order of events.
      seed: of the first parameters and the order of examples.
      points: evaluations, evenly over the pushes.

    Returns:
      The schedule.

    Raises:
      ValueError: the Trace has other pushes than of one gradient each.
    """
    params = workload.init(seed)
    problem = make_problem(
        workload.loss_fn, params, workload.data(seed), optimizer=optax.sgd(0.1),
        shards=1, replicas=int(trace.header["replicas"]),
    )  # fmt: skip
    plan = make_plan(trace)
    if not plan.direct or not plan.taken.all():
        raise ValueError("the battery runs Traces of pushes of one gradient each")
    # Nobody holds more than one version, and one is being made: the same room for all.
    slots = max(plan.slots, int(trace.header["replicas"]) + 1)
    plan = dataclasses.replace(plan, slots=slots)
    size = -(-int(trace.header["steps"]) // points)
    begins = range(0, len(plan), size)
    ends = [min(begin + size, len(plan)) for begin in begins]
    chunks = (
        take_rows(plan, problem, begin, end, size)
        for begin, end in zip(begins, ends, strict=True)
    )
    return Schedule(
        plan,
        tuple(jax.tree.map(jnp.asarray, rows) for rows in chunks),
        tuple(e - b for b, e in zip(begins, ends, strict=True)),
        tuple(float(trace.time[plan.due[end - 1]]) for end in ends),
        params,
    )


def make_program(workload: Workload, rule: Rule, setting: Setting) -> Program:
    """Make the program of a rule on a workload.

    Args:
      workload: what is trained.
      rule: by which.
      setting: any one, for checks.

    Returns:
      The program; any setting of the same names fits it.
    """
    build = functools.partial(_build, rule)
    problem = make_problem(
        workload.loss_fn, workload.init(0), workload.data(0),
        optimizer=build(setting), shards=1, provide=rule.provide,
    )  # fmt: skip
    loop = make_loop(problem, Kind(direct=True, dropped=False, guarded=True), build)

    def shown(state: LoopState, setting: Setting) -> Params:
        params = problem.layout.merge(state.params)
        if rule.shown is None:
            return params
        others = {k: v for k, v in setting.items() if k != "learning_rate"}
        return rule.shown(state.optimizer_state[0], params, **others)

    def advance(state: LoopState, rows: Rows, n: Any, setting: Setting) -> Any:
        state, refused = loop(state, rows, n, setting)
        return state, refused.sum(), workload.measure(shown(state, setting))

    return Program(
        problem,
        jax.jit(lambda part, setting: (build(setting).init(part),)),
        jax.jit(advance, donate_argnums=(0,)),
        jax.jit(workload.measure),
    )


def _build(rule: Rule, setting: Setting) -> optax.GradientTransformation:
    return rule.optimizer_fn(**setting)


def run(program: Program, schedule: Schedule, setting: Setting) -> Curve:
    """Run a setting over a schedule, and stop where it comes apart.

    Args:
      program: of the rule and the workload.
      schedule: of the workload, a cluster and a seed.
      setting: the hyperparameters.

    Returns:
      What came of it.
    """
    curve, _ = run_to_params(program, schedule, setting)
    return curve


def run_to_params(
    program: Program, schedule: Schedule, setting: Setting
) -> tuple[Curve, Params]:
    """As `run`, and give the last parameters too."""
    plan, trace = schedule.plan, schedule.plan.trace
    # Weakly typed, as Python's numbers are: they do not widen narrow parameters.
    traced = {name: jnp.asarray(value) for name, value in setting.items()}
    (part,) = program.problem.split(schedule.params)
    states = program.begin(part, traced)
    state = start_state(plan, program.problem, schedule.params, states)
    measured = [np.asarray(program.measure(schedule.params))]
    seconds, rejected = [0.0], 0
    for rows, n, second in zip(
        schedule.chunks, schedule.counts, schedule.seconds, strict=True
    ):
        state, refused, now = program.advance(state, rows, n, traced)
        measured.append(np.asarray(now))
        seconds.append(second)
        rejected += int(refused)
        if not np.isfinite(measured[-1][0]):
            break
    losses, accuracies = np.array(measured, np.float64).T
    curve = Curve(
        seconds,
        np.where(np.isfinite(losses), losses, np.inf).tolist(),
        accuracies.tolist(),
        pushes=sum(schedule.counts[: len(seconds) - 1]),
        not_finite=rejected,
        staleness=float(trace.staleness().mean()),
        duration=float(trace.duration()),
    )
    return curve, program.problem.merge(state.params)
