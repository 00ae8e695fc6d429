"""The ticket desk, asked by hand: counter, warm start and protocol in one."""

import copy

import numpy as np
import pytest

import dbjax
from dbjax.downpour.tickets import WAIT, Tickets


def entered(replicas, *args, **keywords):
    desk = Tickets(*args, **keywords)
    for replica in range(replicas):
        desk.enter(replica)
    return desk


def test_all_replicas_share_one_counter():
    desk = entered(3, 5, dbjax.asynchronous())
    assert [desk.ask(r) for r in (2, 0, 0, 1, 2, 1, 2)] == [0, 1, 2, 3, 4, None, None]


def test_goes_on_from_a_checkpoint():
    desk = entered(2, 8, dbjax.asynchronous(), warmstart_steps=3, first=6)
    assert [desk.ask(1), desk.ask(0), desk.ask(1)] == [6, 7, None]


def test_warm_start_is_replica_0_alone():
    desk = entered(3, 6, dbjax.asynchronous(), warmstart_steps=2)
    assert desk.ask(1) == WAIT and desk.ask(0) == 0 and desk.ready([1, 2]) == []
    desk.done(0)
    assert desk.ask(2) == WAIT and desk.ask(0) == 1
    assert desk.ask(0) == WAIT, "the last warm step is not finished yet"
    assert desk.ask(1) == WAIT
    desk.done(0)
    assert desk.ready([1, 2]) == [1, 2]
    assert [desk.ask(r) for r in (1, 2, 0)] == [2, 3, 4]


def test_warm_start_gives_nobody_a_lead():
    """After it, a barrier starts with every replica in the same round."""
    desk = entered(3, 20, dbjax.synchronous(), warmstart_steps=4)
    for _ in range(4):
        assert desk.ask(0) >= 0
        desk.done(0)
    assert [desk.ask(r) for r in range(3)] == [4, 5, 6]
    desk.done(0)
    assert desk.ask(0) == WAIT
    desk.done(1), desk.done(2)
    assert [desk.ask(r) for r in range(3)] == [7, 8, 9]


def test_a_warm_start_longer_than_the_run_is_replica_0s_run():
    desk = entered(2, 3, dbjax.asynchronous(), warmstart_steps=10)
    for step in range(3):
        assert desk.ask(1) == WAIT and desk.ask(0) == step
        desk.done(0)
    assert desk.ask(0) is None and desk.ask(1) is None


def test_a_warm_step_lost_is_a_step_all_the_same():
    desk = entered(2, 6, dbjax.asynchronous(), warmstart_steps=2)
    assert desk.ask(0) == 0
    desk.lost(0), desk.leave(0)
    assert desk.ask(1) == WAIT
    desk.enter(0)
    assert desk.ask(0) == 1
    desk.done(0)
    assert desk.ask(1) == 2


@pytest.mark.parametrize("protocol", [dbjax.asynchronous, dbjax.synchronous])
@pytest.mark.parametrize("seed", range(15))
def test_hands_out_every_step_once_whatever_happens(seed, protocol):
    """Replicas join late, fail and come back; `ready` is `ask` without the asking."""
    rng = np.random.default_rng(seed)
    steps, replicas = 40, 4
    desk = Tickets(steps, protocol(), int(rng.integers(0, 8)))
    away, here, stopped = set(range(replicas)), set(), set()
    working, waiting, given = set(), set(), []
    for _ in range(5000):
        if len(stopped) == replicas:
            break
        replica = int(rng.integers(replicas))
        if replica in waiting:  # until the desk is ready for it
            continue
        if replica in here - working:
            ticket = desk.ask(replica)
            if ticket is None:
                here.remove(replica), stopped.add(replica), desk.leave(replica)
            elif ticket == WAIT:
                waiting.add(replica)
            else:
                given.append(ticket), working.add(replica)
            continue
        if replica in away:
            away.remove(replica), here.add(replica), desk.enter(replica)
        elif replica in working and rng.random() < 0.1:
            working.remove(replica), here.remove(replica), away.add(replica)
            desk.lost(replica), desk.leave(replica)
        elif replica in working:
            working.remove(replica), desk.done(replica)
        answers = {r: copy.deepcopy(desk).ask(r) for r in sorted(waiting)}
        ready = desk.ready(sorted(waiting))
        assert ready == [r for r, answer in answers.items() if answer != WAIT]
        waiting -= set(ready)
        assert desk.finished == len(given) - len(working)
    assert len(stopped) == replicas, "somebody waits for ever"
    assert given == list(range(steps)) and desk.finished == steps
