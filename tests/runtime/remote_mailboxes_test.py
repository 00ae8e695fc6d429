"""Orders go out, reports come in, and whoever dies or is silent is replaced."""

import pytest

from dbjax.runtime.mailboxes import Failed
from dbjax.runtime.remote_mailboxes import Back, RemoteMailboxes, Report
from dbjax.runtime.transport import Gone, Late
from tests.problems import alarm

within_time = pytest.fixture(autouse=True)(alarm)


class Answer:
    """A reply that is there once `give` is called."""

    def __init__(self):
        self.calls, self.value, self.there = [], None, False

    def give(self, value):
        self.value, self.there = value, True
        for call in self.calls:
            call(self)

    def then(self, call):
        call(self) if self.there else self.calls.append(call)

    def result(self, timeout=None):
        assert self.there
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class Process:
    """A process that answers when the test says so, and keeps what it was asked."""

    def __init__(self, name):
        self.name, self.asked, self.begun = name, [], Answer()

    def ask(self, method, *args, lane="work"):
        assert method == "obey"
        self.asked.append((args, Answer()))
        return self.asked[-1][1]


class World:
    """A transport, and boxes of `replicas` whose processes are all kept."""

    def __init__(self, replicas=1, timeout=60.0):
        self.processes = [[] for _ in range(replicas)]
        self.killed, self.ended, self.rows = [], [], []
        self.boxes = RemoteMailboxes(
            replicas, self, self.start, lambda r, rows: self.rows.extend(rows), timeout
        )

    def start(self, replica):
        life = len(self.processes[replica])
        process = Process(f"replica {replica}.{life}")
        self.processes[replica].append(process)
        if not life:
            process.begun.give(None)
        return process, process.begun

    def kill(self, address):
        self.killed.append(address.name)

    def end(self, address):
        self.ended.append(address.name)

    def answer(self, order, value, replica=0):
        for args, answer in self.processes[replica][-1].asked:
            if args[0] == order:
                answer.give(value)


def test_messages_come_in_the_order_of_their_orders_and_after_their_rows():
    world = World()
    with world.boxes.open():
        for order in ("first", "second", "third"):
            world.boxes.send(0, order, "more")
        assert world.processes[0][0].asked[0][0] == ("first", "more")
        world.answer("second", Report([2, 3], ["b"]))
        world.answer("first", Report([], ["a"]))
        world.answer("third", Report([4], []))
        assert [world.boxes.receive() for _ in range(3)] == [2, 3, 4]
        assert world.rows == ["a", "b"]
    assert world.ended == ["replica 0.0"]


def test_an_error_is_a_message_and_the_process_stays():
    world = World()
    with world.boxes.open():
        world.boxes.send(0, "order")
        world.answer("order", ValueError("no"))
        failed = world.boxes.receive()
        assert isinstance(failed, Failed) and isinstance(failed.error, ValueError)
        assert failed[:2] == (0, "order")
        assert world.boxes.restart(0)
    assert len(world.processes[0]) == 1 and not world.killed


def test_a_death_is_heard_once_and_another_process_takes_over():
    world = World(replicas=2)
    with world.boxes.open():
        for order in ("first", "second"):
            world.boxes.send(0, order)
        world.boxes.send(1, "other")
        for order in ("second", "first"):
            world.answer(order, Gone("killed"))
        failed = world.boxes.receive()
        assert failed[:2] == (0, "first") and isinstance(failed.error, Gone)
        world.boxes.send(0, "to nobody")
        assert not world.boxes.restart(0)
        world.boxes.send(0, "third")
        world.answer("third", Report(["done"], []))
        world.processes[0][1].begun.give(None)
        assert world.boxes.receive() == Back(0)
        assert world.boxes.receive() == "done"
        world.answer("other", Report(["theirs"], []), replica=1)
        assert world.boxes.receive() == "theirs"
    assert world.ended == ["replica 0.1", "replica 1.0"]


def test_a_start_that_fails_is_a_message_as_well():
    world = World()
    with world.boxes.open():
        world.boxes.send(0, "first")
        world.answer("first", Gone("killed"))
        world.boxes.receive()
        for life in (1, 2):
            assert not world.boxes.restart(0)
            world.processes[0][life].begun.give(Gone("no room"))
            failed = world.boxes.receive()
            assert failed[:2] == (0, None) and isinstance(failed.error, Gone)


def test_who_is_silent_for_too_long_is_killed_and_named():
    world = World(replicas=2, timeout=0.05)
    with world.boxes.open():
        world.boxes.send(1, "first")
        world.boxes.send(0, "second")
        failed = world.boxes.receive()
        assert failed[:2] == (1, "first") and isinstance(failed.error, Late)
        assert "replica 1.0 has not answered to str for 0.05 s" in str(failed.error)
        assert world.killed == ["replica 1.0"]
        world.answer("first", Report(["too late"], []), replica=1)
        world.answer("second", Report(["in time"], []))
        assert world.boxes.receive() == "in time"


def test_at_an_unhappy_end_who_has_something_to_do_is_killed():
    world = World(replicas=2)
    with pytest.raises(KeyError), world.boxes.open():
        world.boxes.send(1, "for ever")
        raise KeyError
    assert (world.ended, world.killed) == (["replica 0.0"], ["replica 1.0"])


def test_where_one_cannot_be_started_none_is_left_to_others():
    world = World(replicas=2)
    start = world.boxes._start

    def fails(replica):
        address, reply = start(replica)
        reply.give(OSError("no such module") if replica else None)
        return address, reply

    world.boxes._start = fails
    with pytest.raises(OSError, match="no such module"), world.boxes.open():
        pass
    assert (world.ended, world.killed) == ([], ["replica 0.0", "replica 1.0"])
