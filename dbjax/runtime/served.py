"""A pure `handle(state, message)` with the state it belongs to, for several threads."""

import threading
from collections.abc import Callable
from typing import Any


class Served:
    """Handles one message at a time, in the order in which they come.

    Args:
      state: the first state.
      handle: `handle(state, message) -> state, reply`, pure.

    >>> counter = Served(0, lambda state, message: (state + message, state))
    >>> counter(5), counter(1)
    (0, 5)
    """

    def __init__(self, state: Any, handle: Callable[[Any, Any], tuple[Any, Any]]):
        self._state, self._handle, self._lock = state, handle, threading.Lock()

    def __call__(
        self, message: Any, record: Callable[[Any], None] | None = None
    ) -> Any:
        """Take a message and give the reply.

        Args:
          message: what `handle` takes.
          record: is given the reply before the next message is handled.

        Returns:
          The reply.
        """
        with self._lock:
            self._state, reply = self._handle(self._state, message)
            if record is not None:
                record(reply)
        return reply
