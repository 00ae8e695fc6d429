"""Adapters: a flax module, NNX or Linen, as plain parameters and a pure loss.

What is trained are parameters. Whatever else a module holds has no place on a server:
replicas that run on their own have no common order in which it could be carried on.
`from_nnx` says what becomes of it. The rest of dbjax knows nothing of flax.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn
from flax.core import DenyList, unfreeze

from dbjax.models.adapted import Adapted, State, adapt, kind
from dbjax.typing import Batch


def from_nnx(module: nnx.Module, *, loss: Callable[[Any, Batch], Any]) -> Adapted:
    """Take an NNX module apart, for training.

    - Parameters are all `nnx.Param`; one that is shared by several layers is one leaf.
      Each stands at its path, such as `layers/0/kernel`, for partition rules; metadata
      on partitions is not used.
    - The loss runs a copy of the module in training mode, as after `module.train()`; a
      loss that wants otherwise sets it on the module that it is given. The module given
      here is never changed.
    - Random numbers, of dropout for example, come from the key that the loss takes:
      `loss_fn(params, batch, key)`, which is `rng=True` of a run. Every stream of the
      module gets its own key from it. To need a key and get none is an error.
    - All else, such as batch statistics, goes into each loss as it was given here, and
      what the loss makes of it is dropped. So a loss is a pure function, and a run can
      be replayed. Batch normalisation loses nothing by it: in training it uses the
      statistics of its batch. Its averages, which evaluation needs, would at any rate
      belong to parameters long gone; `merge` takes them anew for the final ones.

    Args:
      module: with its first parameters.
      loss: `loss(module, batch)` gives a scalar, the mean over the batch; or
        `(scalar, aux)`, which is `has_aux=True` of a run.

    Returns:
      An object with `params`, `loss_fn(params, batch)`, which takes a key as well, and
      `merge(params)`, which gives a module again; see `Adapted`.

    Raises:
      TypeError: the module is not an NNX module, or the loss cannot be called.
      ValueError: there are no parameters, or one is not an array of floats.

    >>> import dbjax, numpy as np, optax
    >>> from flax import nnx
    >>> x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    >>> data = dbjax.from_arrays({"x": x, "y": 3 * x}, batch_size=8)
    >>> p = dbjax.from_nnx(
    ...     nnx.Linear(1, 1, rngs=nnx.Rngs(0)),
    ...     loss=lambda module, batch: ((module(batch["x"]) - batch["y"]) ** 2).mean())
    >>> run = dbjax.downpour.train(p.loss_fn, p.params, data,
    ...                            optimizer=optax.sgd(0.1), replicas=4, steps=400)
    >>> round(float(p.merge(run.params).kernel[0, 0]), 2)
    3.0
    """
    if isinstance(module, nn.Module):
        raise TypeError("module is a Linen module: use from_linen")
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be an nnx.Module, got {kind(module)}")
    graphdef, *parts = nnx.split(module, *_FILTERS)
    params, keys, *state = map(nnx.to_pure_dict, parts)
    flax = _NNX(graphdef, keys, dict(zip(_STATE, state, strict=True)), loss)
    return adapt(flax, params, loss)


def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    loss: Callable[[Any, Batch], Any],
) -> Adapted:
    """Take a Linen module and its variables, for training.

    Everything that `from_nnx` says holds here, in Linen's words: parameters are the
    collection "params", without boxes such as `nn.Partitioned`; other collections go
    into each loss as they are given here. Linen has no training mode: the loss says
    what it wants, as in `module(x, train=True)`.

    Args:
      module: without variables of its own.
      variables: what `module.init(key, ...)` gave.
      loss: `loss(module, batch)` gives a scalar; the module it is given is bound to
        variables and keys, so that it can be called, as can its methods.

    Returns:
      As from `from_nnx`; `merge(params)` gives variables for `module.apply`.

    Raises:
      TypeError: the module is not a Linen module, or the loss cannot be called.
      ValueError: there are no parameters, or one is not an array of floats.

    >>> import dbjax, jax, numpy as np
    >>> from flax import linen as nn
    >>> module, x = nn.Dense(1), np.ones((4, 2), np.float32)
    >>> p = dbjax.from_linen(module, module.init(jax.random.key(0), x),
    ...                      loss=lambda module, batch: (module(batch) ** 2).mean())
    >>> jax.tree.map(np.shape, p.params)
    {'bias': (1,), 'kernel': (2, 1)}
    >>> module.apply(p.merge(p.params), x).shape
    (4, 1)
    """
    if isinstance(module, nnx.Module):
        raise TypeError("module is an NNX module: use from_nnx")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a flax.linen.Module, got {kind(module)}")
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else kind(variables)
        raise ValueError(
            'variables must hold the collection "params", as module.init gives it; '
            f"got {got}"
        )
    state = dict(unfreeze(nn.unbox(variables)))
    params = state.pop("params")
    state.pop("intermediates", None)  # what init happened to sow
    return adapt(_Linen(module, state, loss), params, loss)


_NO_KEY = (
    "the loss draws random numbers, so it must be given a key: "
    "loss_fn(params, batch, key), which is rng=True of a run"
)

_FILTERS = (nnx.Param, nnx.RngState, nnx.BatchStat, nnx.Intermediate, ...)
_STATE = ("batch_stats", "intermediates", "others")


@dataclasses.dataclass(frozen=True)
class _NNX:
    graphdef: Any
    keys: Any  # and counts, of the streams of random numbers
    state: State
    loss: Callable[[Any, Batch], Any]

    def run(self, params, state, batch, key, momentum=None):
        keys = self.keys if key is None else _derive(self.keys, key)
        module = self._merge(params, keys, state)
        module.train()
        if momentum is not None:
            _set_momentum(module, momentum)
        value = self.loss(module, batch)
        if momentum is not None:
            _set_momentum(module, 0.0)  # a module that holds a tracer is not split
        _, _, after, stats, _, others = nnx.split(module, *_FILTERS)
        if key is None and _changed(keys, nnx.to_pure_dict(after)):
            raise ValueError(_NO_KEY)
        new = {"batch_stats": stats, "others": others}
        return value, state | {k: nnx.to_pure_dict(v) for k, v in new.items()}

    def build(self, params, state):
        module = self._merge(params, self.keys, state)
        module.eval()
        return module

    def _merge(self, params, keys, state):
        # From plain dicts: variables are new, so nothing leaks from trace to trace.
        return nnx.merge(self.graphdef, params, keys, *(state[k] for k in _STATE))


@dataclasses.dataclass(frozen=True)
class _Linen:
    module: nn.Module
    state: State
    loss: Callable[[Any, Batch], Any]

    def run(self, params, state, batch, key, momentum=None):
        def average(call, args, kwargs, context):
            if isinstance(context.module, nn.BatchNorm) and momentum is not None:
                object.__setattr__(context.module, "momentum", momentum)
            return call(*args, **kwargs)

        # All else may be written to; what comes of it is the caller's affair.
        apply = nn.apply(self.loss, self.module, mutable=DenyList("params"))
        rngs = None if key is None else {"params": key}  # streams all derive from it
        try:
            with nn.intercept_methods(average):
                value, after = apply({"params": params, **state}, batch, rngs=rngs)
        except errors.InvalidRngError as error:
            if key is not None:
                raise
            raise ValueError(f"{_NO_KEY}: {error}") from error
        return value, {name: unfreeze(after.get(name, state[name])) for name in state}

    def build(self, params, state):
        return {"params": params, **state}


def _derive(keys: Any, key: jax.Array) -> Any:
    """Give each stream a key of its own; counts stay."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    leaves, treedef = jax.tree.flatten(keys)
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            own = jax.random.fold_in(key, i)
            leaves[i] = jax.random.split(own, leaf.shape) if leaf.shape else own
    return treedef.unflatten(leaves)


def _set_momentum(module: nnx.Module, momentum: Any) -> None:
    module.set_attributes(nnx.BatchNorm, momentum=momentum, raise_if_not_found=False)


def _changed(before: Any, after: Any) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return any(x is not y for x, y in pairs)
