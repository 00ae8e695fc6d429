import numpy as np
import pytest

from dbjax.data.shuffle import KEYS, shuffle


def keys(seed):
    return np.random.Philox(seed).random_raw(KEYS)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097])
def test_it_is_a_permutation(count):
    for seed in range(3):
        order = shuffle(np.arange(count), count, keys(seed))
        assert sorted(order) == list(range(count))


def test_a_part_of_the_order_is_that_part_of_the_whole():
    whole = shuffle(np.arange(777), 777, keys(5))
    index = np.array([700, 3, 3, 0, 776])
    np.testing.assert_array_equal(shuffle(index, 777, keys(5)), whole[index])


def test_very_many_numbers_need_no_table():
    count = 2**40 + 12345
    got = shuffle(np.arange(10_000), count, keys(1))
    assert len(set(got.tolist())) == 10_000 and got.min() >= 0 and got.max() < count
    assert abs(got.mean() / count - 0.5) < 0.02  # deviation 0.003


@pytest.mark.parametrize("count", [5, 12, 50])
def test_every_number_is_as_likely_at_every_place(count):
    seen, draws = np.zeros((count, count)), 2_000
    for seed in range(draws):
        seen[np.arange(count), shuffle(np.arange(count), count, keys(seed))] += 1
    expected = draws / count
    freedom = (count - 1) ** 2
    chi = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours():
    """The differences of what follows each other are those of random numbers."""
    order = shuffle(np.arange(10_000), 10_000, keys(0))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    ordered = np.corrcoef(np.arange(10_000), order)[0, 1]
    assert abs(ordered) < 0.05


def test_the_order_is_pinned():
    """Stored traces name batches by (replica, step): a new order would break them."""
    assert shuffle(np.arange(8), 10, np.arange(KEYS)).tolist() == [
        1,
        7,
        8,
        2,
        4,
        9,
        6,
        3,
    ]
