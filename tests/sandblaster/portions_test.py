"""Handing out portions: by hand, and in a world where anything may go wrong."""

import numpy as np
import pytest

from dbjax.sandblaster.batches import mean
from dbjax.sandblaster.messages import (
    Compute,
    Died,
    Done,
    Drop,
    Finished,
    Forget,
    Joined,
    Keep,
    Push,
    Pushed,
)
from dbjax.sandblaster.portions import Portions
from tests.sandblaster.world import World


def started(portions, replicas, **keywords):
    """A desk with everybody there, and the first orders by replica."""
    desk = Portions(portions, replicas, **keywords)
    for replica in range(replicas):
        assert desk.handle(Joined(replica)) == []
    return desk, desk.begin()


def finish(desk, order):
    """The replica finishes what it was ordered to compute."""
    return desk.handle(Finished(order.replica, order.life, order.task))


def portions_of(orders):
    return {o.replica: o.portion for o in orders if isinstance(o, Compute)}


# By hand.


def test_a_replica_stays_in_its_own_range_and_knows_what_comes_next():
    desk, orders = started(portions=12, replicas=3)
    assert portions_of(orders) == {0: 0, 1: 4, 2: 8}
    assert [o.upcoming for o in orders] == [1, 5, 9]
    first = orders[1]
    keep, second = finish(desk, first)
    assert keep == Keep(1, 1, 4)
    assert (second.portion, second.upcoming) == (5, 6)


def test_an_empty_range_is_filled_from_the_one_with_most_left():
    desk, orders = started(portions=24, replicas=3, push_every=100)
    mine, its = orders[0], orders[1]
    _, its = finish(desk, its)  # 1 has 10..15 left, 2 has 17..23
    for _ in range(7):
        mine = finish(desk, mine)[-1]
    assert mine.portion == 7
    _, mine = finish(desk, mine)
    assert (mine.portion, mine.upcoming) == (20, 21), "the upper half of 17..23"
    assert desk.info.steals == 1
    for expected in (21, 22, 23):
        _, mine = finish(desk, mine)
        assert mine.portion == expected
    _, mine = finish(desk, mine)
    assert mine.portion == 13, "the upper half of 10..15"


def test_backups_begin_with_the_one_outstanding_longest_and_the_first_to_finish_counts():
    desk, (slow, middle, fast) = started(portions=3, replicas=3, copies=2)
    assert finish(desk, fast) == [Keep(2, 1, 2), Push(2, 1, 0, (2,))]
    orders = finish(desk, middle)
    assert orders == [
        Keep(1, 1, 1),
        Push(1, 1, 0, (1,)),
        Compute(1, 1, 1, 0, portion=0, upcoming=-1, copy=1),
    ]
    backup = orders[-1]
    assert len(finish(desk, middle)) == 0, "said twice"
    assert finish(desk, backup) == [Keep(1, 1, 0), Push(1, 1, 1, (0,))]
    assert desk.handle(Pushed(2, 1, 0)) == desk.handle(Pushed(1, 1, 0)) == []
    assert desk.handle(Pushed(1, 1, 0)) == [], "said twice"
    assert desk.handle(Pushed(1, 1, 1)) == [Done(0)]
    orders = desk.begin()
    assert portions_of(orders) == {1: 1, 2: 2}, "the slow one is not back yet"
    late = finish(desk, slow)
    assert late[0] == Drop(0, 1, 0)
    assert portions_of(late) == {0: 0}, "and joins in the next evaluation"


def test_what_is_not_overdue_has_no_backup():
    """The others wait: who computes what nobody needs is late the next time."""
    desk, orders = started(portions=16, replicas=8)
    orders = [finish(desk, order)[-1] for order in orders]
    for order in orders[:6]:
        assert not portions_of(finish(desk, order))
    assert portions_of(finish(desk, orders[6])) == {6: 15}, "the last may be too late"


def test_a_portion_is_overdue_when_others_would_have_finished_it():
    desk, (slow, *orders) = started(portions=12, replicas=8)
    finished = 0
    while not desk.info.backups:
        new = finish(desk, orders.pop(0))
        orders += [order for order in new if isinstance(order, Compute)]
        finished += 1
    assert orders[-1].portion == slow.portion and orders[-1].copy == 1
    assert finished == 10, "8 by everyone, and half of the 2 outstanding are allowed"


def test_a_second_copy_rescues_a_slow_first_one():
    desk, orders = started(portions=80, replicas=80)
    for order in orders[4:-1]:
        finish(desk, order)
    new = finish(desk, orders[-1])
    first = {o.portion: o for o in new if isinstance(o, Compute)}
    assert list(first) == [0, 1, 2, 3], "the last twentieth"
    assert not portions_of(finish(desk, first[1]) + finish(desk, first[2]))
    again = [o for o in finish(desk, first[3]) if isinstance(o, Compute)]
    assert [(o.portion, o.copy) for o in again] == [(0, 2)]
    assert finish(desk, again[0])[0] == Keep(again[0].replica, 1, 0)


def test_no_portion_has_more_copies_than_allowed():
    desk, orders = started(portions=4, replicas=4, copies=2)
    got = [portions_of(finish(desk, order)) for order in orders[1:]]
    assert got == [{}, {}, {3: 0}]
    desk, orders = started(portions=4, replicas=4, copies=1)
    for order in orders[1:]:
        assert not portions_of(finish(desk, order))


def test_sums_are_sent_every_few_portions():
    desk, (order,) = started(portions=7, replicas=1, push_every=3)
    pushes = []
    for _ in range(7):
        orders = finish(desk, order)
        pushes += [o.portions for o in orders if isinstance(o, Push)]
        order = orders[-1]
    assert pushes == [(0, 1, 2), (3, 4, 5), (6,)]


def test_who_computes_what_has_a_backup_sends_what_it_holds():
    """Else the batch would wait for a sum that the slow replica could send now."""
    desk, (slow, fast) = started(portions=4, replicas=2, push_every=100)
    _, slow = finish(desk, slow)
    _, fast = finish(desk, fast)
    orders = finish(desk, fast)
    assert orders == [
        Keep(1, 1, 3),
        Push(1, 1, 0, (2, 3)),
        Push(0, 1, 0, (0,)),
        Compute(1, 1, 2, 0, portion=1, upcoming=-1, copy=1),
    ]


def test_what_a_dead_replica_had_not_landed_goes_back():
    desk, (order, other) = started(portions=8, replicas=2, shards=2, push_every=2)
    for _ in range(3):
        order = finish(desk, order)[-1]
    # Pushed 0 and 1, holds 2, computes 3; both shards have added the push.
    assert desk.handle(Died(0, 1, landed=(1, 1))) == []
    assert desk.counted == 2 and desk.info.returned == 2
    got = []
    for _ in range(6):
        orders = finish(desk, other)
        other = orders[-1]
        got += portions_of(orders).values()
    assert sorted([4, *got]) == [2, 3, 4, 5, 6, 7]


def test_a_push_that_only_some_shards_have_added_is_repaired_on_the_others():
    desk, (order, other) = started(portions=6, replicas=2, shards=3, push_every=2)
    order = finish(desk, order)[-1]
    finish(desk, order)
    desk.handle(Died(0, 1, landed=(1, 0, 1)))
    assert desk.counted == 0 and desk.info.repaired == 2
    pushes = []
    for _ in range(6):
        orders = finish(desk, other)
        pushes += [(o.portions, o.shards) for o in orders if isinstance(o, Push)]
        if isinstance(orders[-1], Compute):
            other = orders[-1]
    alone = [push for push in pushes if push[1] is not None]
    assert alone == [((0,), (1,)), ((1,), (1,))]
    assert sorted(p for portions, _ in pushes for p in portions) == list(range(6))


def test_whoever_was_declared_dead_is_told_to_forget():
    desk, (order, _) = started(portions=6, replicas=2)
    desk.handle(Died(0, 1, landed=(0,)))
    assert finish(desk, order) == [Forget(0, 1)]
    assert desk.handle(Pushed(0, 1, 0)) == [Forget(0, 1)]
    (again,) = desk.handle(Joined(0))
    assert again.life == 2
    assert finish(desk, order) == [Forget(0, 1)], "from its former life"
    assert desk.handle(Died(0, 1, landed=(0,))) == [], "said twice"
    assert finish(desk, again)[0] == Keep(0, 2, again.portion)
    with pytest.raises(ValueError, match="never declared dead"):
        desk.handle(Joined(0))


def test_static_splitting_helps_nobody():
    desk, (order, _) = started(portions=4, replicas=2, steal=False, copies=1)
    orders = finish(desk, finish(desk, order)[-1])
    assert orders == [Keep(0, 1, 1), Push(0, 1, 0, (0, 1))]


def test_begin_waits_for_the_last_evaluation():
    desk, _ = started(portions=2, replicas=1)
    with pytest.raises(RuntimeError, match="0 of 2 portions"):
        desk.begin()


@pytest.mark.parametrize(
    "name", ["portions", "replicas", "shards", "push_every", "copies"]
)
def test_nothing_may_be_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Portions(**{"portions": 3, "replicas": 2, name: 0})


# In the world.


@pytest.mark.parametrize("seed", range(100))
def test_every_portion_counts_exactly_once_whatever_happens(seed):
    """Backups, slow and dead replicas, wrong suspicions, repeated messages, restarts."""
    rng = np.random.default_rng(seed)
    replicas, portions = int(rng.integers(1, 7)), int(rng.integers(1, 30))
    desk = Portions(
        portions,
        replicas,
        int(rng.integers(1, 4)),
        push_every=int(rng.integers(1, 6)),
        copies=int(rng.integers(1, 4)),
        steal=bool(rng.random() < 0.8),
    )
    slow = [r for r in range(replicas) if rng.random() < 0.2]
    chaos = float(rng.choice([0.0, 0.02, 0.1]))
    world = World(seed, desk, chaos, slow, save=bool(seed % 2))
    for _ in range(3):
        np.testing.assert_array_equal(world.evaluate(), 1.0)
    # The value counts each portion once as well.
    examples = np.arange(1, portions + 1)
    expected = np.sum(examples * np.arange(portions)) / examples.sum()
    assert mean(examples.tolist(), world.desk.values) == expected


def test_the_world_is_as_bad_as_it_says():
    """The law above would be worth little if nothing happened in it."""
    total = np.zeros(6, int)
    deaths = 0
    for seed in range(30):
        desk = Portions(24, 5, shards=3, push_every=2)
        world = World(seed, desk, chaos=0.05, slow=(0,))
        world.evaluate()
        total += np.array(world.desk.info)
        deaths += world.deaths
    pushes, steals, backups, dropped, returned, repaired = total
    assert min(steals, backups, dropped, returned, repaired) >= 10
    assert deaths > 50


@pytest.mark.parametrize("seed", range(5))
def test_saving_and_restoring_changes_nothing(seed):
    """Restored between any two messages, it gives the same orders to the end."""
    infos = []
    for save in (False, True):
        world = World(seed, Portions(20, 4, 2, push_every=3), 0.05, (1,), save=save)
        world.evaluate(), world.evaluate()
        infos.append((world.desk.save(), world.deaths))
    assert infos[0] == infos[1]


def test_a_value_that_is_not_finite_is_said():
    desk, (order,) = started(portions=1, replicas=1)
    desk.handle(Finished(0, 1, 0, value=float("inf")))
    assert mean([3], desk.values) == float("inf")
