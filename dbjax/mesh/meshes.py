"""Device meshes, and each replica's own part of one."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

REPLICA = "replica"
"""The axis along which model replicas have devices of their own."""


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


def sub_meshes(mesh: Mesh) -> tuple[Mesh, ...]:
    """Give each replica's own devices: the mesh, cut along its axis "replica".

    Args:
      mesh: of any axes.

    Returns:
      A mesh of the other axes for each place along "replica"; the mesh itself, for all
      replicas, if it has no such axis.

    >>> [part.axis_names for part in sub_meshes(make_mesh(replica=1, model=1))]
    [('model',)]
    """
    if REPLICA not in mesh.axis_names:
        return (mesh,)
    at = mesh.axis_names.index(REPLICA)
    names = mesh.axis_names[:at] + mesh.axis_names[at + 1 :]
    if not names:  # each replica has one device, and a mesh needs an axis
        names, at, devices = ("model",), 0, mesh.devices[:, None]
    else:
        devices = mesh.devices
    kinds = (AxisType.Auto,) * len(names)
    return tuple(
        Mesh(part, names, axis_types=kinds) for part in np.moveaxis(devices, at, 0)
    )
