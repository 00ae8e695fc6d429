"""Where parameters lie on a mesh: rules from paths to PartitionSpecs.

All sharding decisions are made here. A rule is `(pattern, spec)`: the first whose
regular expression is found in a leaf's path, such as `layers/0/kernel`, decides.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dbjax.typing import Params

Rules: TypeAlias = Sequence[tuple[str, PartitionSpec]]


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
      ValueError: a rule does not fit the leaf that it matches, or none matches any.
    """
    if rules is not None:
        rules = [(str(pattern), spec) for pattern, spec in rules]
        _check_match(rules, params)

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = _name(path)
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


def batch_sharding(batch: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Spread examples over the axes that no rule names; over all of them without rules.

    So the axes which cut parameters see every example, and the others share them. What
    these do not divide is whole on each.

    Args:
      batch: a pytree of arrays `[B, ...]`.
      mesh: its devices.
      rules: how the parameters lie on it.

    Returns:
      A tree of `NamedSharding`.
    """
    cut = {axis for _, spec in rules or () for axis in _axes(spec)}
    free = tuple(axis for axis in mesh.axis_names if axis not in cut)
    count = 1
    for axis in free:
        count *= mesh.shape[axis]

    def one(leaf: Any) -> NamedSharding:
        fits = free and leaf.ndim and leaf.shape[0] % count == 0
        return NamedSharding(mesh, PartitionSpec(free) if fits else PartitionSpec())

    return jax.tree.map(one, batch)


def _axes(spec: PartitionSpec) -> Iterator[str]:
    for entry in spec:
        yield from (entry,) if isinstance(entry, str) else entry or ()


def _name(path: Any) -> str:
    keys = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path)
    return "/".join(map(str, keys))


def _check_match(rules: Rules, params: Params) -> None:
    """Raise if no rule matches anything: they were meant for other parameters."""
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if rules and not any(re.search(rule, name) for rule, _ in rules for name in names):
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(
            f"rules: none of {[pattern for pattern, _ in rules]} is found in a "
            f"parameter's path; the paths are {shown}"
        )


def _even(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    for axis, size in enumerate(shape):
        if size % mesh.size == 0:
            return PartitionSpec(*[None] * axis, mesh.axis_names)
    return PartitionSpec()
