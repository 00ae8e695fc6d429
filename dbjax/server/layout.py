"""How a pytree of parameters lies on shards; knows nothing of optimizers or versions.

Letters: `S` shards. A shard holds **boxes**: whole leaves, or slices of them that keep
the leaf's rank and path, so that masks and labels by path or rank mean the same on a
shard as on the whole. A leaf that a shard does not hold is `None` there, which JAX
treats as an empty subtree. Only where shards are so small that slices cannot balance
them is a leaf cut into flat runs, which lose its rank.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.typing import Params

SPLITS = ("even", "leaf")

_LANES = 16
"""Float32 lanes of the widest vector registers.

XLA may round the last few elements of a row, which do not fill a register, differently
from the others. Cuts across the last axis at multiples of this leave every element
where it was in its register, so that shards agree bit for bit with the whole.
"""


class Box(NamedTuple):
    """The part `[start, stop)` of one leaf.

    Attributes:
      leaf: the leaf's index in the flattened tree.
      start: first index along each axis; one axis only where the leaf is cut flat.
      stop: the index after the last along each axis.
    """

    leaf: int
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The box's own shape."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def of(self, leaf: Any) -> Any:
        """Give this part of a whole leaf; one that has lost its rank is cut flat."""
        if leaf.shape == self.shape:
            return leaf
        flat = leaf.reshape(-1) if len(self.start) != leaf.ndim else leaf
        return flat[tuple(map(slice, self.start, self.stop))]

    def cut(self, axis: int, at: int) -> tuple["Box", "Box"]:
        """Cut in two across `axis`, `at` counted from the box's start."""
        middle = self.start[axis] + at
        stop = self.stop[:axis] + (middle,) + self.stop[axis + 1 :]
        start = self.start[:axis] + (middle,) + self.start[axis + 1 :]
        return Box(self.leaf, self.start, stop), Box(self.leaf, start, self.stop)


def _cuts(box: Box, wanted: int) -> Iterator[tuple[int, int, int]]:
    """Ways to cut off about `wanted` elements, cleanest first: `(missed, axis, at)`."""
    if not box.shape:
        return
    last = len(box.shape) - 1
    clean = [(axis, 1) for axis in range(last)] + [(last, _LANES)]
    for axis, unit in [*clean, (last, 1)]:
        length = box.shape[axis]
        at = unit * round(wanted * length / box.size / unit)
        if 0 < at < length:
            yield abs(at * (box.size // length) - wanted), axis, at


def _halve(boxes: list[Box], target: int, slack: float) -> tuple[list[Box], list[Box]]:
    """Cut boxes in two groups, the left of about `target` elements.

    Largest first: what one box's rows are too coarse to fill, a smaller box fills.
    """
    left, right, wanted = [], [], target
    for box in sorted(boxes, key=lambda box: -box.size):
        if box.size <= wanted:
            left.append(box)
            wanted -= box.size
            continue
        cuts = list(_cuts(box, wanted))
        near = [cut for cut in cuts if cut[0] <= slack]
        if wanted > slack and cuts and min(cuts)[0] < wanted:
            _, axis, at = near[0] if near else min(cuts)
            first, second = box.cut(axis, at)
            left.append(first)
            right.append(second)
            wanted -= first.size
        else:
            right.append(box)
    return left, right


def bisect(boxes: list[Box], shards: int) -> list[list[Box]]:
    """Cut boxes into `shards` groups of nearly equal size, a box a leaf at most."""
    if shards == 1:
        return [boxes]
    half, total = shards // 2, sum(box.size for box in boxes)
    # Rather keep a leaf whole than balance the last two per cent.
    left, right = _halve(boxes, round(total * half / shards), 0.02 * total / shards)
    return bisect(left, half) + bisect(right, shards - half)


def _runs(boxes: list[Box], shards: int) -> list[list[Box]]:
    """Cut the leaves, laid end to end and flattened, into runs of equal length."""
    total = sum(box.size for box in boxes)
    edges = [total * s // shards for s in range(shards + 1)]
    held: list[list[Box]] = [[] for _ in range(shards)]
    begin = 0
    for box in boxes:
        end = begin + box.size
        for mine, a, b in zip(held, edges[:-1], edges[1:], strict=True):
            low, high = max(a, begin), min(b, end)
            if low == begin and high == end:
                mine.append(box)
            elif low < high:
                mine.append(Box(box.leaf, (low - begin,), (high - begin,)))
        begin = end
    return held


def _even(boxes: list[Box], shards: int) -> list[list[Box]]:
    """Balance by slices; where shards are too small for that, by flat runs."""
    held = bisect(boxes, shards)
    sizes = [sum(box.size for box in mine) for mine in held]
    mean = sum(sizes) / shards
    if min(sizes) > 0 and max(sizes) <= max(1.1 * mean, math.ceil(mean)):
        return held
    return _runs(boxes, shards)


def _whole_leaves(boxes: list[Box], shards: int) -> list[list[Box]]:
    """Give each leaf, largest first, to the shard that holds least so far."""
    held: list[list[Box]] = [[] for _ in range(shards)]
    for box in sorted(boxes, key=lambda box: -box.size):
        min(held, key=lambda mine: sum(b.size for b in mine)).append(box)
    return [sorted(mine) for mine in held]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A pytree's place on `S` shards: `split` and `merge` are each other's inverse.

    Attributes:
      treedef: the tree's structure.
      names: each leaf's path, for messages.
      shapes: each leaf's shape.
      dtypes: each leaf's dtype.
      boxes: `[S]` what each shard holds.

    >>> params = {"w": np.ones((4, 16)), "b": np.ones(4)}
    >>> layout = Layout.of(params, shards=2)
    >>> [jax.tree.map(np.shape, part) for part in layout.split(params)]
    [{'b': (2,), 'w': (2, 16)}, {'b': (2,), 'w': (2, 16)}]
    """

    treedef: Any
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    boxes: tuple[tuple[Box, ...], ...]

    @classmethod
    def of(cls, params: Params, shards: int, split: str = "even") -> "Layout":
        """Lay `params` out on `shards` shards.

        Args:
          params: any pytree of float arrays, none of them empty.
          shards: how many shards; at most the number of parameters.
          split: `"even"` cuts large leaves, so that no shard holds more than about the
            mean; `"leaf"` keeps every leaf whole.

        Returns:
          The layout.

        Raises:
          ValueError: what is wrong with `params`, `shards` or `split`.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = tuple(jax.tree_util.keystr(path) or "params" for path, _ in paths)
        leaves = list(map(_as_array, names, [leaf for _, leaf in paths]))
        check_params(names, leaves)
        boxes = [Box(i, (0,) * x.ndim, x.shape) for i, x in enumerate(leaves)]
        total = sum(box.size for box in boxes)
        most = total if split == "even" else len(boxes)
        unit = "parameters" if split == "even" else "leaves"
        if shards > most:
            raise ValueError(
                f"shards must be at most the number of {unit} ({most}), got {shards}"
            )
        cut = _even if split == "even" else _whole_leaves
        return cls(
            treedef=treedef,
            names=names,
            shapes=tuple(x.shape for x in leaves),
            dtypes=tuple(x.dtype for x in leaves),
            boxes=tuple(tuple(sorted(mine)) for mine in cut(boxes, shards)),
        )

    @property
    def shards(self) -> int:
        """How many shards, `S`."""
        return len(self.boxes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Parameters on each shard, `[S]`."""
        return tuple(sum(box.size for box in mine) for mine in self.boxes)

    @property
    def nbytes(self) -> tuple[int, ...]:
        """Bytes on each shard, `[S]`."""
        return tuple(
            sum(box.size * self.dtypes[box.leaf].itemsize for box in mine)
            for mine in self.boxes
        )

    def split(self, tree: Params) -> tuple[Params, ...]:
        """Cut a tree like the parameters into one tree per shard (pure, jit-safe).

        Args:
          tree: of the structure and shapes that were laid out.

        Returns:
          `[S]` trees of that structure; leaves a shard does not hold are None.
        """
        if self.shards == 1:
            return (tree,)
        leaves = self.treedef.flatten_up_to(tree)
        parts = []
        for mine in self.boxes:
            held: list[Any] = [None] * len(leaves)
            for box in mine:
                held[box.leaf] = box.of(leaves[box.leaf])
            parts.append(jax.tree.unflatten(self.treedef, held))
        return tuple(parts)

    def merge(self, parts: tuple[Params, ...]) -> Params:
        """Put the shards' trees together again (pure, jit-safe).

        Args:
          parts: `[S]` trees as `split` gives them.

        Returns:
          The whole tree.
        """
        if self.shards == 1:
            return parts[0]
        pieces: list[list[tuple[Box, Any]]] = [[] for _ in self.shapes]
        for mine, part in zip(self.boxes, parts, strict=True):
            held = self.treedef.flatten_up_to(part)
            for box in mine:
                pieces[box.leaf].append((box, held[box.leaf]))
        leaves = [
            assemble(p).reshape(shape)
            for p, shape in zip(pieces, self.shapes, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)


def assemble(pieces: list[tuple[Box, Any]]) -> jax.Array:
    """Join boxes into the leaf they tile: find the axis of the first cut, recurse."""
    if len(pieces) == 1:
        return pieces[0][1]
    for axis in range(len(pieces[0][0].start)):
        spans = [(box.start[axis], box.stop[axis]) for box, _ in pieces]
        low, high = min(a for a, _ in spans), max(b for _, b in spans)
        ends = {b for _, b in spans if b < high}
        cuts = sorted(at for at in ends if not any(a < at < b for a, b in spans))
        if cuts:
            edges = itertools.pairwise([low, *cuts, high])
            runs = [
                [piece for piece in pieces if a <= piece[0].start[axis] < b]
                for a, b in edges
            ]
            return jnp.concatenate([assemble(run) for run in runs], axis)
    raise AssertionError("boxes do not come from cuts")


def _as_array(name: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError):
        raise ValueError(
            f"params{name} is a {type(leaf).__name__}: every leaf must be a float array"
        ) from None


def check_params(names: tuple[str, ...], leaves: list[jax.Array]) -> None:
    """Raise if there is nothing to train, or a leaf is not a non-empty float array.

    Args:
      names: each leaf's path, for the message.
      leaves: the leaves.

    Raises:
      ValueError: naming the leaf and what is wrong with it.
    """
    if not leaves:
        raise ValueError("params holds no arrays: there is nothing to train")
    for name, leaf in zip(names, leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"params{name} has dtype {leaf.dtype}: every leaf must be a float array"
            )
        if leaf.size == 0:
            raise ValueError(f"params{name} is empty (shape {leaf.shape})")
