"""Ctrl-C, held back while something is under way that must not be torn apart."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred(busy: Callable[[], bool], ask: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt at once, or `ask` for it where `busy`.

    A second Ctrl-C raises in any case. Outside the main thread, or where the program
    has its own way with Ctrl-C, nothing is changed.

    Args:
      busy: whether Ctrl-C must wait, asked at the moment it comes.
      ask: takes note of it; called from the signal handler, so it must be brief.

    Yields:
      None; the usual handler is back afterwards.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def hear(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked or not busy():
            raise KeyboardInterrupt
        asked = True
        ask()

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
