"""Vectors whose shards are processes of their own, each asked by its address."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.runtime.recorder import Recorder
from dbjax.runtime.transport import Address, Gone, Late, Shared
from dbjax.sandblaster import vector_shard
from dbjax.sandblaster.messages import Added, Get, Put
from dbjax.sandblaster.vector_shard import Command, Reply, VectorsState
from dbjax.sandblaster.vectors import Vectors
from dbjax.server.layout import Layout
from dbjax.typing import Params

SMALL = 100_000
"""Vectors of fewer bytes come with the answer, and not by a reference to them."""


class ShardError(RuntimeError):
    """A shard's process is gone or silent; its part of all vectors is lost."""


class _Elsewhere(NamedTuple):
    """A vector, by reference: those who read it on one machine share one copy."""

    shared: Shared


class VectorHost:
    """One shard's part of all vectors, in the process that it has for itself.

    Args:
      shard: which one.
      share: puts a value where all processes can read it.
    """

    def __init__(self, shard: int, share: Callable[[str, Any], Shared]) -> None:
        self._shard, self._share = shard, share
        self._state = VectorsState()
        self._recorder, self._first_version = Recorder(), 0
        self._shared: tuple[Params, _Elsewhere] | None = None

    def begin(self, zero: float, versions: list[int]) -> None:
        """Count time and versions from what they are in the run."""
        self._recorder, self._first_version = Recorder(zero=zero), versions[self._shard]

    def handle(self, command: Command, row: Any = None) -> Reply | _Elsewhere:
        """Carry out a command.

        Args:
          command: see `vector_shard.handle`.
          row: the `PushRow` to write if it is an `Add` that is taken.

        Returns:
          The reply.
        """
        if isinstance(command, Put):  # a copy: what came is in memory that all share
            command = Put(command.into, jax.tree.map(jnp.array, command.values))
        self._state, reply = vector_shard.handle(self._state, command)
        if row is not None and isinstance(reply, Added) and reply.taken:
            version = self._first_version + reply.version
            row.write(self._recorder, self._shard, version)
        return self._out(reply) if isinstance(command, Get) else reply

    def settle(self) -> tuple[list[Any], int]:
        """Give the rows of pushes since the last time, and the version."""
        rows, self._recorder.rows = self._recorder.rows, []
        return rows, self._first_version + self._state.version

    def _out(self, vector: Params) -> Params | _Elsewhere:
        if sum(leaf.nbytes for leaf in jax.tree.leaves(vector)) < SMALL:
            return _to_wire(vector)
        if self._shared is None or self._shared[0] is not vector:
            there = self._share(f"shard {self._shard}'s vector", _to_wire(vector))
            self._shared = vector, _Elsewhere(there)
        return self._shared[1]


class Shards(NamedTuple):
    """Where the shards are; may be sent to other processes.

    Attributes:
      addresses: of each, `[S]`, where a `VectorHost` lives.
      timeout: seconds until one must have answered.
    """

    addresses: tuple[Address, ...]
    timeout: float

    def ask(self, commands: Mapping[int, Command], row: Any) -> Sequence[Reply]:
        """See `Vectors`; a row is written where the shard is."""
        asked = {shard: ("handle", command, row) for shard, command in commands.items()}
        return [self._here(shard, reply) for shard, reply in self._ask(asked).items()]

    def each(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every `VectorHost`; give what they return, `[S]`."""
        shards = range(len(self.addresses))
        return [*self._ask(dict.fromkeys(shards, (method, *args))).values()]

    def _ask(self, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Ask all, then wait for all.

        Raises:
          ShardError: one cannot be reached.
        """
        replies = {}
        for shard, call in calls.items():
            with blaming(shard):
                replies[shard] = self.addresses[shard].ask(*call)
        for shard, reply in replies.items():
            with blaming(shard):
                replies[shard] = reply.result(self.timeout)
        return replies

    def _here(self, shard: int, reply: Any) -> Any:
        if not isinstance(reply, _Elsewhere):
            return reply
        with blaming(shard):
            return reply.shared.get(self.timeout)


def on_processes(
    layout: Layout, shards: Shards, arrive: Callable[[Any], jax.Array]
) -> Vectors:
    """Cut vectors over shards that are processes.

    Args:
      layout: how a tree like the parameters lies on `S` shards.
      shards: where they are.
      arrive: makes an array of a read-only NumPy one, in place or a copy.

    Returns:
      `Vectors`; nothing goes out but NumPy arrays, the parts as views of the whole.
    """

    def merge(parts: tuple[Params, ...]) -> Params:
        return jax.tree.map(arrive, layout.merge(parts))

    return Vectors(
        shards.ask, lambda tree: layout.split(_to_wire(tree)), merge, layout.shards
    )


def _to_wire(tree: Params) -> Params:
    return jax.tree.map(np.asarray, tree)


@contextlib.contextmanager
def blaming(shard: int) -> Iterator[None]:
    """Raise a `ShardError` where a shard cannot be reached."""
    try:
        yield
    except (Gone, Late) as error:
        raise ShardError(
            f"shard {shard} is lost, and with it its part of the parameters and of "
            "the method's history. With a checkpoint_dir, call minimize again with "
            f"the same arguments: it goes on from the last checkpoint. ({error})"
        ) from None
