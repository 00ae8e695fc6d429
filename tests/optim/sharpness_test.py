"""Sharpness against dense Hessians, and the limit against simulated recursions."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax.optim import sharpness, stability_limit


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((hidden @ params["v"] - batch["y"]) ** 2)


FOUND = jax.jit(functools.partial(sharpness, loss_fn, iterations=400))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_largest_eigenvalue_of_the_scaled_hessian(seed, scaled):
    rng = np.random.default_rng(seed)
    params = {"v": rng.standard_normal(3), "w": rng.standard_normal((4, 3))}
    batch = {"x": rng.standard_normal((20, 4)), "y": rng.standard_normal(20)}
    params, batch = jax.tree.map(jnp.float32, (params, batch))
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda x: loss_fn(unravel(x), batch)))(flat)
    size = rng.uniform(0.5, 2.0, len(flat)).astype(np.float32)
    rates = unravel(jnp.array(size)) if scaled else None
    if scaled:
        hessian = size[:, None] * hessian
    want = np.abs(np.linalg.eigvals(np.asarray(hessian, float))).max()
    got = float(FOUND(params, batch, rates))
    assert got == pytest.approx(want, rel=1e-3)


def test_no_curvature_is_none():
    params = jnp.ones(2)
    assert float(sharpness(lambda w, b: w.sum(), params, None)) == 0


def grows(product, delay, momentum):
    """Whether delayed SGD on a quadratic moves away from its optimum."""
    w = [1.0] * (delay + 2)
    for _ in range(6_000):
        w.append(w[-1] + momentum * (w[-1] - w[-2]) - product * w[-1 - delay])
        if abs(w[-1]) > 1e3:
            return True
    return abs(w[-1]) > 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("delay", [0, 1, 2, 3, 7, 16])
def test_just_below_the_limit_is_stable_and_just_above_is_not(delay, momentum):
    limit = float(stability_limit(delay, momentum))
    assert not grows(0.97 * limit, delay, momentum)
    assert grows(1.03 * limit, delay, momentum)


def test_bisection_comes_to_the_formula():
    delays = np.arange(50).reshape(5, 10)
    np.testing.assert_allclose(
        stability_limit(delays, 1e-12), stability_limit(delays), rtol=1e-9
    )
    np.testing.assert_allclose(stability_limit(0, 0.9), 2 * (1 + 0.9))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: stability_limit([1, -1]), "delay=.*allowed are 0 and more"),
        (lambda: stability_limit(1, 1.0), "momentum=1.0: allowed is 0 to below 1"),
        (lambda: sharpness(None, 0, 0, iterations=0), "iterations=0: allowed are 1"),
    ],
)
def test_what_is_out_of_range_is_said(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
