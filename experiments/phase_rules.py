"""The rules of the phase diagrams: by name, each a function of the learning rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

import dbjax
from dbjax import optim

MOMENTUM = 0.9


class Rule(NamedTuple):
    """A rule that is swept.

    Attributes:
      make: `make(learning_rate)`, which may be a tracer, gives the optimizer.
      provide: what that asks for.
      warm: whether one replica trains alone first.
      limit: of eta times lambda, at a mean staleness; None where none is known.
    """

    make: Callable[[Any], optax.GradientTransformation]
    provide: tuple[str, ...] = ()
    warm: bool = False
    limit: Callable[[np.ndarray], np.ndarray] | None = None


def _adagrad(rate: Any) -> optax.GradientTransformation:
    return dbjax.adagrad(rate)


def _momentum(rate: Any) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=MOMENTUM)


def _by_staleness(rate: Any) -> optax.GradientTransformation:
    return optax.chain(optim.scale_by_staleness(), optax.sgd(rate))


def _compensated(rate: Any) -> optax.GradientTransformation:
    return optax.chain(optim.compensate_delay(2.0, decay=0.95), optax.sgd(rate))


def _by_gap(rate: Any) -> optax.GradientTransformation:
    return optax.chain(optim.scale_by_gap(rate), optax.sgd(rate))


def _adadelay(rate: Any) -> optax.GradientTransformation:
    """The rate at first; after 1,000 updates half of it."""
    return optim.adadelay(1 / rate, 1 / (rate * 1_000**0.5))


RULES = {
    "SGD": Rule(optax.sgd, limit=optim.stability_limit),
    "SGD, warm start": Rule(optax.sgd, warm=True, limit=optim.stability_limit),
    f"SGD, momentum {MOMENTUM}": Rule(
        _momentum, limit=lambda tau: optim.stability_limit(tau, MOMENTUM)
    ),
    "Adagrad": Rule(_adagrad),
    "Adagrad, warm start": Rule(_adagrad, warm=True),
    "SGD, rate / staleness": Rule(
        _by_staleness, ("staleness",),
        limit=lambda tau: np.maximum(1, tau) * optim.stability_limit(tau),
    ),
    "SGD, DC-ASGD": Rule(_compensated, ("stale_params",)),
    "SGD, gap-aware": Rule(_by_gap, ("stale_params",)),
    "AdaDelay": Rule(_adadelay, ("staleness",)),
}  # fmt: skip
