"""Orders go in, messages come out, and whatever happens the threads are gone."""

import threading

import pytest

import dbjax
from dbjax.runtime.mailboxes import Failed, Mailboxes
from tests.problems import alarm, replica_threads

within_time = pytest.fixture(autouse=True)(alarm)


def echo(replica):
    def obey(order):
        for k in range(order):
            yield replica, order, k

    return obey


@pytest.mark.parametrize("jitter", [0.0, 1e-3])
@pytest.mark.parametrize("replicas", [1, 4])
def test_each_replica_carries_out_its_orders_in_turn(replicas, jitter):
    runtime = dbjax.Threads(jitter=jitter, seed=1)
    boxes = Mailboxes([echo(r) for r in range(replicas)], runtime)
    orders, heard = (3, 0, 2), {r: [] for r in range(replicas)}
    with boxes.open():
        assert len(replica_threads()) == replicas
        for order in orders:
            for replica in range(replicas):
                boxes.send(replica, order)
        for _ in range(sum(orders) * replicas):
            replica, *rest = boxes.receive()
            heard[replica].append(tuple(rest))
    want = [(order, k) for order in orders for k in range(order)]
    assert heard == {r: want for r in range(replicas)}


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_error_is_a_message_and_the_replica_goes_on(kind):
    """Whatever is raised: a thread that died in silence would be waited for for ever."""

    def obey(order):
        if order == "fail":
            raise kind("no")
        yield order

    boxes = Mailboxes([obey], dbjax.Threads())
    with boxes.open():
        boxes.send(0, "fail")
        boxes.send(0, "go on")
        failed = boxes.receive()
        assert (failed.replica, failed.order) == (0, "fail")
        assert isinstance(failed, Failed) and isinstance(failed.error, kind)
        assert boxes.receive() == "go on"


def test_what_was_said_before_an_error_is_heard():
    def obey(order):
        yield order
        raise ValueError

    boxes = Mailboxes([obey], dbjax.Threads())
    with boxes.open():
        boxes.send(0, "first")
        assert boxes.receive() == "first"
        assert isinstance(boxes.receive(), Failed)


@pytest.mark.parametrize("raises", [False, True])
def test_on_leaving_the_threads_have_stopped_and_orders_not_begun_are_left(raises):
    begun, goes_on = threading.Event(), threading.Event()
    done = []

    def obey(order):
        begun.set()
        goes_on.wait()
        done.append(order)
        return ()

    boxes = Mailboxes([obey, obey], dbjax.Threads())

    def leave():
        with boxes.open():
            boxes.send(0, "first")
            boxes.send(0, "second")
            begun.wait()
            # Seen by the thread no sooner than the end of its first order.
            boxes._stopped = True
            goes_on.set()
            if raises:
                raise KeyError("the coordinator's own")

    if raises:
        with pytest.raises(KeyError):
            leave()
    else:
        leave()
    assert done == ["first"]
    assert not replica_threads()
