"""The twins themselves, where a result is known by hand."""

import numpy as np

from dbjax.trace import COMPUTE, DROPPED, FETCH, PUSH, TAKEN, Trace
from tests import textbook


def identity(w, replica, batch):
    return w


def rows(*events):
    """Events as (kind, replica, shard, version, count, id, status)."""
    kind, replica, shard, version, count, id, status = zip(*events, strict=True)
    return Trace.from_columns(
        {"replicas": 2, "shards": 2},
        kind=kind,
        time=np.arange(float(len(kind))),
        replica=replica,
        shard=shard,
        version=version,
        count=count,
        id=id,
        status=status,
        batch=0,
    )


def test_client_order():
    assert textbook.client(3) == 3 * ["fetch", "compute", "push 1"]
    assert textbook.client(5, n_fetch=3, n_push=2) == [
        *("fetch", "compute", "compute", "push 2"),
        *("compute", "fetch", "compute", "push 2", "compute", "push 1"),
    ]


def test_adagrad_by_hand():
    rule = textbook.Adagrad(0.5)
    w = rule(np.zeros(2), np.array([4.0, 0.0]))
    np.testing.assert_allclose(w, [-0.5, 0.0])
    np.testing.assert_allclose(rule(w, np.array([3.0, -9.0])), [-0.8, 0.5])


def test_downpour_of_delays_is_delayed_descent():
    delays = [0, 1, 0, 2, 3, 1, 1]
    start = np.array([1.0, -2.0])
    got = textbook.downpour(
        Trace.from_delays(delays),
        identity,
        start,
        [slice(0, 2)],
        lambda: textbook.Adagrad(0.1),
    )
    want = textbook.delayed(lambda w: w, start, delays, textbook.Adagrad(0.1))
    np.testing.assert_array_equal(got[0], want)


def test_downpour_accrues_steps_locally_and_sees_mixed_versions():
    trace = rows(
        (FETCH, 0, 0, 0, 0, -1, 0),
        (FETCH, 0, 1, 0, 0, -1, 0),
        (COMPUTE, 0, -1, -1, 0, -1, 0),
        (COMPUTE, 0, -1, -1, 0, -1, 0),
        (PUSH, 0, 0, 1, 2, 0, TAKEN),
        (FETCH, 1, 0, 1, 0, -1, 0),
        (FETCH, 1, 1, 0, 0, -1, 0),
        (PUSH, 0, 1, 1, 2, 0, TAKEN),
        (COMPUTE, 1, -1, -1, 0, -1, 0),
        (PUSH, 1, 0, 2, 1, 0, TAKEN),
        (PUSH, 1, 1, 2, 1, 0, DROPPED),
    )
    versions = textbook.downpour(
        trace,
        identity,
        np.array([1.0, 2.0]),
        [slice(0, 1), slice(1, 2)],
        lambda: textbook.sgd(0.25),
        local_rule=textbook.sgd(0.5),
    )
    # Replica 0 sums w and w/2; replica 1 then pushes the 0.625 it fetched.
    assert np.ravel(versions[0]).tolist() == [1.0, 0.625, 0.46875]
    assert np.ravel(versions[1]).tolist() == [2.0, 1.25, 1.25]
    assert textbook.join(versions).tolist() == [0.46875, 1.25]
