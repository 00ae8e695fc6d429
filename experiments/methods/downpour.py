"""Downpour SGD: many replicas, a sharded parameter server, no waiting."""

import dbjax
from experiments import registry, runtimes
from experiments.methods.base import Plan

_ORDER = (
    "replicas",
    "shards",
    "n_fetch",
    "n_push",
    "overlap",
    "warmstart_steps",
)


def plan(config, workload) -> Plan:
    """Say what the run would take."""
    options = config.downpour
    if options.shards > workload.num_parameters:
        raise registry.ConfigError(
            f"downpour.shards is {options.shards}, more than the "
            f"{workload.num_parameters:,} parameters of {workload.name}."
        )
    machines = runtimes.make_cluster(config)
    runtimes.make_runtime(config, machines)
    accrual = options.n_push > 1 or options.n_fetch > 1

    def simulate(steps):
        order = {name: options[name] for name in _ORDER}
        return dbjax.simulate(machines, steps=steps, seed=config.seed, **order)

    return Plan(
        optimizer=runtimes.make_optimizer("downpour", options),
        copies=(2 if accrual else 1) * options.replicas + 4,
        simulate=simulate,
    )


def run(config, workload, session):
    """Run it."""
    options = config.downpour
    return dbjax.downpour.train(
        workload.loss,
        workload.init(config.seed),
        workload.data,
        optimizer=runtimes.make_optimizer("downpour", options),
        steps=config.steps,
        eval_fn=session.evaluate,
        eval_every=config.eval_every,
        checkpoint_dir=session.checkpoints,
        checkpoint_every=config.checkpoint_every,
        runtime=runtimes.make_runtime(config, runtimes.make_cluster(config)),
        **{name: options[name] for name in _ORDER},
    )
