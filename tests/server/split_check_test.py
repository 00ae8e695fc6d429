"""Which rules the split would change, and what is said about them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.server.layout import Layout
from dbjax.server.split_check import check_split


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"w": (48, 32), "b": (32,), "out": (32, 4), "scale": ()}
    return {
        name: jnp.asarray(rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
    }


def check(rule, shards=3, split="even", tree=None, provide=()):
    tree = params() if tree is None else tree
    check_split(rule, tree, Layout.of(tree, shards, split), split, provide)


def by_rank(p):
    return jax.tree.map(lambda x: x.ndim > 1, p)


ELEMENTWISE = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": dbjax.adagrad(0.1),
    "adam": optax.adam(1e-2),
    "adamw, decay by rank": optax.adamw(1e-2, mask=by_rank),
    "rmsprop": optax.rmsprop(1e-2),
    "lion": optax.lion(1e-2),
    "clipped by value": optax.chain(optax.clip(0.5), optax.sgd(0.1)),
    "scheduled": optax.sgd(optax.linear_schedule(0.1, 0.0, 10)),
    "delayed": dbjax.delay_gradients(optax.sgd(0.1), 1),
}
WHOLE_TREE = {
    "global norm 1": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "global norm 1000": optax.chain(optax.clip_by_global_norm(1e3), optax.sgd(0.1)),
    "global norm 1, slow": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-5)),
    "normalized": optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)),
}
WHOLE_LEAF = {
    "lamb": optax.lamb(1e-2),
    "block rms": optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules_pass(name):
    check(ELEMENTWISE[name])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_of_narrow_parameters_is_no_difference(dtype):
    check(optax.adam(1e-2), tree=params(dtype))


@pytest.mark.parametrize("split", ["even", "leaf"])
@pytest.mark.parametrize("name", WHOLE_TREE)
def test_rules_that_see_the_whole_tree_are_found(name, split):
    with pytest.raises(ValueError, match="depends on the split over 3 shards") as error:
        check(WHOLE_TREE[name], split=split)
    words = str(error.value)
    assert "per_shard=True" in words and "shards=1" in words
    assert ('split="leaf"' in words) == (split == "even")


@pytest.mark.parametrize("name", WHOLE_LEAF)
def test_rules_that_see_a_whole_leaf_want_whole_leaves(name):
    with pytest.raises(ValueError, match='split="leaf"'):
        check(WHOLE_LEAF[name])
    check(WHOLE_LEAF[name], split="leaf")


@pytest.mark.parametrize("name", WHOLE_TREE)
def test_one_shard_is_the_whole(name):
    check(WHOLE_TREE[name], shards=1)


def test_large_leaves_are_tried_small():
    tree = {"w": jnp.zeros((4000, 300)), "b": jnp.zeros(300)}
    check(optax.adam(1e-2), shards=7, tree=tree)
    with pytest.raises(ValueError, match="depends on the split"):
        check(optax.lamb(1e-2), shards=7, tree=tree)


def test_more_shards_than_the_small_copy_could_take():
    """The copy that is tried must not be cut more finely than the parameters are."""
    tree = {"w": jnp.zeros((200_000, 2)), "b": jnp.zeros(8)}
    check(optax.adamw(1e-2, mask=by_rank), shards=5000, tree=tree)


def test_flat_runs_have_no_rank():
    """Where shards are too small for slices, a mask by rank is another one there."""
    tree = {
        "a": jnp.ones((7, 9)),
        "b": jnp.ones((4, 1, 3)),
        "c": jnp.ones((2, 2, 2, 2)),
    }
    layout = Layout.of(tree, 4)
    assert any(len(box.start) == 1 for boxes in layout.boxes for box in boxes)
    check(optax.sgd(1e-2), shards=4, tree=tree)
    decay = optax.add_decayed_weights(0.1, by_rank)
    with pytest.raises(ValueError, match="depends on the split"):
        check(decay, shards=4, tree=tree)


def test_fixed_masks_and_labels():
    names = params().keys()
    check(optax.masked(optax.sgd(0.1), {name: name == "w" for name in names}))
    rules = {"w": optax.adam(0.1), "other": optax.sgd(0.1)}
    labels = {name: name if name == "w" else "other" for name in names}
    check(optax.multi_transform(rules, labels))


def test_provided_arguments_reach_the_rule():
    def update(g, state, params=None, *, staleness, stale_params, **extra):
        return jax.tree.map(lambda g, w, old: g / staleness + w - old, g, params,
                            stale_params), state  # fmt: skip

    rule = optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)
    check(rule, provide=("staleness", "stale_params"))
    with pytest.raises(ValueError, match="does not run on a shard's part"):
        check(rule)
