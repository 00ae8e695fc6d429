"""Adapters: a flax module, NNX or Linen, as plain parameters and a pure loss.

What is trained are parameters. Whatever else a module holds has no place on a server:
replicas that run on their own have no common order in which it could be carried on.
`from_nnx` says what becomes of it. The rest of dbjax knows nothing of flax.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn
from flax.core import DenyList, unfreeze

from dbjax.typing import Batch, LossFn, Params

State = dict[str, Any]
"""What a module holds besides parameters and keys; its "batch_stats" and the rest."""


def from_nnx(module: nnx.Module, *, loss: Callable[[Any, Batch], Any]) -> "Adapted":
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
        raise TypeError(f"module must be an nnx.Module, got {_kind(module)}")
    graphdef, *parts = nnx.split(module, *_FILTERS)
    params, keys, *state = map(nnx.to_pure_dict, parts)
    flax = _NNX(graphdef, keys, dict(zip(_STATE, state, strict=True)), loss)
    return _adapt(flax, params, loss)


def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    *,
    loss: Callable[[Any, Batch], Any],
) -> "Adapted":
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
        raise TypeError(f"module must be a flax.linen.Module, got {_kind(module)}")
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else _kind(variables)
        raise ValueError(
            'variables must hold the collection "params", as module.init gives it; '
            f"got {got}"
        )
    state = dict(unfreeze(nn.unbox(variables)))
    params = state.pop("params")
    state.pop("intermediates", None)  # what init happened to sow
    return _adapt(_Linen(module, state, loss), params, loss)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A flax module for training; made by `from_nnx` and `from_linen`.

    Attributes:
      params: the first parameters, nested dicts of arrays.
      loss_fn: `loss_fn(params, batch)`, or with a key as third argument; pure.
    """

    params: Params
    loss_fn: LossFn
    _flax: "_Flax"

    def merge(
        self,
        params: Params,
        batches: Iterable[Batch] | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Any:
        """Give the module with these parameters, ready for use.

        Batch normalisation needs averages for evaluation. They are the plain mean, over
        the batches given here, of each one's statistics, which the loss makes as in
        training, with these parameters. Other state that is not trained is carried from
        batch to batch, as the loss changes it.

        Args:
          params: trained ones, of the structure of `self.params`.
          batches: some training batches, of the training's size; or `()`, to keep all
            state as it was given. Needed only if there are batch statistics.
          key: for random numbers in these batches; a fixed one if not given.

        Returns:
          From NNX a new module in evaluation mode, as after `module.eval()`; from
          Linen variables for `module.apply`.

        Raises:
          ValueError: the parameters are of another structure; there are batch
            statistics and it is not said what they are to be; or there is no batch.
        """
        _check_structure(params, self.params)
        state = self._flax.state
        if batches is None and jax.tree.leaves(state.get("batch_stats", {})):
            raise ValueError(
                "batches: the module has batch statistics, which are not trained. Give "
                "some training batches, to take the statistics of these parameters; or "
                "batches=() to keep those it was given with"
            )
        keep = batches is None or (isinstance(batches, tuple) and not batches)
        key = jax.random.key(0) if key is None else key
        count = 0
        for batch in () if batches is None else batches:
            own = jax.random.fold_in(key, count)
            # The mean of those before, and this one's share of a mean with it.
            momentum = count / (count + 1)
            state = self._after(params, state, batch, own, momentum)
            jax.block_until_ready(state)  # one program of several devices at a time
            count += 1
        if not (count or keep):
            raise ValueError("batches: there were none")
        return self._flax.build(params, state)

    @functools.cached_property
    def _after(self) -> Callable[..., State]:
        return jax.jit(lambda *args: self._flax.run(*args)[1])


class _Flax(Protocol):
    """What differs between NNX and Linen."""

    @property
    def state(self) -> State: ...

    def run(
        self,
        params: Params,
        state: State,
        batch: Batch,
        key: jax.Array | None,
        momentum: Any = None,
    ) -> tuple[Any, State]:
        """Give what the loss returns, and the state after it.

        `momentum` takes the place of that of batch normalisation.
        """
        ...

    def build(self, params: Params, state: State) -> Any: ...


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


_NO_KEY = (
    "the loss draws random numbers, so it must be given a key: "
    "loss_fn(params, batch, key), which is rng=True of a run"
)


def _adapt(flax: _Flax, params: Params, loss: Any) -> Adapted:
    if not callable(loss):
        raise TypeError(
            f"loss must be callable, loss(module, batch); got {_kind(loss)}"
        )
    _check_params(params)
    params = jax.tree.map(jnp.array, params)

    def loss_fn(params: Params, batch: Batch, key: jax.Array | None = None) -> Any:
        """Give the loss of the module with these parameters."""
        _check_structure(params, shapes)
        return flax.run(params, flax.state, batch, key)[0]

    shapes = jax.eval_shape(lambda: params)  # keeps no first parameters alive
    return Adapted(params, loss_fn, flax)


def _check_params(params: Params) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("the module has no parameters to train")
    for path, leaf in leaves:
        if not hasattr(leaf, "__array__"):
            what = f"{_kind(leaf)}; give a module that holds arrays"
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            what = f"{leaf.dtype}; what is not trained must not be a parameter"
        else:
            continue
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"parameter {name} must be an array of floats, got {what}")


def _check_structure(params: Params, expected: Params) -> None:
    if jax.tree.structure(params) != jax.tree.structure(expected):
        raise ValueError(
            f"params must have the structure {jax.tree.structure(expected)}, got "
            f"{jax.tree.structure(params)}"
        )


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


def _kind(value: Any) -> str:
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"the class {name}" if isinstance(value, type) else f"a {name}"
