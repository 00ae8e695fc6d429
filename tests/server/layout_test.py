"""Layout: any tree on any number of shards; split and merge are each other's inverse."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dbjax.server import layout as layout_lib
from dbjax.server.layout import Layout

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def leaf(rng, shape, dtype=np.float32):
    """Every element another one, as far as the dtype can tell them apart."""
    return rng.permutation(math.prod(shape)).reshape(shape).astype(dtype)


def random_tree(rng, most=40):
    """A tree of 1 to 7 numpy leaves of rank 0 to 4, nested at random."""
    leaves = []
    for _ in range(rng.integers(1, 8)):
        rank = int(rng.integers(0, 5))
        shape = tuple(rng.integers(1, max(3, most >> rank), rank).tolist())
        leaves.append(leaf(rng, shape, DTYPES[rng.integers(len(DTYPES))]))
    cut = rng.integers(0, len(leaves) + 1)
    return {"a": leaves[:cut], "b": {"c": tuple(leaves[cut:]), "none": None}}


def shard_counts(rng, tree):
    """One shard, a few, a random number, and one shard for every parameter."""
    total = sum(x.size for x in jax.tree.leaves(tree))
    some = {1, 2, 3, 4, 6, 8, int(rng.integers(1, total + 1)), total}
    return sorted(n for n in some if n <= min(total, 100))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def placed(layout, parts):
    """Merge by hand: put each box where it says it belongs; each element once."""
    whole = [np.zeros(s, d) for s, d in zip(layout.shapes, layout.dtypes, strict=True)]
    times = [np.zeros(shape, int) for shape in layout.shapes]
    for boxes, part in zip(layout.boxes, parts, strict=True):
        held = layout.treedef.flatten_up_to(part)
        there = [i for i, each in enumerate(held) if each is not None]
        assert there == [box.leaf for box in boxes], "what is not held is None"
        for box in boxes:
            at = tuple(map(slice, box.start, box.stop))
            for target, value in ((whole, held[box.leaf]), (times, 1)):
                target = target[box.leaf]
                if len(box.start) != target.ndim:
                    target = target.reshape(-1)
                target[at] += value
    for count in times:
        np.testing.assert_array_equal(count, 1)
    return jax.tree.unflatten(layout.treedef, whole)


@pytest.fixture
def eager(monkeypatch):
    """Merge with numpy: XLA would compile each of hundreds of shapes."""
    monkeypatch.setattr(layout_lib.jnp, "concatenate", np.concatenate)


@pytest.mark.parametrize("seed", range(40))
def test_random_trees(seed, eager):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng)
    total = sum(x.size for x in jax.tree.leaves(tree))
    for shards in shard_counts(rng, tree):
        layout = Layout.of(tree, shards)
        parts = layout.split(tree)
        assert len(parts) == layout.shards == shards
        assert_same(placed(layout, parts), tree)
        assert_same(layout.merge(parts), tree)
        assert_same(layout.split(layout.merge(parts)), parts)
        mean = total / shards
        assert sum(layout.sizes) == total and min(layout.sizes) > 0
        assert max(layout.sizes) <= max(1.1 * mean, math.ceil(mean))
        held = [sum(x.size for x in jax.tree.leaves(part)) for part in parts]
        nbytes = [sum(x.nbytes for x in jax.tree.leaves(part)) for part in parts]
        assert held == list(layout.sizes) and nbytes == list(layout.nbytes)


@pytest.mark.parametrize("seed", range(15))
def test_random_trees_of_whole_leaves(seed, eager):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng)
    leaves = jax.tree.leaves(tree)
    for shards in range(1, len(leaves) + 1):
        layout = Layout.of(tree, shards, "leaf")
        parts = layout.split(tree)
        assert_same(placed(layout, parts), tree)
        assert_same(layout.merge(parts), tree)
        assert min(layout.sizes) > 0
        held = sorted(x.shape for part in parts for x in jax.tree.leaves(part))
        assert held == sorted(x.shape for x in leaves)
        # Greedy, largest first: at most 4/3 of the best possible, which is no less
        # than the mean and the largest leaf. The bound of one leaf more holds anyhow.
        largest = max(x.size for x in leaves)
        assert max(layout.sizes) <= sum(layout.sizes) / shards + largest


@pytest.mark.parametrize("seed", range(3))
def test_split_and_merge_in_a_jitted_function(seed):
    rng = np.random.default_rng(100 + seed)
    tree = random_tree(rng)
    for shards in shard_counts(rng, tree)[1:4]:
        layout = Layout.of(tree, shards)
        parts = jax.jit(layout.split)(tree)
        assert_same(parts, layout.split(tree))
        assert_same(jax.jit(layout.merge)(parts), tree)


NETWORK = {"w": (300, 120), "b": (120,), "out": (120, 10), "scale": ()}


def network():
    rng = np.random.default_rng(0)
    return {name: leaf(rng, shape) for name, shape in NETWORK.items()}


@pytest.mark.parametrize("shards", [2, 3, 4, 5, 7, 8, 10])
def test_slices_keep_path_and_rank(shards):
    """Masks by rank and labels by path mean the same on a shard as on the whole."""
    tree = network()
    for part in Layout.of(tree, shards).split(tree):
        assert set(part) == set(tree)
        for name, held in part.items():
            assert held is None or held.ndim == len(NETWORK[name])


def test_small_leaves_stay_whole_where_large_ones_can_balance():
    tree = network()
    layout = Layout.of(tree, 4)
    pieces = [box.leaf for boxes in layout.boxes for box in boxes]
    b, out, scale = (sorted(tree).index(name) for name in ("b", "out", "scale"))
    assert [pieces.count(i) for i in (b, out, scale)] == [1, 1, 1]


def test_cuts_across_the_last_axis_fill_vector_registers():
    """So that XLA rounds each element on a shard as it does on the whole."""
    layout = Layout.of({"b": np.zeros(1000, np.float32)}, 3)
    starts = [box.start[0] for boxes in layout.boxes for box in boxes]
    assert starts[0] == 0 and all(start % 16 == 0 for start in starts)


def test_one_shard_is_the_tree_itself():
    tree = network()
    layout = Layout.of(tree, 1)
    assert layout.split(tree)[0] is tree and layout.merge((tree,)) is tree


def test_layouts_of_equal_trees_are_equal():
    assert Layout.of(network(), 5) == Layout.of(network(), 5)
    shapes = jax.tree.map(jnp.asarray, network())
    assert Layout.of(shapes, 5) == Layout.of(network(), 5)


@pytest.mark.parametrize(
    ("tree", "shards", "split", "words"),
    [
        ({}, 1, "even", "no arrays"),
        ({"a": None}, 1, "even", "no arrays"),
        ({"a": np.arange(3)}, 1, "even", r"params\['a'\] has dtype int"),
        ({"a": [np.ones(2), np.ones(2, complex)]}, 1, "even", r"\['a'\]\[1\].*complex"),
        ({"a": np.ones(3), "b": np.ones((2, 0))}, 1, "even", r"\['b'\] is empty"),
        ({"a": np.ones(3)}, 4, "even", r"number of parameters \(3\), got 4"),
        ({"a": np.ones(3)}, 2, "leaf", r"number of leaves \(1\), got 2"),
        ({"a": np.ones(3)}, 1, "rows", "'even', 'leaf'.*'rows'"),
    ],
)
def test_bad_input(tree, shards, split, words):
    with pytest.raises(ValueError, match=words):
        Layout.of(jax.tree.map(jnp.asarray, tree), shards, split)
