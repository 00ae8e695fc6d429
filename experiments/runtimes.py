"""From a config to the runtime that a method runs on, and to its optimizer."""

import math
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import optax

import dbjax
from dbjax import cluster
from experiments import registry

OPTIMIZERS: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adagrad": dbjax.adagrad,
    "adam": optax.adam,
}


def make_optimizer(method: str, options: ml_collections.ConfigDict):
    """Build the optimizer of `options.optimizer` and `options.learning_rate`."""
    name = options.optimizer
    build = registry.choose(f"{method}.optimizer", name, OPTIMIZERS)
    return build(options.learning_rate)


def make_cluster(config: ml_collections.ConfigDict) -> cluster.Cluster:
    """Build the emulated machines of `config.cluster`."""
    return _build_cluster(**config.cluster)


def make_local(config: ml_collections.ConfigDict) -> cluster.Cluster:
    """Build the same kind of machine on its own: no network and no server."""
    options = config.cluster
    return _build_cluster(step_time=options.step_time, spread=options.spread)


def make_runtime(config: ml_collections.ConfigDict, machines: cluster.Cluster):
    """Build `config.runtime`: "emulated" on the given machines, or "threads"."""
    runtimes = {
        "emulated": lambda: dbjax.Emulated(machines, seed=config.seed),
        "threads": dbjax.Threads,
    }
    return registry.choose("runtime", config.runtime, runtimes)()


def _build_cluster(
    *,
    step_time: float,
    spread: float,
    slow_replicas: Sequence[int] = (),
    slow_factor: float = 1.0,
    latency: float = 0.0,
    bandwidth: float | None = None,
    shard_service: float = 0.0,
) -> cluster.Cluster:
    return cluster.Cluster(
        step_time=cluster.LogNormal(step_time, spread),
        slow=cluster.Slow(factor=slow_factor, replicas=slow_replicas)
        if slow_replicas
        else None,
        latency=latency,
        bandwidth=math.inf if bandwidth is None else bandwidth,
        shard_service=shard_service,
    )
