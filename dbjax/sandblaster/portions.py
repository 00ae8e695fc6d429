"""The coordinator's handing out of portions: a state machine without thread or clock.

**Handing out.** Each replica has a contiguous range of portions of its own, so that it
sees the same examples in every evaluation and knows what to prefetch. When its range is
empty it takes what dead replicas gave back, then the upper half of the range with most
left, and when nothing is left a backup copy of an overdue portion, if there is one;
else it waits until there is.

**What is overdue.** Whoever computes a copy that is not needed is late for the next
evaluation, so copies are for stragglers. There is no clock, but everyone finishes one
portion while `R` are finished by all. Those outstanding for longest first, a portion is
overdue when `R + outstanding / 2` were finished since it was handed out; or when it is
among the last `R / 20`, as then hardly anybody is left to tell the time by. A second
copy, which is to rescue a slow first one, waits until more than twice as many were
finished since the first as are still outstanding: most first copies have won by then.
`R` is the number of replicas present, or of portions if those are fewer.

**Why every portion counts exactly once.** What a shard has added cannot be told apart
again, so it is decided *before* anything is added who may add it:

1. A finished gradient is not added to the replica's accrued sum but reported. The
   coordinator says `Keep` to the first who reports a portion and `Drop` to all others.
   So at any time at most one living replica holds a portion in its sum, and a sum never
   holds a loser: nothing ever has to be subtracted.
2. A sum is sent when the coordinator says `Push`, who notes what is in it. Its portions
   count when all shards have added it. Shards add a push at most once, by its id.
3. A dead replica is first fenced: each shard promises to take nothing more from that
   life, and says which pushes it has added. Only then do its portions go back: those
   it computed, those in its unsent sum, and those in pushes that no shard has added.
   Suspecting a living replica is therefore safe: it is told to forget.
4. A push that some shards have added and others have not is repaired: its portions are
   computed again and pushed, each alone, to the shards that lack them.

Not handled here: a shard that loses what it has added. Links are taken to keep the
order of their messages, and what is sent to a former life of a replica to be lost.

Sums are sent every `push_every` portions; sooner where nothing is left to hand out, or
where the portion at hand gets a backup copy, as then its replica may be slow or gone,
and what it holds should not wait for it. Source: the paper, section 4.2; its pseudocode
(appendix, 1.2) counts portions as they are handed out and knows no copies.
"""

import bisect
import copy
import heapq
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from dbjax.sandblaster.messages import (
    Compute,
    Died,
    Done,
    Drop,
    Finished,
    Forget,
    Joined,
    Keep,
    Push,
    Pushed,
)

Message = Joined | Finished | Pushed | Died
Order = Compute | Keep | Drop | Push | Forget | Done

_AWAY, _IDLE, _BUSY = range(3)

LAST = 20
"""When one portion in so many is outstanding, all that are may have a backup."""


class PortionsInfo(NamedTuple):
    """What was done beyond computing each portion once, over all evaluations.

    Attributes:
      pushes: sums that replicas were told to send.
      steals: ranges cut in two for a replica whose own was empty.
      backups: copies handed out of portions that were outstanding.
      dropped: finished gradients that were ignored.
      returned: portions given back by the dead.
      repaired: those of them that only some shards lacked.
    """

    pushes: int = 0
    steals: int = 0
    backups: int = 0
    dropped: int = 0
    returned: int = 0
    repaired: int = 0


class Portions:
    """Hands out the portions of a batch, evaluation after evaluation.

    `begin` and `handle` give orders, which are carried out in order; `save` gives the
    whole state as plain values between any two messages, `restore` goes on from there.

    Args:
      portions: how many portions the batch has, unless `begin` says otherwise.
      replicas: how many replicas there may be; all are away until they have joined.
      shards: how many shards a push goes to.
      push_every: portions summed before a push.
      copies: how many replicas may compute one portion at the same time; 1: no backups.
      steal: whether a replica may go on outside its own range; without it and without
        copies this is the static splitting in `replicas` equal parts.

    Attributes:
      evaluation: the evaluation under way, or the last one; -1 before the first.
      counted: portions that count in it.
      info: what else was done.

    Raises:
      ValueError: an argument is below 1.

    >>> portions = Portions(portions=2, replicas=1)
    >>> portions.handle(Joined(0)), portions.begin()
    ([], [Compute(replica=0, life=1, task=0, evaluation=0, portion=0, upcoming=1, ...
    >>> portions.handle(Finished(0, 1, task=0))
    [Keep(replica=0, life=1, portion=0), Compute(replica=0, life=1, task=1, ...
    >>> portions.handle(Finished(0, 1, task=1))
    [Keep(replica=0, life=1, portion=1), Push(replica=0, life=1, id=0, ...
    >>> portions.handle(Pushed(0, 1, 0))
    [Done(evaluation=0)]
    """

    def __init__(
        self,
        portions: int,
        replicas: int,
        shards: int = 1,
        *,
        push_every: int = 4,
        copies: int = 4,
        steal: bool = True,
    ) -> None:
        for name, value in (
            ("portions", portions),
            ("replicas", replicas),
            ("shards", shards),
            ("push_every", push_every),
            ("copies", copies),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.portions, self.replicas, self.shards = portions, replicas, shards
        self.push_every, self.copies, self.steal = push_every, copies, steal
        self.evaluation, self.counted = -1, portions
        self.info = PortionsInfo()
        self._ends = [portions]  # of each group
        self._values, self._squares = [0.0] * portions, [0.0] * portions
        # Of each replica:
        self._is = [_AWAY] * replicas
        self._present = 0  # how many are not away
        self._idle: dict[int, None] = {}  # those with nothing to do, in that order
        self._finishes = 0  # gradients reported: the only clock there is
        self._life = [0] * replicas
        self._work = [(-1, -1)] * replicas  # evaluation and portion it computes
        self._tasks = [0] * replicas  # how many it was given
        self._held: list[list[int]] = [[] for _ in range(replicas)]
        self._next_id = [0] * replicas
        self._pushing: list[dict[int, Any]] = [{} for _ in range(replicas)]
        # Of the evaluation under way:
        self._ranges = [[0, 0] for _ in range(replicas)]  # next and stop
        self._returned: list[int] = []  # a heap
        self._lacking: dict[int, tuple[int, ...]] = {}  # by these shards only
        self._outstanding: dict[int, list[int]] = {}  # portion -> who computes it
        # By how often a portion is outstanding: when it was last handed out.
        self._by_copies: list[dict[int, int]] = [{} for _ in range(copies + 1)]
        self._fullest: list[tuple[int, int]] = []  # a heap; see `_rob`

    @property
    def done(self) -> bool:
        """Whether every portion counts."""
        return self.counted == self.portions

    def begin(self, groups: Sequence[int] | None = None) -> list[Order]:
        """Begin the next evaluation; the shards' gradients must be zero by now.

        Args:
          groups: how many portions each group has, in their order; no sum holds
            portions of two groups. All of the last evaluation's if not given.

        Returns:
          Orders. Replicas that still compute a portion of the last one join in later.

        Raises:
          RuntimeError: the last evaluation is not done.
          ValueError: there is no portion.
        """
        if not self.done:
            raise RuntimeError(
                f"evaluation {self.evaluation} is not done: {self.counted} of "
                f"{self.portions} portions count"
            )
        if groups is not None:
            self._ends = list(itertools.accumulate(groups))
            if not groups or self._ends[-1] < 1:
                raise ValueError(f"groups={groups}: there must be a portion")
            self.portions = self._ends[-1]
            self._values, self._squares = ([0.0] * self.portions for _ in range(2))
        self.evaluation, self.counted = self.evaluation + 1, 0
        p, n = self.portions, self.replicas
        self._ranges = [[p * r // n, p * (r + 1) // n] for r in range(n)]
        self._fullest = _heap_of(self._ranges)
        self._lacking.clear()
        orders: list[Order] = []
        self._serve_idle(orders)
        return orders

    def handle(self, message: Message) -> list[Order]:
        """Take a message; repeated and outdated ones do no harm.

        Args:
          message: `Joined`, `Finished`, `Pushed` or `Died`.

        Returns:
          Orders, for the sender and others.

        Raises:
          ValueError: a replica joins that nobody has declared dead.
        """
        orders: list[Order] = []
        if isinstance(message, Joined):
            self._joined(message.replica, orders)
        elif self._is[message.replica] == _AWAY or (
            message.life != self._life[message.replica]
        ):
            if not isinstance(message, Died):
                orders.append(Forget(message.replica, message.life))
        elif isinstance(message, Died):
            self._died(message.replica, message.landed, orders)
        elif isinstance(message, Finished):
            self._finished(message, orders)
        else:
            self._landed(message, orders)
        return orders

    def life(self, replica: int) -> int:
        """Give the replica's present life, which is what to fence when it dies."""
        return self._life[replica]

    @property
    def values(self) -> list[float]:
        """The mean loss of each portion of the evaluation, `[portions]`."""
        return list(self._values)

    @property
    def squares(self) -> list[float]:
        """The reported `g g` of each portion of the evaluation, `[portions]`."""
        return list(self._squares)

    # Messages.

    def _joined(self, replica: int, orders: list[Order]) -> None:
        if self._is[replica] != _AWAY:
            raise ValueError(
                f"replica {replica} joins, and was never declared dead: fence it on "
                "all shards, then say Died"
            )
        self._is[replica] = _IDLE
        self._idle[replica] = None
        self._present += 1
        self._life[replica] += 1
        if not self.done:
            self._assign(replica, orders)

    def _finished(self, message: Finished, orders: list[Order]) -> None:
        replica = message.replica
        evaluation, portion = self._work[replica]
        if self._is[replica] != _BUSY or message.task != self._tasks[replica] - 1:
            return  # a repetition
        self._work[replica] = (-1, -1)
        self._finishes += 1
        if evaluation == self.evaluation and portion in self._outstanding:
            self._values[portion] = message.value
            self._squares[portion] = message.square
            self._keep(replica, portion, orders)
        else:
            orders.append(Drop(replica, message.life, portion))
            self._count(dropped=1)
        self._assign(replica, orders)
        while self._idle and self._overdue() is not None:
            self._assign(next(iter(self._idle)), orders)

    def _landed(self, message: Pushed, orders: list[Order]) -> None:
        push = self._pushing[message.replica].pop(message.id, None)
        if push is not None:
            self._counts(push[0], orders)

    def _died(self, replica: int, landed: tuple[int, ...], orders: list[Order]) -> None:
        self._is[replica] = _AWAY
        self._present -= 1
        self._idle.pop(replica, None)
        evaluation, portion = self._work[replica]
        self._work[replica] = (-1, -1)
        back = list(self._held[replica])
        self._held[replica].clear()
        copies = self._outstanding.get(portion, [])
        # Not among them: it was beaten to the portion by one who has died since.
        if evaluation == self.evaluation and replica in copies:
            del self._by_copies[len(copies)][portion]
            copies.remove(replica)
            if copies:
                self._by_copies[len(copies)][portion] = self._finishes
            else:
                del self._outstanding[portion]
                back.append(portion)
        for id_, (portions, shards) in self._pushing[replica].items():
            every = range(self.shards) if shards is None else shards
            lacking = tuple(shard for shard in every if landed[shard] <= id_)
            if not lacking:
                self._counts(portions, orders)
                continue
            back.extend(portions)
            if len(lacking) < self.shards:
                self._lacking.update(dict.fromkeys(portions, lacking))
                self._count(repaired=len(portions))
        self._pushing[replica].clear()
        self._count(returned=len(back))
        for each in back:
            heapq.heappush(self._returned, each)
        self._serve_idle(orders)

    # Sums.

    def _keep(self, replica: int, portion: int, orders: list[Order]) -> None:
        """The first to finish a portion adds it to its sum."""
        del self._by_copies[len(self._outstanding.pop(portion))][portion]
        shards, held = self._lacking.get(portion), self._held[replica]
        # A repair must not be mixed with another sum, nor one group with another.
        if shards is not None or held and self._group(held[0]) != self._group(portion):
            self._push(replica, orders)
        orders.append(Keep(replica, self._life[replica], portion))
        self._held[replica].append(portion)
        if shards is not None:
            self._push(replica, orders, shards)

    def _push(
        self, replica: int, orders: list[Order], shards: tuple[int, ...] | None = None
    ) -> None:
        """Let a replica send what it holds, if it holds anything."""
        held = self._held[replica]
        if not held:
            return
        id_, portions = self._next_id[replica], tuple(held)
        self._next_id[replica] = id_ + 1
        self._pushing[replica][id_] = portions, shards
        held.clear()
        orders.append(Push(replica, self._life[replica], id_, portions, shards))
        self._count(pushes=1)

    def _group(self, portion: int) -> int:
        return bisect.bisect_right(self._ends, portion)

    def _counts(self, portions: Sequence[int], orders: list[Order]) -> None:
        self.counted += len(portions)
        if self.done:
            orders.append(Done(self.evaluation))

    # Handing out.

    def _assign(self, replica: int, orders: list[Order]) -> None:
        """Give a free replica its next portion, if there is one for it."""
        portion = self._take(replica)
        if portion is None or len(self._held[replica]) >= self.push_every:
            self._push(replica, orders)
        if portion is not None:
            self._outstanding[portion] = [replica]
            self._by_copies[1][portion] = self._finishes
        else:
            portion = self._copy(replica, orders)
        if portion is None:
            self._is[replica] = _IDLE
            self._idle[replica] = None
            return
        self._idle.pop(replica, None)
        self._is[replica], self._work[replica] = _BUSY, (self.evaluation, portion)
        begin, end = self._ranges[replica]
        order = Compute(
            replica,
            self._life[replica],
            self._tasks[replica],
            self.evaluation,
            portion,
            upcoming=begin if begin < end else -1,
            copy=len(self._outstanding[portion]) - 1,
        )
        self._tasks[replica] += 1
        orders.append(order)

    def _serve_idle(self, orders: list[Order]) -> None:
        for replica in sorted(self._idle):
            if not self.done:
                self._assign(replica, orders)

    def _take(self, replica: int) -> int | None:
        """Take a portion that nobody computes."""
        mine = self._ranges[replica]
        if mine[0] == mine[1]:
            if self._returned:
                return heapq.heappop(self._returned)
            if not self.steal or not self._rob(replica):
                return None
        mine[0] += 1
        return mine[0] - 1

    def _rob(self, replica: int) -> bool:
        """Take over the upper half of the range with most left."""
        # A range only shrinks unless it is taken over, so what the heap says of it is
        # too much rather than too little, and is put right when it comes up.
        heap = self._fullest
        while heap:
            most, victim = heap[0]
            begin, end = self._ranges[victim]
            if most == begin - end:
                break
            heapq.heappop(heap)
            if begin < end:
                heapq.heappush(heap, (begin - end, victim))
        else:
            return False
        middle = end - (end - begin + 1) // 2
        self._ranges[victim][1] = middle
        self._ranges[replica][:] = middle, end
        heapq.heappush(heap, (middle - end, replica))
        self._count(steals=1)
        return True

    def _copy(self, replica: int, orders: list[Order]) -> int | None:
        """Take a backup copy of a portion that is overdue."""
        portion = self._overdue()
        if portion is None:
            return None
        others = self._outstanding[portion]
        del self._by_copies[len(others)][portion]
        for other in others:
            self._push(other, orders)
        others.append(replica)
        self._by_copies[len(others)][portion] = self._finishes
        self._count(backups=1)
        return portion

    def _overdue(self) -> int | None:
        """Find a portion that needs a backup; those with fewest copies come first."""
        left, everyone = len(self._outstanding), min(self._present, self.portions)
        for copies in range(1, self.copies):
            if not self._by_copies[copies]:
                continue
            # The first is outstanding for longest.
            portion, handed = next(iter(self._by_copies[copies].items()))
            since = self._finishes - handed
            if copies > 1:
                overdue = since > 2 * left
            else:
                overdue = since >= everyone + left / 2
                overdue |= left <= max(1, everyone // LAST)
            if overdue:
                return portion
        return None

    def _count(self, **more: int) -> None:
        added = {name: getattr(self.info, name) + n for name, n in more.items()}
        self.info = self.info._replace(**added)

    # Between any two messages.

    def save(self) -> dict[str, Any]:
        """Give the whole state as a dict that JSON can hold."""
        state = {
            name: copy.deepcopy(value)
            for name, value in vars(self).items()
            if name != "_fullest"  # follows from the ranges
        }
        state["info"] = self.info._asdict()
        state["_pushing"] = [list(each.items()) for each in self._pushing]
        state["_by_copies"] = [list(each.items()) for each in self._by_copies]
        state["_idle"] = list(self._idle)
        for name in ("_outstanding", "_lacking"):
            state[name] = list(state[name].items())
        return state

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> "Portions":
        """Go on from what `save` gave, before or after it was written as JSON."""
        arguments = "portions replicas shards push_every copies steal".split()
        new = cls(**{name: saved[name] for name in arguments})
        for name, value in copy.deepcopy(saved).items():
            setattr(new, name, value)
        new.info = PortionsInfo(**saved["info"])
        new._work = [(evaluation, portion) for evaluation, portion in saved["_work"]]
        new._pushing = [
            {
                id_: (tuple(portions), None if shards is None else tuple(shards))
                for id_, (portions, shards) in each
            }
            for each in saved["_pushing"]
        ]
        new._by_copies = [dict(each) for each in saved["_by_copies"]]
        new._idle = dict.fromkeys(saved["_idle"])
        new._outstanding = {p: list(replicas) for p, replicas in saved["_outstanding"]}
        new._lacking = {p: tuple(shards) for p, shards in saved["_lacking"]}
        new._fullest = _heap_of(new._ranges)
        return new


def _heap_of(ranges: list[list[int]]) -> list[tuple[int, int]]:
    """Order the replicas whose ranges are not empty: most left first."""
    heap = [(b - e, replica) for replica, (b, e) in enumerate(ranges) if b < e]
    heapq.heapify(heap)
    return heap
