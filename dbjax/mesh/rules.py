"""Device meshes, and where parameters lie on them: rules from paths to PartitionSpecs.

All sharding decisions are made here. A rule is `(pattern, spec)`: the first whose
regular expression is found in a leaf's path, such as `layers/0/kernel`, decides.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dbjax.typing import Params

Rules: TypeAlias = Sequence[tuple[str, PartitionSpec]]


def make_mesh(devices: Sequence[jax.Device] | None = None, **axes: int) -> Mesh:
    """Make a mesh of named axes.

    Args:
      devices: to use; the first ones there are if not given.
      **axes: the size of each axis, in order.

    Returns:
      A mesh whose axes are of the Auto kind: users' losses need no annotations.

    Raises:
      ValueError: there is no axis, a size is below 1, or there are too few devices.

    >>> make_mesh(replica=1, model=1).axis_names
    ('replica', 'model')
    """
    if not axes or any(size < 1 for size in axes.values()):
        raise ValueError(f"axes={axes}: allowed are one or more, of sizes from 1")
    count = math.prod(axes.values())
    there = jax.devices() if devices is None else list(devices)
    if count > len(there):
        raise ValueError(
            f"a mesh of {axes} needs {count} devices; there are {len(there)}"
        )
    # The first two by position: their names differ between versions of jax.
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=there[:count],
    )


def shardings(params: Params, mesh: Mesh, rules: Rules | None = None) -> Params:
    """Give the sharding of every leaf.

    Args:
      params: arrays, or anything with shapes.
      mesh: where they are to lie.
      rules: a leaf that none matches is whole on every device. Without rules each leaf
        is cut evenly over all devices, along its first axis that allows it.

    Returns:
      A tree of `NamedSharding`.

    Raises:
      ValueError: a rule does not fit the leaf that it matches.
    """
    if rules is not None:
        rules = [(str(pattern), spec) for pattern, spec in rules]

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
        if rules is None:
            return NamedSharding(mesh, _even(leaf.shape, mesh))
        specs = (spec for pattern, spec in rules if re.search(pattern, name))
        spec = next(specs, PartitionSpec())
        try:
            if len(spec) > len(leaf.shape):
                raise ValueError(f"{spec} is for more axes than shape {leaf.shape} has")
            sharding = NamedSharding(mesh, spec)
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"rules: {name} does not fit: {error}") from error
        return sharding

    return jax.tree_util.tree_map_with_path(one, params)


def shard_params(params: Params, mesh: Mesh, rules: Rules | None = None) -> Params:
    """Put parameters onto a mesh; for the arguments see `shardings`."""
    return jax.tree.map(jax.device_put, params, shardings(params, mesh, rules))


def batch_sharding(batch: Any, mesh: Mesh) -> Any:
    """Spread examples over all devices; a batch they do not divide is whole on each.

    Args:
      batch: a pytree of arrays `[B, ...]`.
      mesh: its devices.

    Returns:
      A tree of `NamedSharding`.
    """
    spec = PartitionSpec(mesh.axis_names)

    def one(leaf: Any) -> NamedSharding:
        fits = leaf.ndim and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, spec if fits else PartitionSpec())

    return jax.tree.map(one, batch)


def _even(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    for axis, size in enumerate(shape):
        if size % mesh.size == 0:
            return PartitionSpec(*[None] * axis, mesh.axis_names)
    return PartitionSpec()
