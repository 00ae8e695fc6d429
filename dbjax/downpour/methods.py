"""What others have built on replicas and shards, as arguments of `train`.

Each function gives a method's settings, for `train(loss, params, data, **settings)`: an
optimizer for the shards, a rule for the replicas, periods and a protocol; those that
`simulate` and `replay` take are among them. Letters: `R` replicas, `H` minibatches
between two pushes, `w` the shards' parameters, `x` a replica's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from dbjax.downpour.protocol import synchronous
from dbjax.optim.accumulating import delayed_nesterov, elastic, softsync
from dbjax.optim.local import MOVEMENT, POSITION, LocalRule

Settings = dict[str, Any]


def parameter_averaging(
    optimizer: optax.GradientTransformation, *, replicas: int, every: int
) -> Settings:
    """Replicas train by themselves, and are averaged after every `every` minibatches.

    `w <- mean of x_1, ..., x_R`, and `x_r <- w`.

    Args:
      optimizer: each replica's own; with `optax.sgd` this is local SGD.
      replicas: R.
      every: H. 1 averages after each minibatch; an epoch's is iterative parameter
        mixing; as many as a replica computes in all is one-shot averaging.

    Returns:
      Arguments of `train`.

    Raises:
      ValueError: an argument is below 1.

    Sources: Zinkevich and others 2010 (one-shot), McDonald and others 2010 (iterative
    mixing), Stich 2019 (local SGD).

    >>> import jax.numpy as jnp, numpy as np, dbjax
    >>> data = dbjax.from_arrays({"x": np.ones((8, 1), np.float32)}, batch_size=4)
    >>> loss = lambda p, b: jnp.mean((p["w"] - b["x"]) ** 2)
    >>> settings = parameter_averaging(optax.sgd(0.25), replicas=4, every=3)
    >>> run = dbjax.downpour.train(
    ...     loss, {"w": jnp.zeros(1)}, data, steps=12, **settings)
    >>> float(run.params["w"][0])
    0.875
    """
    return {
        **_in_step(replicas, every),
        "optimizer": optax.sgd(1 / replicas),
        "local_optimizer": LocalRule(optimizer, push=MOVEMENT),
    }


def diloco(
    optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    every: int,
    learning_rate: float = 0.7,
    momentum: float = 0.9,
) -> Settings:
    """Replicas train by themselves; how far they move on average is a gradient.

    `w <- Nesterov(mean of w - x_1, ..., w - x_R)`, and `x_r <- w`.

    Args:
      optimizer: each replica's own, AdamW in the paper; its state is kept.
      replicas: R.
      every: H.
      learning_rate: of the outer step; 1 without momentum is `parameter_averaging`.
      momentum: of the outer step.

    Returns:
      Arguments of `train`. Let R H divide its `steps`: a last round that is not full
      is not applied.

    Raises:
      ValueError: an argument is below 1.

    Source: Douillard and others 2023 (arXiv 2311.08105, algorithm 1).

    >>> diloco(optax.adamw(1e-3), replicas=8, every=50)["protocol"].name
    'synchronous(every=50)'
    """
    outer = optax.sgd(learning_rate, momentum or None, nesterov=bool(momentum))
    return {
        **_in_step(replicas, every),
        "optimizer": softsync(outer, replicas),
        "local_optimizer": LocalRule(optimizer, push=MOVEMENT),
    }


def async_diloco(
    optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    every: int | Sequence[int],
    learning_rate: float = 0.7,
    momentum: float = 0.9,
) -> Settings:
    """DiLoCo without rounds: each push is applied as it comes, momentum now and then.

    See `dbjax.optim.delayed_nesterov`, with the R pushes of a round.

    Args:
      optimizer: each replica's own.
      replicas: R.
      every: H, or one for each replica, see `proportional_steps`.
      learning_rate: of the outer step.
      momentum: of the outer step.

    Returns:
      Arguments of `train`.

    Raises:
      ValueError: an argument is below 1.

    Source: Liu and others 2024 (arXiv 2401.09135), second-hand.

    >>> settings = async_diloco(optax.sgd(0.1), replicas=2, every=(30, 10))
    >>> settings["n_push"]
    (30, 10)
    """
    each = tuple(every) if isinstance(every, Sequence | np.ndarray) else every
    return {
        "replicas": replicas,
        "n_fetch": each,
        "n_push": each,
        "optimizer": delayed_nesterov(learning_rate, momentum, replicas),
        "local_optimizer": LocalRule(optimizer, push=MOVEMENT),
    }


def proportional_steps(speeds: Sequence[float], most: int) -> tuple[int, ...]:
    """Give each replica as many minibatches as it is fast: all push equally often.

    `H_r = most v_r / max v`, rounded, at least 1.

    Args:
      speeds: of the replicas `[R]`, such as `Cluster.fit(trace).speeds`.
      most: the fastest one's.

    Returns:
      `every` of each, `[R]`.

    Raises:
      ValueError: a speed is not above 0, or `most` is below 1.

    Source: Liu and others 2024 (arXiv 2401.09135, dynamic local updates).

    >>> proportional_steps((1.0, 0.5, 0.1), most=20)
    (20, 10, 2)
    """
    v = np.asarray(speeds, float)
    if v.ndim != 1 or not len(v) or not (np.isfinite(v) & (v > 0)).all():
        raise ValueError(f"speeds={speeds}: allowed are numbers above 0")
    if most < 1:
        raise ValueError(f"most={most}: allowed are integers from 1")
    return tuple(np.maximum(1, np.rint(most * v / v.max())).astype(int).tolist())


def easgd(
    optimizer: optax.GradientTransformation,
    *,
    replicas: int,
    every: int,
    alpha: float | None = None,
) -> Settings:
    """Replicas keep their own parameters; they and the shards' draw each other nearer.

    After every H minibatches `e = alpha (x_r - w)`, `x_r <- x_r - e`, `w <- w + e`.

    A push brings `x_r`, and the shards move. What is fetched then has moved already,
    and draws `x_r` by `alpha / (1 - alpha)` of what is left: by `e`, if nobody came
    between.

    Args:
      optimizer: each replica's own, `optax.sgd` in the paper.
      replicas: R.
      every: H.
      alpha: how far; `0.9 / R` if None.

    Returns:
      Arguments of `train`; `run.params` are the shards'.

    Raises:
      ValueError: `alpha` is not between 0 and 1.

    Source: Zhang, Choromanska and LeCun 2015 (algorithm 1); the default of `alpha` is
    from memory.

    >>> easgd(optax.sgd(0.1), replicas=4, every=10)["n_push"]
    10
    """
    alpha = 0.9 / replicas if alpha is None else alpha
    rule = elastic(alpha)
    return {
        "replicas": replicas,
        "n_fetch": every,
        "n_push": every,
        "optimizer": rule,
        "local_optimizer": LocalRule(optimizer, POSITION, alpha / (1 - alpha)),
    }


def _in_step(replicas: int, every: int) -> Settings:
    return {
        "replicas": replicas,
        "n_fetch": every,
        "n_push": every,
        "protocol": synchronous(every),
    }
