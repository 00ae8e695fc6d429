"""What a replica does by itself: its steps, what it pushes, what a fetch changes."""

import math
from typing import Any, NamedTuple

import optax

GRADIENTS, MOVEMENT, POSITION = PUSHES = "gradients", "movement", "position"


class LocalRule(NamedTuple):
    """A replica's own rule, for `local_optimizer`.

    Between fetches a replica steps by itself, `x <- x + update(g)`. It pushes the sum
    of its gradients `g` (as the paper does), or how far it has moved, the sum of
    `-update(g)`, or where it is, `x`. A fetched `w` replaces `x`, or draws it nearer,
    `x <- x + attraction (w - x)`; the first one always replaces it.

    Replicas that a fetch does not replace are part of the run's state: a run on threads
    or Ray that is resumed begins where the shards are.

    Attributes:
      optimizer: its steps, any optax transformation.
      push: "gradients", "movement" or "position".
      attraction: above 0; 1 replaces `x`.

    >>> rule = LocalRule(optax.adamw(1e-3), push="movement")
    >>> rule.attraction
    1.0
    """

    optimizer: optax.GradientTransformation
    push: str = GRADIENTS
    attraction: float = 1.0


def as_local_rule(given: Any) -> LocalRule:
    """Check a `local_optimizer`; an optax transformation pushes gradients.

    Args:
      given: a `LocalRule` or an optax transformation.

    Returns:
      The rule.

    Raises:
      TypeError: it is neither.
      ValueError: `push` or `attraction` is not allowed.
    """
    rule = given if isinstance(given, LocalRule) else LocalRule(given)
    if not (hasattr(rule.optimizer, "init") and hasattr(rule.optimizer, "update")):
        raise TypeError(
            "local_optimizer must be an optax.GradientTransformation, or a LocalRule "
            f"of one, got {given!r}"
        )
    if rule.push not in PUSHES:
        raise ValueError(f"push must be one of {PUSHES}, got {rule.push!r}")
    if not 0 < rule.attraction < math.inf:
        raise ValueError(f"attraction must be above 0, got {rule.attraction!r}")
    return rule
