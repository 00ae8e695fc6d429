"""Locally connected layers: every position has weights of its own (section 5).

A node sees a patch of the layer below, as in a convolution, but no weights are shared.
Letters: `H x W` positions below and `C` maps there, `R x Q` positions of the layer and
`D` maps (nodes that share a patch), `k` the patch's side, `s` the stride, `B` examples.

Gathering patches is what makes such layers slow, so weights are stored by what they
read: next to each other lie those of all nodes that see a column of the layer below.
One matrix product a column takes `k` rows of it to the `k / s` positions that see it,
and shifted sums bring these together. Patches overlap in rows only, so `k / s` copies
of the input and of the output exist at once, not `(k / s)^2`. Weights are read in the
order they lie, and not copied, save those of columns that both ends share; with padding
"SAME" there are none.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dbjax.models import halo
from dbjax.typing import Array

Padding = tuple[tuple[int, int], tuple[int, int]]

# With more examples, matrix products beat sums of outer products.
_FEW = 32


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Which positions below a layer's positions see.

    Attributes:
      below: `(H, W)`.
      patch: `k`.
      stride: `s`, of rows and of columns.
      padding: zeros `((above, below), (left, right))` around the input.

    Raises:
      ValueError: the patch does not fit.
    """

    below: tuple[int, int]
    patch: int
    stride: int
    padding: Padding

    def __post_init__(self) -> None:
        k, s = self.patch, self.stride
        if k < 1 or s < 1 or k % s:
            raise ValueError(
                f"patch={k}, stride={s}: allowed are strides from 1 that divide the "
                "patch"
            )
        if min(self.below) < k:
            height, width = self.below
            raise ValueError(
                f"an input of {height}x{width} is smaller than the patch, {k}x{k}"
            )
        if not all(0 <= zeros < k for side in self.padding for zeros in side):
            raise ValueError(
                f"padding={self.padding}: allowed are numbers from 0 to {k - 1}, less "
                "than the patch"
            )

    @property
    def positions(self) -> tuple[int, int]:
        """`(R, Q)`."""
        rows, cols = (
            (size + sum(zeros) - self.patch) // self.stride + 1
            for size, zeros in zip(self.below, self.padding, strict=True)
        )
        return rows, cols

    @property
    def steps(self) -> int:
        """How many successive positions see a column: `k / s`."""
        return self.patch // self.stride

    def kernel_shape(self, channels: int, maps: int) -> tuple[int, ...]:
        """Give the weights' shape: `[R, Q, s * k * C, k / s, D]`.

        Args:
          channels: `C`.
          maps: `D`.

        Returns:
          The shape; the first axis is the rows, so that partitions cut it.
        """
        rows = self.patch * self.stride * channels
        return (*self.positions, rows, self.steps, maps)

    def check_cut(self, parts: int) -> None:
        """Raise unless rows below can be cut as those of positions are.

        Args:
          parts: over how many devices.

        Raises:
          ValueError: the rows do not divide, or there are not `s` below for each.
        """
        rows, expected = self.positions[0], self.patch - self.stride
        halo.check_rows("a locally connected layer", rows, parts)
        if self.below[0] != self.stride * rows or sum(self.padding[0]) != expected:
            raise ValueError(
                f"a locally connected layer of {rows} rows and stride {self.stride} "
                f"can be cut over {parts} devices if its input has "
                f"{self.stride * rows} rows and {expected} rows of padding; they are "
                f"{self.below[0]} and {sum(self.padding[0])}"
            )


def locally_connected(
    inputs: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    stride: int = 1,
    padding: str | Padding = "SAME",
) -> jax.Array:
    r"""Apply a locally connected layer.

    .. math::
      y_{rqbd} = \beta_{rqd} + \sum_{i,j=0}^{k-1} \sum_c x_{sr+i,\, sq+j,\, b,\, c}
        \, w_{rqijcd}

    Where the mesh that is set has an axis "model", the layer is partitioned over it:
    rows of positions are cut, each device keeps its rows of weights, and is sent the
    rows of the input that it sees and does not hold. That asks for an input of exactly
    `stride` rows for each row of positions, as padding "SAME" makes them.

    Args:
      inputs: `[H, W, B, C]`.
      kernel: `[R, Q, s * k * C, k / s, D]`; `arrange` makes it of `w` above.
      bias: `[R, Q, D]`.
      stride: `s`; must divide the patch.
      padding: zeros `((above, below), (left, right))` around the input, "VALID" for
        none, or "SAME" for `k - s` of them, `(k - s) // 2` above and left.

    Returns:
      `[R, Q, B, D]`. It has first derivatives in reverse mode only.

    Raises:
      ValueError: the input is smaller than the patch, the kernel or the bias do not
        match, or the rows cannot be cut.
    """
    inputs, kernel = jnp.asarray(inputs), jnp.asarray(kernel)
    if inputs.ndim != 4 or kernel.ndim != 5:
        raise ValueError(
            "locally_connected: inputs must be [H, W, B, C] and the kernel "
            f"[R, Q, s * k * C, k / s, D], got {inputs.shape} and {kernel.shape}"
        )
    patch = kernel.shape[3] * stride
    if isinstance(padding, str):
        padding = named_padding(padding, patch, stride)
    height, width = inputs.shape[:2]
    geometry = Geometry((height, width), patch, stride, padding)
    expected = geometry.kernel_shape(inputs.shape[3], kernel.shape[4])
    if kernel.shape != expected:
        raise ValueError(
            f"locally_connected: for inputs {inputs.shape}, patch {patch}, stride "
            f"{stride} and padding {padding} the kernel must have shape {expected}, "
            f"got {kernel.shape}"
        )
    bias = jnp.zeros((), kernel.dtype) if bias is None else jnp.asarray(bias)
    if bias.ndim and bias.shape != (*expected[:2], expected[4]):
        raise ValueError(
            f"locally_connected: bias must have shape "
            f"{(*expected[:2], expected[4])}, got {bias.shape}"
        )
    parts = halo.partitions()
    layer = functools.partial(connect, geometry=geometry, parts=parts)
    if parts == 1:
        return layer(inputs, kernel, bias)
    geometry.check_cut(parts)
    cut = PartitionSpec(halo.AXIS)
    return jax.shard_map(
        layer,
        in_specs=(cut, cut, cut if bias.ndim else PartitionSpec()),
        out_specs=cut,
        axis_names={halo.AXIS},
    )(inputs, kernel, bias)


def named_padding(name: str, patch: int, stride: int) -> Padding:
    """Give the zeros around an input for "SAME" or "VALID"."""
    if name not in ("SAME", "VALID"):
        raise ValueError(
            f"padding={name!r}: allowed are 'SAME', 'VALID' and "
            "((above, below), (left, right))"
        )
    zeros = patch - stride if name == "SAME" else 0
    side = (zeros // 2, zeros - zeros // 2)
    return side, side


def connect(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    geometry: Geometry,
    parts: int,
    whole: bool = False,
) -> jax.Array:
    """Apply the layer to a device's rows; what `locally_connected` does on each.

    Args:
      x: `[H / parts, W, B, C]`, or `[H, W, B, C]` with `whole`.
      kernel: `[R / parts, ...]`.
      bias: `[R / parts, Q, D]` or a scalar.
      geometry: of the layer as a whole.
      parts: over how many devices the rows are cut, under `shard_map` if not 1.
      whole: whether each device holds the input whole, so that none need be sent.

    Returns:
      `[R / parts, Q, B, D]`.
    """
    (above, below), (left, right) = geometry.padding
    k, s, rows = geometry.patch, geometry.stride, geometry.positions[0]
    if whole and parts > 1:
        here = rows // parts * s
        x = halo.window(x, above, below, here, here + k - s)
    else:
        x = halo.extend(x, above, below, parts)
    # Columns in groups of s, of which the padding leaves out only whole ones.
    groups = geometry.positions[1] + geometry.steps - 1
    first, before = divmod(left, s)
    after = (-(before + x.shape[1])) % s
    x = jnp.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))
    x = x[:, : (groups - first) * s]
    y = _connect(x, kernel, s, first)
    return y + (bias[:, :, None] if bias.ndim else bias)


def arrange(weights: Array, *, stride: int, left: int) -> jax.Array:
    """Bring weights given by position into the order that the layer wants.

    Args:
      weights: `[R, Q, k, k, C, D]`.
      stride: `s`.
      left: zeros left of the input.

    Returns:
      The kernel, `[R, Q, s * k * C, k / s, D]`.
    """
    rows, cols, k, _, channels, maps = weights.shape
    steps = k // stride
    weights = jnp.asarray(weights).reshape(rows, cols, k, steps, stride, channels, maps)
    weights = weights.transpose(0, 1, 4, 2, 5, 3, 6)  # [R, Q, s, k, C, k / s, D]
    weights = weights.reshape(rows, cols, stride * k * channels, steps, maps)
    # Position q sees, as its j-th, the group q + j of columns.
    return jnp.stack(
        [
            jnp.roll(weights[:, :, :, j], j - left // stride, axis=1)
            for j in range(steps)
        ],
        axis=3,
    )


# How columns are numbered below: `u` is a group of s columns of the input, position q
# sees the groups q - first to q - first + k / s - 1, and the weights of all positions
# that see group u lie at u modulo Q. So groups u and u + Q, at the left and right end,
# share a place, of which each uses what the other does not.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _connect(x: jax.Array, kernel: jax.Array, s: int, first: int) -> jax.Array:
    """Take the rows that are seen, in whole groups of columns, to `[rows, Q, B, D]`."""
    rows, cols, depth, steps, maps = kernel.shape
    slabs = _slabs(x, rows, steps * s, s)
    groups = slabs.shape[1]
    flat = kernel.reshape(rows, cols, depth, steps * maps)
    z = _join(
        jnp.einsum("ruib,ruio->rubo", slabs[:, u], flat[:, at])
        for u, at in _wraps(groups, cols)
    ).reshape(rows, groups, -1, steps, maps)
    after = max(0, cols + steps - 1 - first - groups)
    z = jnp.pad(z, ((0, 0), (first, after), (0, 0), (0, 0), (0, 0)))
    return functools.reduce(jnp.add, (z[:, j : j + cols, :, j] for j in range(steps)))


def _connect_forward(x: jax.Array, kernel: jax.Array, s: int, first: int) -> Any:
    return _connect(x, kernel, s, first), (x, kernel)


def _connect_backward(
    s: int, first: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, cols, depth, steps, maps = kernel.shape
    slabs = _slabs(x, rows, steps * s, s)
    groups, _, batch = slabs.shape[1:]
    flat = kernel.reshape(rows, cols, depth, steps * maps)
    after = max(0, groups + first - cols)
    dy = jnp.pad(dy, ((0, 0), (steps - 1 - first, after), (0, 0), (0, 0)))
    seeing = [dy[:, j : j + groups] for j in reversed(range(steps))]
    dz = jnp.stack(seeing, axis=3).reshape(rows, groups, batch, steps * maps)
    wraps = _wraps(groups, cols)
    dslabs = _join(
        jnp.einsum("rubo,ruio->ruib", dz[:, u], flat[:, at]) for u, at in wraps
    )
    dkernel, *more = (_outer(slabs[:, u], dz[:, u]) for u, _ in wraps)
    if cols > groups:  # the last weights see padding only
        dkernel = jnp.pad(dkernel, ((0, 0), (0, cols - groups), (0, 0), (0, 0)))
    for part in more:
        dkernel = dkernel.at[:, : part.shape[1]].add(part)
    return _slabs_backward(dslabs, x, steps * s, s), dkernel.reshape(kernel.shape)


_connect.defvjp(_connect_forward, _connect_backward)


def _slabs(x: jax.Array, rows: int, k: int, s: int) -> jax.Array:
    """For each row of positions, the `k` rows it sees: `[rows, groups, s * k * C, B]`.

    The examples come last: all copies are long, and matrix products are faster so.
    """
    x = x.transpose(0, 1, 3, 2)
    _, width, channels, batch = x.shape
    seen = [x[i : i + s * (rows - 1) + 1 : s, p::s] for p in range(s) for i in range(k)]
    depth = s * k * channels
    return jnp.stack(seen, axis=2).reshape(rows, width // s, depth, batch)


def _slabs_backward(dslabs: jax.Array, x: jax.Array, k: int, s: int) -> jax.Array:
    """The gradient of `x`, given that of the slabs."""
    height, width, batch, channels = x.shape
    rows, groups = dslabs.shape[:2]
    dslabs = dslabs.reshape(rows, groups, s, k, channels, batch)
    zero = jnp.zeros((), dslabs.dtype)

    def spread(i: int) -> jax.Array:
        part = dslabs[:, :, :, i].reshape(rows, width, channels, batch)
        below = height - i - (rows - 1) * s - 1
        return jax.lax.pad(part, zero, [(i, below, s - 1)] + [(0, 0, 0)] * 3)

    return functools.reduce(jnp.add, map(spread, range(k))).transpose(0, 1, 3, 2)


def _wraps(groups: int, cols: int) -> list[tuple[slice, slice]]:
    """Groups of columns, and where their weights lie."""
    return [
        (slice(u, min(u + cols, groups)), slice(0, min(cols, groups - u)))
        for u in range(0, groups, cols)
    ]


def _join(parts: Iterable[jax.Array]) -> jax.Array:
    first, *more = parts
    return jnp.concatenate([first, *more], axis=1) if more else first


def _outer(slabs: jax.Array, dz: jax.Array) -> jax.Array:
    """The gradient of the weights, `[rows, groups, s * k * C, k / s * D]`."""
    batch = slabs.shape[3]
    if batch > _FEW or halo.others_cut():
        return jnp.einsum("ruib,rubo->ruio", slabs, dz)
    # One loop over the weights, written once; XLA spreads it over the cores. It takes
    # examples one by one, which devices that hold some each would have to exchange.
    return functools.reduce(
        jnp.add,
        (slabs[:, :, :, b, None] * dz[:, :, b, None, :] for b in range(batch)),
    )
