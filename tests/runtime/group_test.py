"""A leader and its followers, without processes."""

import threading

import pytest

from dbjax.runtime import group as group_lib
from dbjax.runtime.group import Follower, Group
from dbjax.runtime.transport import Gone, Late
from tests.runtime.pretend import Reply


class Somebody:
    """An address whose answers the test gives."""

    def __init__(self):
        self.replies = []

    def ask(self, method, *args, lane="work"):
        reply = Reply(method)
        if lane == "work":
            self.replies.append(reply)
        return reply


@pytest.fixture
def followers():
    return [Somebody(), Somebody()]


@pytest.fixture
def group(followers):
    group = Group(followers)
    yield group
    group._own.shutdown()


@pytest.fixture
def stuck():
    """What waits for a follower, until the test is over."""
    event = threading.Event()
    yield event.wait
    event.set()


def answer(follower, error=None):
    follower.replies.pop(0).finish(error, None)


def test_a_follower_may_be_one_thing_behind(group, followers):
    assert group.do(lambda: 1, group.ask("first")) == 1
    second = threading.Thread(target=group.do, args=(int, group.ask("second")))
    second.start()
    answer(followers[0])
    second.join(0.05)
    assert second.is_alive()
    answer(followers[1])
    second.join(60)
    assert not second.is_alive()


def test_a_follower_that_fails_is_heard_while_the_leader_waits_for_it(
    group, followers, stuck, monkeypatch
):
    monkeypatch.setattr(group_lib, "GRACE", 0.01)
    asked = group.ask("compute")
    answer(followers[1], ValueError("no such data"))
    with pytest.raises(ValueError, match="no such data"):
        group.do(stuck, asked)


def test_what_a_death_breaks_is_no_error_of_its_own(group, followers):
    def own():
        answer(followers[0], OSError("connection reset"))
        threading.Timer(0.05, followers[1].replies[0].fail).start()
        raise OSError("connection reset")

    with pytest.raises(Gone):
        group.do(own, group.ask("compute"))


def test_an_error_of_all_is_raised(group, followers):
    asked = group.ask("compute")
    for follower in followers:
        answer(follower, KeyError("x"))
    with pytest.raises(KeyError, match="x"):
        group.do(lambda: {}["x"], asked)


def test_what_must_be_in_time_is_late(group, stuck):
    with pytest.raises(Late):
        group.do(stuck, group.ask("begin"), 0.01)


def test_a_follower_does_the_same_and_tells_nothing():
    part = []
    assert Follower(part).follow("append", 1) is None
    assert part == [1]
