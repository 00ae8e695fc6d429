"""The replica's state machine, driven by hand: no arrays, threads or clock."""

import itertools
import json

import numpy as np
import pytest

from dbjax.downpour.replica import (
    COMPUTE,
    FETCH,
    PUSH,
    STOP,
    TICKET,
    Periods,
    ReplicaState,
    advance,
    begin,
)
from tests import textbook

PERIODS = list(itertools.product((1, 2, 3, 5), (1, 2, 3, 5)))


def drive(tickets, periods, state=None, saved=False):
    """What a replica asks for, given its tickets; `saved`: state goes through JSON."""
    state = begin() if state is None else state
    order, tickets = [], iter(tickets)
    while state.asked != STOP:
        if state.asked == TICKET:
            state = advance(state, periods, next(tickets, None))
        else:
            word = f"push {state.accrued}" if state.asked == PUSH else state.asked
            order.append(word)
            state = advance(state, periods)
        if saved:
            state = ReplicaState(*json.loads(json.dumps(state)))
    return order, state


@pytest.mark.parametrize(("n_fetch", "n_push"), PERIODS)
@pytest.mark.parametrize("saved", [False, True])
def test_does_what_the_paper_says(n_fetch, n_push, saved):
    for minibatches in range(12):
        order, state = drive(range(minibatches), Periods(n_fetch, n_push), saved=saved)
        assert order == textbook.client(minibatches, n_fetch, n_push)
        assert state.batch == minibatches and state.accrued == 0


def test_no_ticket_no_work():
    assert drive([], Periods())[0] == []


def test_stopped_stays_stopped():
    state = drive([0], Periods())[1]
    assert advance(state, Periods()) == state


def test_numbers_minibatches_and_keeps_its_ticket():
    periods, seen, state = Periods(n_fetch=2, n_push=3), [], begin()
    for ticket in (4, 7, 8, 20):
        assert state.asked == TICKET
        state = advance(state, periods, ticket)
        if state.asked == FETCH:
            assert state.step == ticket
            state = advance(state, periods)
        assert state.asked == COMPUTE
        seen.append((state.batch, state.step))
        state = advance(state, periods)
        if state.asked == PUSH:
            state = advance(state, periods)
    assert seen == [(0, 4), (1, 7), (2, 8), (3, 20)]


def test_overlap_changes_nothing_in_what_is_asked_for():
    for n_fetch, n_push in PERIODS:
        blocking = drive(range(9), Periods(n_fetch, n_push))
        assert blocking == drive(range(9), Periods(n_fetch, n_push, overlap=True))


@pytest.mark.parametrize("seed", range(20))
def test_a_failure_loses_accrued_gradients_and_nothing_else(seed):
    """After a failure a replica fetches first, and goes on with its next minibatch."""
    rng = np.random.default_rng(seed)
    periods = Periods(*rng.integers(1, 5, 2).tolist())
    state, computed, pushed, lost = begin(), 0, 0, 0
    fresh = True
    for ticket in range(60):
        before = state.batch
        state = advance(state, periods, ticket)
        wants = fresh or before % periods.n_fetch == 0
        assert (state.asked == FETCH) == wants
        if state.asked == FETCH:
            state = advance(state, periods)
        fresh = False
        assert state.asked == COMPUTE and state.batch == before
        if rng.random() < 0.15:  # it fails with this minibatch in hand, which is lost
            lost += state.accrued
            state = begin(state._replace(batch=state.batch + 1))
            assert state == ReplicaState(TICKET, before + 1, -1, 0, True)
            fresh = True
            continue
        computed += 1
        state = advance(state, periods)
        if state.asked == PUSH:
            assert state.accrued == periods.n_push
            pushed += state.accrued
            state = advance(state, periods)
        assert state.accrued < periods.n_push
    assert computed == pushed + lost + state.accrued
