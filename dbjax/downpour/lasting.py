"""Finds optimizers that cannot get rid of a number that is not finite.

With SGD, Adagrad or Adam a NaN in a gradient stays for ever in the parameters or in the
optimizer's state. A look at these once in a while then tells whether any gradient was
not finite, and saves reading every one of them again.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.loss import all_finite
from dbjax.server.shard import apply_gradients
from dbjax.typing import Params

_POISONS = np.array([np.nan, np.inf, -np.inf])
_STEPS, _AT = 5, 1
"""A trial: so many steps, a poisoned gradient at this one."""


def not_finite_lasts(
    optimizer: optax.GradientTransformation,
    params: Params,
    provide: tuple[str, ...] = (),
) -> bool:
    """Whether what is not finite in any leaf's gradient can be seen ever after.

    The rule is tried, on leaves cut down to a few elements. A rule that clips, masks or
    freezes fails, and so does one that skips such gradients itself.

    Args:
      optimizer: the rule.
      params: the parameters; shapes and paths are used, not values.
      provide: the extra arguments the rule asks for.
    """
    small = jax.tree.map(
        lambda x: jnp.ones(tuple(min(n, 2) for n in x.shape), x.dtype), params
    )
    leaves, treedef = jax.tree.flatten(small)
    extras = {"staleness": jnp.int32(1), "stale_params": small}
    wanted = {name: extras[name] for name in provide}

    def lasts(leaf: jax.Array, poison: jax.Array) -> jax.Array:
        held, state = small, optimizer.init(small)
        for step in range(_STEPS):
            gradients = [
                jnp.where((step == _AT) & (leaf == i), poison, 0.5).astype(x.dtype)
                * jnp.ones_like(x)
                for i, x in enumerate(leaves)
            ]
            held, state = apply_gradients(
                optimizer, held, state, treedef.unflatten(gradients), wanted
            )
        return ~is_sound(held, state)

    which, poisons = np.divmod(np.arange(len(leaves) * len(_POISONS)), len(_POISONS))
    tried = jax.jit(jax.vmap(lasts))(which, jnp.asarray(_POISONS[poisons], jnp.float32))
    return bool(tried.all())


def is_sound(*trees: Params) -> jax.Array:
    """Whether all floats are finite."""
    leaves = map(jnp.asarray, jax.tree.leaves(trees))
    return all_finite([x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)])
