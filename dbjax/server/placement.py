"""Where model partitions lie, and which shards hold the parameters of each.

A replica's sub-mesh has `P` devices, its partitions. Shards are cut along the same
edges, so a partition exchanges only with the shards that hold its parameters. What two
partitions hold alike, such as a bias that is not cut, one of them owns; the other gets
it from that one's shard. Letters: `S` shards, `P` partitions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dbjax import mesh as mesh_lib
from dbjax.server.layout import Box, Layout, assemble, bisect
from dbjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Placement:
    """Moves parameters and gradients between shards and partitions, box by box.

    Attributes:
      layout: which boxes each shard holds.
      meshes: each replica's own devices.
      shardings: of each leaf, on each of these meshes.
      pieces: `[leaves][P]` the part of each leaf that each partition holds.
      owners: `[leaves][P]` the partition that owns that part, itself where it can.
      homes: `[S]` the device on which each shard lives, beside replica 0's partitions;
        if these are of several processes, beside those of this one.
    """

    layout: Layout
    meshes: tuple[Mesh, ...]
    shardings: tuple[tuple[NamedSharding, ...], ...]
    pieces: tuple[tuple[Box, ...], ...]
    owners: tuple[tuple[int, ...], ...]
    homes: tuple[jax.Device, ...]

    @classmethod
    def of(
        cls,
        params: Params,
        shards: int,
        mesh: Mesh,
        rules: mesh_lib.Rules | None = None,
        split: str = "even",
    ) -> "Placement":
        """Lay parameters out on shards and on the partitions of replicas.

        Args:
          params: any pytree of float arrays, or of their shapes and dtypes.
          shards: how many shards; a multiple or a divisor of the number of partitions.
          mesh: its axis "replica", if it has one, gives each replica its own devices.
          rules: how parameters lie on these, see `dbjax.shard_params`.
          split: how the parameters of one partition are cut over several shards.

        Returns:
          The placement.

        Raises:
          ValueError: rules or shards do not fit.
        """
        meshes = mesh_lib.sub_meshes(mesh)
        trees = [mesh_lib.shardings(params, one, rules) for one in meshes]
        shardings = tuple(tuple(jax.tree.leaves(tree)) for tree in trees)
        plain = Layout.of(params, 1)
        partitions = meshes[0].size
        if shards % partitions and partitions % shards:
            raise ValueError(
                "shards must be a multiple or a divisor of a replica's partitions, "
                f"{partitions}, so that both have the same edges; got {shards}"
            )
        pieces = tuple(
            _pieces(leaf, shape, sharding)
            for leaf, (shape, sharding) in enumerate(
                zip(plain.shapes, shardings[0], strict=True)
            )
        )
        owners = _owners(pieces)
        owned: list[list[Box]] = [[] for _ in range(partitions)]
        for held, by in zip(pieces, owners, strict=True):
            for p, box in enumerate(held):
                if by[p] == p:
                    owned[p].append(box)
        boxes = _cut(owned, shards, plain, split)
        here = list(meshes[0].local_devices)
        homes = tuple(here[s * len(here) // shards] for s in range(shards))
        layout = dataclasses.replace(plain, boxes=boxes)
        return cls(layout, meshes, shardings, pieces, owners, homes)

    def describe(self) -> dict[str, Any]:
        """What a Trace's header says of it, JSON-able."""
        axes = self.meshes[0].shape
        return {
            "meshes": len(self.meshes),
            "mesh": {str(axis): int(size) for axis, size in axes.items()},
            "fetch_bytes": self.partition_bytes.tolist(),
            "push_bytes": self.owned_bytes.tolist(),
        }

    @functools.cached_property
    def spans_processes(self) -> bool:
        """Whether a replica's devices are not all of this process."""
        return self.meshes[0].is_multi_process

    def mesh(self, replica: int) -> Mesh:
        """A replica's own devices; replicas beyond the meshes there are share them."""
        return self.meshes[replica % len(self.meshes)]

    def put(self, params: Params) -> Params:
        """Place a whole tree on replica 0's devices."""
        leaves, treedef = jax.tree.flatten(params)
        return treedef.unflatten(map(jax.device_put, leaves, self.shardings[0]))

    def split(self, tree: Params) -> tuple[Params, ...]:
        """Push: give each shard its part of a tree, on its own device.

        Args:
          tree: like the parameters, on some replica's mesh, or anywhere as a whole.

        Returns:
          `[S]` trees like the parameters; leaves that a shard does not hold are None.
        """
        leaves = self.layout.treedef.flatten_up_to(tree)
        parts = []
        for s, mine in enumerate(self.layout.boxes):
            held: list[Any] = [None] * len(leaves)
            for box in mine:
                there = self._held_by_partitions(box.leaf, leaves[box.leaf])
                held[box.leaf] = _gather(box, self.homes[s], there)
            parts.append(jax.tree.unflatten(self.layout.treedef, held))
        return tuple(parts)

    def merge(self, parts: tuple[Params, ...], replica: int = 0) -> Params:
        """Fetch: give each partition of a replica its parameters.

        Args:
          parts: `[S]` trees as `split` gives them.
          replica: whose devices they are for.

        Returns:
          The whole tree, each leaf spread over the replica's devices. What is there
          already is not copied. Other processes' devices get theirs there.
        """
        devices = list(self.mesh(replica).devices.flat)
        mine = set(self.mesh(replica).local_devices)
        shardings = self.shardings[replica % len(self.meshes)]
        leaves = []
        for leaf, there in enumerate(self._held_by_shards(parts)):
            held = [
                _gather(piece, device, there)
                for piece, device in zip(self.pieces[leaf], devices, strict=True)
                if device in mine
            ]
            shape = self.layout.shapes[leaf]
            leaves.append(
                jax.make_array_from_single_device_arrays(shape, shardings[leaf], held)
            )
        return jax.tree.unflatten(self.layout.treedef, leaves)

    def whole(self, parts: tuple[Params, ...], consume: bool = False) -> Params:
        """Give the whole tree for a user's functions, in buffers of its own.

        On CPU it is on one device. Programs on several, of which a user might launch
        many without waiting, could hang there, by themselves or with a replica's.

        Args:
          parts: `[S]` trees as `split` gives them.
          consume: whether `parts` are of no use after this. Then no more than one leaf
            is there twice.

        Returns:
          The tree.
        """
        if self.homes[0].platform != "cpu":
            merged = self.merge(parts)
            return merged if consume else jax.tree.map(jnp.copy, merged)
        leaves = []
        for leaf, there in enumerate(self._held_by_shards(parts)):
            shape = self.layout.shapes[leaf]
            one = _gather(Box(leaf, (0,) * len(shape), shape), self.homes[0], there)
            if len(there) == 1 and not consume:
                one = jnp.copy(one)
            leaves.append(jax.block_until_ready(one))
            if len(there) > 1 and consume:
                for _, array in there:
                    array.delete()
        return jax.tree.unflatten(self.layout.treedef, leaves)

    @functools.cached_property
    def partition_bytes(self) -> np.ndarray:
        """Bytes that each partition fetches from each shard, int `[P, S]`.

        It pushes the gradients of what it owns: `owned_bytes`.
        """
        return self._bytes(lambda leaf, p: True)

    @functools.cached_property
    def owned_bytes(self) -> np.ndarray:
        """Bytes of the parameters that each partition owns on each shard, `[P, S]`."""
        return self._bytes(lambda leaf, p: self.owners[leaf][p] == p)

    def _bytes(self, counts: Callable[[int, int], bool]) -> np.ndarray:
        table = np.zeros((self.meshes[0].size, self.layout.shards), np.int64)
        for s, mine in enumerate(self.layout.boxes):
            for box in mine:
                size = self.layout.dtypes[box.leaf].itemsize
                for p, piece in enumerate(self.pieces[box.leaf]):
                    if counts(box.leaf, p) and (common := _overlap(piece, box)):
                        table[p, s] += common.size * size
        return table

    def _held_by_partitions(self, leaf: int, array: Any) -> list[tuple[Box, Any]]:
        """What the owners hold of a leaf; all of it where it is in one place."""
        pieces, owners = self.pieces[leaf], self.owners[leaf]
        if isinstance(array, jax.Array) and len(array.devices()) == len(pieces):
            held = {
                self._partition_of[one.device]: one.data
                for one in array.addressable_shards
                if one.device in self._partition_of
            }
            if len(held) == len(pieces):
                return [(pieces[p], held[p]) for p in held if owners[p] == p]
        if not isinstance(array, jax.Array):
            array = np.array(array)  # which JAX may share with whoever made it
        shape = self.layout.shapes[leaf]
        return [(Box(leaf, (0,) * len(shape), shape), array)]

    @functools.cached_property
    def _partition_of(self) -> dict[jax.Device, int]:
        return {
            device: p
            for mesh in self.meshes
            for p, device in enumerate(mesh.devices.flat)
        }

    def _held_by_shards(
        self, parts: tuple[Params, ...]
    ) -> Iterator[list[tuple[Box, Any]]]:
        """What the shards hold, leaf by leaf."""
        held: list[list[tuple[Box, Any]]] = [[] for _ in self.layout.shapes]
        for mine, part in zip(self.layout.boxes, parts, strict=True):
            leaves = self.layout.treedef.flatten_up_to(part)
            for box in mine:
                held[box.leaf].append((box, leaves[box.leaf]))
        return iter(held)


def _pieces(
    leaf: int, shape: tuple[int, ...], sharding: NamedSharding
) -> tuple[Box, ...]:
    """The part of a leaf on each device, `[P]`."""
    where = sharding.devices_indices_map(shape)
    boxes = []
    for device in sharding.mesh.devices.flat:
        spans = [s.indices(n) for s, n in zip(where[device], shape, strict=True)]
        start, stop = (tuple(span[i] for span in spans) for i in (0, 1))
        boxes.append(Box(leaf, start, stop))
    return tuple(boxes)


def _owners(pieces: tuple[tuple[Box, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Who owns each piece: of those who hold it alike, the one that owns least."""
    owned = [0] * len(pieces[0])
    owners = [[-1] * len(held) for held in pieces]
    # What one alone holds comes first, then the large ones: so that the rest balances.
    holders = [
        ([q for q, other in enumerate(held) if other == box], leaf, box)
        for leaf, held in enumerate(pieces)
        for box in dict.fromkeys(held)
    ]
    for by, leaf, box in sorted(holders, key=lambda one: (len(one[0]), -one[2].size)):
        owner = min(by, key=lambda p: owned[p])
        owned[owner] += box.size
        for p in by:
            owners[leaf][p] = owner
    return tuple(map(tuple, owners))


def _cut(
    owned: list[list[Box]], shards: int, layout: Layout, split: str
) -> tuple[tuple[Box, ...], ...]:
    """Give what each partition owns to its shards, or several partitions' to one."""
    partitions = len(owned)
    if shards < partitions:
        several = partitions // shards
        groups = [owned[i : i + several] for i in range(0, partitions, several)]
        held = [_united(sum(group, []), layout.names) for group in groups]
    elif shards > partitions and split == "even":
        each = shards // partitions
        held = [cut for boxes in owned for cut in bisect(boxes, each)]
    elif shards > partitions:
        raise ValueError(
            f'split="leaf" keeps what a partition holds of a leaf on one shard: use at '
            f"most {partitions} shards, one a partition; got {shards}"
        )
    else:
        held = owned
    for s, mine in enumerate(held):
        if not mine:
            raise ValueError(
                f"shard {s} of {shards} would hold nothing: too few parameters are cut "
                f"over the {partitions} partitions; use fewer shards, or other rules"
            )
    return tuple(tuple(sorted(mine)) for mine in held)


def _united(boxes: list[Box], names: tuple[str, ...]) -> list[Box]:
    """Put neighbouring boxes of the same leaf together."""
    united = []
    for leaf in sorted({box.leaf for box in boxes}):
        mine = [box for box in boxes if box.leaf == leaf]
        start = tuple(map(min, zip(*(box.start for box in mine), strict=True)))
        stop = tuple(map(max, zip(*(box.stop for box in mine), strict=True)))
        hull = Box(leaf, start, stop)
        if hull.size != sum(box.size for box in mine):
            raise ValueError(
                f"a shard cannot hold what several partitions hold of {names[leaf]}, "
                "which is no single block: use one shard a partition, or one for all"
            )
        united.append(hull)
    return united


def _overlap(a: Box, b: Box) -> Box | None:
    start, stop = tuple(map(max, a.start, b.start)), tuple(map(min, a.stop, b.stop))
    empty = any(low >= high for low, high in zip(start, stop, strict=True))
    return None if empty else Box(a.leaf, start, stop)


def _gather(box: Box, device: jax.Device, there: list[tuple[Box, Any]]) -> jax.Array:
    """Bring a box onto a device, from whoever holds parts of it."""
    moved = []
    for held, array in there:
        common = _overlap(box, held)
        if common is None:
            continue
        if common != held:
            inside = zip(common.start, common.stop, held.start, strict=True)
            array = array[tuple(slice(a - o, b - o) for a, b, o in inside)]
        moved.append((common, jax.device_put(array, device)))
    assert sum(common.size for common, _ in moved) == box.size, "a gap"
    return assemble(moved)
