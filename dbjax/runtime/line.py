"""Calls from one process of a machine to another over a socket, quicker than Ray's.

Who is called listens; who can read its memory, and so knows its secret, may call it.
Each caller has one `Line` to it, and what comes over that is carried out on two lanes,
as in `dbjax.runtime.transport`. Messages are bytes.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from dbjax.runtime.shared_memory import Place
from dbjax.runtime.transport import Gone, Late

LONGEST = 64 * 1024
"""Bytes that fit into a socket whose reader is busy; longer messages go by Ray."""

_DONE, _RAISED, _ELSEWHERE = range(3)


class Elsewhere(Exception):
    """It has been done, but its answer cannot be sent over a line."""


class Line:
    """The caller's end.

    Args:
      place: of the process that is called.

    Raises:
      OSError, EOFError, multiprocessing.AuthenticationError: it does not listen to us.
    """

    def __init__(self, place: Place) -> None:
        self._connection = Client(_name(place), authkey=place.token)
        self._lock = threading.Lock()
        self._waiting: dict[int, concurrent.futures.Future[bytes]] = {}
        self._number = itertools.count()
        self._who = f"process {place.pid}"
        self._closed = False
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether calls get through, as far as is known."""
        return not self._closed

    def call(
        self, lane: str, method: str, message: bytes
    ) -> concurrent.futures.Future[bytes]:
        """Have something done.

        Returns:
          The answer to be. It raises `Gone` if the other has gone, `Elsewhere` if
          it can be had by other ways only, and else whatever the call has raised.
        """
        answer: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                answer.set_exception(Gone(f"{self._who} has hung up"))
                return answer
            number = next(self._number)
            self._waiting[number] = answer
            with contextlib.suppress(OSError):  # who reads learns of it, too
                self._connection.send_bytes(
                    pickle.dumps((number, lane, method, message))
                )
        return answer

    def _read(self) -> None:
        try:
            with contextlib.suppress(OSError, EOFError):
                while True:
                    number, how, what = pickle.loads(self._connection.recv_bytes())
                    with self._lock:
                        answer = self._waiting.pop(number)
                    if how == _DONE:
                        answer.set_result(what)
                    else:
                        answer.set_exception(what if how == _RAISED else Elsewhere())
                    del answer, what  # the next one may be long in coming
        finally:  # whatever ends this: nobody is to wait for what nobody reads
            self._hang_up()

    def _hang_up(self) -> None:
        with self._lock:
            self._closed, waiting, self._waiting = True, self._waiting, {}
            self._connection.close()
        for answer in waiting.values():
            answer.set_exception(Gone(f"{self._who} has hung up"))


def listen(
    place: Place,
    answer: Callable[[str, bytes], bytes | None],
    lanes: Mapping[str, concurrent.futures.Executor],
) -> None:
    """Carry out, for as long as this process lives, what is called over lines.

    Args:
      place: of this process.
      answer: `answer(method, message)`; None where the answer cannot be sent so.
      lanes: who carries out what comes on each.
    """
    listener = Listener(_name(place), authkey=place.token)

    def accept() -> None:
        while True:
            # Whoever knows no secret, or dies while it says it, is not heard.
            with contextlib.suppress(
                OSError, EOFError, multiprocessing.AuthenticationError
            ):
                caller = _Caller(listener.accept(), answer, lanes)
                threading.Thread(target=caller.serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


class _Caller:
    """The other end of somebody's line."""

    def __init__(
        self,
        connection: Connection,
        answer: Callable[[str, bytes], bytes | None],
        lanes: Mapping[str, concurrent.futures.Executor],
    ) -> None:
        self._connection, self._answer, self._lanes = connection, answer, lanes
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Take calls until it hangs up."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                number, lane, *call = pickle.loads(self._connection.recv_bytes())
                self._lanes[lane].submit(self._carry_out, number, *call)
                del call

    def _carry_out(self, number: int, method: str, message: bytes) -> None:
        try:
            done = self._answer(method, message)
            reply = number, (_ELSEWHERE if done is None else _DONE), done
        except Exception as error:
            reply = number, _RAISED, _that_pickles(error)
        with self._lock, contextlib.suppress(OSError):  # it may have hung up
            self._connection.send_bytes(pickle.dumps(reply))


def _that_pickles(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error


def _name(place: Place) -> str:
    """Give an address that is in no file system, which anybody may know."""
    return "\0dbjax-" + hashlib.blake2b(place.token, digest_size=16).hexdigest()


class Way:
    """How calls get to one actor, by Ray or over a line.

    Calls on `WORK` stay in order: those by either way are carried out in order, so
    where one follows on the other, only the last call by that must be done.

    Attributes:
      lock: held while a call is sent.
      last_by_ray: on `WORK`, unless it is known to be done.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.last_by_ray: Any = None
        self._last_by_line: concurrent.futures.Future[bytes] | None = None
        self._line: Line | None = None
        self._asked = False

    def line(self, place: Place) -> Line | None:
        """Give the line to whoever is there; asked for the first time, it is made."""
        if not self._asked:
            self._asked = True
            threading.Thread(target=self._connect, args=(place,), daemon=True).start()
        return self._line if self._line is not None and self._line.is_open else None

    def sent(self, answer: concurrent.futures.Future[bytes]) -> None:
        """Take note of a call on `WORK` over the line."""
        self._last_by_line = answer

    def wait_for_line(self, timeout: float) -> None:
        """Wait until what was called on `WORK` over the line is done.

        Raises:
          Late: it is not after `timeout` seconds.
        """
        last, self._last_by_line = self._last_by_line, None
        if last is not None and not concurrent.futures.wait([last], timeout).done:
            raise Late(f"what was asked before has not been done for {timeout:g} s")

    def _connect(self, place: Place) -> None:
        # Whoever does not listen, or not to us, is asked by Ray as before.
        with contextlib.suppress(
            OSError, EOFError, multiprocessing.AuthenticationError
        ):
            self._line = Line(place)
