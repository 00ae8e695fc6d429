"""Calls over sockets: answers, order, errors, and whoever hangs up."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from dbjax.runtime.line import Elsewhere, Line, Way, _name, listen
from dbjax.runtime.shared_memory import Memory, Place
from dbjax.runtime.transport import SIDE, WORK, Gone, Late

pytestmark = pytest.mark.skipif(Memory().place is None, reason="no such memory here")


Answering = Callable[[str, bytes], bytes | None]


def _listen(answer: Answering) -> tuple[Place, list[concurrent.futures.Executor]]:
    place = Memory().place
    assert place is not None
    pools = [concurrent.futures.ThreadPoolExecutor(threads) for threads in (1, 2)]
    listen(place, answer, dict(zip((WORK, SIDE), pools, strict=True)))
    return place, pools


@pytest.fixture
def listening() -> Iterator[Callable[[Answering], Place]]:
    """Listens at a new place, until the test is over."""
    made = []

    def at_a_place(answer: Answering) -> Place:
        place, pools = _listen(answer)
        made.extend(pools)
        return place

    yield at_a_place
    for pool in made:
        pool.shutdown()


def test_a_call_is_answered(listening) -> None:
    line = Line(listening(lambda method, message: method.encode() + message))
    assert line.call(WORK, "push", b" it").result(30) == b"push it"


def test_work_is_done_in_the_order_in_which_it_was_sent(listening) -> None:
    done: list[bytes] = []
    line = Line(listening(lambda method, message: done.append(message) or b""))
    sent = [str(i).encode() for i in range(200)]
    for answer in [line.call(WORK, "push", each) for each in sent]:
        answer.result(30)
    assert done == sent


def test_work_of_several_callers_is_done_one_at_a_time(listening) -> None:
    busy, most = [], []

    def answer(method: str, message: bytes) -> bytes:
        busy.append(message)
        most.append(len(busy))
        busy.remove(message)
        return message

    place = listening(answer)
    lines = [Line(place) for _ in range(4)]
    answers = [
        line.call(WORK, "push", bytes([i, j]))
        for j in range(50)
        for i, line in enumerate(lines)
    ]
    assert [a.result(30) for a in answers] == [
        bytes([i, j]) for j in range(50) for i in range(4)
    ]
    assert set(most) == {1}


def test_what_is_asked_beside_the_work_does_not_wait_for_it(listening) -> None:
    go_on = threading.Event()

    def answer(method: str, message: bytes) -> bytes:
        if method == "push":
            assert go_on.wait(30)
        return message

    line = Line(listening(answer))
    pushed = line.call(WORK, "push", b"1")
    assert line.call(SIDE, "fetch", b"2").result(30) == b"2"
    assert not pushed.done()
    go_on.set()
    assert pushed.result(30) == b"1"


class _Odd(Exception):
    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


@pytest.mark.parametrize(
    ("raised", "there"),
    [
        (ValueError("shapes"), ValueError),
        (Gone("deposed"), Gone),
        (_Odd("odd"), RuntimeError),
    ],
)
def test_what_a_call_raises_comes_home(listening, raised, there) -> None:
    def answer(method: str, message: bytes) -> bytes:
        raise raised

    line = Line(listening(answer))
    with pytest.raises(there, match=str(raised)):
        line.call(WORK, "push", b"").result(30)
    assert line.is_open


def test_an_answer_that_cannot_be_sent_is_elsewhere(listening) -> None:
    line = Line(listening(lambda method, message: None))
    with pytest.raises(Elsewhere):
        line.call(WORK, "push", b"").result(30)


def test_who_does_not_know_the_secret_is_not_heard(listening) -> None:
    place = listening(lambda method, message: message)
    with pytest.raises(multiprocessing.AuthenticationError):
        multiprocessing.connection.Client(_name(place), authkey=b"another")
    assert Line(place).call(WORK, "push", b"1").result(30) == b"1"


def test_the_address_does_not_tell_the_secret() -> None:
    place = Memory().place
    assert place is not None
    assert place.token.hex() not in _name(place)


def test_nobody_listens() -> None:
    with pytest.raises(OSError):
        Line(Place(1, 1, b"nobody has this"))


def _die_when_asked(pipe: multiprocessing.connection.Connection) -> None:
    def answer(method: str, message: bytes) -> bytes:
        if method == "push":
            threading.Event().wait()  # for ever
        if method == "die":
            os._exit(1)
        return message

    pipe.send(_listen(answer)[0])
    threading.Event().wait()


def test_calls_of_one_that_dies_are_gone_and_so_are_later_ones() -> None:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    child = spawn.Process(target=_die_when_asked, args=(there,), daemon=True)
    child.start()
    line = Line(here.recv())
    waiting = line.call(WORK, "push", b"")
    line.call(SIDE, "die", b"")
    with pytest.raises(Gone, match="hung up"):
        waiting.result(30)
    child.join(30)
    assert not line.is_open
    with pytest.raises(Gone, match="hung up"):
        line.call(WORK, "push", b"").result(30)


def test_a_way_has_its_line_once_it_is_made(listening) -> None:
    place = listening(lambda method, message: message)
    way, made = Way(), threading.Event()
    while way.line(place) is None:
        made.wait(0.001)
    assert way.line(place) is way.line(place)


def test_the_other_way_waits_for_what_the_line_carries(listening) -> None:
    go_on = threading.Event()

    def answer(method: str, message: bytes) -> bytes:
        assert go_on.wait(30)
        return message

    way, line = Way(), Line(listening(answer))
    way.sent(line.call(WORK, "push", b"1"))
    with pytest.raises(Late, match="before"):
        way.wait_for_line(0.0)
    way.sent(line.call(WORK, "push", b"2"))
    go_on.set()
    way.wait_for_line(30.0)
