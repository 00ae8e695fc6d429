"""What replicas and shards in processes of their own are made of.

The driver packs a `Kit`, which holds no arrays; each process makes the same jitted
functions of it. A process that is kept for the next run makes an equal kit's only once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dbjax import mesh as mesh_lib
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.hands import ReplicaHands
from dbjax.downpour.limbs import GroupHands
from dbjax.downpour.problem import Problem, assemble, digest
from dbjax.downpour.program import make_program
from dbjax.downpour.protocol import Protocol
from dbjax.runtime.group import Follower, Group
from dbjax.runtime.parcels import to_wire
from dbjax.runtime.replica_host import ReplicaHost
from dbjax.runtime.shard_host import ShardHost
from dbjax.runtime.transport import Address, Shared
from dbjax.server.layout import Layout
from dbjax.server.placement import Placement
from dbjax.server.shard import Shard
from dbjax.server.shard import make_shard as make_functions
from dbjax.typing import Batch


class Kit(NamedTuple):
    """A problem without its arrays.

    Attributes:
      params: shapes and dtypes of the parameters.
      batch: a minibatch's tree, with the place of each leaf's shape in `leaves`.
      leaves: shapes and dtypes.
      shards: how many.
      split: how parameters are cut.
      mesh: axes of a replica's devices, by name; None for a single device.
      recipe: see `assemble`.
    """

    params: Any
    batch: Batch
    leaves: tuple[Any, ...]
    shards: int
    split: str
    mesh: dict[str, int] | None
    recipe: dict[str, Any]


class Start(NamedTuple):
    """Where one replica goes on after a resume.

    Attributes:
      local: leaves of its local optimizer's state, None if it has none.
      stream: where its data's own iterator stands, None if it has none.
    """

    local: list[Any] | None = None
    stream: Any = None


def make_kit(problem: Problem, split: str) -> Kit:
    """Pack what other processes need of a problem."""
    shapes = jax.eval_shape(lambda tree: tree, problem.params)
    treedef, *leaves = problem.batch_spec
    batch = treedef.unflatten(range(len(leaves)))
    placement, mesh = problem.placement, None
    if placement is not None:
        axes = placement.mesh(0).shape
        mesh = {str(axis): int(size) for axis, size in axes.items()}
    shards = problem.layout.shards
    return Kit(shapes, batch, tuple(leaves), shards, split, mesh, problem.recipe)


def make_replica(
    kit: Shared,
    data: Shared,
    arguments: Arguments,
    start: Start,
    timeout: float,
    replica: int,
    life: int,
    shards: Sequence[Address],
    batch: int,
    next_id: int,
    zero: float,
    group: Group | None = None,
) -> ReplicaHost | Follower:
    """Make a replica, in its process; see `ReplicaHost` for the arguments.

    Where it spans several, `group` is given to the first, and all others follow.
    """
    problem = dataclasses.replace(_problem(kit), data=data.get())
    if hasattr(problem.data, "start"):
        problem.data.start(arguments.replicas)
    hands = ReplicaHands(problem, replica)
    if life == 0 and start.stream is not None:
        problem.data.set_state(start.stream)  # type: ignore[attr-defined]
    if life == 0 and start.local is not None and problem.local_init is not None:
        packed: Kit = kit.get()
        shapes = jax.eval_shape(problem.local_init, packed.params)
        leaves, treedef = jax.tree.flatten(shapes)
        pairs = zip(leaves, start.local, strict=True)
        arrays = [np.asarray(saved, like.dtype) for like, saved in pairs]
        hands.local_state = treedef.unflatten(arrays)
    if jax.process_index():
        return Follower(hands)
    return ReplicaHost(
        make_program(arguments), hands if group is None else GroupHands(hands, group),
        replica, life, shards, problem.layout.nbytes,
        not arguments.protocol.free_running, batch, next_id, zero, timeout, state_of,
    )  # fmt: skip


def make_shard(
    kit: Shared,
    protocol: Protocol,
    digest_every: int,
    timeout: float,
    share: Callable[[str, Any], Shared],
    shard: int,
    held: Shared,
    zero: float,
) -> ShardHost:
    """Make a shard, in its process; see `ShardHost` for the arguments."""

    def takes(clocks: Any, replica: int, missed: int) -> bool:
        return protocol.takes is None or protocol.takes(clocks, replica, missed)

    return ShardHost(
        shard, _functions(kit), held.get(), takes, digest, digest_every, zero,
        share, timeout,
    )  # fmt: skip


def state_of(hands: Any, batch: int) -> Start:
    """What of a replica belongs into a checkpoint; `batch`: its next minibatch."""
    local = hands.local()
    after = getattr(hands.problem.data, "state_after", None)
    if after is None:
        return Start(to_wire(local))
    return Start(to_wire(local), after([0] * hands.replica + [batch]))


@functools.lru_cache(maxsize=4)
def _problem(kit: Shared) -> Problem:
    packed: Kit = kit.get()
    params, shards, split = packed.params, packed.shards, packed.split
    placement = None
    if packed.mesh is None:
        layout = Layout.of(params, shards, split)
    else:
        devices = _of_each_process(math.prod(packed.mesh.values()))
        mesh, rules = mesh_lib.make_mesh(devices, **packed.mesh), packed.recipe["rules"]
        placement = Placement.of(params, shards, mesh, rules, split)
        layout = placement.layout
    spec = (jax.tree.structure(packed.batch), *packed.leaves)
    return assemble(None, None, layout, placement, spec, **packed.recipe)


@functools.lru_cache(maxsize=4)
def _functions(kit: Shared) -> Shard:
    """What a shard needs of a problem: not the replicas' devices."""
    recipe = kit.get().recipe
    return make_functions(recipe["optimizer"], recipe["provide"])


def _of_each_process(count: int) -> list[jax.Device]:
    """So many devices, the first ones of each process of this world."""
    processes = range(jax.process_count())
    each = count // len(processes)
    there = ([d for d in jax.devices() if d.process_index == p] for p in processes)
    return [device for devices in there for device in devices[:each]]
