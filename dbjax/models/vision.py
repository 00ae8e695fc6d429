"""The paper's network for images: locally connected, pooled, normalised, one-vs-all.

Three stages of filtering, L2 pooling and local contrast normalisation, then a logistic
unit for each class (the paper, section 5). The paper states images of 100x100, patches
of 10x10, 8 to 36 maps, 21,000 classes and the sizes 80 M, 330 M and 1.7 B; grids, pools
and the maps of each size are our choice. Letters: `B` examples, `C` classes, `G`
positions on a side, `m` maps.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dbjax.models import halo
from dbjax.models.base import Model
from dbjax.models.locally_connected import Geometry, connect, named_padding
from dbjax.models.pooling import check_pool, l2_pool, normalize_contrast

_ROWS = PartitionSpec(halo.AXIS)
RULES = (
    (r"stages/\d+/", _ROWS),
    (r"output/kernel", PartitionSpec(None, halo.AXIS)),
    (r"output/bias", _ROWS),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a network.

    Attributes:
      image: side of the images.
      channels: of the images.
      patch: side of what a node sees.
      grid: rows and columns of positions in the first stage; zeros are put around the
        images so that there are as many.
      maps: nodes that share a patch, for each stage.
      pools: `(size, stride)` of the L2 pooling, for each stage.
      window: of the contrast normalisation.
      classes: `C`.

    Raises:
      ValueError: they do not fit each other.
    """

    image: int = 100
    channels: int = 3
    patch: int = 10
    grid: int = 96
    maps: Sequence[int] = (11, 11, 11)
    pools: Sequence[tuple[int, int]] = ((4, 2), (4, 2), (5, 3))
    window: int = 5
    classes: int = 21_000

    def __post_init__(self) -> None:
        for name in ("image", "channels", "patch", "grid", "window", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"vision: {name}={getattr(self, name)}: allowed are numbers from 1"
                )
        if not self.maps or min(self.maps) < 1:
            raise ValueError(f"vision: maps={self.maps}: allowed are numbers from 1")
        if len(self.pools) != len(self.maps):
            raise ValueError(
                f"vision: maps={self.maps} has {len(self.maps)} stages, "
                f"pools={self.pools} has {len(self.pools)}"
            )
        if self.window % 2 == 0:
            raise ValueError(f"vision: window={self.window}: allowed are odd numbers")
        least = self.image - self.patch + 1
        if least >= 1 and not least <= self.grid < self.image + self.patch:
            raise ValueError(
                f"vision: grid={self.grid}: patches of {self.patch} in images of "
                f"{self.image} have {least} to {self.image + self.patch - 1} positions"
            )
        try:
            for geometry, (size, stride) in zip(
                self.geometries, self.pools, strict=True
            ):
                check_pool(*geometry.positions, size, stride)
        except ValueError as error:
            raise ValueError(f"vision: {error}") from error

    @functools.cached_property
    def geometries(self) -> tuple[Geometry, ...]:
        """What each stage's positions see."""
        zeros = self.grid - 1 + self.patch - self.image
        side = (zeros // 2, zeros - zeros // 2)
        first = Geometry((self.image,) * 2, self.patch, 1, (side, side))
        same = named_padding("SAME", self.patch, 1)
        grids = self.grids[1:-1]
        return first, *(Geometry((g, g), self.patch, 1, same) for g in grids)

    @functools.cached_property
    def grids(self) -> tuple[int, ...]:
        """`G` of each stage, and of the features."""
        grids = [self.grid]
        for _, stride in self.pools:
            grids.append(grids[-1] // stride)
        return tuple(grids)

    @property
    def features(self) -> int:
        """How many numbers the logistic units see."""
        return self.grids[-1] ** 2 * self.maps[-1]

    def halo_bytes(self, batch_size: int, partitions: int) -> int:
        """Give the bytes of borders that a device is sent in a step: loss and gradient.

        Images lie whole on each device, so in the first stage the filtering is sent
        nothing. In the backward pass each border's gradient goes the other way. Besides
        these there are `feature_bytes`; of the outputs only `B` losses are summed.

        Args:
          batch_size: `B`.
          partitions: how many devices the network is cut over.

        Returns:
          The bytes, for float32.
        """
        total = 0
        for i, (size, stride) in enumerate(self.pools):
            grid, pooled, maps = self.grids[i], self.grids[i + 1], self.maps[i]
            if i > 0:
                above, below = self.geometries[i].padding[0]
                row = 4 * batch_size * grid * self.maps[i - 1]
                total += halo.halo_bytes(grid, above, below, partitions, row)
            above = (size - stride) // 2
            below = size - stride - above
            row = 4 * batch_size * pooled * maps
            total += halo.halo_bytes(grid, above, below, partitions, row)
            reach, row = self.window // 2, 4 * batch_size * pooled
            total += 2 * halo.halo_bytes(pooled, reach, reach, partitions, row)
        return 2 * total

    def feature_bytes(self, batch_size: int, partitions: int) -> int:
        """Give the bytes of features that a device sends in a step: loss and gradient.

        It gathers all of them for its classes, and in the backward pass it gets the sum
        of the gradients of its own: `(P - 1) / P` of them, each way.
        """
        return 2 * 4 * batch_size * self.features * (partitions - 1) // partitions


PRESETS = {
    "80M": Sizes(),
    "330M": Sizes(maps=(24, 30, 32)),
    "1.7B": Sizes(maps=(35, 35, 35), pools=((3, 1), (4, 2), (5, 3))),
    "small": Sizes(
        image=18,
        patch=4,
        grid=16,
        maps=(8, 8, 8),
        pools=((4, 2), (3, 1), (3, 1)),
        window=3,
        classes=16,
    ),
}


def vision(
    preset: str = "80M",
    *,
    image: int | None = None,
    channels: int | None = None,
    patch: int | None = None,
    grid: int | None = None,
    maps: Sequence[int] | None = None,
    pools: Sequence[tuple[int, int]] | None = None,
    window: int | None = None,
    classes: int | None = None,
) -> Model:
    """The paper's network for images (section 5 and figure 3), or one of its kind.

    A stage of `G x G` positions has `G * G * (patch * patch * m_below + 1) * m`
    parameters, as weights and biases belong to a position; the logistic units have
    `(features + 1) * C`. Images of 100 are seen from 96 positions, with 5 zeros around
    them, and rows of all stages divide by 8:

    ========  ==========  ==========  ========  ============================
    preset    `G`         maps        features  parameters
    ========  ==========  ==========  ========  ============================
    "80M"     96, 48, 24  11, 11, 11  8x8x11    80,198,856: by stage
                                                30,514,176, 27,903,744,
                                                6,975,936, output 14,805,000
    "330M"    96, 48, 24  24, 30, 32  8x8x32    330,876,936: 66,576,384,
                                                165,957,120, 55,314,432,
                                                43,029,000
    "1.7B"    96, 96, 48  35, 35, 35  16x16x35  1,696,874,760: 97,090,560,
                                                1,129,282,560, 282,320,640,
                                                188,181,000
    "small"   16, 8, 8    8, 8, 8     8x8x8     240,656, patches of 4x4 of
                                                images of 18x18, 16 classes
    ========  ==========  ==========  ========  ============================

    Pools reach one position beyond their stride on either side. The filtering is
    linear, so the root of the pools is the non-linearity, as in Le et al. 2012.

    Partitioned over an axis "model", each device has rows of every stage, and some
    classes; sent are the borders of rows, and the features, which all classes see
    (`Sizes.halo_bytes`).

    Args:
      preset: where the sizes come from that are not given: "80M", "330M", "1.7B",
        "small".
      image: side of the images.
      channels: of the images.
      patch: side of what a node sees.
      grid: positions of the first stage, on a side.
      maps: nodes that share a patch, for each stage.
      pools: `(size, stride)` of each stage's L2 pooling.
      window: side of the contrast normalisation's window, odd.
      classes: `C`.

    Returns:
      The network: images `[B, image, image, channels]` to `[B, C]`; its loss is the sum
      of `C` binary log losses.

    Raises:
      ValueError: the preset is unknown, or the sizes do not fit each other.

    >>> vision("small").num_parameters
    240656
    """
    if preset not in PRESETS:
        raise ValueError(
            f"vision: preset={preset!r}: allowed are {', '.join(map(repr, PRESETS))}"
        )
    given: dict[str, Any] = {
        "image": image,
        "channels": channels,
        "patch": patch,
        "grid": grid,
        "maps": None if maps is None else tuple(maps),
        "pools": None if pools is None else tuple(map(tuple, pools)),
        "window": window,
        "classes": classes,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    sizes = dataclasses.replace(PRESETS[preset], **changes)
    return Model(
        name="vision",
        make=functools.partial(Vision, sizes),
        losses=one_vs_all,
        input_shape=(sizes.image, sizes.image, sizes.channels),
        classes=sizes.classes,
        rules=RULES,
    )


def one_vs_all(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Sum the binary log losses of all classes.

    .. math::
      \ell = \sum_{c=1}^{C} \log(1 + e^{z_c}) - z_{\mathrm{label}}

    Args:
      outputs: `[B, C]`; they may be cut along `C`, and are not gathered.
      labels: `[B]`.

    Returns:
      `[B]`.
    """
    own = jnp.arange(outputs.shape[-1]) == labels[:, None]
    return jnp.sum(jax.nn.softplus(jnp.where(own, -outputs, outputs)), axis=-1)


class Stage(nnx.Module):
    """The weights of a stage, drawn so that its filters give values of deviation 1."""

    def __init__(self, geometry: Geometry, channels: int, maps: int, key: jax.Array):
        shape = geometry.kernel_shape(channels, maps)
        self.kernel = nnx.Param(_draw(key, shape, geometry.patch**2 * channels))
        self.bias = nnx.Param(jnp.zeros((*geometry.positions, maps)))


class Output(nnx.Module):
    """The weights of the logistic units.

    All start close to the prior, 1 of `C` classes, and to each other: else the first
    steps would do nothing but to lower `C` biases.
    """

    def __init__(self, features: int, classes: int, key: jax.Array):
        self.kernel = nnx.Param(_draw(key, (features, classes), 100 * features))
        self.bias = nnx.Param(jnp.full(classes, -math.log(max(1, classes - 1))))


class Vision(nnx.Module):
    """The network as an NNX module.

    Args:
      sizes: of the network.
      rngs: gives the first parameters.
    """

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        self.sizes = sizes
        channels = (sizes.channels, *sizes.maps[:-1])
        self.stages = nnx.List(
            Stage(geometry, below, maps, rngs.params())
            for geometry, below, maps in zip(
                sizes.geometries, channels, sizes.maps, strict=True
            )
        )
        self.output = Output(sizes.features, sizes.classes, rngs.params())

    def __call__(self, images: jax.Array) -> jax.Array:
        """Give `[B, C]`, before the logistic function."""
        sizes, parts = self.sizes, halo.partitions()
        weights = [(stage.kernel[...], stage.bias[...]) for stage in self.stages]
        output = self.output.kernel[...], self.output.bias[...]
        network = functools.partial(_network, sizes=sizes, parts=parts)
        x = images.transpose(1, 2, 0, 3).astype(weights[0][0].dtype)
        if parts > 1:
            for grid in sizes.grids:
                halo.check_rows("vision", grid, parts)
            classes = PartitionSpec(None, halo.AXIS)
            network = jax.shard_map(
                network,
                in_specs=(PartitionSpec(), _ROWS, (classes, _ROWS)),
                out_specs=classes,
                axis_names={halo.AXIS},
            )
        return network(x, weights, output)


def _network(
    x: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    output: tuple[jax.Array, jax.Array],
    *,
    sizes: Sizes,
    parts: int,
) -> jax.Array:
    """Give a device's classes `[B, C / parts]`, which see the features of all."""
    x = _features(x, weights, sizes=sizes, parts=parts)
    if parts > 1:
        x = jax.lax.all_gather(x, halo.AXIS, axis=0, tiled=True)
    kernel, bias = output
    x = x.transpose(2, 0, 1, 3).reshape(-1, sizes.features)
    return x @ kernel + bias


def _features(
    x: jax.Array,
    weights: Sequence[tuple[jax.Array, jax.Array]],
    *,
    sizes: Sizes,
    parts: int,
) -> jax.Array:
    """All stages, on a device's rows; images are whole on each device."""
    for i, (kernel, bias) in enumerate(weights):
        size, stride = sizes.pools[i]
        geometry = sizes.geometries[i]
        x = connect(x, kernel, bias, geometry=geometry, parts=parts, whole=i == 0)
        x = l2_pool(x, size=size, stride=stride, parts=parts)
        x = normalize_contrast(x, window=sizes.window, parts=parts)
    return x


def _draw(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Uniform weights of deviation `1 / sqrt(fan_in)`.

    They are drawn row by row: random bits of all at once would need several times the
    memory of the weights. Each row has a key, so partitions change no number.
    """
    limit = math.sqrt(3 / fan_in)

    def row(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, shape[1:], minval=-limit, maxval=limit)

    return jax.lax.map(row, jax.random.split(key, shape[0]))
