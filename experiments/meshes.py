"""The devices that `config.mesh` asks for, and what partitions over them cost.

`config.mesh` holds the sizes of a mesh's axes, `{"replica": 2, "model": 2}`: along
"replica" each replica has devices of its own, over "model" the workload's rules cut the
parameters. Without it, or where it is empty, a run has no mesh.
"""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

import dbjax
from dbjax import mesh as mesh_lib
from dbjax.mesh import REPLICA
from dbjax.mesh.costs import Costs
from dbjax.mesh.memory import readable
from dbjax.trace import Trace
from dbjax.typing import Batch
from experiments import registry
from experiments.workloads import Workload


def make_devices(config: ml_collections.ConfigDict) -> None:
    """Let the CPU count as enough devices for the mesh; call it before any is used.

    It changes nothing where there is an accelerator, whose devices are what they are,
    nor if `XLA_FLAGS` says already how many devices the CPU should count as.

    Args:
      config: of the run.
    """
    needed = math.prod(axes_of(config).values())
    flags = os.environ.get("XLA_FLAGS", "")
    if needed == 1 or "xla_force_host_platform_device_count" in flags:
        return
    # The size of XLA's pool of threads. A program on several devices holds a thread for
    # each until all have come, so these must not be all there are; dbjax launches one
    # such program a device at a time. Far more threads than cores make steps slower.
    threads = max(8, 2 * needed, int(os.environ.get("NPROC") or 0))
    os.environ["NPROC"] = str(threads)
    there = jax.config.jax_num_cpu_devices  # pyrefly: ignore[missing-attribute]
    jax.config.update("jax_num_cpu_devices", max(needed, there))


def axes_of(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Give the sizes of the mesh's axes; none, if the run has no mesh.

    Raises:
      registry.ConfigError: a size is below 1.
    """
    axes = dict(config.get("mesh") or {})
    for name, size in axes.items():
        if size < 1:
            raise registry.ConfigError(f"mesh.{name} is {size}; it must be 1 or more.")
    # A replica's devices are neighbours; a config sorts its keys.
    return {name: axes[name] for name in sorted(axes, key=lambda one: one != REPLICA)}


def make(config: ml_collections.ConfigDict) -> Mesh | None:
    """Make the mesh, if the config has one.

    Raises:
      registry.ConfigError: there are not as many devices.
    """
    axes = axes_of(config)
    if not axes:
        return None
    needed, there = math.prod(axes.values()), jax.device_count()
    if needed > there:
        raise registry.ConfigError(
            f"mesh is {_times(axes)} and needs {needed} devices; there are {there} of "
            f"platform {jax.default_backend()}. Give a smaller one; a CPU counts as "
            "many, if meshes.make_devices(config) is called before any is used."
        )
    return dbjax.make_mesh(None, **axes)


def of_a_replica(config: ml_collections.ConfigDict) -> Mesh | None:
    """Give the part of the mesh that one copy of the parameters lies on."""
    mesh = make(config)
    return None if mesh is None else mesh_lib.sub_meshes(mesh)[0]


def arguments(config: ml_collections.ConfigDict, workload: Workload) -> dict[str, Any]:
    """Give the arguments `mesh` and `rules` of a run; none, if it has no mesh."""
    mesh = make(config)
    return {} if mesh is None else {"mesh": mesh, "rules": workload.rules}


def describe(mesh: Mesh) -> str:
    """Say in one line which devices there are."""
    platform = mesh.devices.flat[0].platform
    return f"mesh: {_times(mesh.shape)}, {mesh.size} {platform} devices"


def shardings(workload: Workload, mesh: Mesh, seed: int) -> Any:
    """Say where the parameters lie on a replica's devices."""
    shapes = jax.eval_shape(workload.init, seed)
    return mesh_lib.shardings(shapes, mesh, workload.rules)


def place_batch(batch: Batch, mesh: Mesh, workload: Workload) -> Batch:
    """Put a minibatch onto a replica's devices."""
    where = mesh_lib.batch_sharding(batch, mesh, workload.rules)
    return jax.tree.map(jax.device_put, batch, where)


def costs(mesh: Mesh, workload: Workload, seed: int) -> Costs:
    """Read off the compiled program what one gradient costs a replica's devices.

    Args:
      mesh: of a replica.
      workload: whose loss it is.
      seed: of the parameters.

    Returns:
      The costs; nothing is run.
    """
    where = shardings(workload, mesh, seed)
    shapes = jax.eval_shape(workload.init, seed)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        *(shapes, where),
    )
    batch = place_batch(workload.data.batch(0, 0), mesh, workload)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(workload.loss), out_shardings=where)
        return mesh_lib.partition_costs(gradient, params, batch)


def report(
    config: ml_collections.ConfigDict, workload: Workload, trace: Trace
) -> str | None:
    """Say what the partitions of a run cost.

    Args:
      config: of the run.
      workload: what was trained.
      trace: of the run.

    Returns:
      What a gradient costs, and how many bytes each partition exchanged with each shard
      in the whole run; None where replicas had no partitions.
    """
    mesh = of_a_replica(config)
    if mesh is None or "fetch_bytes" not in trace.header:
        return None
    table = trace.partition_bytes()
    lines = [
        f"a gradient of {workload.name} on {_times(mesh.shape)}, "
        f"{costs(mesh, workload, config.seed)}",
        "exchanged in the run:",
        _row("", [f"shard {s}" for s in range(table.shape[1])]),
        *(_row(f"partition {p}", map(readable, row)) for p, row in enumerate(table)),
    ]
    return "\n".join(lines)


def _row(head: str, cells: Iterable[str]) -> str:
    return f"{head:<17}" + "".join(f"{cell:>12}" for cell in cells)


def _times(axes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in axes.items())
