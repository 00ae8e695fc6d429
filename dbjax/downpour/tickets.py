"""The ticket desk: a step is a ticket from a counter that all replicas share.

The desk joins the counter, the warm start and the protocol. A runtime asks it; it knows
no thread or clock. `WAIT` means: ask again when `done`, `enter` or `leave` was called;
for many who wait, `ready` says whom that would help. Where pushes are `gated`, a
runtime also says who has `begun`, and asks `may_push` before each push.
"""

from collections.abc import Iterable, Sequence

from dbjax.downpour.protocol import Protocol

WAIT = -1


class Tickets:
    """Hands out the steps `again`, then `first, first + 1, ..., steps - 1`.

    During the first `warmstart_steps` replica 0 is alone: every other replica waits
    until it has finished them (the paper, section 4.1, warm start).

    Args:
      steps: steps in the whole run.
      protocol: who may begin its next minibatch.
      warmstart_steps: how many replica 0 takes alone.
      first: the first step that was never handed out; above 0 after a resume.
      again: steps below it that failed replicas took with them before the resume.

    Attributes:
      clocks: the minibatches that each replica has finished.
      next: the next new step.
      finished: minibatches finished by all replicas, lost ones included.
      warm: whether the warm start is over.
      gated: whether the protocol makes pushes wait.

    >>> from dbjax.downpour.protocol import asynchronous
    >>> desk = Tickets(steps=2, protocol=asynchronous())
    >>> desk.enter(0)
    >>> desk.ask(0), desk.ask(0), desk.ask(0)
    (0, 1, None)
    """

    def __init__(
        self,
        steps: int,
        protocol: Protocol,
        warmstart_steps: int = 0,
        first: int = 0,
        again: Sequence[int] = (),
    ) -> None:
        self.protocol, self.clocks = protocol, protocol.clocks()
        self.steps, self.warmstart_steps = steps, warmstart_steps
        self.next, self.finished = first, first - len(again)
        self._again = list(again)
        self.warm = self.finished >= min(warmstart_steps, steps)
        self._held: list[int] = []  # joined, but kept off the clocks until then
        self.gated = protocol.may_push is not None
        # What their answers look at, when waiters were asked.
        self._asked_at = self._pushed_at = None

    def enter(self, replica: int) -> None:
        """A replica joins, or comes back."""
        self._pushed_at = None  # it may be the last one now
        # The lone replica of a warm start would otherwise be ahead of the others.
        if self.warm or replica == 0:
            self.clocks.enter(replica)
        else:
            self._held.append(replica)

    def ask(self, replica: int) -> int | None:
        """Give the next step, None if there is none left, or `WAIT`."""
        if not self.warm and replica != 0:
            return WAIT
        step = self._again[0] if self._again else self.next
        if step >= self.steps:
            return None
        if not self.warm and step >= self.warmstart_steps:
            return WAIT
        if not self.protocol.may_begin(self.clocks, replica):
            return WAIT
        if not self.protocol.free_running:
            self.clocks.take_part(replica)
        if self._again:
            return self._again.pop(0)
        self.next = step + 1
        return step

    def ready(self, waiting: Iterable[int]) -> list[int]:
        """Name those of the waiting replicas that would not be told `WAIT` again."""
        if not self.warm:
            return []
        if self.next >= self.steps and not self._again:
            return list(waiting)
        may_begin, clocks = self.protocol.may_begin, self.clocks
        if self.protocol.by_slowest:
            if clocks.begins_on == self._asked_at:
                return []
            self._asked_at = clocks.begins_on
        return [replica for replica in waiting if may_begin(clocks, replica)]

    def begun(self, replica: int) -> None:
        """A replica has the parameters for its minibatch, or will have no more."""
        if replica in self.clocks.rounds:
            self.clocks.begin(replica)

    def may_push(self, replica: int) -> bool:
        """Whether it may push now; if not, ask again when `begun` or `leave` was."""
        may_push = self.protocol.may_push
        if may_push is not None:
            if not may_push(self.clocks, replica):
                return False
            self.clocks.push(replica)
        return True

    def ready_to_push(self, waiting: Iterable[int]) -> list[int]:
        """Name those that wait for `may_push` and would not be told to wait again."""
        may_push, clocks = self.protocol.may_push, self.clocks
        if may_push is None:
            return []
        if self.protocol.by_slowest:
            if clocks.pushes_on == self._pushed_at:
                return []
            self._pushed_at = clocks.pushes_on
        return [replica for replica in waiting if may_push(clocks, replica)]

    def is_awaited(self, replica: int) -> bool:
        """Whether others wait for it to begin a minibatch."""
        return self.gated and self.clocks.is_awaited(replica)

    def done(self, replica: int) -> None:
        """A replica has finished a minibatch, and its push if one was due."""
        if not self.protocol.free_running:  # else nobody looks at the clocks
            self.clocks.tick(replica)
        self._finish()

    def give_back(self, step: int) -> None:
        """A replica died before it had computed a step: another one will."""
        self._again.append(step)

    def is_empty(self) -> bool:
        """Whether there is no step left to hand out."""
        return not self._again and self.next >= self.steps

    def lost(self, replica: int) -> None:
        """A replica failed with a ticket in hand: the minibatch is lost."""
        self._finish()

    def _finish(self) -> None:
        self.finished += 1
        if not self.warm and self.finished >= min(self.warmstart_steps, self.steps):
            self.warm = True
            for replica in self._held:
                self.clocks.enter(replica)
            self._held.clear()

    def leave(self, replica: int) -> None:
        """A replica has stopped or failed."""
        if replica in self._held:
            self._held.remove(replica)
        else:
            self.clocks.leave(replica)
