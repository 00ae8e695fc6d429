"""One shard: pure messages in and out, versions that nobody writes to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dbjax
from dbjax.server.layout import Layout
from dbjax.server.messages import Fetch, Fetched, Push, Pushed
from dbjax.server.shard import make_shard
from tests import textbook

START = np.array([1.0, -2.0, 0.5, 0.0], np.float32)


def push(gradient, base=0, number=0, **more):
    return Push(0, number, number, {"w": jnp.asarray(gradient)}, base, **more)


def tree(values=START):
    return {"w": jnp.array(values)}


def test_fetch_gives_the_newest_version_and_changes_nothing():
    shard = make_shard(optax.sgd(0.5))
    state = shard.init(tree())
    same, reply = shard.handle(state, Fetch(3, 0))
    assert same is state
    assert isinstance(reply, Fetched) and reply.version == 0
    np.testing.assert_array_equal(reply.params["w"], START)
    state, reply = shard.handle(state, push(np.ones(4)))
    assert reply == Pushed(1)
    _, reply = shard.handle(state, Fetch(3, 1))
    assert reply.version == 1
    np.testing.assert_array_equal(reply.params["w"], START - 0.5)


def test_a_version_that_someone_sees_is_never_written_to():
    shard = make_shard(optax.sgd(0.1, momentum=0.9))
    state, seen = shard.init(tree()), []
    for number in range(6):
        state, _ = shard.handle(state, push(np.full(4, 1.0 + number), number, number))
        seen.append((state.params["w"], np.array(state.params["w"])))
    for published, then in seen:
        np.testing.assert_array_equal(published, then)


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("recycle", [False, True])
def test_equals_the_textbook_with_and_without_recycling(rule, recycle):
    optimizer, twin = {
        "sgd": (optax.sgd(0.1), textbook.sgd(0.1)),
        "adagrad": (dbjax.adagrad(0.1), textbook.Adagrad(0.1)),
    }[rule]
    rng = np.random.default_rng(0)
    shard = make_shard(optimizer)
    state, w, spare = shard.init(tree()), START.astype(np.float64), None
    for number in range(10):
        gradient = rng.standard_normal(4).astype(np.float32)
        gradient[number % 4] = 0
        old = state.params
        state, _ = shard.handle(state, push(gradient, number, number), spare=spare)
        spare = old if recycle else None
        w = twin(w, gradient.astype(np.float64))
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5, atol=1e-6)


def test_a_spare_is_consumed_and_nothing_else_of_the_parameters():
    shard = make_shard(optax.sgd(0.5))
    first = shard.init(tree())
    second, _ = shard.handle(first, push(np.ones(4)))
    spare = tree(np.full(4, 7.0, np.float32))
    third, _ = shard.handle(second, push(np.ones(4), 1, 1), spare=spare)
    assert spare["w"].is_deleted()
    np.testing.assert_array_equal(first.params["w"], START)
    np.testing.assert_array_equal(second.params["w"], START - 0.5)
    np.testing.assert_array_equal(third.params["w"], START - 1.0)


def test_a_rejected_push_counts_a_version_and_keeps_everything():
    shard = make_shard(dbjax.adagrad(0.1))
    state, _ = shard.handle(shard.init(tree()), push(np.ones(4)))
    after, reply = shard.handle(state, push(np.full(4, np.nan), 1, 1, taken=False))
    assert reply == Pushed(2) and after.version == 2
    assert after.params is state.params
    assert after.optimizer_state is state.optimizer_state
    assert after.incarnation == state.incarnation


def spy():
    """A rule that moves the parameters by what it was provided with."""

    def update(g, state, params=None, **extra):
        moves = jax.tree.map(jnp.zeros_like, params)
        if "staleness" in extra:
            moves = jax.tree.map(lambda m: m + extra["staleness"], moves)
        if "stale_params" in extra:
            moves = jax.tree.map(jnp.add, moves, extra["stale_params"])
        return moves, len(extra)

    return optax.GradientTransformationExtraArgs(lambda params: 0, update)


@pytest.mark.parametrize("provide", [(), ("staleness",), ("stale_params",)])
def test_provides_what_is_asked_for_and_no_more(provide):
    shard = make_shard(spy(), provide)
    state = shard.init(tree())
    for number in range(3):
        state, _ = shard.handle(
            state, push(np.ones(4), number, number, stale_params=tree())
        )
    before = np.array(state.params["w"])
    old = tree(np.full(4, 10.0, np.float32))
    state, _ = shard.handle(state, push(np.ones(4), 1, 3, stale_params=old))
    moved = {(): 0, ("staleness",): 2, ("stale_params",): 10}[provide]
    np.testing.assert_allclose(state.params["w"] - before, moved, rtol=1e-6)
    assert int(state.optimizer_state) == len(provide)


@pytest.mark.parametrize("provide", ["staleness", ("stale",), ("staleness", "version")])
def test_cannot_provide_what_no_shard_has(provide):
    with pytest.raises(ValueError, match="provide must be a tuple among"):
        make_shard(optax.sgd(0.1), provide)


def masked_decay():
    """Weight decay on matrices only, chosen by rank."""
    decay = optax.add_decayed_weights(
        0.1, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )
    return optax.chain(decay, optax.sgd(0.1))


def labelled():
    """Another rule for each leaf, chosen by path."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "slow" if "b" in jax.tree_util.keystr(path) else "fast",
            params,
        )

    rules = {"slow": optax.sgd(0.01), "fast": dbjax.adagrad(0.1)}
    return optax.multi_transform(rules, labels)


@pytest.mark.parametrize("make", [masked_decay, labelled])
@pytest.mark.parametrize(("shards", "split"), [(3, "even"), (2, "leaf")])
def test_masks_and_labels_work_on_a_shard_as_on_the_whole(make, shards, split):
    rng = np.random.default_rng(0)
    shapes = {"a": (40, 16), "b": (16,), "c": [(16, 8), (8,)]}

    def draw():
        return jax.tree.map(
            lambda shape: rng.standard_normal(shape).astype(np.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    start, gradients = draw(), [draw() for _ in range(3)]
    layout, shard = Layout.of(start, shards, split), make_shard(make())

    def train(parts, pushes):
        states = [shard.init(part) for part in parts]
        for number, push in enumerate(pushes):
            messages = [Push(0, number, number, part, number) for part in push]
            states = [
                shard.handle(state, message)[0]
                for state, message in zip(states, messages, strict=True)
            ]
        return tuple(state.params for state in states)

    own = jax.tree.map(jnp.array, start)
    (whole,) = train((own,), [(g,) for g in gradients])
    split_start = tuple(jax.tree.map(jnp.array, part) for part in layout.split(start))
    parts = train(split_start, [layout.split(g) for g in gradients])
    jax.tree.map(np.testing.assert_array_equal, layout.merge(parts), whole)
