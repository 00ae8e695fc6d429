"""DC-ASGD (Zheng and others 2017), as a stranger would write it.

python -m experiments.battery --rule=experiments/rules/compensate.py
"""

import jax
import optax

provide = ("stale_params",)
search = {"lam": [0.04, 0.4]}


def rule(learning_rate, lam):
    """Correct a gradient for how far the parameters have moved since it was taken."""

    def update(updates, state, params=None, *, stale_params, **extra):
        compensated = jax.tree.map(
            lambda g, w, old: g + lam * g * g * (w - old), updates, params, stale_params
        )
        return compensated, state

    correct = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        update,  # pyrefly: ignore[bad-argument-type]
    )
    return optax.chain(correct, optax.sgd(learning_rate))
