"""Plain SGD on one machine, the baseline.

Downpour with one replica that fetches and pushes at every step is the plain optax loop,
bit for bit (`tests/laws_test.py`), so that is what runs: clock, Trace and checkpoints
come with it. The machine is one of the cluster's, without its network.
"""

import dbjax
from experiments import runtimes
from experiments.methods.base import Plan


def plan(config, workload) -> Plan:
    """Say what the run would take."""
    del workload
    machine = runtimes.make_local(config)
    runtimes.make_runtime(config, machine)

    def simulate(steps):
        return dbjax.simulate(
            machine, replicas=1, shards=1, steps=steps, seed=config.seed
        )

    return Plan(
        optimizer=runtimes.make_optimizer("sgd", config.sgd),
        copies=5,
        simulate=simulate,
    )


def run(config, workload, session):
    """Run it."""
    return dbjax.downpour.train(
        workload.loss,
        workload.init(config.seed),
        workload.data,
        optimizer=runtimes.make_optimizer("sgd", config.sgd),
        replicas=1,
        shards=1,
        steps=config.steps,
        eval_fn=session.evaluate,
        eval_every=config.eval_every,
        checkpoint_dir=session.checkpoints,
        checkpoint_every=config.checkpoint_every,
        runtime=runtimes.make_runtime(config, runtimes.make_local(config)),
    )
