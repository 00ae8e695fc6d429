"""Replicas as processes with a mailbox each: orders go in, messages come out."""

import collections
import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dbjax.runtime.mailboxes import Failed
from dbjax.runtime.threads import LOOK_UP
from dbjax.runtime.transport import Address, Gone, Late, Reply, Transport


class Back(NamedTuple):
    """A replica whose process was gone has a new one."""

    replica: int


class Report(NamedTuple):
    """What a process says when it has carried out an order.

    Attributes:
      messages: for whoever gave it.
      rows: of the Trace.
    """

    messages: list[Any]
    rows: list[Any]


class _Sent:
    """An order under way; None stands for the start of the process."""

    def __init__(self, replica: int, address: Address, order: Any) -> None:
        self.replica, self.address, self.order = replica, address, order
        self.since, self.answered = time.monotonic(), False
        self.reply: Reply | None = None
        self.error: Gone | Late | None = None

    def result(self, timeout: float) -> Any:
        if self.reply is None or self.error is not None:
            raise self.error or Gone(f"{self.address.name} is gone")
        return self.reply.result(timeout)


class RemoteMailboxes:
    """Processes that carry out orders, each its own in the order they were given.

    Args:
      replicas: how many.
      transport: starts and ends processes.
      start: `start(r)` starts the process of replica `r`: its address, where `obey`
        carries out orders and gives a `Report`, and the reply that says it is there.
      heard: `heard(r, rows)` is given what came of an order before its messages are.
      timeout: seconds until a process that does not answer counts as gone.
    """

    def __init__(
        self,
        replicas: int,
        transport: Transport,
        start: Callable[[int], tuple[Address, Reply]],
        heard: Callable[[int, list[Any]], None],
        timeout: float,
    ) -> None:
        self._transport, self._start = transport, start
        self._tell_rows, self._timeout = heard, timeout
        self._addresses: list[Address | None] = [None] * replicas
        self._under_way: list[collections.deque[_Sent]] = [
            collections.deque() for _ in range(replicas)
        ]
        self._answered: queue.Queue[_Sent] = queue.Queue()
        self._messages: collections.deque[Any] = collections.deque()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Start the processes and wait for them; on leaving they have stopped.

        Raises:
          Gone, Late, Exception: one could not be started.
        """
        started = happy = False
        try:
            replies = [self._begin(replica) for replica in range(len(self._addresses))]
            for reply in replies:
                reply.result(self._timeout)
            started = True
            yield
            happy = True
        finally:
            for address, orders in zip(self._addresses, self._under_way, strict=True):
                if address is None:
                    continue
                # One that is asked for nothing, or computes what is not needed any
                # more, can serve others; what else might be wrong, nobody knows.
                if happy or (started and not orders):
                    self._transport.end(address)
                else:
                    self._transport.kill(address)

    def send(self, replica: int, order: Any, *args: Any) -> None:
        """Give an order; it is lost where the process is.

        Args:
          replica: whom.
          order: what `obey` takes first.
          *args: what else it takes.
        """
        address = self._addresses[replica]
        if address is None:
            return
        sent = _Sent(replica, address, order)
        with contextlib.suppress(Gone):  # which is heard in its turn
            sent.reply = address.ask("obey", order, *args)
        self._wait_for(sent)

    def receive(self) -> Any:
        """Wait for the next message, `Failed` or `Back`, of any replica."""
        while not self._messages:
            sent = self._next()
            if sent.address is not self._addresses[sent.replica]:
                continue  # of a process that was given up
            sent.answered = True
            under_way = self._under_way[sent.replica]
            while under_way and under_way[0].answered:
                self._hear(under_way.popleft())
        return self._messages.popleft()

    def restart(self, replica: int) -> bool:
        """Start a replica's process again, if it is gone.

        Args:
          replica: whose.

        Returns:
          Whether it is there; else a `Back` comes once it is, or it has `Failed`.
        """
        if self._addresses[replica] is not None:
            return True
        reply = self._begin(replica)
        address = self._addresses[replica]
        assert address is not None
        sent = _Sent(replica, address, None)
        sent.reply = reply
        self._wait_for(sent)
        return False

    def _begin(self, replica: int) -> Reply:
        self._addresses[replica], reply = self._start(replica)
        return reply

    def _wait_for(self, sent: _Sent) -> None:
        self._under_way[sent.replica].append(sent)
        if sent.reply is None:
            self._answered.put(sent)
        else:
            sent.reply.then(lambda _: self._answered.put(sent))

    def _next(self) -> _Sent:
        """Wait for an answer; where none comes at all, give the oldest question."""
        end = time.monotonic() + self._timeout
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                # Not at once: so that a Ctrl-C is heard.
                return self._answered.get(timeout=min(LOOK_UP, self._timeout))
        waiting = [orders[0] for orders in self._under_way if orders]
        oldest = min(waiting, key=lambda sent: sent.since)
        what = "start" if oldest.order is None else type(oldest.order).__name__
        oldest.error = Late(
            f"{oldest.address.name} has not answered to {what} for {self._timeout:g} s"
        )
        return oldest

    def _hear(self, sent: _Sent) -> None:
        replica, order = sent.replica, sent.order
        try:
            report = sent.result(self._timeout)
        except (Gone, Late) as error:
            self._transport.kill(sent.address)
            self._addresses[replica] = None
            self._under_way[replica].clear()
            self._messages.append(Failed(replica, order, error))
        except Exception as error:
            self._messages.append(Failed(replica, order, error))
        else:
            if order is None:
                self._messages.append(Back(replica))
                return
            self._tell_rows(replica, report.rows)
            self._messages.extend(report.messages)
