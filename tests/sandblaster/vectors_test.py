"""Named vectors agree with dense numpy wherever they live, and shards keep their word."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dbjax.sandblaster import vector_shard, vectors
from dbjax.sandblaster.messages import (
    Add,
    Added,
    Combine,
    Dots,
    Fence,
    Fenced,
    Get,
    Put,
)
from dbjax.server.layout import Layout

PLAIN_CODE = True

SHAPES = {"w": (7, 5), "b": (5,), "s": ()}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
PLACES = ["in_process", "mesh", 1, 2, 3, 5, SIZE]


def tree(flat):
    """Cut a flat array into the tree."""
    edges = np.cumsum([0] + [int(np.prod(shape)) for shape in SHAPES.values()])
    return {
        name: np.asarray(flat[a:b].reshape(shape))
        for (name, shape), a, b in zip(
            SHAPES.items(), edges[:-1], edges[1:], strict=True
        )
    }


def flat(parts):
    """Lay a tree end to end, in the order of `SHAPES`."""
    return np.concatenate([np.asarray(parts[name]).ravel() for name in SHAPES])


def make(place):
    zeros = tree(np.zeros(SIZE, np.float32))
    if place == "in_process":
        return vectors.in_process()
    if place == "mesh":
        mesh = jax.make_mesh((1,), ("model",), (jax.sharding.AxisType.Auto,))
        one = NamedSharding(mesh, PartitionSpec())
        return vectors.on_mesh(jax.tree.map(lambda x: jax.device_put(x, one), zeros))
    return vectors.on_shards(Layout.of(zeros, place))


def draw(rng):
    values = rng.standard_normal(SIZE).astype(np.float32)
    values[rng.random(SIZE) < 0.2] = 0.0
    return values


NUMPY = {
    "zero": lambda x: 0 * x,
    "multiply": np.multiply,
    "sign": np.sign,
    "clip": lambda x, low, high: np.minimum(np.maximum(x, low), high),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_random_program_gives_what_dense_numpy_gives(place):
    rng = np.random.default_rng(0)
    ours, theirs = make(place), {}
    names = ["x", "g", "d", "s0", "y0"]
    for name in names:
        theirs[name] = draw(rng)
        ours.put(name, tree(theirs[name]))
    for _ in range(40):
        into = rng.choice(names)
        # Different ones, in a pattern that is always the same and compiles once.
        a, b, c, d, e = (str(name) for name in rng.permutation(names))
        what = rng.integers(4)
        if what == 0:
            coefficients = rng.uniform(-1, 1, 3)
            terms = dict(zip([a, b, c], coefficients.tolist(), strict=True))
            ours.combine(into, terms)
            theirs[into] = sum(v * theirs[name] for name, v in terms.items())
        elif what == 1:
            ours.copy(into, a)
            theirs[into] = theirs[a].copy()
        elif what == 2:
            operation = rng.choice(list(NUMPY))
            args = [a, b, c][: vector_shard.OPERATIONS[operation].vectors]
            ours.elementwise(into, operation, *args)
            theirs[into] = NUMPY[operation](*(theirs[name] for name in args))
        else:
            theirs[into] = draw(rng)
            ours.put(into, tree(theirs[into]))
        pairs = [(a, b), (c, c), (d, a), (b, e)]
        expected = [np.dot(theirs[p].astype(float), theirs[q]) for p, q in pairs]
        size = [np.abs(theirs[p] * theirs[q]).sum() + 1e-30 for p, q in pairs]
        error = np.abs(ours.dots(pairs) - expected) / size
        assert error.max() < 1e-6
    for name in names:
        np.testing.assert_allclose(flat(ours.get(name)), theirs[name], 1e-5, 1e-6)
        assert all(
            leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ours.get(name))
        )


def test_dots_of_float32_stay_sound_where_a_running_sum_does_not():
    n = 3_000_000
    ours = vectors.in_process()
    rng = np.random.default_rng(0)
    a, b = rng.random((2, n), np.float32)
    ours.put("a", a), ours.put("b", b)
    exact = np.dot(a.astype(float), b)
    assert abs(ours.dots([("a", "b")])[0] / exact - 1) < 3e-7
    running = np.cumsum(a * b, dtype=np.float32)[-1]
    assert abs(running / exact - 1) > 1e-5, "or the test shows nothing"


def test_leaves_and_shards_are_added_in_float64():
    """In float32 the small leaf would vanish beside the large one."""
    values = {"large": np.full(4, 2.0**12, np.float32), "small": np.ones(4, np.float32)}
    for ours in (vectors.in_process(), vectors.on_shards(Layout.of(values, 2, "leaf"))):
        ours.put("x", values)
        assert ours.dots([("x", "x")])[0] == 4 * 2.0**24 + 4


def test_dots_in_float64_where_x64_is_enabled():
    with jax.enable_x64():
        ours = vectors.in_process()
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((2, 1000))
        ours.put("a", {"x": a}), ours.put("b", {"x": b})
        ours.combine("c", {"a": 1.0, "b": 1e-12})
        np.testing.assert_allclose(
            ours.dots([("c", "b")]), [(a + 1e-12 * b) @ b], 1e-14
        )
        narrow = rng.random(1000).astype(np.float32)
        ours.put("n", {"x": narrow})
        np.testing.assert_allclose(
            ours.dots([("n", "n")]),
            [narrow.astype(float) @ narrow.astype(float)],
            1e-15,
        )


def test_history_may_be_bfloat16_and_is_summed_in_float32():
    ours = vectors.in_process()
    a = np.random.default_rng(0).random(4096, np.float32)
    ours.put("a", {"x": a})
    ours.copy("h", "a", "bfloat16")
    assert ours.get("h")["x"].dtype == jnp.bfloat16
    assert ours.get("a")["x"].dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(a, jnp.bfloat16), float)
    np.testing.assert_allclose(ours.dots([("h", "a")]), [rounded @ a], 1e-6)
    ours.combine("d", {"a": 1.0, "h": -1.0})
    np.testing.assert_allclose(ours.get("d")["x"], a - rounded, atol=1e-7)
    ours.combine("h", {"h": 1.0, "a": 1.0})
    assert ours.get("h")["x"].dtype == jnp.bfloat16, "as the first one named"


def test_what_is_not_finite_is_seen_and_can_be_zeroed():
    ours = vectors.on_shards(Layout.of({"x": np.ones(4)}, 2))
    ours.put("x", {"x": np.array([1.0, np.nan, np.inf, 0.0], np.float32)})
    assert np.isnan(ours.dots([("x", "x")])[0])
    ours.elementwise("x", "zero", "x")
    assert ours.dots([("x", "x")])[0] == 0.0


def test_a_vector_is_a_copy_of_what_was_put_and_is_never_written_to():
    for ours in (make("in_process"), make("mesh"), make(2)):
        values = tree(np.ones(SIZE, np.float32))
        ours.put("x", values)
        values["w"][:] = 5.0
        seen = ours.get("x")
        ours.combine("x", {"x": 3.0})
        np.testing.assert_array_equal(flat(seen), 1.0)
        np.testing.assert_array_equal(flat(ours.get("x")), 3.0)


def test_a_history_that_turns_round_compiles_once():
    """The names change from one iteration to the next, the pattern does not."""
    kernels, state = vector_shard.KERNELS, vector_shard.VectorsState()
    compiled = kernels.dots._cache_size(), kernels.combine._cache_size()
    for name in ("g", "s0", "s1", "s2"):
        put = Put(name, {"of a shape that no other test has": jnp.ones((3, 1, 4))})
        state, _ = vector_shard.handle(state, put)
    for first in range(3):
        order = [f"s{(first + i) % 3}" for i in range(3)]
        dots = Dots(tuple((name, "g") for name in order))
        combine = Combine("d", (*order, "g"), (1.0 + first, 2.0, 3.0, 4.0))
        for message in (dots, combine):
            state, _ = vector_shard.handle(state, message)
    now = kernels.dots._cache_size(), kernels.combine._cache_size()
    assert now == (compiled[0] + 1, compiled[1] + 1)


def test_a_push_is_added_once_and_never_after_the_fence():
    state, _ = vector_shard.handle(vector_shard.VectorsState(), Put("g", jnp.zeros(2)))

    def tell(message):
        nonlocal state
        state, reply = vector_shard.handle(state, message)
        return reply

    one = jnp.ones(2)
    assert tell(Add("g", one, replica=3, life=1, id=0)) == Added(True, 1)
    assert tell(Add("g", one, 3, 1, 0)) == Added(False, 1), "a repetition"
    assert tell(Add("g", one, 3, 1, 4)) == Added(True, 2), (
        "those between went elsewhere"
    )
    assert tell(Add("g", one, 5, 1, 0)) == Added(True, 3), "another replica"
    assert tell(Fence(3, 1)) == tell(Fence(3, 1)) == Fenced(5)
    assert tell(Add("g", one, 3, 1, 5)) == Added(False, 3), "from the dead"
    assert tell(Add("g", one, 3, 2, 0)) == Added(True, 4), "a new life"
    assert tell(Fence(7, 1)) == Fenced(0), "never heard of"
    assert tell(Add("g", one, 7, 1, 0)) == Added(False, 4)
    np.testing.assert_array_equal(tell(Get("g")), [4.0, 4.0])


def test_wrong_commands_are_errors():
    ours = make(2)
    ours.put("x", tree(np.ones(SIZE, np.float32)))
    with pytest.raises(KeyError, match="no vector 'y'; there are .'x'"):
        ours.dots([("x", "y")])
    with pytest.raises(KeyError, match="no operation 'cube'"):
        ours.elementwise("x", "cube", "x")
    with pytest.raises(ValueError, match="takes 2 vectors and 0 numbers"):
        ours.elementwise("x", "multiply", "x")
    with pytest.raises(ValueError, match="one or more vectors"):
        ours.combine("x", {})
    with pytest.raises(ValueError, match="NamedSharding on one mesh"):
        vectors.on_mesh({"x": jnp.ones(3)})


@pytest.mark.multidevice
def test_on_several_devices_inner_products_are_one_all_reduce():
    """In a process of its own, as this one may have a single device by now."""
    script = pathlib.Path(__file__).with_name("mesh_check.py")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["all-reduces", "1", "error", "small"]
