"""From a config to the runtime that a method runs on, and to its optimizer."""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import optax

import dbjax
from dbjax import cluster
from dbjax.runtime.ray import Progress
from experiments import registry

OPTIMIZERS: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adagrad": dbjax.adagrad,
    "adam": optax.adam,
}


def make_optimizer(
    method: str, options: ml_collections.ConfigDict
) -> optax.GradientTransformation:
    """Build the optimizer of `options.optimizer` and `options.learning_rate`.

    Args:
      method: whose options these are, for the error.
      options: a method's part of the config.

    Returns:
      The optimizer.

    Raises:
      registry.ConfigError: if there is none of that name.
    """
    build = registry.choose(f"{method}.optimizer", options.optimizer, OPTIMIZERS)
    return build(options.learning_rate)


def make_cluster(
    config: ml_collections.ConfigDict, minibatches: float = 1.0
) -> cluster.Cluster:
    """Build the emulated machines of `config.cluster`.

    Args:
      config: of the run.
      minibatches: how many of them are computed at a time; 0.5 for half of one.

    Returns:
      The machines.
    """
    options = config.cluster.to_dict()
    options["step_time"] *= minibatches
    return _build_cluster(**options)


def make_local(config: ml_collections.ConfigDict) -> cluster.Cluster:
    """Build the same kind of machine on its own: no network and no server."""
    options = config.cluster
    return _build_cluster(step_time=options.step_time, spread=options.spread)


def make_runtime(
    config: ml_collections.ConfigDict,
    machines: cluster.Cluster,
    watch: Callable[[Progress], None] | None = None,
    *,
    minibatches: bool = True,
) -> dbjax.Emulated | dbjax.Threads | dbjax.Ray:
    """Build `config.runtime`: "emulated" on the given machines, "threads" or "ray".

    Args:
      config: of the run.
      machines: what is emulated.
      watch: told how a run on Ray goes.
      minibatches: whether it is for a method on minibatches; others have no standbys.

    Returns:
      The runtime.

    Raises:
      registry.ConfigError: if there is none of that name, or it refuses its options.
    """

    def ray() -> dbjax.Ray:
        options = dict(config.get("ray") or {})
        if not minibatches:
            options |= {"standby": 0}
        return _build_ray(watch=watch if minibatches else None, **options)

    runtimes: dict[str, Callable[[], Any]] = {
        "emulated": lambda: dbjax.Emulated(machines, seed=config.seed),
        "threads": dbjax.Threads,
        "ray": ray,
    }
    return registry.choose("runtime", config.runtime, runtimes)()


def _build_ray(
    *,
    watch: Callable[[Progress], None] | None,
    address: str = "local",
    standby: int = 0,
    replica_cpus: float | None = None,
    shard_cpus: float | None = None,
    replica_gpus: float = 0.0,
    working_dir: str = "",
    timeout: float = 120.0,
) -> dbjax.Ray:
    """Build the connection; what `config.ray` may hold means the same as in `Ray`.

    Args:
      watch: told how the run goes.
      address: "local", "auto" or host:port.
      standby: of each of Downpour's shards, 0 or 1.
      replica_cpus: set aside for each replica.
      shard_cpus: the same for each shard.
      replica_gpus: GPUs for each replica.
      working_dir: a folder of modules to send along, "" if all nodes have them.
      timeout: seconds until a process that does not answer is an error.

    Raises:
      registry.ConfigError: if Ray is not installed, or one of them cannot be.
    """
    if importlib.util.find_spec("ray") is None:
        raise registry.ConfigError(
            "runtime is \"ray\", which is not installed: pip install 'dbjax[ray]'"
        )
    try:
        return dbjax.Ray(
            address=address,
            standby=standby,
            watch=watch,
            replica_cpus=replica_cpus,
            shard_cpus=shard_cpus,
            replica_gpus=replica_gpus,
            runtime_env={"working_dir": working_dir} if working_dir else None,
            timeout=timeout,
        )
    except ValueError as error:
        raise registry.ConfigError(f"ray: {error}") from error


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
    """Build machines; the arguments are what `config.cluster` may hold.

    Args:
      step_time: mean seconds for a minibatch.
      spread: its standard deviation, as a part of the mean.
      slow_replicas: indices of the replicas that are slow throughout.
      slow_factor: how many times longer these take.
      latency: seconds for a message, each way.
      bandwidth: bytes per second on each link; None for no limit.
      shard_service: seconds that a shard is busy with a push.

    Raises:
      registry.ConfigError: if the cluster refuses one of them.
    """
    try:
        slow = None
        if slow_replicas:
            slow = cluster.Slow(factor=slow_factor, replicas=slow_replicas)
        return cluster.Cluster(
            step_time=cluster.LogNormal(step_time, spread),
            slow=slow,
            latency=latency,
            bandwidth=math.inf if bandwidth is None else bandwidth,
            shard_service=shard_service,
        )
    except ValueError as error:
        raise registry.ConfigError(f"cluster: {error}") from error
