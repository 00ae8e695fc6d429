"""What asynchrony costs: time and replica-seconds to a target; shards that are full.

A cluster of equal machines, a second for a minibatch with a spread of 10 %.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import dbjax
from dbjax.trace import PUSH, Trace
from dbjax.typing import Params
from experiments.phase_rules import RULES
from experiments.workload import Workload

if TYPE_CHECKING:
    from experiments.phases import Diagram, Study

EXAMPLES = 2_000  # on which the loss is followed
POINTS = 200  # evaluations of a run
# Seconds that a shard needs for one push: all parameters, or a quarter of them.
SERVICE = {1: 0.001, 4: 0.00025}


class Cost(NamedTuple):
    """When a rule first reaches the target; infinity where it does not.

    Attributes:
      rule: its name.
      replicas: how many.
      learning_rate: of the best rates of the diagram, the one that was first.
      wall_seconds: emulated.
      replica_seconds: that times the replicas.
    """

    rule: str
    replicas: int
    learning_rate: float
    wall_seconds: float
    replica_seconds: float


class Load(NamedTuple):
    """What a cluster does in the second half of a run.

    Attributes:
      replicas: how many.
      shards: of the server.
      updates_per_second: that every shard makes.
      most_updates_per_second: 1 / service, the most that it could.
      staleness: mean, in updates.
      utilisation: the share of their time that replicas compute, over the whole run.
    """

    replicas: int
    shards: int
    updates_per_second: float
    most_updates_per_second: float
    staleness: float
    utilisation: float


def costs(
    study: "Study", workload: Workload, diagrams: Sequence["Diagram"]
) -> list[Cost]:
    """Time `study.priced`, by number of replicas.

    Args:
      study: with the target, and how long a run may be.
      workload: what is trained.
      diagrams: by replicas, which give each number of them its best rates.

    Returns:
      A cost for each rule and number of replicas.
    """
    assert workload.fixed is not None
    batch = {name: values[:EXAMPLES] for name, values in workload.fixed.items()}
    loss = jax.jit(lambda params: workload.loss(params, batch))
    found = []
    for diagram in diagrams:
        if diagram.rule not in study.priced:
            continue
        for index, replicas in enumerate(diagram.values.tolist()):
            order = np.where(diagram.failed, np.inf, diagram.loss)[index].argsort()
            trace = dbjax.simulate(
                dbjax.Cluster(), replicas=replicas, steps=study.longest
            )
            reached = []
            for rate in diagram.rates[order[: study.few]].tolist():
                when = _time_to(study, workload, trace, diagram.rule, rate, loss)
                reached.append((when, rate))
            when, rate = min(reached)
            found.append(Cost(diagram.rule, replicas, rate, when, replicas * when))
    return found


def _time_to(
    study: "Study",
    workload: Workload,
    trace: Trace,
    rule: str,
    rate: float,
    loss: Callable[[Params], Any],
) -> float:
    """Replay, and say when the loss is first at the target."""

    def evaluate(params: Params, step: int, time: float) -> dict[str, float]:
        return {"loss": float(loss(params))}

    run = dbjax.replay(
        trace, workload.loss, workload.init(0), workload.data,
        optimizer=RULES[rule].make(rate), provide=RULES[rule].provide, exact=False,
        eval_fn=evaluate, eval_every=max(1, study.longest // POINTS),
    )  # fmt: skip
    there = [
        row["time"] for row in run.trace.evaluations if row["loss"] <= study.target
    ]
    return min(there, default=math.inf)


def saturation(study: "Study") -> list[Load]:
    """Simulate the same machines, more and more of them, on one shard and on four."""
    found = []
    for shards, service in SERVICE.items():
        cluster = dbjax.Cluster(shard_service=service)
        for replicas in study.crowd:
            trace = dbjax.simulate(
                cluster, replicas=replicas, shards=shards, steps=replicas * study.turns
            )
            pushes = trace.take((trace.kind == PUSH) & (trace.shard == 0))
            half = len(pushes) // 2
            # Without the end, when there is nothing left to do for most replicas.
            late = pushes.time[half : int(0.9 * len(pushes))]
            load = Load(
                replicas,
                shards,
                (len(late) - 1) / float(late[-1] - late[0]),
                1 / service,
                float((pushes.version - 1 - pushes.base)[half:].mean()),
                float(trace.utilisation().mean()),
            )
            found.append(load)
    return found
