"""The driver's view of the shards: where they live, their standbys, their deaths."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from dbjax.runtime.live_shard import Snapshot
from dbjax.runtime.parcels import Answer, Held
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.transport import SIDE, WORK, Address, Gone, Late, Reply, Transport
from dbjax.server.shard import ShardState
from dbjax.trace import FAIL, RESTART

_AT = {name: place for place, name in enumerate(COLUMNS)}


MOST_FAILURES = 5
"""So many processes in a row that cannot be started end a run."""


class Asked(NamedTuple):
    """A reply under way, and who was asked."""

    address: Address
    reply: Reply


class Loss(NamedTuple):
    """A shard that was restored from a copy.

    Attributes:
      shard: which.
      version: that of the copy.
      rows: FAIL and RESTART, of the Trace.
    """

    shard: int
    version: int
    rows: tuple[Any, ...]


class RemoteShards:
    """Shards as processes; replaces those that die.

    Args:
      transport: starts processes.
      make: `make(shard, held)` gives what makes a `ShardHost` in its process.
      begin: what each shard begins with.
      standby: whether each has one.
      timeout: seconds until one must have answered.
      recorder: for the clock.
      post: has a function called by the driver's thread.
      moved: told `(shard, address)` when one has moved.
    """

    def __init__(
        self,
        transport: Transport,
        make: Callable[[int, Held], Callable[[], Any]],
        begin: list[Held],
        standby: bool,
        timeout: float,
        recorder: Recorder,
        post: Callable[[Callable[[], Any]], None],
        moved: Callable[[int, Address], None],
    ) -> None:
        self._transport, self._make, self._timeout = transport, make, timeout
        self._wants_standby, self._recorder = standby, recorder
        self._post, self._moved = post, moved
        self._copies = list(begin)
        self._homes: list[Address] = []
        self._standbys: list[Address | None] = [None] * len(begin)
        self._coming: list[Address | None] = [None] * len(begin)
        self._failures = [0] * len(begin)
        self._held_back: list[list[Callable[[], None]]] = [[] for _ in begin]
        self._change = threading.Condition()
        self.moving: set[int] = set()
        self.lives: dict[int, int] = {}
        self.losses: list[Loss] = []
        self.promotions = self.deaths = 0
        self._newest = [held.version for held in begin]
        self._incarnations = [held.incarnation for held in begin]
        self._acknowledged: dict[tuple[int, int], int] = {}
        self._known: list[dict[tuple[int, int], Any]] = [{} for _ in begin]
        self._merged = [(-1, -1)] * len(begin)  # the last of those that were given
        self._pinged: list[float | None] = [None] * len(begin)
        self._ended = False

    def __len__(self) -> int:
        """Count them."""
        return len(self._copies)

    # In the thread of whoever runs.

    def start(self) -> None:
        """Start all, and wait until they are there, with their standbys."""
        hosted = [self._host(s, self._copies[s]) for s in range(len(self))]
        for shard, (address, reply) in enumerate(hosted):
            while True:
                try:
                    reply.result(self._timeout)
                    break
                except Gone:
                    address, reply = self._host_again(shard)
            self._homes.append(address)
        for shard, address in enumerate(self._homes):
            self._watch(shard, address)
        if not self._wants_standby:
            return
        with self._change:
            self._post(lambda: [self._find_standby(s) for s in range(len(self))])
            if not self._change.wait_for(lambda: all(self._standbys), self._timeout):
                missing = [s for s, one in enumerate(self._standbys) if one is None]
                raise Late(f"the standbys of shards {missing} have not come")

    def end(self) -> None:
        """Let all go."""
        self._ended = True
        for address in [*self._homes, *self._standbys, *self._coming]:
            if address is not None:
                self._transport.end(address)
        self._homes = []

    def addresses(self) -> tuple[Address, ...]:
        """Where they live now."""
        with self._change:
            return tuple(self._homes)

    def ask_all_to_show(self) -> list[Asked]:
        """Ask for the newest versions of all."""
        return [Asked(a, a.ask("fetch", lane=SIDE)) for a in self.addresses()]

    def snapshot(self, step: int, now: float, all_asked: list[Asked]) -> Snapshot:
        """Wait for the newest versions that all were asked for."""
        states = []
        for shard, asked in enumerate(all_asked):
            answer = self._patiently(shard, asked, "fetch", SIDE, self._with_params)
            states.append(ShardState(answer.params, None, answer.version))
        return Snapshot(step, now, tuple(states), lambda: None)

    def collect(self) -> list[Held]:
        """Give all they hold, while no push is under way."""
        asked = [Asked(a, a.ask("held")) for a in self.addresses()]
        return [self._patiently(s, one, "held") for s, one in enumerate(asked)]

    def are_still(self, held: list[Held]) -> bool:
        """Whether none has lost anything since it gave what it holds; then keep that.

        In the driver's thread.
        """
        for one in held:
            for row in one.log:
                self._know(row)
        if self.moving or [one.incarnation for one in held] != self._incarnations:
            return False
        self._copies = [one._replace(log=(), digests=()) for one in held]
        for home, one in zip(self._homes, held, strict=True):
            home.ask("forget", one.version)
        return True

    def lines(self) -> list[list[Any]]:
        """Give each shard's rows in its order, and forget them."""
        lines = []
        for shard, known in enumerate(self._known):
            line = [known[key] for key in sorted(known)]
            self._merged[shard] = max(known, default=self._merged[shard])
            for loss in self.losses:
                if loss.shard == shard and loss.rows:
                    incarnation = loss.rows[1][_AT["incarnation"]]
                    # Some of what was lost may have been heard of later.
                    newest = max(
                        (v for i, v in known if i == incarnation - 1), default=0
                    )
                    lost = max(loss.rows[0][_AT["count"]], newest - loss.version)
                    loss.rows[0][_AT["count"]] = lost
                    at = sum(row[_AT["incarnation"]] < incarnation for row in line)
                    line[at:at] = loss.rows
            lines.append(line)
        self._known = [{} for _ in self._known]
        self.losses = [loss._replace(rows=()) for loss in self.losses]
        return lines

    def _with_params(self, answer: Answer) -> Answer:
        return answer._replace(params=answer.params.get(self._timeout))

    def _patiently(
        self,
        shard: int,
        asked: Asked,
        method: str,
        lane: str = WORK,
        finish: Callable[[Any], Any] = lambda answer: answer,
    ) -> Any:
        """Wait for an answer; ask again where the shard has moved meanwhile."""
        while True:
            try:
                return finish(asked.reply.result(self._timeout))
            except Gone:
                pass
            before = asked.address
            with self._change:
                there = self._change.wait_for(
                    lambda before=before: (
                        self._homes[shard] is not before and shard not in self.moving
                    ),
                    self._timeout,
                )
                home = self._homes[shard]
            if not there:
                raise Late(f"shard {shard} has not come back for {self._timeout:g} s")
            asked = Asked(home, home.ask(method, lane=lane))

    # In the driver's thread.

    def ask(
        self, calls: dict[int, tuple[str, tuple[Any, ...]]], then: Callable[..., None]
    ) -> None:
        """Ask some shards, however often they move; `then({shard: answer})`."""
        answers: dict[int, Any] = {}
        if not calls:
            then(answers)

        def send(shard: int) -> None:
            method, args = calls[shard]
            if shard in self.moving:
                self._held_back[shard].append(lambda: send(shard))
                return
            home = self._homes[shard]
            self._when(home.ask(method, *args), lambda reply: got(shard, home, reply))

        def got(shard: int, home: Address, reply: Reply) -> None:
            try:
                answers[shard] = reply.result(self._timeout)
            except Gone:
                if self._homes[shard] is home:  # of whose death is yet to be heard
                    self._held_back[shard].append(lambda: send(shard))
                else:
                    send(shard)
                return
            if len(answers) == len(calls):
                then(answers)

        for shard in calls:
            send(shard)

    def look_for_the_silent(self, now: float) -> None:
        """Replace shards that have not answered for half of the time others wait."""
        for shard, home in enumerate(self._homes):
            pinged = self._pinged[shard]
            if pinged is None:
                self._pinged[shard] = now
                self._when(home.ask("alive_and_well", lane=SIDE), self._well(shard))
            elif now - pinged > self._timeout / 2 and shard not in self.moving:
                self._pinged[shard] = None
                self._transport.kill(home)
                self._died(shard, home)

    def _well(self, shard: int) -> Callable[[Reply], None]:
        def well(reply: Reply) -> None:
            self._pinged[shard] = None

        return well

    def copy(self) -> None:
        """Have each shard copied, to be restored from if it dies."""

        def keep(shard: int, reply: Reply) -> None:
            try:
                held = reply.result(self._timeout)
            except (Gone, Late):
                return
            if held.incarnation == self._incarnations[shard]:
                self._copies[shard] = held

        if self._wants_standby:
            return
        for shard, home in enumerate(self._homes):
            self._when(home.ask("held"), lambda reply, shard=shard: keep(shard, reply))

    def heard(self, row: Any) -> bool:
        """Take note of a push that was handled; whether it is news."""
        shard, replica = row[_AT["shard"]], row[_AT["replica"]]
        key = replica, shard
        self._acknowledged[key] = max(self._acknowledged.get(key, -1), row[_AT["id"]])
        if row[_AT["incarnation"]] == self._incarnations[shard]:
            self._newest[shard] = max(self._newest[shard], row[_AT["version"]])
        return self._know(row)

    def _know(self, row: Any) -> bool:
        key = row[_AT["incarnation"]], row[_AT["version"]]
        known = self._known[row[_AT["shard"]]]
        new = key not in known and key > self._merged[row[_AT["shard"]]]
        if new:
            known[key] = row
        return new

    def acknowledged(self, replica: int) -> list[int]:
        """By shard: the last push of a replica that is known to be handled."""
        return [self._acknowledged.get((replica, s), -1) for s in range(len(self))]

    def _host(
        self, shard: int, held: Held, away: bool = False
    ) -> tuple[Address, Reply]:
        name = f"shard {shard}" + (" (standby)" if away else "")
        home = self._homes[shard] if away else None
        make = self._make(shard, held)
        return self._transport.host(name, make, kind="shard", away_from=home)

    def _watch(self, shard: int, address: Address) -> None:
        def told(reply: Reply) -> None:
            try:
                reply.result(self._timeout)
            except Gone:
                self._died(shard, address)
            else:  # somebody who had it before has let it go
                if address in (self._homes[shard], self._standbys[shard]):
                    self._watch(shard, address)

        if not self._ended:
            self._when(address.ask("alive", lane=SIDE), told)

    def _died(self, shard: int, address: Address) -> None:
        if self._ended:
            return
        if address is self._standbys[shard]:
            self.deaths += 1
            self._standbys[shard] = None
            self._homes[shard].ask("forsake", address, lane=SIDE)
            self._find_standby(shard)
        elif address is self._homes[shard] and shard not in self.moving:
            self.deaths += 1
            with self._change:
                self.moving.add(shard)
            # One that was to be adopted may have been.
            standby = self._standbys[shard] or self._coming[shard]
            self._standbys[shard] = self._coming[shard] = None
            if standby is not None:
                self._promote(shard, standby)
            else:
                self._restore(shard)

    def _promote(self, shard: int, address: Address, restored: bool = False) -> None:
        """Let a process take a shard's place."""

        def promoted(reply: Reply) -> None:
            try:
                followed = reply.result(self._timeout)
            except (Gone, Late):  # that one, too
                followed = None
            if followed is None or not (followed or restored):
                self._transport.kill(address)
                self._restore(shard)
                return
            self.promotions += not restored
            self._failures[shard] = 0
            with self._change:
                self._homes[shard] = address
                self.moving.discard(shard)
                self._change.notify_all()
            self._watch(shard, address)  # anew: it may have died before it was home
            self._moved(shard, address)
            held_back, self._held_back[shard] = self._held_back[shard], []
            for send in held_back:
                send()
            if self._wants_standby:
                self._find_standby(shard)

        self._when(address.ask("promote", dict(self.lives)), promoted)

    def _restore(self, shard: int) -> None:
        """Make a shard anew from its copy; say how many updates that loses."""
        copy = self._copies[shard]
        incarnation = self._incarnations[shard] = self._incarnations[shard] + 1
        lost = max(0, self._newest[shard] - copy.version)
        self._newest[shard] = copy.version
        rows = tuple(
            self._recorder.make_row(
                kind, -1, shard=shard, version=copy.version, count=count,
                incarnation=incarnation,
            )
            for kind, count in ((FAIL, lost), (RESTART, 0))
        )  # fmt: skip
        self.losses.append(Loss(shard, copy.version, rows))
        held = copy._replace(
            incarnation=incarnation, origins=(*copy.origins, copy.version)
        )
        self._copies[shard] = held
        address, reply = self._host(shard, held)

        def there(reply: Reply) -> None:
            try:
                reply.result(self._timeout)
            except (Gone, Late):
                self._count_failure(shard)
                self._restore(shard)
                return
            self._promote(shard, address, restored=True)

        self._when(reply, there)

    def _find_standby(self, shard: int) -> None:
        """Start another standby, and let the shard adopt it."""
        if self._ended or shard in self.moving:
            return
        address, reply = self._host(shard, self._copies[shard], away=True)
        self._coming[shard] = address

        def there(reply: Reply) -> None:
            try:
                reply.result(self._timeout)
            except (Gone, Late):
                again()
                return
            if self._coming[shard] is address:
                home = self._homes[shard]
                self._when(home.ask("adopt", address), adopted)

        def adopted(reply: Reply) -> None:
            try:
                reply.result(self._timeout)
            except (Gone, Late):
                again()
                return
            if self._coming[shard] is address:
                with self._change:
                    self._coming[shard], self._standbys[shard] = None, address
                    self._failures[shard] = 0
                    self._change.notify_all()
                self._watch(shard, address)

        def again() -> None:
            if self._coming[shard] is not address:
                return  # it has taken the shard's place
            self._coming[shard] = None
            self._transport.kill(address)
            self._count_failure(shard)
            self._find_standby(shard)

        self._when(reply, there)

    def _host_again(self, shard: int) -> tuple[Address, Reply]:
        self._count_failure(shard)
        return self._host(shard, self._copies[shard])

    def _count_failure(self, shard: int) -> None:
        self.deaths += 1
        self._failures[shard] += 1
        if self._failures[shard] >= MOST_FAILURES:
            raise RuntimeError(
                f"shard {shard} could not be started, {MOST_FAILURES} times in a row"
            )

    def _when(self, reply: Reply, call: Callable[[Reply], None]) -> None:
        """Have `call(reply)` called by the driver's thread when the reply is there."""
        reply.then(lambda reply: self._post(lambda: call(reply)))
