"""Who carries out a live run: threads of this process, or processes of their own."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dbjax.downpour.arguments import Arguments
from dbjax.downpour.hands import ReplicaHands
from dbjax.downpour.hosting import Start, make_kit, make_replica, make_shard
from dbjax.downpour.problem import Problem, digest
from dbjax.downpour.provenance import restore_streams, stream_state
from dbjax.runtime.base import Program
from dbjax.runtime.parcels import Held, to_wire
from dbjax.runtime.ray import Ray
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.remote import RemoteCrew, Terms
from dbjax.runtime.threads import Crew, Threads
from dbjax.server.shard import ShardState
from dbjax.trace import RESTART


class Beginning(NamedTuple):
    """Where a live run begins, or goes on.

    Attributes:
      states: of the shards; without an optimizer state where it is new.
      recorder: the Trace so far.
      batches: each replica's next minibatch.
      ids: each replica's next push.
      local: local optimizers' states, by replica.
      streams: where the data's own iterators stand; None at their beginning.
    """

    states: list[ShardState]
    recorder: Recorder
    batches: list[int]
    ids: list[int]
    local: dict[int, Any]
    streams: Any


class LocalCrew(Crew):
    """Threads of this process.

    Args:
      problem: what is trained.
      program: the algorithm.
      begin: where it begins.
      runtime: the settings.
    """

    def __init__(
        self, problem: Problem, program: Program, begin: Beginning, runtime: Threads
    ) -> None:
        self._problem, self._local = problem, begin.local
        self._made: dict[int, ReplicaHands] = {}
        states = [
            problem.shard.init(state.params) if state.optimizer_state is None else state
            for state in begin.states
        ]
        restore_streams(problem, begin.streams)
        super().__init__(
            program, self._make_hands, problem.shard, states, problem.layout.nbytes,
            runtime, digest, begin.recorder, begin.batches, begin.ids,
        )  # fmt: skip

    def collect(self) -> list[ShardState]:
        """Give the shards' states, while nothing is under way."""
        return [shard.state for shard in self.shards]

    def replica_states(self) -> tuple[dict[int, list[Any]], Any]:
        """Give leaves of local optimizers' states, and where iterators stand."""
        local = {
            replica: jax.tree.leaves(hands.local_state)
            for replica, hands in self._made.items()
            if hands.local_state is not None
        }
        return local, stream_state(self._problem, self.batches)

    def describe(self) -> dict[str, Any]:
        """What the Trace's header says of it."""
        return {}

    def peak_copies(self) -> int:
        """An estimate of the most parameter copies held at once."""
        versions = max(shard.most_versions for shard in self.shards)
        return versions + 2 * self.program.replicas * (1 + (len(self.shards) > 1))

    def _make_hands(self, replica: int) -> ReplicaHands:
        hands = self._made[replica] = ReplicaHands(self._problem, replica)
        hands.local_state = self._local.get(replica)
        return hands


class RayCrew(RemoteCrew):
    """Processes on Ray; see `RemoteCrew`."""

    def __init__(self, problem: Problem, *args: Any) -> None:
        super().__init__(*args)
        self._problem = problem

    def collect(self) -> list[ShardState]:
        """Complete the record, while nothing is under way; give the shards' states."""
        problem, states = self._problem, []
        for shard in super().collect():
            params = jax.tree.map(jnp.array, shard.params)
            shapes = jax.eval_shape(problem.optimizer.init, params)
            leaves, treedef = jax.tree.flatten(shapes)
            pairs = zip(shard.optimizer_state, leaves, strict=True)
            arrays = [jnp.array(saved, like.dtype) for saved, like in pairs]
            states.append(
                shard._replace(params=params, optimizer_state=treedef.unflatten(arrays))
            )
        return states

    def replica_states(self) -> tuple[dict[int, list[Any]], Any]:
        """Give leaves of local optimizers' states, and where iterators stand."""
        there: dict[int, Start] = self.states_of_replicas()
        local = {r: one.local for r, one in there.items() if one.local is not None}
        streams: dict[str, Any] = {}
        for replica, count in enumerate(self.batches):
            one = there.get(replica)
            if count and (one is None or one.stream is None):
                return local, None
            if one is not None and one.stream is not None:
                streams |= one.stream["streams"]
        return local, {"replicas": len(self.batches), "streams": streams}

    def describe(self) -> dict[str, Any]:
        """What the Trace's header says of it."""
        shards = self.shards
        return {
            "deaths": {"replicas": self.deaths, "shards": shards.deaths},
            "promotions": shards.promotions,
            "gaps": self.gaps,
            "replica_processes": self.terms.processes,
        }

    def peak_copies(self) -> int:
        """An estimate of the most parameter copies held at once, by all processes."""
        each = 2 + 2 * (len(self.shards) > 1)
        return 2 + len(self.batches) * self.terms.processes * each


@contextlib.contextmanager
def ray_crew(
    problem: Problem,
    arguments: Arguments,
    program: Program,
    begin: Beginning,
    runtime: Ray,
    split: str,
) -> Iterator[RayCrew]:
    """Gather processes on Ray, for as long as they are needed."""
    a, timeout = arguments, runtime.timeout
    devices = 1 if problem.placement is None else problem.placement.mesh(0).size
    if devices % runtime.replica_processes:
        raise ValueError(
            f"replica_processes={runtime.replica_processes} must divide the devices of "
            f"a replica: it has {devices}, as mesh= says"
        )
    bare = a._replace(eval_fn=None, checkpoint_dir=None)
    with runtime.session() as session:
        session.check_room(a.replicas, a.shards * (1 + runtime.standby))
        for what in ("loss_fn", "optimizer", "local_optimizer"):
            session.share(what, problem.recipe[what])  # so that it is named
        kit = session.share("the problem", make_kit(problem, split), keyed=True)
        data = session.share("data", problem.data)

        def replica_maker(replica: int, *where: Any) -> Any:
            local, streams = begin.local.get(replica), begin.streams
            stream = None
            if streams is not None and str(replica) in streams["streams"]:
                own = {str(replica): streams["streams"][str(replica)]}
                stream = {"replicas": streams["replicas"], "streams": own}
            leaves = None if local is None else to_wire(jax.tree.leaves(local))
            start = Start(leaves, stream)
            return functools.partial(
                make_replica, kit, data, bare, start, timeout, replica, *where
            )

        def shard_maker(shard: int, held: Held, zero: float) -> Any:
            there = session.share(f"shard {shard}", held)
            return functools.partial(
                make_shard, kit, a.protocol, runtime.digest_every, timeout,
                session.share_there,
                *(shard, there, zero),
            )  # fmt: skip

        every = runtime.snapshot_every
        terms = Terms(
            make_replica=replica_maker,
            make_shard=shard_maker,
            devices=devices,
            processes=runtime.replica_processes,
            standby=bool(runtime.standby),
            snapshot_every=max(1, a.steps // 10) if every is None else every,
            timeout=timeout,
            replicas_at=runtime.replicas_at,
            watch=runtime.watch,
            watch_every=runtime.watch_every,
        )
        held = [
            Held(
                to_wire(state.params),
                None if state.optimizer_state is None
                else to_wire(jax.tree.leaves(state.optimizer_state)),
                state.version,
                state.incarnation,
                origins=tuple(_origins(begin.recorder, shard)),
            )
            for shard, state in enumerate(begin.states)
        ]  # fmt: skip
        crew = RayCrew(
            *(problem, program, session, terms, held),
            *(begin.recorder, begin.batches, begin.ids),
        )
        with crew.open():
            yield crew


def _origins(recorder: Recorder, shard: int) -> list[int]:
    """The versions that a shard's incarnations 1, 2, ... began from."""
    kind, of, version = (COLUMNS.index(name) for name in ("kind", "shard", "version"))
    rows = [row for row in recorder.rows if row[kind] == RESTART and row[of] == shard]
    return [row[version] for row in rows]
