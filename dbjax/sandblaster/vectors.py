"""`Vectors`: the coordinator's only door to the vectors; through it come scalars only.

One class, three places where vectors may live, each a small function: `in_process`
arrays, arrays spread `on_mesh` over devices, and `on_shards`; in `remote_vectors` there
is a fourth. What is asked of a vector is the same in each and agrees to rounding.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dbjax.runtime.served import Served
from dbjax.sandblaster import vector_shard
from dbjax.sandblaster.messages import (
    Add,
    Copy,
    Dots,
    Elementwise,
    Fence,
    Get,
    Names,
    Put,
    Swap,
    combination,
)
from dbjax.sandblaster.vector_shard import Command, Kernels, Reply, VectorsState
from dbjax.server.layout import Layout
from dbjax.server.placement import Placement
from dbjax.typing import Params


class Vectors:
    """Named vectors, wherever they live.

    Args:
      ask: `ask(commands, record)` sends shards a command each, by shard, and gives
        their replies; with `record`, if not None, each shard writes down its reply
        before it takes another. It may be called from several threads.
      split: cuts a tree into one part per shard.
      merge: puts the parts together again.
      shards: how many there are, `S`.

    >>> vectors = in_process()
    >>> vectors.put("x", {"w": np.array([3.0, 4.0], np.float32)})
    >>> vectors.combine("y", {"x": 2.0})
    >>> vectors.dots([("x", "x"), ("x", "y")])
    array([25., 50.])
    """

    def __init__(
        self,
        ask: Callable[[Mapping[int, Command], Any], Sequence[Reply]],
        split: Callable[[Params], tuple[Params, ...]],
        merge: Callable[[tuple[Params, ...]], Params],
        shards: int = 1,
    ) -> None:
        self._ask, self._split, self._merge = ask, split, merge
        self.shards = shards

    def tell(self, message: Command) -> Sequence[Reply]:
        """Send the same command to every shard; give their replies `[S]`."""
        return self._ask(dict.fromkeys(range(self.shards), message), None)

    def dots(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Give inner products of pairs of vectors, all in one round.

        Args:
          pairs: names; the same pattern of names is compiled once.

        Returns:
          float64 `[pairs]`: the shards' parts, added up exactly and rounded once where
          they are finite.
        """
        parts: Any = self.tell(Dots(tuple((a, b) for a, b in pairs)))
        return np.array([_total(one) for one in np.stack(parts).T.tolist()])

    def combine(self, into: str, terms: Mapping[str, float], dtype: Any = None) -> None:
        """Set a vector to a linear combination.

        Args:
          into: the vector set; it may be among the terms.
          terms: coefficients by name.
          dtype: of the result; those of the first vector named if None.
        """
        self.tell(combination(into, terms, dtype))

    def copy(self, into: str, name: str, dtype: Any = None) -> None:
        """Set a vector to another's value, in another dtype if one is given."""
        self.tell(Copy(into, name, dtype))

    def elementwise(
        self, into: str, operation: str, *names: str, scalars: Sequence[float] = ()
    ) -> None:
        """Set a vector to an operation on others, see `operations.OPERATIONS`.

        Args:
          into: the vector set; it may be among the others.
          operation: its name.
          *names: its vectors.
          scalars: its numbers.
        """
        self.tell(Elementwise(into, operation, names, tuple(map(float, scalars))))

    def swap(self, a: str, b: str) -> None:
        """Let two vectors exchange their names."""
        self.tell(Swap(a, b))

    def add(
        self,
        into: str,
        gradients: Params,
        replica: int,
        life: int,
        id_: int,
        shards: Sequence[int] | None = None,
        record: Any = None,
    ) -> None:
        """Add a replica's accrued sum to a vector, on each shard at most once.

        Args:
          into: the vector.
          gradients: the whole sum.
          replica: who pushes; with `life` and `id_` as in its `Push`.
          life: in which life.
          id_: which of its pushes.
          shards: which shards it is for; None: all.
          record: what each shard writes down before it adds another sum. In this
            process that is a function, which is given the shard and its reply.
        """
        parts = self._split(gradients)
        to = range(self.shards) if shards is None else shards
        adds = {shard: Add(into, parts[shard], replica, life, id_) for shard in to}
        self._ask(adds, record)

    def fence(self, replica: int, life: int) -> tuple[int, ...]:
        """Let no shard take anything more from a replica's life.

        Args:
          replica: who.
          life: which life.

        Returns:
          `[S]`, on each shard, below which id its pushes are added.
        """
        replies: Any = self.tell(Fence(replica, life))
        return tuple(reply.landed for reply in replies)

    def names(self) -> list[str]:
        """List the vectors there are."""
        names: Any = self.tell(Names())[0]
        return sorted(names)

    def put(self, into: str, tree: Params) -> None:
        """Set a vector from a whole tree: for the start, not for iterations."""
        parts = self._split(tree)
        self._ask({s: Put(into, part) for s, part in enumerate(parts)}, None)

    def get(self, name: str) -> Params:
        """Give a whole vector: for the end, not for iterations."""
        return self._merge(tuple(self.tell(Get(name))))


def _total(parts: list[float]) -> float:
    return math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)


def in_process() -> Vectors:
    """Keep whole vectors as arrays of this process.

    Returns:
      `Vectors` whose inner products are one jitted call.
    """
    return _held((lambda tree: (_own(tree),)), (lambda parts: parts[0]), 1)


def on_shards(layout: Layout) -> Vectors:
    """Cut vectors over the shards of a layout, each of which answers for its part.

    Args:
      layout: how a tree like the parameters lies on `S` shards.

    Returns:
      `Vectors` whose inner products are the sum of the shards' replies.
    """
    return _held(lambda tree: layout.split(_own(tree)), layout.merge, layout.shards)


def on_partitions(placement: Placement) -> Vectors:
    """Cut vectors over shards whose edges are those of replicas' partitions.

    Args:
      placement: how a tree like the parameters lies on both.

    Returns:
      `Vectors` that come as whole trees on replica 0's devices.
    """
    return _held(placement.split, placement.merge, placement.layout.shards)


def on_mesh(params: Params) -> Vectors:
    """Keep vectors spread over devices as the parameters are.

    Args:
      params: the tree whose leaves' shardings all vectors take; each is a
        `NamedSharding` on one mesh.

    Returns:
      `Vectors` whose inner products are one program with one all-reduce.

    Raises:
      ValueError: a leaf lies on no mesh, or on another one.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    dots = mesh_dots(jax.tree.leaves(shardings))
    kernels = vector_shard.make_kernels(dots, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        # Not by way of one device: it may be too small for the whole.
        own = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
        return jax.device_put(own, sharding)

    def split(tree: Params) -> tuple[Params]:
        return (jax.tree.map(place, tree, shardings),)

    return _held(split, (lambda parts: parts[0]), 1, kernels)


def mesh_dots(shardings: Sequence[NamedSharding]) -> vector_shard.DotsFn:
    """Make the inner products of vectors that lie on a mesh.

    Every device sums what it holds, leaf by leaf; one all-reduce adds these up. A leaf
    that is not cut along some axis of the mesh is there several times, and counts on
    the first device along that axis only.

    Args:
      shardings: of each leaf `[leaves]`, on one mesh.

    Returns:
      A function like `vector_shard.inner_products`.

    Raises:
      ValueError: a leaf lies on no mesh, or on another one.
    """
    meshes = {s.mesh if isinstance(s, NamedSharding) else None for s in shardings}
    if len(meshes) != 1 or None in meshes:
        raise ValueError(
            f"all leaves must have a NamedSharding on one mesh, got {list(shardings)}"
        )
    (mesh,) = meshes
    assert isinstance(mesh, Mesh)
    specs = [sharding.spec for sharding in shardings]
    axes = tuple(mesh.axis_names)

    def dots(vectors: tuple[Params, ...], pairs: tuple[tuple[int, int], ...]) -> Any:
        leaves = tuple(tuple(jax.tree.leaves(vector)) for vector in vectors)

        def local(leaves: tuple[Any, ...]) -> jax.Array:
            parts = vector_shard.inner_products(leaves, pairs)
            counts = jnp.stack([_counts_here(axes, spec) for spec in specs])
            return jax.lax.psum(jnp.where(counts, parts, 0), axes)

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=((tuple(specs),) * len(leaves),),
            out_specs=PartitionSpec(),
        )(leaves)

    return dots


def _counts_here(axes: tuple[str, ...], spec: PartitionSpec) -> jax.Array:
    """Whether this device is the first to hold its part of a leaf."""
    named = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    cut = set(itertools.chain.from_iterable(named))
    here = jnp.bool_(True)
    for axis in axes:
        if axis not in cut:
            here &= jax.lax.axis_index(axis) == 0
    return here


def _held(
    split: Callable[[Params], tuple[Params, ...]],
    merge: Callable[[tuple[Params, ...]], Params],
    shards: int,
    kernels: Kernels = vector_shard.KERNELS,
) -> Vectors:
    """Hold the shards' states here, and let each answer in turn."""
    served = [
        Served(VectorsState(), functools.partial(vector_shard.handle, kernels=kernels))
        for _ in range(shards)
    ]

    def ask(commands: Mapping[int, Command], record: Any) -> list[Reply]:
        notes = {
            shard: None if record is None else functools.partial(record, shard)
            for shard in commands
        }
        return [served[s](command, notes[s]) for s, command in commands.items()]

    return Vectors(ask, split, merge, shards)


def _own(tree: Params) -> Params:
    """Copy what is numpy's, which may change."""
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), tree
    )
