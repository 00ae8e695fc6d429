"""A shard in a process of its own, perhaps with a standby that handles all it does."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dbjax.loss import all_finite
from dbjax.runtime.parcels import FENCED, Answer, Held, Parcel, to_wire
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.transport import Address, Deposed, Gone, Late, Reply, Shared
from dbjax.server.shard import Shard, ShardState
from dbjax.trace import DROPPED, NOT_FINITE, PUSH, TAKEN
from dbjax.trace.history import missed, missed_taken
from dbjax.typing import Params

MOST_NEWS = 64
"""Rows that one answer holds at most."""

_TIME, _VERSION = COLUMNS.index("time"), COLUMNS.index("version")


class ShardHost:
    """Handles parcels one at a time; what is fetched meanwhile is the version before.

    A version shows when it is made and, with a standby, when that has made it too: so
    whatever anybody has seen is not lost with one process.

    Args:
      index: which shard.
      shard: its functions.
      held: what it begins with.
      takes: the protocol's `takes(clocks, replica, missed)`.
      digest: checksum of its parameters.
      digest_every: every so many versions they are checksummed; 0 for never.
      zero: when the run began.
      share: puts a value where all processes can read it.
      timeout: seconds until the standby must have answered.
    """

    def __init__(
        self,
        index: int,
        shard: Shard,
        held: Held,
        takes: Callable[[Any, int, int], bool],
        digest: Callable[[Params], int],
        digest_every: int,
        zero: float,
        share: Callable[[str, Any], Shared],
        timeout: float,
    ) -> None:
        self._index, self._shard, self._takes = index, shard, takes
        self._digest, self._every, self._share = digest, digest_every, share
        self._timeout = timeout
        self._recorder = Recorder(zero=zero)
        self._standby: Address | None = None
        self._forsaken: list[Address] = []
        self._news_of_standby = threading.Condition()
        # A version must not be written over between being chosen and being looked at.
        self._looking = threading.Lock()
        self._spare: Params = None
        self._published: Answer | None = None
        self._lives: dict[int, int] = {}
        self._heard: dict[tuple[int, int], int] = {}  # rows that a life knows of
        self._follows = False
        self._load(held)

    # One at a time.

    def push(self, parcel: Parcel) -> Answer:
        """Handle a push, once however often it comes.

        Raises:
          ValueError: its gradients are not what this shard holds.
        """
        message, arrived = parcel.push, self._recorder.now()
        if self._follows or parcel.life < self._lives.get(message.replica, 0):
            return Answer(self._state.version, self._state.incarnation, FENCED)
        _, last, version, status = self._handled.get(message.replica, (0, -1, 0, 0))
        if message.id > last:
            self._check(message.gradients if message.taken else None, message.replica)
            parcel, status = self._judge(parcel)
            self._handle(parcel, status, arrived)
            version = self._state.version
        rows = self._news((message.replica, parcel.life))
        answer = Answer(version, self._state.incarnation, status, rows=rows)
        if not parcel.fetches:
            return answer
        seen, params = self._look()
        return answer._replace(version=seen.version, params=params)

    def settle(self, parcels: list[Parcel]) -> None:
        """Count pushes that reached others, but not this shard, as dropped.

        Their gradients were lost with the replica.
        """
        for parcel in parcels:
            message = parcel.push
            if message.id > self._handled.get(message.replica, (0, -1))[1]:
                base, origin = parcel.bases[self._index]  # it came from another shard
                message = message._replace(taken=False, base=base, origin=origin)
                now = self._recorder.now()
                self._handle(parcel._replace(push=message), DROPPED, now)

    def fence(self, replica: int, life: int) -> list[Parcel]:
        """Take nothing more from a replica's life, or those before it.

        Returns:
          Its pushes that have not been forgotten, without their gradients.
        """
        self._lives[replica] = life + 1
        return [p for p in self._parcels.values() if p.push.replica == replica]

    def forget(self, version: int) -> None:
        """What it has noted up to a version is known elsewhere."""
        self._log = [row for row in self._log if row[_VERSION] > version]
        self._digests = [one for one in self._digests if one[1] > version]
        self._parcels = {v: p for v, p in self._parcels.items() if v > version}
        if self._standby is not None:
            self._standby.ask("forget", version)

    def held(self) -> Held:
        """Give all it holds."""
        state = self._state
        return Held(
            to_wire(state.params),
            to_wire(jax.tree.leaves(state.optimizer_state)),
            *(state.version, state.incarnation, dict(self._handled)),
            *(tuple(self._log), tuple(self._digests), self._origins),
            tuple(self._dropped),
        )

    def adopt(self, standby: Address) -> None:
        """Have another process handle all that this one handles from now on."""
        standby.ask("follow", self.held(), self._parcels).result(self._timeout)
        self._standby = standby

    # As a standby.

    def follow(self, held: Held, parcels: dict[int, Parcel]) -> None:
        """Be what another shard is, and refuse whatever does not come from it."""
        self._load(held)
        self._parcels, self._follows = dict(parcels), True

    def repeat(self, parcel: Parcel, status: int, row: list[Any]) -> None:
        """Handle what the other handles."""
        if not self._follows:
            raise Deposed(f"shard {self._index}: its standby has taken its place")
        self._apply(parcel, status)
        self._note(parcel, status, row)

    def promote(self, lives: dict[int, int]) -> bool:
        """Take the other's place; say whether this one has followed it.

        `lives`: of each replica that began again, the first life that is not fenced.
        """
        followed, self._follows = self._follows, False
        self._lives.update(lives)
        return followed

    # Beside these.

    def alive_and_well(self) -> None:
        """Answer."""

    def forsake(self, standby: Address) -> None:
        """A standby is gone: go on alone. Only the driver knows which of two is."""
        with self._news_of_standby:
            self._forsaken.append(standby)
            self._news_of_standby.notify_all()

    def fetch(self, who: tuple[int, int] | None = None) -> Answer:
        """Give the newest version that shows, by a reference that many may use.

        `who`: the replica and its life that ask, if they are to hear of pushes, too.
        """
        answer, seen = self._published, self._seen
        if answer is None or answer.version != seen.version:
            seen, params = self._look()
            shared = self._share(f"shard {self._index}", params)
            answer = Answer(seen.version, seen.incarnation, params=shared)
            self._published = answer
        return answer if who is None else answer._replace(rows=self._news(who))

    def _news(self, who: tuple[int, int]) -> tuple[Any, ...]:
        """Give the rows that a replica has not heard of, the newest if there are many.

        Not all may be needed: those that others have acknowledged are known.
        """
        with self._looking:
            end = self._logged
            since, self._heard[who] = self._heard.get(who, 0), end
            new = min(end - since, len(self._log), MOST_NEWS)
            return tuple(self._log[len(self._log) - new :])

    def _look(self) -> tuple[ShardState, Params]:
        """Give what shows, and views of it, which keep it from being written over."""
        with self._looking:
            return self._seen, to_wire(self._seen.params)

    def _load(self, held: Held) -> None:
        params = jax.tree.map(lambda x: jax.numpy.array(x), held.params)
        state = self._shard.init(params)
        if held.optimizer_state is not None:
            leaves, treedef = jax.tree.flatten(state.optimizer_state)
            pairs = zip(held.optimizer_state, leaves, strict=True)
            arrays = [jax.numpy.array(saved, like.dtype) for saved, like in pairs]
            state = state._replace(optimizer_state=treedef.unflatten(arrays))
        self._state = state._replace(version=held.version, incarnation=held.incarnation)
        self._seen = self._state
        self._handled, self._origins = dict(held.handled), held.origins
        self._dropped = list(held.dropped)
        self._log, self._digests = list(held.log), list(held.digests)
        self._logged = len(self._log)  # of which nobody has heard from this process
        self._parcels: dict[int, Parcel] = {}  # by the version that they made
        self._shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)

    def _check(self, gradients: Params, replica: int) -> None:
        if gradients is None:
            return
        got = jax.tree.map(lambda x: (x.shape, x.dtype), gradients)
        if got != self._shapes:
            raise ValueError(
                f"replica {replica} sent shard {self._index} gradients of other shapes "
                f"or dtypes than its parameters: {got}, not {self._shapes}"
            )

    def _judge(self, parcel: Parcel) -> tuple[Parcel, int]:
        """Give a push its status."""
        message = parcel.push
        if not message.taken:
            return parcel, NOT_FINITE
        if not bool(_finite(message.gradients)):
            status = NOT_FINITE
        elif not self._takes(parcel.clocks, message.replica, self._updates(parcel)):
            status = DROPPED
        else:
            return parcel, TAKEN
        return parcel._replace(push=message._replace(taken=False)), status

    def _missed(self, parcel: Parcel) -> int:
        push, version = parcel.push, self._state.version
        return missed(version, push.base, push.origin, self._origins)

    def _updates(self, parcel: Parcel) -> int:
        return missed_taken(self._state.version, self._missed(parcel), self._dropped)

    def _handle(self, parcel: Parcel, status: int, arrived: float) -> None:
        message, version = parcel.push, self._state.version + 1
        row = self._recorder.make_row(
            PUSH, message.replica, arrived, shard=self._index, step=message.step,
            version=version, base=message.base, count=parcel.count, status=status,
            nbytes=self._bytes, id_=message.id, incarnation=self._state.incarnation,
        )  # fmt: skip
        reply = None
        if self._standby is not None:
            reply = self._standby.ask("repeat", parcel, status, row)
        self._apply(parcel, status)
        if reply is not None:
            self._await(reply)
        row[_TIME] = self._recorder.now()
        self._note(parcel, status, row)

    def _apply(self, parcel: Parcel, status: int) -> None:
        """Make the next version."""
        message, state = parcel.push, self._state
        message = message._replace(taken=message.taken and status == TAKEN)
        if message.taken:
            message = message._replace(base=state.version - self._missed(parcel))
        with self._looking:
            self._state, _ = self._shard.handle(state, message, spare=self._spare)
        if message.taken:
            jax.block_until_ready(self._state.params)
            self._spare = state.params

    def _note(self, parcel: Parcel, status: int, row: list[Any]) -> None:
        """Let the version show, and remember whose it was."""
        state, message = self._state, parcel.push
        self._handled[message.replica] = parcel.life, message.id, state.version, status
        if status == DROPPED:
            self._dropped.append(state.version)
        with self._looking:  # nobody sees a version without its row
            self._log.append(row)
            self._logged += 1
            self._seen = state
        light = message._replace(gradients=None, stale_params=None)
        self._parcels[state.version] = parcel._replace(push=light, clocks=None)
        if self._every and state.version % self._every == 0:
            digest = self._digest(state.params)
            self._digests.append((self._index, state.version, digest))

    def _await(self, reply: Reply) -> None:
        """Wait for the standby; where it is gone, until the driver says so too."""
        try:
            reply.result(self._timeout)
        except Deposed:
            raise
        except Gone:
            with self._news_of_standby:
                told = self._news_of_standby.wait_for(
                    lambda: self._standby in self._forsaken, self._timeout
                )
            if not told:
                raise Late(
                    f"shard {self._index}: its standby is gone, and the driver has not "
                    f"said what next for {self._timeout:g} s"
                ) from None
            self._standby = None

    @functools.cached_property
    def _bytes(self) -> int:
        return sum(np.asarray(x).nbytes for x in jax.tree.leaves(self._state.params))


_finite = jax.jit(all_finite)
