"""Where replicas stand in their minibatches: what protocols look at.

Rounds are each replica's own, or shared by all where a protocol has backups.
"""

from typing import Any


class _Counts:
    """A count for each live replica, and the least of them."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.least = 0
        self._at: dict[int, int] = {}  # count -> how many live replicas are at it

    def put(self, replica: int, count: int) -> None:
        if count < self.least or not self._at:
            self.least = count
        self._at[count] = self._at.get(count, 0) + 1
        before = self.of.get(replica)
        self.of[replica] = count
        if before is not None:
            self._drop(before)

    def remove(self, replica: int) -> None:
        self._drop(self.of.pop(replica))

    def _drop(self, count: int) -> None:
        left = self._at[count] - 1
        if left:
            self._at[count] = left
            return
        del self._at[count]
        if count == self.least and self._at:
            self.least = min(self._at)


class Clocks:
    """How many minibatches each live replica has begun and finished.

    One is begun when the replica has the parameters for it, and finished when its push
    is handled. What is begun is kept only for protocols with a `may_push`.

    Attributes:
      rounds: how many are finished, by replica.
      begun: how many are begun, by replica: as many, or one more.

    >>> clocks = Clocks()
    >>> clocks.enter(0), clocks.enter(1), clocks.begin(1), clocks.tick(1)
    (None, None, None, None)
    >>> clocks.rounds, clocks.slowest, clocks.begun, clocks.last
    ({0: 0, 1: 1}, 0, {0: 0, 1: 1}, 0)
    """

    def __init__(self) -> None:
        self._rounds, self._begun = _Counts(), _Counts()
        self.rounds, self.begun = self._rounds.of, self._begun.of
        self._closed = 0  # rounds that a push was sent in: it is too late to join them

    @property
    def slowest(self) -> int:
        """The least of `rounds`; it stays where nobody is left."""
        return self._rounds.least

    @property
    def last(self) -> int:
        """The least of `begun`."""
        return self._begun.least

    @property
    def begins_on(self) -> Any:
        """What `may_begin` of a `by_slowest` protocol looks at."""
        return self.slowest

    @property
    def pushes_on(self) -> Any:
        """What `may_push` of such a protocol looks at."""
        return self.last

    def enter(self, replica: int) -> None:
        """A replica joins, or comes back, at the slowest's round if it is open yet."""
        round_ = max(self.slowest, self._closed)
        self._rounds.put(replica, round_)
        self._begun.put(replica, round_)

    def take_part(self, replica: int) -> None:
        """A replica has a ticket for its next minibatch."""

    def begin(self, replica: int) -> None:
        """A replica has the parameters for its next minibatch."""
        self._begun.put(replica, self.rounds[replica] + 1)

    def push(self, replica: int) -> None:
        """A replica sends its push: whoever joins from now on is in a later round."""
        self._closed = max(self._closed, self.begun[replica])

    def tick(self, replica: int) -> None:
        """A replica has finished a minibatch."""
        self._rounds.put(replica, self.rounds[replica] + 1)

    def is_awaited(self, replica: int) -> bool:
        """Whether others have begun a round, and may wait for it to begin that, too."""
        begun = self.begun
        return replica in begun and begun[replica] < max(begun.values())

    def leave(self, replica: int) -> None:
        """A replica is gone: nobody waits for it any more."""
        self._rounds.remove(replica)
        self._begun.remove(replica)


class SharedRounds(Clocks):
    """Rounds that are over when all live replicas but some backups have pushed.

    Whoever comes later is late: its minibatch is of a round that needs it no more. A
    round is open to whoever asks until its first push, which is not sent before there
    are members enough and all of them have the parameters.

    Args:
      backups: how many replicas need not push.

    Attributes:
      round: how many rounds are over.
      late: replicas whose minibatch under way is needed no more.

    >>> clocks = SharedRounds(backups=1)
    >>> for replica in (0, 1, 2):
    ...     clocks.enter(replica), clocks.take_part(replica), clocks.begin(replica)
    (None, None, None)
    (None, None, None)
    (None, None, None)
    >>> clocks.push(2), clocks.push(0), clocks.push(1), clocks.late
    (None, None, None, {1})
    >>> clocks.tick(0), clocks.tick(2), clocks.round
    (None, None, 1)
    """

    def __init__(self, backups: int) -> None:
        super().__init__()
        self.round, self.late = 0, set[int]()
        self._backups = backups
        self._part: dict[int, int] = {}  # the last round that each has taken part in
        # Of this round's members whose minibatch is not finished: all of them, those
        # without parameters yet, those whose push is on its way in time.
        self._members, self._fetching = set[int](), set[int]()
        self._in_time = set[int]()
        self._pushed = 0
        self._needed: int | None = None  # pushes, since the round is closed
        self._changes, self._seen = 0, (0, True, False)

    @property
    def begins_on(self) -> Any:
        """See `Clocks.begins_on`."""
        return self._changes

    @property
    def pushes_on(self) -> Any:
        """See `Clocks.pushes_on`."""
        return self._changes

    def enter(self, replica: int) -> None:
        """See `Clocks.enter`."""
        super().enter(replica)
        self._look()

    def may_begin(self, replica: int) -> bool:
        """Whether a replica may take part in this round."""
        return self._needed is None and self._part.get(replica, -1) < self.round

    def may_push(self, replica: int) -> bool:
        """Whether a replica's push may be sent, in time or late."""
        return replica in self.late or self._needed is not None or self._is_complete

    def take_part(self, replica: int) -> None:
        """See `Clocks.take_part`."""
        self._part[replica] = self.round
        self._members.add(replica)
        self._fetching.add(replica)
        self._look()

    def begin(self, replica: int) -> None:
        """See `Clocks.begin`."""
        super().begin(replica)
        self._fetching.discard(replica)
        self._look()

    def push(self, replica: int) -> None:
        """See `Clocks.push`; the first one closes the round."""
        super().push(replica)
        if replica not in self._members:
            return
        if self._needed is None:
            self._needed = self._quorum
        if self._pushed + len(self._in_time) < self._needed:
            self._in_time.add(replica)
        else:
            self.late.add(replica)
        self._look()

    def tick(self, replica: int) -> None:
        """See `Clocks.tick`."""
        super().tick(replica)
        self._pushed += replica in self._in_time
        self._drop(replica)

    def is_awaited(self, replica: int) -> bool:
        """See `Clocks.is_awaited`: the round needs more members."""
        waits = bool(self._members) and not self._is_complete
        return waits and replica in self.rounds and self.may_begin(replica)

    def leave(self, replica: int) -> None:
        """See `Clocks.leave`; a round needs fewer pushes from then on."""
        super().leave(replica)
        self._part.pop(replica, None)
        self._drop(replica)

    @property
    def _quorum(self) -> int:
        return max(1, len(self.rounds) - self._backups)

    @property
    def _is_complete(self) -> bool:
        return not self._fetching and len(self._members) >= self._quorum

    def _drop(self, replica: int) -> None:
        for some in (self._members, self._fetching, self._in_time, self.late):
            some.discard(replica)
        if self._needed is not None:
            self._end_if_over(self._needed)
        self._look()

    def _end_if_over(self, needed: int) -> None:
        enough = self._pushed >= min(needed, self._quorum) and not self._in_time
        if self._members and not enough:
            return
        self.round += 1
        self.late |= self._members
        self._members = set()
        self._pushed, self._needed = 0, None

    def _look(self) -> None:
        """Count the changes to what replicas wait for: it may come back to the same."""
        now = self.round, self._needed is None, self._is_complete
        if now != self._seen:
            self._seen, self._changes = now, self._changes + 1
