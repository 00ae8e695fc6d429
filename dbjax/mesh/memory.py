"""The memory that training a model needs, known from shapes before any is taken."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh

from dbjax.mesh.rules import Rules, shardings
from dbjax.typing import Params

AnyMesh: TypeAlias = Mesh | AbstractMesh | Mapping[str, int]
"""Devices, or only how many: a mapping `{axis: size}` needs none to be there."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device of a replica that needs most; activations are not among them.

    Attributes:
      parameters: one version of them.
      gradients: one set.
      optimizer: its state.
      versions: further versions of the parameters that are kept.
    """

    parameters: int
    gradients: int
    optimizer: int
    versions: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        """Say how much, and of what."""
        parts = dataclasses.asdict(self).items()
        listed = ", ".join(f"{name} {readable(size)}" for name, size in parts if size)
        return f"{readable(self.total)} ({listed})"


def estimate_memory(
    shapes: Params,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    versions: int = 0,
) -> Memory:
    """Say what one device needs for a model; nothing is allocated.

    A gradient and the optimizer's state lie like the parameters they belong to.
    Activations depend on the batch and the program: see `partition_costs`.

    Args:
      shapes: of the parameters: a tree of arrays or `jax.ShapeDtypeStruct`.
      mesh: the devices that one copy is partitioned over; None: one device.
      rules: how, see `shardings`.
      optimizer: whose state is held; None: no state, as with plain SGD.
      versions: of the parameters, kept besides the newest.

    Returns:
      Bytes, by purpose.

    Raises:
      ValueError: `versions` is below 0, or a rule does not fit.

    >>> print(estimate_memory({"w": jax.ShapeDtypeStruct((1024, 1024), "float32")}))
    8.0 MiB (parameters 4.0 MiB, gradients 4.0 MiB)
    """
    if versions < 0:
        raise ValueError(f"versions must be at least 0; got {versions!r}")
    mine = shapes
    if mesh is not None:
        mine = jax.tree.map(_part, shapes, shardings(shapes, _abstract(mesh), rules))
    mine = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), mine)
    one = _bytes(mine)
    state = jax.eval_shape(optimizer.init, mine) if optimizer is not None else ()
    return Memory(one, one, _bytes(state), versions * one)


def check_memory(
    budget: float,
    shapes: Params,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    versions: int = 0,
    axis: str = "model",
) -> Memory:
    """Refuse a model that does not fit, and say how many partitions would.

    Args:
      budget: bytes that a device has; devices that share a machine share its memory.
      shapes: see `estimate_memory`, also for what follows.
      mesh: the devices.
      rules: how the parameters are partitioned.
      optimizer: whose state is held.
      versions: further ones that are kept.
      axis: of the mesh, that partitions the model.

    Returns:
      What is needed.

    Raises:
      ValueError: it exceeds the budget. The message names the fewest partitions, in
        powers of two up to 4096, that the rules allow and that fit.
    """
    kept: dict[str, Any] = {"optimizer": optimizer, "versions": versions}
    need = estimate_memory(shapes, mesh, rules, **kept)
    if need.total <= budget:
        return need
    axes = {} if mesh is None else dict(_abstract(mesh).shape)
    for partitions in (2**k for k in range(1, 13)):
        if partitions <= axes.get(axis, 1):
            continue
        try:
            each = estimate_memory(shapes, axes | {axis: partitions}, rules, **kept)
        except ValueError:  # the rules do not divide by so many
            continue
        if each.total <= budget:
            advice = f"{partitions} partitions on as many machines would fit"
            advice += f", {readable(each.total)} on each"
            break
    else:
        advice = "no number of partitions that the rules allow would fit"
    raise ValueError(
        f"the model needs {need} on a device; there are {readable(budget)}: {advice}"
    )


def device_memory(devices: Sequence[jax.Device]) -> float:
    """Say how much memory there is for each of some devices.

    Args:
      devices: that work at the same time. Those of a CPU share the machine's memory.

    Returns:
      Bytes; infinity where nothing is known.
    """
    if devices[0].platform == "cpu":
        try:
            pages, size = (os.sysconf(f"SC_{n}") for n in ("PHYS_PAGES", "PAGE_SIZE"))
        except (AttributeError, ValueError):  # not every system says
            return math.inf
        return pages * size / len(devices)
    limits = [(one.memory_stats() or {}).get("bytes_limit") for one in devices]
    return min((float(limit) for limit in limits if limit), default=math.inf)


def readable(size: float) -> str:
    """Write bytes with the unit that leaves few digits.

    Args:
      size: in bytes.

    Returns:
      Such as `19.0 GiB`.

    >>> readable(20_401_094_656), readable(512)
    ('19.0 GiB', '512 B')
    """
    power = min(int(math.log2(max(size, 1)) // 10), len(_UNITS) - 1)
    digits = 1 if power else 0
    return f"{size / 1024**power:.{digits}f} {_UNITS[power]}"


def _abstract(mesh: AnyMesh) -> Any:
    if not isinstance(mesh, Mapping):
        return mesh
    kinds = (AxisType.Auto,) * len(mesh)
    return AbstractMesh(tuple(mesh.values()), tuple(mesh), axis_types=kinds)


def _part(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype)


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
