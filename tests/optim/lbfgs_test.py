import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dbjax.optim import lbfgs, linesearch, minimize, scale_by_lbfgs
from dbjax.optim.linesearch import words
from dbjax.optim.status import CONVERGED
from tests import textbook

PLAIN_CODE = True

ZOOM = functools.partial(
    optax.scale_by_zoom_linesearch, 15, initial_guess_strategy="one"
)
SEARCHES = {
    "default": {},
    "backtracking": {"linesearch": linesearch.backtracking()},
    "none": {"linesearch": None},
    "schedule": {"learning_rate": lambda count: 1.0 / (1 + count)},
    "bfloat16": {"history_dtype": jnp.bfloat16},
}


def trees_of(x):
    return {"w": x[:6].reshape(2, 3), "b": [x[6:8], x[8]]}


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def walk(steps, size=9, seed=0, dtype=np.float32, drift=0.3):
    """Random parameters, and gradients of a convex quadratic there."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(size, size))
    matrix = root @ root.T / size + 0.1 * np.eye(size)
    points = np.cumsum(drift * random.normal(size=(steps, size)), axis=0)
    return points.astype(dtype), (points @ matrix).astype(dtype)


RULE = functools.cache(scale_by_lbfgs)  # what is compiled for one test serves all


def directions(rule, points, gradients, tree=trees_of, state=None):
    """The direction at each point, flat, and the last state."""
    update, seen = rule.update, []
    state = rule.init(tree(jnp.array(points[0]))) if state is None else state
    for w, g in zip(points, gradients, strict=True):
        d, state = update(tree(jnp.array(g)), state, tree(jnp.array(w)))
        seen.append(flat(d))
    return np.stack(seen), state


@functools.cache
def of_optax(*arguments):
    rule = optax.scale_by_lbfgs(*arguments)
    return rule._replace(update=jax.jit(rule.update))


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-4), ("float64", 1e-11)])
def test_direction_is_the_dense_inverse_hessian_times_the_gradient(dtype, rtol, scaled):
    m = 3
    with jax.enable_x64(dtype == "float64"):
        points, gradients = walk(9, dtype=dtype)
        order = flat(trees_of(np.arange(9)))  # leaves are not in the vector's order
        got, state = directions(RULE(m, scaled), points, gradients)
        theirs, _ = directions(of_optax(m, scaled), points, gradients)
    np.testing.assert_allclose(got, theirs, rtol=10 * rtol, atol=10 * rtol)
    points, gradients = points[:, order], gradients[:, order]
    points, gradients = points.astype("float64"), gradients.astype("float64")
    for k, g in enumerate(gradients):
        s = list(np.diff(points[: k + 1], axis=0))[-m:]
        y = list(np.diff(gradients[: k + 1], axis=0))[-m:]
        gamma = s[-1] @ y[-1] / (y[-1] @ y[-1]) if s else min(1, 1 / np.linalg.norm(g))
        gamma = gamma if scaled else 1.0
        want = textbook.inverse_hessian(s, y, gamma, 9) @ g
        size = np.abs(want).max()
        np.testing.assert_allclose(textbook.two_loop(s, y, gamma, g), want, rtol=1e-9)
        np.testing.assert_allclose(got[k], want, rtol=rtol, atol=rtol * size)
    counts = state.products
    assert (counts.pairs, counts.skipped, counts.damped, counts.restarts) == (
        m,
        0,
        0,
        0,
    )
    slope = got[-1] @ gradients[-1]
    np.testing.assert_allclose(counts.slope, slope, rtol=10 * rtol)


def test_what_the_products_hold_are_the_products_of_the_history():
    points, gradients = walk(8)
    _, state = directions(RULE(3, True), points, gradients, tree=lambda x: x)
    order = (int(state.products.next) + np.arange(3)) % 3
    s, y = np.asarray(state.s_history)[order], np.asarray(state.y_history)[order]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    close(np.triu(state.products.sy), np.triu(s @ y.T))
    close(state.products.yy, y @ y.T)
    close(state.products.sg, s @ gradients[-1])
    close(state.products.yg, y @ gradients[-1])


def test_direction_turns_with_the_coordinates_and_not_with_the_scale_of_the_value():
    points, gradients = walk(7, size=9)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))
    turn = turn.astype(np.float32)
    rule, whole = RULE(3, True), lambda x: x
    plain, _ = directions(rule, points, gradients, whole)
    turned, _ = directions(rule, points @ turn, gradients @ turn, whole)
    np.testing.assert_allclose(turned, plain @ turn, rtol=1e-3, atol=1e-4)
    scaled, _ = directions(rule, points, 1000 * gradients, whole)
    np.testing.assert_allclose(scaled[1:], plain[1:], rtol=1e-3, atol=1e-4)


def test_small_differences_of_large_gradients_keep_their_digits():
    """`y` is a thousandth of `g`: products made by subtraction still serve."""
    points, gradients = walk(9, drift=1e-3)
    gradients += np.float32(3.0)
    got, _ = directions(RULE(3, True), points, gradients, lambda x: x)
    points, gradients = points.astype("float64"), gradients.astype("float64")
    s, y = list(np.diff(points, axis=0))[-3:], list(np.diff(gradients, axis=0))[-3:]
    gamma = s[-1] @ y[-1] / (y[-1] @ y[-1])
    want = textbook.two_loop(s, y, gamma, gradients[-1])
    np.testing.assert_allclose(got[-1], want, atol=0.02 * np.abs(want).max())


def test_bfloat16_history_is_half_and_its_direction_close():
    points, gradients = walk(9)
    full, _ = directions(RULE(3, True), points, gradients)
    rule = scale_by_lbfgs(3, history_dtype=jnp.bfloat16)
    half, state = directions(rule, points, gradients)
    assert {x.dtype for x in jax.tree.leaves(state.s_history)} == {
        np.dtype(jnp.bfloat16)
    }
    np.testing.assert_allclose(half, full, atol=0.05 * np.abs(full).max())
    assert (np.sum(half * gradients[:, flat(trees_of(np.arange(9)))], 1) > 0).all()


def test_complex_parameters_give_the_direction_of_optax():
    points, gradients = walk(6, size=8)
    as_complex = lambda x: x[:4] + 1j * x[4:]  # noqa: E731
    got, _ = directions(RULE(3, True), points, gradients, as_complex)
    want, _ = directions(of_optax(3), points, gradients, as_complex)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_negative_curvature_is_damped_and_every_direction_descends():
    """Steps of fixed length on a saddle, where optax's directions turn uphill."""
    hessian = jnp.array([1.0, -1.0, 0.5, -2.0])
    rule = scale_by_lbfgs(3)
    update, w = rule.update, jnp.array([1.0, 0.1, -2.0, 0.1])
    state = rule.init(w)
    for _ in range(12):
        d, state = update(hessian * w, state, w)
        assert jnp.vdot(d, hessian * w) > 0
        w = w - 0.3 * d / jnp.linalg.norm(d)
    assert state.products.damped > 0
    assert jnp.isfinite(w).all()
    s, y = state.s_history, state.y_history
    assert (jnp.sum(s * y, axis=1) > 0).all()


def test_a_step_of_nothing_is_skipped():
    points, gradients = walk(5)
    rule = RULE(3, True)
    got, state = directions(rule, points, gradients)
    again, after = directions(rule, points[-1:], gradients[-1:], state=state)
    np.testing.assert_allclose(again[0], got[-1], rtol=1e-5, atol=1e-6)
    assert after.products.skipped == state.products.skipped + 1
    jax.tree.map(np.testing.assert_array_equal, after.s_history, state.s_history)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_passes_and_leaves_no_trace(bad):
    """The next gradient is a direction, the one after it makes a pair again."""
    points, gradients = walk(8)
    broken = gradients.copy()
    broken[5, 0] = bad
    rule = RULE(3, True)
    got, state = directions(rule, points, broken)
    assert not np.isfinite(got[5]).all() or bad == 1e30
    assert np.isfinite(got[6:]).all()
    assert state.products.pairs == 3
    for leaf in jax.tree.leaves((state.s_history, state.y_history)):
        assert jnp.isfinite(leaf).all()
        assert jnp.abs(leaf).max() < 100


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def mixed_loss(params, scale=1.0):
    return scale * sum(
        jnp.sum((x.astype("float32") - 0.5) ** 2 * (1 + i)) + jnp.sum(x**4)
        for i, x in enumerate(jax.tree.leaves(params))
    ).astype("float32")


def mixed_params():
    return {
        "a": jnp.linspace(-1, 1, 6).reshape(2, 3),
        "b": [jnp.ones(2, jnp.bfloat16), jnp.array(2.0, jnp.float32)],
    }


def loop(rule, loss, params, steps, **extra):
    """The optax loop; the parameters, the values and the states."""

    def step(params, state):
        value_and_grad = optax.value_and_grad_from_state(loss)
        value, grad = value_and_grad(params, state=state, **extra)
        updates, state = rule.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, **extra
        )
        return optax.apply_updates(params, updates), state, value

    jitted = jax.jit(step, donate_argnums=1)
    state = rule.init(params)
    states, values = [jax.tree.map(np.asarray, state)], []
    for _ in range(steps):
        params, state, value = jitted(params, state)
        states.append(jax.tree.map(np.array, state))
        values.append(float(value))
    # The state of optax's zoom has weak types at first.
    zooms = optax.tree.get(state, "decrease_error") is not None
    assert jitted._cache_size() == 1 + zooms
    return params, values, states


@pytest.mark.parametrize("name", SEARCHES)
def test_drop_in_for_optax_stable_and_donatable_from_the_first_call(name):
    rule = lbfgs(memory_size=3, **SEARCHES[name])
    params, values, states = loop(rule, mixed_loss, mixed_params(), 6)
    spec = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in states]
    assert all(s == spec[0] for s in spec)
    assert jax.tree.map(lambda x: x.dtype, params)["b"][0] == jnp.bfloat16
    assert values[-1] < values[0]
    for what in ("value", "grad", "count"):
        optax.tree.get(states[0], what)  # an error if it is not unique
    assert optax.tree.get(states[0], "value") == np.inf
    assert optax.tree.get(states[-1], "count") == 6
    assert jax.tree.structure(optax.tree.get(states[-1], "grad")) == jax.tree.structure(
        params
    )
    abstract = jax.eval_shape(rule.init, mixed_params())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == spec[0]


def test_same_iterates_as_optax_with_the_line_search_of_optax():
    start = jnp.array([-1.2, 1.0, -0.5, 0.8])
    _, ours, states = loop(lbfgs(linesearch=ZOOM()), rosenbrock, start, 12)
    for what in ("value", "grad", "count"):
        optax.tree.get(states[0], what)  # an error if it is not unique
    theirs = loop_of_optax(optax.lbfgs(linesearch=ZOOM()), rosenbrock, start, 12)
    np.testing.assert_allclose(ours, theirs, rtol=2e-2)


def loop_of_optax(rule, loss, params, steps):
    def body(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = rule.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(lambda p: jax.lax.scan(body, (p, rule.init(p)), length=steps)[1])(
        params
    )


def test_scan_vmap_and_the_loop_without_jit_agree():
    rule = lbfgs(memory_size=3)
    starts = jnp.array([[-1.2, 1.0], [0.5, -0.5]])
    lanes = jax.vmap(lambda p: loop_of_optax(rule, rosenbrock, p, 8))(starts)
    params, state, values = starts[0], rule.init(starts[0]), []
    grad_of = jax.jit(jax.value_and_grad(rosenbrock))
    for _ in range(8):
        value, grad = grad_of(params)
        values.append(value)
        updates, state = rule.update(
            grad, state, params, value=value, grad=grad, value_fn=rosenbrock
        )
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(values, lanes[0], rtol=1e-2, atol=1e-5)


def test_aux_is_that_of_the_newest_parameters():
    def loss(w, target):
        residual = w - target
        return jnp.sum(residual**4), {"residual": residual, "calls": jnp.int32(1)}

    params, target = jnp.zeros(3), jnp.arange(3.0)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    aux = jax.eval_shape(loss, params, target)[1]
    rule = lbfgs(aux=aux)
    state = rule.init(params)
    (value, _), grad = value_and_grad(params, target)

    @jax.jit
    def step(params, state, value, grad):
        updates, state = rule.update(
            *(grad, state, params),
            **dict(value=value, grad=grad, value_fn=loss, target=target),
        )
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state, value, grad)
        value, grad = (optax.tree.get(state, name) for name in ("value", "grad"))
        got = optax.tree.get(state, "aux")
        np.testing.assert_allclose(got["residual"], params - target, rtol=1e-6)
        assert got["calls"] == 1
    assert step._cache_size() == 1


def test_a_search_that_finds_nothing_drops_the_history():
    rule, params = lbfgs(linesearch=linesearch.more_thuente()), jnp.array([2.0, 1.0])
    state = rule.init(params)
    for sign in (1.0, 1.0, -1.0):  # the last gradient points the wrong way
        value, grad = jax.value_and_grad(lambda w: jnp.sum(w**4))(params)
        before = params
        updates, state = rule.update(
            *(sign * grad, state, params),
            **dict(value=value, grad=sign * grad, value_fn=lambda w: jnp.sum(w**4)),
        )
        params = optax.apply_updates(params, updates)
    assert state[1].status in (words.FAILED, words.INCONSISTENT, words.NOT_DESCENT)
    assert (params == before).all()
    assert state[0].products.pairs == 0


def test_scaling_by_leaf_is_the_dense_inverse_hessian_from_its_diagonal():
    """In the textbook `H` starts from `gamma D`, `D` as `vector_free` defines it."""
    m, points, gradients = 3, *walk(9)
    rule = scale_by_lbfgs(m, scaling="leaf")
    got, state = directions(rule, points, gradients)
    assert state.products.yy.shape == (3, m, m)
    order = flat(trees_of(np.arange(9)))
    points, gradients = (x[:, order].astype("float64") for x in (points, gradients))
    s, y = np.diff(points, axis=0)[-m:], np.diff(gradients, axis=0)[-m:]
    sizes = [leaf.size for leaf in jax.tree.leaves(trees_of(np.arange(9)))]
    cuts = np.cumsum(sizes)[:-1]
    whole = np.linalg.norm(s[-1]) / np.linalg.norm(y[-1])
    parts = [np.linalg.norm(v) for v in np.split(s[-1], cuts)]
    parts = parts / np.array([np.linalg.norm(v) for v in np.split(y[-1], cuts)])
    d = np.repeat(parts / whole, sizes)
    start = d * (s[-1] @ y[-1]) / (y[-1] @ (d * y[-1]))
    root = np.sqrt(start)  # H from D is that of the variables w / root from the unit
    scaled = textbook.inverse_hessian(list(s / root), list(y * root), 1.0, 9)
    want = root * (scaled @ (root * gradients[-1]))
    np.testing.assert_allclose(got[-1], want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    np.testing.assert_allclose(state.products.slope, want @ gradients[-1], rtol=1e-3)


def test_scaling_by_leaf_is_no_other_for_a_single_leaf():
    points, gradients = walk(9)
    plain, _ = directions(RULE(3, True), points, gradients, lambda x: x)
    leaf = scale_by_lbfgs(3, scaling="leaf")
    got, _ = directions(leaf, points, gradients, lambda x: x)
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-6)


def two_scales(params):
    """Two leaves of very different curvature, and one that does not count."""
    a, b = params["a"] - 1, params["b"] - 1
    far = jnp.linspace(1, 10, a.size), jnp.linspace(1e3, 1e4, b.size)
    return jnp.sum(far[0] * a**2) + jnp.sum(far[1] * b**2) + 0 * jnp.sum(params["c"])


def test_scaling_by_leaf_saves_evaluations_where_leaves_differ_and_none_may_be_flat():
    params = {name: jnp.zeros(30) for name in "abc"}
    spent = {
        scaling: minimize(
            two_scales,
            params,
            optimizer=lbfgs(memory_size=5, scaling=scaling),
            gradient_tolerance=1e-2,
        )
        for scaling in ("leaf", "whole")
    }
    assert all(result.status == CONVERGED for result in spent.values())
    assert spent["leaf"].evaluations < 0.8 * spent["whole"].evaluations


@pytest.mark.parametrize("m", [10, 20])
@pytest.mark.parametrize("scaling", ["leaf", "whole"])
def test_an_update_in_place_copies_no_history(scaling, m):
    params = {"w": jnp.ones((40, 50)), "b": jnp.ones(2000)}
    rule = scale_by_lbfgs(m, scaling=scaling)
    state = rule.init(params)
    step = jax.jit(rule.update, donate_argnums=1).lower(params, state, params)
    memory = step.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 4000 * 4  # a few vectors, not m of them


def test_inside_nnx_optimizer():
    """The modules' own loop; `nnx.Optimizer` hands on value, grad and value_fn."""
    from flax import nnx

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    x, y = jnp.sin(jnp.arange(12.0)).reshape(4, 3), jnp.ones((4, 2))
    optimizer = nnx.Optimizer(model, lbfgs(memory_size=3), wrt=nnx.Param)
    graphdef, _ = nnx.split(model)

    def loss(state):
        return jnp.mean((nnx.merge(graphdef, state)(x) - y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        value, grad = jax.value_and_grad(loss)(params)
        optimizer.update(model, grad, value=value, grad=grad, value_fn=loss)
        return value

    values = [float(step(model, optimizer)) for _ in range(8)]
    assert values[-1] < 1e-4 * values[0]
    assert optimizer.step[...] == 8


@pytest.mark.parametrize("linesearch_", [None, linesearch.more_thuente()])
def test_inside_the_wrappers_of_optax(linesearch_):
    """Injected hyperparameters, a schedule, and gradients gathered over steps."""
    start = jnp.array([2.0, -1.0])

    def loss(w):
        return jnp.sum(jnp.array([1.0, 4.0]) * w**2)

    make = functools.partial(lbfgs, memory_size=2, linesearch=linesearch_)
    schedule = optax.exponential_decay(0.5, 3, 0.9)
    injected = optax.inject_hyperparams(
        make, static_args=("memory_size", "scale_init_precond", "scaling")
    )
    rules = {
        "injected": injected(learning_rate=0.5),
        "injected schedule": injected(learning_rate=schedule),
        "schedule": make(learning_rate=schedule),
    }
    if linesearch_ is None:  # a search must see the value of what it steps from
        rules["gathered"] = optax.MultiSteps(make(0.5), 2).gradient_transformation()
    for name, rule in rules.items():
        params, values, _ = loop_with(optax.with_extra_args_support(rule), loss, start)
        assert values[-1] < 0.05 * values[0], name
        assert jnp.isfinite(params).all()


def loop_with(rule, loss, params, steps=10):
    """The plain loop, value and gradient made anew, in one compiled step."""

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = rule.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return optax.apply_updates(params, updates), state, value

    state, values = rule.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    assert step._cache_size() <= 2  # optax's wrappers begin with weak types
    return params, values, state


def test_value_and_grad_come_from_the_state_without_an_evaluation():
    calls = []

    def loss(w):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum((w - 1) ** 4)

    rule, params = lbfgs(), jnp.array([3.0, 0.5])
    state = rule.init(params)
    value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
    updates, state = rule.update(
        grad, state, params, value=value, grad=grad, value_fn=loss
    )
    params = optax.apply_updates(params, updates)
    jax.effects_barrier()
    before = len(calls)
    kept = optax.value_and_grad_from_state(loss)(params, state=state)
    jax.effects_barrier()
    assert len(calls) == before
    want = jax.value_and_grad(lambda w: jnp.sum((w - 1) ** 4))(params)
    np.testing.assert_allclose(kept[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(kept[1], want[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "words_in_error", "make"),
    [
        (ValueError, "memory_size=0", lambda: lbfgs(memory_size=0)),
        (ValueError, "memory_size=-3", lambda: scale_by_lbfgs(-3)),
        (TypeError, "memory_size=2.5", lambda: lbfgs(memory_size=2.5)),
        (TypeError, "memory_size=True", lambda: lbfgs(memory_size=True)),
        (ValueError, "history_dtype=int8", lambda: lbfgs(history_dtype="int8")),
        (ValueError, "scaling='row'", lambda: lbfgs(scaling="row")),
        (TypeError, "linesearch='zoom'", lambda: lbfgs(linesearch="zoom")),
        (
            ValueError,
            "params=",
            lambda: scale_by_lbfgs().update(1.0, scale_by_lbfgs().init(1.0)),
        ),
    ],
)
def test_bad_input_is_named(error, words_in_error, make):
    with pytest.raises(error, match=words_in_error):
        make()


SHARDED = """
import os
os.environ["NPROC"] = "64"
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import dbjax

mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.KIND,))
specs = {"w": P("x", None), "b": P(None), "v": P(None, None, "x")}
if "KIND" == "Auto":  # as jit writes them, or the user's own parameters change
    specs |= {"w": P("x"), "b": P()}
shapes = {"w": (16, 3), "b": (5,), "v": (2, 3, 8)}
whole = {k: jnp.sin(1.0 + jnp.arange(np.prod(s), dtype="float32")).reshape(s) for k, s in shapes.items()}
params = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in whole.items()}

def loss(p):
    return sum(jnp.sum(x**4 + x**2) for x in jax.tree.leaves(p))

def same(a, b):
    return a.sharding.is_equivalent_to(b, a.ndim)

rule = dbjax.scale_by_lbfgs(3)
inits = (rule.init, jax.jit(rule.init))
for init in inits[: 1 + ("KIND" == "Auto")]:
    step = jax.jit(lambda g, state, p: rule.update(g, state, p), donate_argnums=1)
    state = init(params)
    for k, spec in specs.items():
        rows = NamedSharding(mesh, P(None, *spec))
        assert same(state.s_history[k], rows) and same(state.y_history[k], rows)
        assert same(state.params[k], rows.update(spec=spec))
        if k != "b":
            shard = state.s_history[k].addressable_shards[0].data
            assert shard.size * 8 == state.s_history[k].size
    text = step.lower(params, state, params).compile().as_text()
    ops = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    found = {op: text.count(f" {op}(") + text.count(f" {op}-start(") for op in ops}
    assert found == {op: int(op == "all-reduce") for op in ops}, found
    p = params
    for _ in range(5):
        d, state = step(jax.tree.map(lambda x: 4 * x**3 + 2 * x, p), state, p)
        p = jax.block_until_ready(jax.tree.map(lambda a, b: a - 0.5 * b, p, d))
    assert same(state.s_history["w"], NamedSharding(mesh, P(None, "x")))
    assert step._cache_size() == 1, step._cache_size()

def run(params):
    rule = dbjax.lbfgs(memory_size=2)
    def one(p, state):
        value, grad = optax.value_and_grad_from_state(loss)(p, state=state)
        updates, state = rule.update(grad, state, p, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(p, updates), state
    one, state = jax.jit(one, donate_argnums=1), rule.init(params)
    for _ in range(6):
        params, state = jax.block_until_ready(one(params, state))
    return params

jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    run(params), run(whole),
)
"""


@pytest.mark.multidevice
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_one_all_reduce_and_the_history_sharded_from_init_on(kind):
    script = textwrap.dedent(SHARDED).replace("KIND", kind)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
