"""Downpour SGD: many replicas, a sharded parameter server, no waiting."""

from typing import Any

import ml_collections

import dbjax
from dbjax.downpour.run import Run
from dbjax.trace import Trace
from experiments import meshes, runtimes
from experiments.methods import minibatches
from experiments.methods.base import Plan, Session
from experiments.workloads import Workload

_ORDER = ("replicas", "shards", "n_fetch", "n_push", "overlap", "warmstart_steps")


def plan(config: ml_collections.ConfigDict, workload: Workload) -> Plan:
    """Say what the run would take."""
    options = config.downpour
    mesh = meshes.of_a_replica(config)
    minibatches.check_shards("downpour", options.shards, workload, mesh)
    machines = runtimes.make_cluster(config)
    runtimes.make_runtime(config, machines)
    accrual = options.n_push > 1 or options.n_fetch > 1

    def simulate(steps: int) -> Trace:
        return dbjax.simulate(machines, steps=steps, seed=config.seed, **_order(config))

    return minibatches.plan(
        config,
        workload,
        optimizer=runtimes.make_optimizer("downpour", options),
        copies=(2 if accrual else 1) * options.replicas + 4,
        simulate=simulate,
        mesh=mesh,
    )


def run(config: ml_collections.ConfigDict, workload: Workload, session: Session) -> Run:
    """Run it."""
    return minibatches.train(
        config,
        workload,
        session,
        optimizer=runtimes.make_optimizer("downpour", config.downpour),
        runtime=runtimes.make_runtime(
            config, runtimes.make_cluster(config), session.watch
        ),
        **_order(config),
        **meshes.arguments(config, workload),
    )


def _order(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments that decide the order of the run."""
    return {name: config.downpour[name] for name in _ORDER}
