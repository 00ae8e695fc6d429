"""Rows cut over devices: each gets the border rows it sees from its neighbours.

Layers here have activations `[rows, cols, B, C]`. Cut over `n` devices, each holds
`rows / n` successive rows, and a window that reaches further needs rows of the device
above or below: a halo. Exactly those rows are sent, to whom they are needed by; in the
backward pass their gradients go the same way back (the paper, section 3).
"""

import jax
import jax.numpy as jnp

AXIS = "model"
"""The mesh axis that networks are partitioned over."""


def partitions() -> int:
    """Give how many devices the mesh that is set cuts a network over; 1 without one.

    Inside a `shard_map` over the axis it is 1 as well: there all is cut already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or AXIS in mesh.manual_axes:
        return 1
    return mesh.shape[AXIS]


def others_cut() -> bool:
    """Whether the mesh that is set may cut more than rows, such as examples."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(
        size > 1
        for name, size in mesh.shape.items()
        if name != AXIS and name not in mesh.manual_axes
    )


def check_rows(what: str, rows: int, parts: int) -> None:
    """Raise unless rows can be cut evenly.

    Args:
      what: whose rows they are.
      rows: how many.
      parts: over how many devices.

    Raises:
      ValueError: `parts` does not divide `rows`.
    """
    if rows % parts:
        raise ValueError(
            f"{what}: {rows} rows cannot be cut over {parts} devices of the axis "
            f"{AXIS!r}: {rows} / {parts} is not whole"
        )


def hops(rows: int, reach: int) -> list[int]:
    """Give how many rows come from the next device, the one after it, and so on.

    Args:
      rows: of each device.
      reach: how many rows are needed from one side.

    Returns:
      Their numbers, nearest device first; the sum is `reach`.

    >>> hops(rows=6, reach=9)
    [6, 3]
    """
    return [min(rows, reach - taken) for taken in range(0, reach, rows)]


def extend(x: jax.Array, above: int, below: int, parts: int) -> jax.Array:
    """Add the rows above and below that a device's windows see.

    Args:
      x: `[rows, ...]`; of this device, under `shard_map`, where `parts` is not 1.
      above: how many rows are seen above the first.
      below: how many below the last.
      parts: over how many devices the rows are cut.

    Returns:
      `[above + rows + below, ...]`; zeros stand for rows beyond the image.
    """
    if parts == 1:
        return jnp.pad(x, [(above, below)] + [(0, 0)] * (x.ndim - 1))
    rows = x.shape[0]
    # A device to which nobody sends gets zeros from ppermute. Beyond the last device
    # there is nobody at all, and nothing is sent.
    first, last = [], []
    for hop, count in enumerate(hops(rows, above), start=1):
        way = [(i, i + hop) for i in range(parts - hop)]
        first.insert(0, _send(x[rows - count :], way))
    for hop, count in enumerate(hops(rows, below), start=1):
        way = [(i + hop, i) for i in range(parts - hop)]
        last.append(_send(x[:count], way))
    return jnp.concatenate([*first, x, *last])


def window(x: jax.Array, above: int, below: int, step: int, size: int) -> jax.Array:
    """Take a device's rows, and those its windows see, out of whole rows.

    Args:
      x: `[rows, ...]`, whole on every device.
      above: rows of zeros above.
      below: rows of zeros below.
      step: from one device's first row to the next device's.
      size: how many rows a device takes.

    Returns:
      `[size, ...]`.
    """
    x = jnp.pad(x, [(above, below)] + [(0, 0)] * (x.ndim - 1))
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * step, size)


def halo_bytes(rows: int, above: int, below: int, parts: int, row_bytes: int) -> int:
    """Give how many bytes one device is sent in one `extend`.

    Args:
      rows: all rows, of all devices.
      above: how many rows are seen above a device's first.
      below: how many below its last.
      parts: over how many devices the rows are cut.
      row_bytes: of one row.

    Returns:
      The bytes that a device amid others receives in the forward pass; where the
      gradient of `x` is asked for, it is sent as many again in the backward pass.
    """
    if parts == 1:
        return 0
    here = rows // parts
    sides = (hops(here, above)[: parts - 1], hops(here, below)[: parts - 1])
    return row_bytes * sum(map(sum, sides))


def _send(x: jax.Array, way: list[tuple[int, int]]) -> jax.Array:
    return jax.lax.ppermute(x, AXIS, way) if way else jnp.zeros_like(x)
