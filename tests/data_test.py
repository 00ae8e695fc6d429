import itertools
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax.data import from_arrays, from_iterators, stack


def numbers(n, **keywords):
    arrays = {"x": np.arange(n), "pair": (np.arange(2.0 * n).reshape(n, 2),)}
    return from_arrays(arrays, **keywords)


def stream(data, replica, steps):
    return [data.batch(replica, step)["x"] for step in range(steps)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 12])
@pytest.mark.parametrize("replica", [0, 5])
def test_an_epoch_sees_every_example_once(batch_size, replica):
    data = numbers(12, batch_size=batch_size, seed=3)
    seen = np.concatenate(stream(data, replica, 12)).reshape(batch_size, 12)
    for epoch in seen:
        assert sorted(epoch) == list(range(12))
    assert batch_size == 1 or (seen[0] != seen[1]).any()


def test_a_batch_depends_on_seed_replica_and_step_alone():
    data, again = (numbers(50, batch_size=8, seed=1) for _ in range(2))
    asked = [(9, 3), (0, 0), (2, 70), (0, 1), (9, 2)]
    for replica, step in asked:
        want = data.batch(replica, step)
        for other in (again, pickle.loads(pickle.dumps(data))):
            got = other.batch(np.int64(replica), np.int32(step))
            jax.tree.map(np.testing.assert_array_equal, got, want)
    other = numbers(50, batch_size=8, seed=2)
    assert (other.batch(0, 0)["x"] != data.batch(0, 0)["x"]).any()
    assert (data.batch(1, 0)["x"] != data.batch(0, 0)["x"]).any()


def test_the_order_is_pinned():
    """Stored traces name batches by (replica, step): a new order would break them."""
    data = numbers(10, batch_size=4, seed=7)
    got = [data.batch(r, s)["x"].tolist() for r, s in ((0, 0), (0, 2), (3, 1))]
    assert got == [[6, 3, 9, 1], [8, 4, 6, 5], [6, 0, 9, 7]]


def test_leaves_stay_aligned_and_numpy():
    batch = numbers(9, batch_size=5).batch(1, 1)
    np.testing.assert_array_equal(batch["pair"][0][:, 0], 2.0 * batch["x"])
    assert batch["pair"][0].shape == (5, 2)
    served = from_arrays(jnp.ones((4, 2), jnp.bfloat16), 2).batch(0, 0)
    assert type(served) is np.ndarray and served.dtype == jnp.bfloat16


def test_a_served_batch_is_nobody_elses():
    data = numbers(4, batch_size=4)
    data.batch(0, 0)["x"][:] = -1
    assert sorted(data.batch(0, 0)["x"]) == [0, 1, 2, 3]


def test_subsets_are_disjoint_and_balanced():
    data = numbers(11, batch_size=2, subsets=3)
    epochs = [set(np.concatenate(stream(data, r, 20)).tolist()) for r in range(6)]
    assert sorted(len(e) for e in epochs[:3]) == [3, 4, 4]
    assert sorted(itertools.chain(*epochs[:3])) == list(range(11))
    assert epochs[:3] == epochs[3:]
    assert (data.batch(0, 0)["x"] != data.batch(3, 0)["x"]).any()


def test_batches_are_the_batches_stacked():
    data = numbers(20, batch_size=6, subsets=2)
    replicas, steps = np.array([0, 1, 1, 7, 0]), np.array([0, 3, 4, 2, 9])
    rows = [data.batch(r, s) for r, s in zip(replicas, steps, strict=True)]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    for got in (data.batches(replicas, steps), stack(data, replicas, steps)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert data.batches([], [])["pair"][0].shape == (0, 6, 2)


def test_threads_see_what_one_thread_sees():
    data, alone = (numbers(64, batch_size=8) for _ in range(2))
    got = {}

    def serve(replica):
        got[replica] = np.stack(stream(data, replica, 50))

    threads = [threading.Thread(target=serve, args=(r,)) for r in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for replica in range(4):
        np.testing.assert_array_equal(got[replica], stream(alone, replica, 50))


@pytest.mark.parametrize(
    ("size", "lengths"), [(None, [4, 4, 2]), (5, [5, 5]), (99, [10])]
)
def test_portions_cut_the_examples_in_order(size, lengths):
    data = numbers(10, batch_size=4, portion_size=size)
    portions = [data.portion(i)["x"] for i in range(data.num_portions)]
    assert [len(p) for p in portions] == lengths
    np.testing.assert_array_equal(np.concatenate(portions), np.arange(10))
    assert data.num_examples == 10
    with pytest.raises(ValueError, match="read-only"):
        portions[0][0] = 1
    with pytest.raises(IndexError, match=f"allowed are 0 to {len(lengths) - 1}"):
        data.portion(len(lengths))


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "batch_size=0", {"batch_size": 0}),
        (TypeError, "batch_size=2.0", {"batch_size": 2.0}),
        (ValueError, "batch_size=11.*10 examples", {"batch_size": 11}),
        (ValueError, "3 subset.s. leave 3", {"batch_size": 4, "subsets": 3}),
        (ValueError, "subsets=0", {"subsets": 0}),
        (ValueError, "portion_size=-1", {"portion_size": -1}),
        (ValueError, "seed=-1", {"seed": -1}),
        (ValueError, "no leaves", {"arrays": {}}),
        (ValueError, r"arrays\['y'\] is a scalar", {"arrays": {"y": 1.0}}),
        (
            ValueError,
            r"differ.*\['x'\].: 3.*\['y'\].: 4",
            {"arrays": {"x": np.ones(3), "y": np.ones(4)}},
        ),
    ],
)
def test_bad_arguments_are_named(error, words, change):
    arguments = {"arrays": np.ones(10), "batch_size": 2} | change
    with pytest.raises(error, match=words):
        from_arrays(**arguments)


def test_bad_replicas_and_steps_are_named():
    data = numbers(4, batch_size=2)
    with pytest.raises(ValueError, match="replica=-1"):
        data.batch(-1, 0)
    with pytest.raises(ValueError, match="step=-2"):
        data.batch(0, -2)
    with pytest.raises(ValueError, match="one length"):
        data.batches([0, 1], [0])
    with pytest.raises(ValueError, match="negative"):
        data.batches([0], [-1])


class Resumable:
    """Counts, and says where it stands, as grain's iterators do."""

    def __init__(self, replica, pack=lambda at: {"at": at}, unpack=lambda s: s["at"]):
        self.replica, self.at, self.pack, self.unpack = replica, 0, pack, unpack

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return np.array([self.replica, self.at - 1])

    def get_state(self):
        return self.pack(self.at)

    def set_state(self, state):
        self.at = self.unpack(state)


MAKERS = {
    "plain": lambda r, n: (np.array([r, step]) for step in itertools.count()),
    "json": lambda r, n: Resumable(r),
    "bytes": lambda r, n: Resumable(r, lambda at: bytes([at]), lambda s: s[0]),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_iterators_are_read_forwards(kind):
    data = from_iterators(MAKERS[kind])
    data.start(3)
    for replica, step in ((0, 0), (2, 0), (0, 1), (0, 1), (0, 4), (2, 1)):
        assert data.batch(replica, step).tolist() == [replica, step]
    with pytest.raises(ValueError, match="replica 0 asked for its batch 3.* at 5"):
        data.batch(0, 3)
    data.start(3)
    assert data.batch(0, 3).tolist() == [0, 3]


@pytest.mark.parametrize("kind", MAKERS)
def test_iterators_resume_where_they_stood(kind):
    data, again = (from_iterators(MAKERS[kind]) for _ in range(2))
    data.start(4)
    for replica, step in ((0, 6), (3, 0)):
        data.batch(replica, step)
    again.set_state(data.get_state())
    for replica, step in ((0, 7), (1, 0), (3, 1)):
        assert again.batch(replica, step).tolist() == [replica, step]
    with pytest.raises(ValueError, match="forwards only"):
        again.batch(0, 6)


def test_the_state_of_iterators_is_honoured_not_replayed():
    made = []
    data = from_iterators(lambda r, n: made.append(Resumable(r)) or made[-1])
    data.start(1)
    data.batch(0, 9)
    data.set_state(data.get_state())
    assert made[1].at == 10 and data.batch(0, 10)[1] == 10


def test_a_loader_may_reuse_its_buffer():
    def make(replica, replicas):
        buffer = np.zeros(1)
        while True:
            yield buffer
            buffer += 1

    data = from_iterators(make)
    data.start(1)
    assert [float(b[0]) for b in [data.batch(0, s) for s in range(3)]] == [0, 1, 2]


def test_iterator_errors_name_replica_and_step():
    data = from_iterators(lambda replica, replicas: [np.ones(1)] * 2)
    with pytest.raises(ValueError, match="start"):
        data.batch(0, 0)
    data.start(2)
    with pytest.raises(ValueError, match="replica=2.*allows 0 to 1"):
        data.batch(2, 0)
    with pytest.raises(ValueError, match="replica 1 ended after 2.*step 5"):
        data.batch(1, 5)
    with pytest.raises(ValueError, match="replicas=0"):
        data.start(0)
    with pytest.raises(TypeError, match="make=3"):
        from_iterators(3)


def test_stack_takes_any_data():
    data = from_iterators(MAKERS["plain"])
    data.start(2)
    got = stack(data, [0, 1, 0], [0, 0, 1])
    np.testing.assert_array_equal(got, [[0, 0], [1, 0], [0, 1]])
    with pytest.raises(ValueError, match="no batches"):
        stack(data, [], [])


@pytest.mark.parametrize("odd", [np.ones(3), np.ones(2, np.int32), (np.ones(2),)])
def test_stack_names_the_batch_whose_shapes_change(odd):
    data = from_iterators(lambda r, n: [np.ones(2), np.ones(2), odd])
    data.start(5)
    with pytest.raises(ValueError, match="replica 4, step 2 has .*replica 4, step 0"):
        stack(data, [4, 4, 4], [0, 1, 2])
