import pickle

import jax
import numpy as np
import pytest

from dbjax.data import from_source, stack


class Numbers:
    """Gives the rows themselves."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, rows):
        return {"x": rows, "double": 2.0 * rows}


def stream(data, replica, steps):
    return [data.batch(replica, step)["x"] for step in range(steps)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 12])
@pytest.mark.parametrize("replica", [0, 5])
def test_an_epoch_sees_every_example_once(batch_size, replica):
    data = from_source(Numbers(12), batch_size, seed=3)
    seen = np.concatenate(stream(data, replica, 12)).reshape(batch_size, 12)
    for epoch in seen:
        assert sorted(epoch) == list(range(12))
    assert batch_size == 1 or (seen[0] != seen[1]).any()


def test_a_batch_depends_on_seed_replica_and_step_alone():
    data, again = (from_source(Numbers(50), 8, seed=1) for _ in range(2))
    for replica, step in [(9, 3), (0, 0), (2, 70), (0, 1), (9, 2)]:
        want = data.batch(replica, step)
        for other in (again, pickle.loads(pickle.dumps(data))):
            got = other.batch(np.int64(replica), np.int32(step))
            jax.tree.map(np.testing.assert_array_equal, got, want)
    other = from_source(Numbers(50), 8, seed=2)
    assert (other.batch(0, 0)["x"] != data.batch(0, 0)["x"]).any()
    assert (data.batch(1, 0)["x"] != data.batch(0, 0)["x"]).any()


def test_the_order_is_pinned():
    """Stored traces name batches by (replica, step): a new order would break them."""
    data = from_source(Numbers(10), 4, seed=7, subsets=2)
    got = [data.batch(r, s)["x"].tolist() for r, s in ((0, 0), (1, 1), (3, 1))]
    assert got == [[6, 1, 9, 0], [7, 7, 8, 5], [3, 3, 5, 7]]


@pytest.mark.parametrize("subsets", [1, 2, 3, 11])
def test_subsets_are_disjoint_and_balanced(subsets):
    data = from_source(Numbers(11), 1, subsets=subsets)
    size = -(-11 // subsets)
    epochs = [set(np.concatenate(stream(data, r, size)).tolist()) for r in range(22)]
    assert sum(map(len, epochs[:subsets])) == 11
    assert set().union(*epochs[:subsets]) == set(range(11))
    assert {len(epoch) for epoch in epochs} <= {11 // subsets, size}
    assert epochs[:subsets] == epochs[subsets : 2 * subsets]


def test_portions_are_all_examples_in_order():
    data = from_source(Numbers(10), 2, portion_size=4)
    assert data.num_portions == 3
    portions = [data.portion(i)["x"].tolist() for i in range(3)]
    assert portions == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(IndexError, match="portion 3: allowed are 0 to 2"):
        data.portion(3)
    assert from_source(Numbers(10), 5).num_portions == 2


def test_a_very_large_source_costs_no_memory():
    data = from_source(Numbers(2**40), 128, subsets=200)
    assert data.batch(199, 10**6)["x"].shape == (128,)
    assert len(pickle.dumps(data)) < 500


def test_it_stacks():
    data = from_source(Numbers(20), 6)
    got = stack(data, [0, 1, 7], [3, 4, 2])
    assert got["x"].shape == (3, 6)
    np.testing.assert_array_equal(got["x"][1], data.batch(1, 4)["x"])


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "batch_size=0", {"batch_size": 0}),
        (ValueError, "batch_size=11.*10 examples", {"batch_size": 11}),
        (ValueError, "3 subset.s. leave 3", {"batch_size": 4, "subsets": 3}),
        (ValueError, "subsets=0", {"subsets": 0}),
        (ValueError, "portion_size=-1", {"portion_size": -1}),
        (ValueError, "seed=-1", {"seed": -1}),
    ],
)
def test_bad_arguments_are_named(error, words, change):
    with pytest.raises(error, match=words):
        from_source(**({"source": Numbers(10), "batch_size": 2} | change))


def test_bad_replicas_and_steps_are_named():
    data = from_source(Numbers(4), 2)
    with pytest.raises(ValueError, match="replica=-1"):
        data.batch(-1, 0)
    with pytest.raises(ValueError, match="step=-2"):
        data.batch(0, -2)
