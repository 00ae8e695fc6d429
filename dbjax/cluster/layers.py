"""The work of partitioned layers, from plain geometry: what `partitions` asks for.

A layer is cut over `N` machines, each of which holds its part's weights, computes that
part forward and backward, and sends what others need of it:

- a fully connected layer by its units: every machine needs all activations of the layer
  below, and holds a part of the sum for each of their gradients;
- a locally connected one by its positions, into rectangles as square as `N` allows: a
  machine needs only the borders of its neighbours' rectangles.

The network's input is at hand everywhere and has no gradient. A multiplication and an
addition are two operations. Pooling, normalisation, biases and losses are left out.

Letters: `B` examples in a mini-batch, `N` machines, `g` the side of a grid, `p` that of
a patch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from dbjax.cluster.partitions import Network, Work


class Full(NamedTuple):
    """A fully connected layer.

    Attributes:
      inputs: activations below.
      units: of this layer.
    """

    inputs: int
    units: int

    @property
    def weights(self) -> int:
        """How many there are, without biases."""
        return self.inputs * self.units

    def part(self, machines: int) -> int:
        """How many of the weights the machine with most of them holds."""
        return self.inputs * math.ceil(self.units / machines)

    def border(self, machines: int) -> tuple[float, int]:
        """Give the numbers for each example, and the messages, of any machine."""
        return self.inputs * (machines - 1) / machines, machines - 1


class Local(NamedTuple):
    """A locally connected layer, its filters not shared; below lies a grid of its size.

    Attributes:
      grid: side of the grid of positions, `g`.
      maps: units at each position.
      patch: side of the patch that a unit sees, `p`.
      channels: maps of the layer below.
    """

    grid: int
    maps: int
    patch: int
    channels: int

    @property
    def weights(self) -> int:
        """How many there are, without biases."""
        return self.grid**2 * self._at_a_position

    @property
    def _at_a_position(self) -> int:
        return self.maps * self.patch**2 * self.channels

    def _tiles(self, machines: int) -> list[tuple[int, int]]:
        """Give for both axes the number of tiles and the longest one's length."""
        rows = max(n for n in range(1, math.isqrt(machines) + 1) if machines % n == 0)
        return [(n, math.ceil(self.grid / n)) for n in (rows, machines // rows)]

    def part(self, machines: int) -> int:
        """How many of the weights the machine with most of them holds."""
        (_, height), (_, width) = self._tiles(machines)
        return height * width * self._at_a_position

    def border(self, machines: int) -> tuple[float, int]:
        """Give the numbers for each example, and the messages, of an inner machine."""
        area, seen, reached = 1, 1, 1
        for tiles, length in self._tiles(machines):
            inner = self.patch - 1 if tiles > 1 else 0
            area *= length
            seen *= min(length + inner, self.grid)
            reached *= 1 + min(tiles - 1, 2 * math.ceil(inner / 2 / length))
        return (seen - area) * self.channels, reached - 1


Layer: TypeAlias = Full | Local


def phases(
    layers: Sequence[Layer], machines: int, batch: int, itemsize: int = 4
) -> tuple[Work, ...]:
    """Give the work of one step: each layer forward, then each backward.

    Args:
      layers: of the network, from the input.
      machines: `N`.
      batch: `B`.
      itemsize: bytes of an activation.

    Returns:
      The work of the machine that has most, in each phase. Forward, a layer takes 2
      operations for each weight and example; backward 4, for the gradients of weights
      and of inputs, the first layer 2.

    >>> phases([Full(10, 20), Full(20, 8)], machines=2, batch=1)[1]
    Work(flops=160, bytes=40.0, messages=1)
    """
    forward, backward = [], []
    for index, layer in enumerate(layers):
        numbers, messages = layer.border(machines) if index else (0.0, 0)
        sent = numbers * batch * itemsize
        flops = 2 * batch * layer.part(machines)
        forward.append(Work(flops, sent, messages))
        backward.append(Work(2 * flops if index else flops, sent, messages))
    return (*forward, *reversed(backward))


def network(layers: Sequence[Layer], batch: int, itemsize: int = 4) -> Network:
    """Give a network's work for any number of machines; see `phases`."""
    return lambda machines: phases(layers, machines, batch, itemsize)
