import numpy as np
import pytest

from dbjax.cluster import Cluster, Empirical, Exponential
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.program import make_program
from dbjax.downpour.protocol import asynchronous
from dbjax.runtime.emulated import Emulated, order
from dbjax.runtime.network import Message, Network, Push, ahead
from dbjax.runtime.rows import Rows
from dbjax.trace import COMPUTE, FETCH, PUSH, TAKEN


def test_defaults():
    runtime = Emulated()
    assert runtime.cluster == Cluster()
    assert runtime.seed == 0
    assert Emulated(seed=np.int64(3)) == Emulated(Cluster(), 3)


@pytest.mark.parametrize("seed", [-1, 0.5, True, "0", None])
def test_the_seed_is_an_integer(seed):
    with pytest.raises(ValueError, match="seed must be an integer of at least 0; got"):
        Emulated(seed=seed)


def test_the_cluster_is_a_cluster():
    with pytest.raises(TypeError, match="cluster must be a Cluster; got 3"):
        Emulated(3)


def test_the_actor_is_run():
    """What is fetched, computed and pushed is what the actor asks for."""
    program = make_program(Arguments(2, 1, 6, 1, 1, False, 0, asynchronous()))
    asked = []

    def advance(state, periods, ticket=None):
        asked.append(state.asked)
        after = program.advance(state, periods, ticket)
        # An actor of another mind: it never fetches again.
        if after.asked == "fetch" and not after.fresh:
            return after._replace(asked="compute")
        return after

    cluster = Cluster(step_time=1.0)
    columns = order(program._replace(advance=advance), cluster, 0, (0,))
    assert np.sum(columns["kind"] == FETCH) == 2
    assert np.sum(columns["kind"] == COMPUTE) == 6
    assert asked.count("compute") == asked.count("push") == 6
    assert asked.count("ticket") == 8  # two are refused
    assert np.all(columns["base"][columns["kind"] == PUSH] == 0)


def test_draws_ahead_are_the_draws():
    cluster = Cluster(step_time=Exponential(1.0))
    streams = ahead(lambda *block: cluster.compute_times(7, *block), 3)
    expected = cluster.compute_times(7, np.arange(3), 0, 100)
    for replica in (2, 0):
        drawn = [next(streams[replica]) for _ in range(100)]
        np.testing.assert_array_equal(drawn, expected[replica])


def network(cluster: Cluster, **kwargs) -> tuple[Network, Rows]:
    rows = Rows()
    given = {"replicas": 3, "shard_bytes": (0,), "takes": None} | kwargs
    return Network(cluster, 0, rows=rows, **given), rows


def push(step: int = 0) -> Push:
    return Push(step, 1, 0, [0])


def test_a_shard_handles_one_push_at_a_time_in_their_order():
    net, rows = network(Cluster(shard_service=1.0))
    assert net.near
    assert net.push(0, 1, 5.0, push()) == 6.0
    assert net.push(1, 2, 5.5, push()) == 7.0
    assert [row[0] for row in rows.push] == [6.0, 7.0]
    assert [row[2] for row in rows.push] == [5.0, 6.0]
    # Somebody else's fetch sees what is done; each waits for its own push only.
    assert net.fetch(2, 3, 5.75) == (5.75, 3, [0])
    assert net.fetch(2, 4, 6.0) == (6.0, 4, [1])
    assert net.fetch(0, 5, 6.5) == (6.5, 5, [1])
    assert net.fetch(1, 6, 6.5) == (7.0, 6, [2])


def test_a_push_done_at_the_same_time_by_a_later_turn_is_not_seen():
    net, _ = network(Cluster(shard_service=1.0))
    net.push(0, 9, 5.0, push())
    assert net.fetch(2, 4, 6.0) == (6.0, 4, [0])
    assert net.fetch(2, 10, 6.0) == (6.0, 10, [1])


def test_a_shard_that_needs_no_time_keeps_the_order_of_its_rows():
    """A push done at the time of the one before stands after it, whatever its turn."""
    net, rows = network(Cluster(shard_service=Empirical([0.0])))
    net.push(0, 9, 5.0, push())
    net.push(1, 4, 5.0, push())
    assert [row[1] for row in rows.push] == [9, 9]
    assert net.fetch(1, 4, 5.0) == (5.0, 9, [2])


def test_messages_of_one_link_do_not_overtake_each_other():
    net, rows = network(Cluster(latency=1.0, bandwidth=2.0), shard_bytes=(8, 0))
    assert not net.near
    both = Push(0, 1, 0, [0, 0])
    first = Message(0, 1, 0.0, both, -1, 0)
    second = Message(0, 2, 0.5, None, 7, 0)
    assert net.send(first) == [5.0, 1.0]
    assert net.send(second) == [5.0, 1.5]
    for message, shard, now in (
        (first, 1, 1.0),
        (second, 1, 1.5),
        (first, 0, 5.0),
        (second, 0, 5.0),
    ):
        net.arrive(message, shard, now)
    assert (first.open, first.over) == (0, 5.0)
    # The reply with its 8 bytes needs 5 s more.
    assert (second.open, second.over, second.versions) == (0, 10.0, [1, 1])
    assert [row[9] for row in rows.push] == [TAKEN, TAKEN]


def test_rows_are_packed_and_sorted():
    rows = Rows()
    rows.fetch.append((2.0, 3, 1.0, 0, 0, 5, 1))
    rows.compute.append((2.0, 3, 1.0, 0, 4, 2))
    rows.pack()
    rows.push.append((2.0, 3, 2.0, 0, 0, 4, 1, 0, 1, TAKEN, 0))
    rows.compute.append((1.0, 7, 0.5, 1, 3, 0))
    columns = rows.columns((16,))
    assert columns["kind"].tolist() == [COMPUTE, COMPUTE, PUSH, FETCH]
    assert columns["batch"].tolist() == [0, 2, -1, -1]
    assert columns["bytes"].tolist() == [0, 0, 16, 16]
    assert columns["id"].tolist() == [-1, -1, 0, -1]
