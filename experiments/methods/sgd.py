"""Plain SGD on one machine, the baseline.

Downpour with one replica that fetches and pushes at every step is the plain optax loop,
bit for bit (`tests/laws_test.py`), so that is what runs: clock, Trace and checkpoints
come with it. The machine is one of the cluster's, without its network; a mesh does not
count, the parameters are whole on one device.
"""

import ml_collections

import dbjax
from dbjax.downpour.run import Run
from dbjax.trace import Trace
from experiments import runtimes
from experiments.methods import minibatches
from experiments.methods.base import Plan, Session
from experiments.workloads import Workload


def plan(config: ml_collections.ConfigDict, workload: Workload) -> Plan:
    """Say what the run would take."""
    machine = runtimes.make_local(config)
    runtimes.make_runtime(config, machine)

    def simulate(steps: int) -> Trace:
        return dbjax.simulate(machine, replicas=1, steps=steps, seed=config.seed)

    return minibatches.plan(
        config,
        workload,
        optimizer=runtimes.make_optimizer("sgd", config.sgd),
        copies=5,
        simulate=simulate,
    )


def run(config: ml_collections.ConfigDict, workload: Workload, session: Session) -> Run:
    """Run it."""
    return minibatches.train(
        config,
        workload,
        session,
        optimizer=runtimes.make_optimizer("sgd", config.sgd),
        runtime=runtimes.make_runtime(
            config, runtimes.make_local(config), session.watch
        ),
    )
