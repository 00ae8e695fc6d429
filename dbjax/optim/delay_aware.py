"""What others have proposed against stale gradients, each as an optax transformation.

Each is handed what it asks for: `staleness` (int32, how many updates the gradient has
missed, or a tree of them, one for each leaf) or `stale_params` (the parameters at which
it was taken), by a shard with `provide=("staleness",)` in `dbjax.downpour.train`,
`replay` and `sweep`, or by `dbjax.stale` in a loop of one's own. Without delay each is
the plain rule.
All are elementwise: the result does not depend on how parameters lie on shards.

Below `g` is the gradient, `w` the parameters that it meets, `w_old` those at which it
was taken, `tau` its staleness and `t` the number of updates before it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dbjax.typing import Gradients, Params


class CompensateDelayState(NamedTuple):
    """The running mean of squared gradients, None where lambda is constant."""

    mean_square: Params


class ScaleByGapState(NamedTuple):
    """How many gradients there were, and the running mean of their squares."""

    count: jax.Array
    mean_square: Params


class ScaleByAdadelayState(NamedTuple):
    """How many updates there were, int32."""

    count: jax.Array


class PredictParamsState(NamedTuple):
    """The inner optimizer's state, and its last update: the parameters are ahead."""

    inner_state: Any
    last: Params


def scale_by_staleness(offset: int = 0) -> optax.GradientTransformationExtraArgs:
    r"""Divide the learning rate by the staleness.

    .. math::
      u = g / \max(1, \tau + \text{offset})

    Args:
      offset: 0 for staleness-aware SGD, 1 for DynSGD.

    Returns:
      An optax transformation that asks for `staleness`, to go before an optimizer.

    Raises:
      ValueError: `offset` is negative.

    Source: Zhang and others 2016 (arXiv 1511.05950), whose rate at tau = 0 is taken to
    be the full one; Jiang and others 2017 (DynSGD), as dist-keras has it.

    >>> rule = optax.chain(scale_by_staleness(), optax.sgd(1.0))
    >>> params = jnp.array(0.0)
    >>> print(rule.update(jnp.array(8.0), rule.init(params), staleness=4)[0])
    -2.0
    """
    if offset < 0:
        raise ValueError(f"offset={offset}: allowed are 0 and more")

    def update(
        updates: Gradients, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Gradients, Any]:
        staleness = _asked_for("scale_by_staleness", "staleness", extra)

        # A product, not a quotient: XLA rounds a division by a scalar as it likes.
        def scale(tau: Any) -> jax.Array:
            late = jnp.maximum(1, jnp.asarray(tau) + offset)
            return 1.0 / late.astype(jnp.float32)

        return _scaled(updates, jax.tree.map(scale, staleness)), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


def compensate_delay(
    lam: float | jax.Array, decay: float | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Correct a gradient for how far the parameters have moved: DC-ASGD.

    .. math::
      u = g + \lambda \, g \odot g \odot (w - w_{old})

    With `decay`, the adaptive one: :math:`\lambda = \text{lam} / \sqrt{m + 10^{-7}}`,
    where the running mean :math:`m` of squares includes the current gradient.

    Args:
      lam: lambda, at least 0; may be a tracer. The paper has 2 for the adaptive one.
      decay: of the running mean, 0.95 in the paper; None for a constant lambda.

    Returns:
      An optax transformation that asks for `stale_params`, to go before an optimizer.

    Raises:
      ValueError: `lam` is negative, or `decay` is not from 0 to below 1.

    Source: Zheng and others 2017 (ICML), equations 10 and 14. It stands for a term of
    Taylor's series whose matrix of second derivatives is guessed from the gradient.

    >>> rule = optax.chain(compensate_delay(0.5), optax.sgd(1.0))
    >>> params, old = jnp.array(3.0), jnp.array(1.0)
    >>> state = rule.init(params)
    >>> print(rule.update(jnp.array(2.0), state, params, stale_params=old)[0])
    -6.0
    """
    if not isinstance(lam, jax.core.Tracer) and not 0 <= float(lam) < math.inf:
        raise ValueError(f"lam={lam}: allowed are 0 and more")
    if decay is not None:
        _check_decay(decay)

    def init(params: Params) -> CompensateDelayState:
        return CompensateDelayState(None if decay is None else _zeros(params))

    def update(
        updates: Gradients, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Gradients, CompensateDelayState]:
        old = _asked_for("compensate_delay", "stale_params", extra)
        moved = _moved("compensate_delay", params, old)
        if decay is None:
            new = jax.tree.map(lambda g, d: g + lam * g * g * d, updates, moved)
            return new, state
        mean = optax.tree.update_moment(updates, state.mean_square, decay, 2)
        new = jax.tree.map(
            lambda g, d, m: (g + lam / jnp.sqrt(m + 1e-7) * g * g * d).astype(g.dtype),
            *(updates, moved, mean),
        )
        return new, CompensateDelayState(mean)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_gap(
    learning_rate: float | jax.Array, decay: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Divide a gradient by how many steps the parameters have moved meanwhile.

    .. math::
      u = g \Big/ \left(1 + \frac{|w - w_{old}|}{C}\right), \qquad
      C = \text{learning\_rate} \cdot (\sqrt{\bar m} + \text{eps})

    elementwise, where :math:`\bar m` is the running mean of squared gradients, free of
    its start's bias.

    Args:
      learning_rate: the largest that is used; positive, may be a tracer.
      decay: of the running mean.
      eps: added to its root.

    Returns:
      An optax transformation that asks for `stale_params`, to go before an optimizer.

    Raises:
      ValueError: `learning_rate` or `eps` is not positive, or `decay` not from 0 to
        below 1.

    Source: Barkai, Hakimi and Schuster 2020 (arXiv 1909.10802); that C is a root mean
    square of steps is taken from an implementation of it, not from its text.

    >>> rule = optax.chain(scale_by_gap(1.0), optax.sgd(1.0))
    >>> params, old = jnp.array(5.0), jnp.array(1.0)
    >>> state = rule.init(params)
    >>> updates, state = rule.update(jnp.array(4.0), state, params, stale_params=old)
    >>> print(updates.round(4))
    -2.0
    """
    for name, value in (("learning_rate", learning_rate), ("eps", eps)):
        if not isinstance(value, jax.core.Tracer) and not 0 < float(value) < math.inf:
            raise ValueError(f"{name}={value}: allowed are positive numbers")
    _check_decay(decay)

    def init(params: Params) -> ScaleByGapState:
        return ScaleByGapState(jnp.zeros([], jnp.int32), _zeros(params))

    def update(
        updates: Gradients, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Gradients, ScaleByGapState]:
        old = _asked_for("scale_by_gap", "stale_params", extra)
        moved = _moved("scale_by_gap", params, old)
        count = jnp.asarray(optax.safe_increment(state.count))
        mean = optax.tree.update_moment(updates, state.mean_square, decay, 2)
        unbiased = 1.0 / (1.0 - decay ** count.astype(jnp.float32))

        def scaled(g: jax.Array, d: jax.Array, m: jax.Array) -> jax.Array:
            step = learning_rate * (jnp.sqrt(m * unbiased.astype(m.dtype)) + eps)
            return (g / (1.0 + jnp.abs(d) / step)).astype(g.dtype)

        new = jax.tree.map(scaled, updates, moved, mean)
        return new, ScaleByGapState(count, mean)

    return optax.GradientTransformationExtraArgs(init, update)


def adadelay(
    smoothness: float | jax.Array, c: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    r"""SGD whose rate falls with the time and with each gradient's own delay.

    .. math::
      w \leftarrow w - \frac{g}{L + c \, \sqrt{t + \tau}}

    Args:
      smoothness: L, the largest curvature; its inverse is the first rate.
      c: how fast the rate falls; at least 0. Either may be a tracer.

    Returns:
      An optax transformation that asks for `staleness`; the learning rate is in it.

    Raises:
      ValueError: `smoothness` is not positive, or `c` is negative.

    Source: Sra, Yu, Li and Smola 2016 (arXiv 1508.05003), from memory: that the rate is
    the inverse of a sum is not checked against the text; its rate for each coordinate
    is not here.

    >>> rule, params = adadelay(1.0, 0.5), jnp.array(0.0)
    >>> print(rule.update(jnp.array(6.0), rule.init(params), staleness=16)[0])
    -2.0
    """
    if not isinstance(smoothness, jax.core.Tracer) and not float(smoothness) > 0:
        raise ValueError(f"smoothness={smoothness}: allowed are positive numbers")
    if not isinstance(c, jax.core.Tracer) and not float(c) >= 0:
        raise ValueError(f"c={c}: allowed are 0 and more")

    def init(params: Params) -> ScaleByAdadelayState:
        return ScaleByAdadelayState(jnp.zeros([], jnp.int32))

    def update(
        updates: Gradients, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Gradients, ScaleByAdadelayState]:
        staleness = _asked_for("adadelay", "staleness", extra)

        def rate(tau: Any) -> jax.Array:
            late = jnp.sqrt((state.count + tau).astype(jnp.float32))
            return -1.0 / (smoothness + c * late)

        count = jnp.asarray(optax.safe_increment(state.count))
        scaled = _scaled(updates, jax.tree.map(rate, staleness))
        return scaled, ScaleByAdadelayState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def predict_params(
    inner: optax.GradientTransformation, delay: float | jax.Array
) -> optax.GradientTransformationExtraArgs:
    r"""Show parameters where they will be in `delay` steps: weight prediction.

    With the inner optimizer's updates :math:`u_t` to its own parameters :math:`w_t`,
    what is seen, and where gradients are taken, is

    .. math::
      \hat w_t = w_t + \text{delay} \cdot u_{t-1}

    which needs no other server than any optimizer does: the update of what is seen is
    :math:`u_t + \text{delay} \, (u_t - u_{t-1})`. What a run ends with is ahead, too:
    `without_prediction` takes that back.

    Args:
      inner: any optax transformation, best one with momentum.
      delay: steps ahead, at least 0, such as the mean staleness; may be a tracer.

    Returns:
      An optax transformation with state `PredictParamsState`.

    Raises:
      ValueError: `delay` is negative.

    Source: the rule of SpecTrain (Chen and others 2018), XPipe and SAPipe, with the
    last whole update in the place of a momentum; as a change of variables it is ours.

    >>> rule, params = predict_params(optax.sgd(1.0), delay=2), jnp.array(9.0)
    >>> updates, state = rule.update(jnp.array(1.0), rule.init(params), params)
    >>> print(updates, without_prediction(state, params + updates, delay=2))
    -3.0 8.0
    """
    if not isinstance(delay, jax.core.Tracer) and not 0 <= float(delay) < math.inf:
        raise ValueError(f"delay={delay}: allowed are 0 and more")
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> PredictParamsState:
        return PredictParamsState(
            inner.init(params), jax.tree.map(jnp.zeros_like, params)
        )

    def update(
        updates: Gradients, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Gradients, PredictParamsState]:
        if params is not None:
            params = without_prediction(state, params, delay)
        new, inner_state = inner.update(updates, state.inner_state, params, **extra)
        shown = jax.tree.map(lambda u, last: u + delay * (u - last), new, state.last)
        return shown, PredictParamsState(inner_state, new)

    return optax.GradientTransformationExtraArgs(init, update)


def without_prediction(
    state: PredictParamsState, params: Params, delay: float | jax.Array
) -> Params:
    """Give the inner optimizer's own parameters.

    Args:
      state: of `predict_params`.
      params: as they are seen.
      delay: what it was made with.

    Returns:
      The parameters, `delay` steps back.
    """
    return jax.tree.map(lambda p, last: p - delay * last, params, state.last)


def _asked_for(rule: str, name: str, extra: dict[str, Any]) -> Any:
    value = extra.get(name)
    if value is None:
        raise ValueError(
            f'{rule} asks for {name}: give provide=("{name}",) to downpour.train, '
            "replay or sweep, or wrap the optimizer in dbjax.stale"
        )
    return value


def _moved(rule: str, params: Params | None, old: Params) -> Params:
    if params is None:
        raise ValueError(f"{rule} compares parameters: call update with params=")
    return optax.tree.sub(params, old)


def _scaled(tree: Params, scale: Any) -> Params:
    """Scale all leaves alike, or each by its own."""
    scale = jax.tree.broadcast(scale, tree)
    return jax.tree.map(lambda x, by: (x * by).astype(x.dtype), tree, scale)


def _zeros(params: Params) -> Params:
    """In bfloat16 a running mean would soon stop moving."""
    return jax.tree.map(
        lambda p: jnp.zeros_like(
            p, dtype=jnp.promote_types(jnp.result_type(p), jnp.float32)
        ),
        params,
    )


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}: allowed are numbers from 0 to below 1")
