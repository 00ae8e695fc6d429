"""L2 pooling and local contrast normalisation, on rows cut over devices.

Letters: activations are `[R, Q, B, C]`, rows and columns of positions, examples, maps.
Both functions are given a device's own rows, under `shard_map` where `parts` is not 1,
and have the borders sent that their windows see. Whatever can be summed before it is
sent is: over columns in the one, over maps in the other.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.models import halo

# Below it a window counts as having no contrast (Le et al. 2012).
CONTRAST = 0.01
# Under the root of a pool, so that its gradient is finite where all is zero.
_EPSILON = 1e-6


def l2_pool(x: jax.Array, *, size: int, stride: int = 1, parts: int = 1) -> jax.Array:
    r"""Pool each map over windows of `size x size` positions.

    .. math::
      y = \sqrt{\epsilon + \mathrm{mean}\, x^2}, \qquad \epsilon = 10^{-6}

    Windows overlap by `size - stride`; `size - stride` zeros surround the rows and
    columns, `(size - stride) // 2` of them above and left.

    Args:
      x: `[R, Q, B, C]`.
      size: of the windows, at least `stride`.
      stride: must divide `R` and `Q`.
      parts: over how many devices the rows are cut.

    Returns:
      `[R / stride, Q / stride, B, C]`.

    Raises:
      ValueError: the windows do not fit.
    """
    check_pool(x.shape[0], x.shape[1], size, stride)
    before = (size - stride) // 2
    after = size - stride - before
    weights = [1 / size] * size
    y = jnp.pad(jnp.square(x), ((0, 0), (before, after), (0, 0), (0, 0)))
    y = _weighted(y, weights, stride, axis=1)
    y = halo.extend(y, before, after, parts)
    y = _weighted(y, weights, stride, axis=0)
    return jnp.sqrt(y + _EPSILON)


def check_pool(rows: int, cols: int, size: int, stride: int) -> None:
    """Raise unless windows of `size` at every `stride` fit the positions."""
    if not 1 <= stride <= size:
        raise ValueError(
            f"pool size={size}, stride={stride}: allowed are strides from 1 to the size"
        )
    if rows % stride or cols % stride:
        raise ValueError(
            f"pool stride={stride}: must divide the {rows} rows and {cols} columns"
        )


def normalize_contrast(x: jax.Array, *, window: int = 5, parts: int = 1) -> jax.Array:
    r"""Subtract the local mean and divide by the local deviation, over all maps.

    .. math::
      v_{pc} = x_{pc} - \frac{1}{C} \sum_{o, c'} g_o x_{p+o,\,c'}, \qquad
      y_{pc} = v_{pc} \Big/ \max\Big(0.01, \sqrt{\tfrac{1}{C}
        \sum_{o, c'} g_o v_{p+o,\,c'}^2}\Big)

    `g` is a Gaussian over `window x window` offsets `o`, of deviation `window / 4`,
    that sums to 1; beyond the border `x` and `v` count as zero (Jarrett et al. 2009;
    the constant 0.01 is that of Le et al. 2012).

    Args:
      x: `[R, Q, B, C]`.
      window: its side, odd.
      parts: over how many devices the rows are cut.

    Returns:
      As `x`.

    Raises:
      ValueError: the window is even or not positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window}: allowed are odd numbers from 1")
    offsets = np.arange(window) - window // 2
    gaussian = np.exp(-0.5 * np.square(offsets / (window / 4)))
    weights = (gaussian / gaussian.sum()).tolist()

    def local(values: jax.Array) -> jax.Array:
        """The weighted mean around each position, `[R, Q, B, 1]`."""
        reach = window // 2
        mean = jnp.mean(values, axis=-1, keepdims=True)
        mean = jnp.pad(mean, ((0, 0), (reach, reach), (0, 0), (0, 0)))
        mean = _weighted(mean, weights, 1, axis=1)
        return _weighted(halo.extend(mean, reach, reach, parts), weights, 1, 0)

    v = x - local(x)
    # The maximum is inside the root, whose gradient at zero is infinite.
    return v * jax.lax.rsqrt(jnp.maximum(local(jnp.square(v)), CONTRAST**2))


def _weighted(
    x: jax.Array, weights: Sequence[float], stride: int, axis: int
) -> jax.Array:
    """Sum over a window that moves along an axis."""
    count = (x.shape[axis] - len(weights)) // stride + 1
    last = (count - 1) * stride + 1
    moved = (
        weight * jax.lax.slice_in_dim(x, i, i + last, stride, axis)
        for i, weight in enumerate(weights)
    )
    return functools.reduce(jnp.add, moved)
