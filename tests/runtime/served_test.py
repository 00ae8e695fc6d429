"""One message at a time, whoever sends it, and its record before the next one."""

import sys
import threading

import pytest

from dbjax.runtime.served import Served


@pytest.fixture(autouse=True)
def interrupted():
    """Threads take turns at almost every line."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_every_message_is_handled_once_and_records_stand_in_their_order():
    """The replies are 1, 2, 3, ... however many threads there are."""
    served, rows = Served(0, lambda state, _: (state + 1, state + 1)), []

    def send():
        for _ in range(300):
            served("one more", rows.append)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == list(range(1, 6 * 300 + 1))


def test_a_message_that_raises_leaves_the_state_as_it_was():
    def handle(state, message):
        return state + [message], 1 / message

    served = Served([], handle)
    served(1)
    with pytest.raises(ZeroDivisionError):
        served(0)
    assert served(2) == 0.5
    assert served._state == [1, 2]
