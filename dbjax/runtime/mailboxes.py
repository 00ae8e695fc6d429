"""Replicas as threads with a mailbox each: orders go in, messages come out."""

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dbjax.runtime.threads import LOOK_UP, Threads


class Failed(NamedTuple):
    """A replica could not carry out an order; what it held is to be taken for lost.

    Attributes:
      replica: whose.
      order: which.
      error: why.
    """

    replica: int
    order: Any
    error: BaseException


class Mailboxes:
    """Threads that carry out orders, each its own in the order they were given.

    Args:
      hands: `hands[r](order)` carries out an order of replica `r` in its own thread,
        and gives messages.
      runtime: the `Threads` settings.
    """

    def __init__(
        self, hands: list[Callable[[Any], Iterable[Any]]], runtime: Threads
    ) -> None:
        self._hands, self._runtime = hands, runtime
        self._orders: list[queue.Queue[Any]] = [queue.Queue() for _ in hands]
        self._messages: queue.Queue[Any] = queue.Queue()
        self._stopped = False

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Start the threads; on leaving they have stopped, whatever happened."""
        threads = [
            threading.Thread(
                target=self._live, args=(r,), name=f"replica-{r}", daemon=True
            )
            for r in range(len(self._hands))
        ]
        try:
            for thread in threads:
                thread.start()
            yield
        finally:
            self._stopped = True
            for orders in self._orders:
                orders.put(None)
            for thread in threads:
                if thread.ident is not None:  # started
                    thread.join()

    def send(self, replica: int, order: Any) -> None:
        """Give an order."""
        self._orders[replica].put(order)

    def receive(self) -> Any:
        """Wait for the next message, or `Failed`, of any replica."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._messages.get(timeout=LOOK_UP)

    def _live(self, replica: int) -> None:
        die = random.Random(f"{self._runtime.seed} {replica}")
        while (order := self._orders[replica].get()) is not None:
            if self._stopped:
                continue
            if self._runtime.jitter:
                time.sleep(die.random() * self._runtime.jitter)
            try:
                for message in self._hands[replica](order):
                    self._messages.put(message)
            except BaseException as error:  # or it would be waited for for ever
                self._messages.put(Failed(replica, order, error))
