"""One shard's part of all named vectors: `handle(state, message) -> state, reply`.

Pure. A vector is a tree like the shard's part of the parameters; every shard holds its
part of every vector, so a command needs no other shard. Published arrays are never
written to. Knows no replica but by number, and no coordinator.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dbjax.sandblaster.messages import (
    Add,
    Added,
    Combine,
    Copy,
    Dots,
    Elementwise,
    Fence,
    Fenced,
    Get,
    Names,
    Put,
    Swap,
)
from dbjax.sandblaster.operations import OPERATIONS
from dbjax.typing import Params

Command: TypeAlias = (
    Put | Get | Names | Dots | Combine | Copy | Swap | Elementwise | Add | Fence
)
Reply: TypeAlias = Params | np.ndarray | list[str] | Added | Fenced | None
DotsFn: TypeAlias = Callable[[tuple[Params, ...], tuple[tuple[int, int], ...]], Any]


class Heard(NamedTuple):
    """What a shard has heard of a replica: a life, its next push, and if it is over."""

    life: int = 0
    next_id: int = 0
    fenced: bool = False


class VectorsState(NamedTuple):
    """Vectors by name, what was heard of each replica, and how many sums were added."""

    vectors: Mapping[str, Params] = {}
    heard: Mapping[int, Heard] = {}
    version: int = 0


class Kernels(NamedTuple):
    """The jitted functions behind the commands, made by `make_kernels`."""

    dots: DotsFn
    combine: Callable[..., Params]
    elementwise: Callable[..., Params]
    copy: Callable[..., Params]
    add: Callable[..., Params]


def inner_products(
    vectors: tuple[Params, ...], pairs: tuple[tuple[int, int], ...]
) -> jax.Array:
    """Inner products of pairs of vectors, leaf by leaf.

    Each leaf's sum is taken in float32 at least (in float64 where x64 is enabled) by
    XLA, which sums in a tree: the error is a few roundings of `sum |a b|`, whatever the
    size. Leaves and shards are then added up in float64 by the caller.

    Args:
      vectors: different ones, each a tree.
      pairs: indices into them.

    Returns:
      `[pairs, leaves]`.
    """
    leaves = [jax.tree.leaves(vector) for vector in vectors]
    widest = jax.dtypes.canonicalize_dtype(np.float64)

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a.astype(widest) * b.astype(widest))

    return jnp.stack(
        [
            jnp.stack([one(a, b) for a, b in zip(leaves[i], leaves[j], strict=True)])
            for i, j in pairs
        ]
    )


def _combine(
    vectors: tuple[Params, ...], coefficients: jax.Array, dtype: Any
) -> Params:
    """`sum_i c_i v_i` in float32 at least, then in the dtypes of the first vector."""

    def one(*leaves: jax.Array) -> jax.Array:
        wide = functools.reduce(jnp.promote_types, [x.dtype for x in leaves])
        wide = jnp.promote_types(wide, jnp.float32)
        terms = [
            c.astype(wide) * x.astype(wide)
            for c, x in zip(coefficients, leaves, strict=True)
        ]
        return functools.reduce(jnp.add, terms).astype(dtype or leaves[0].dtype)

    return jax.tree.map(one, *vectors)


def _elementwise(
    name: str, vectors: tuple[Params, ...], scalars: tuple[Any, ...]
) -> Params:
    def one(*leaves: jax.Array) -> jax.Array:
        dtype = leaves[0].dtype
        numbers = [jnp.asarray(scalar, dtype) for scalar in scalars]
        return OPERATIONS[name].function(*leaves, *numbers).astype(dtype)

    return jax.tree.map(one, *vectors)


def _copy(vector: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda x: x if dtype is None else x.astype(dtype), vector)


def _add(vector: Params, gradients: Params) -> Params:
    return jax.tree.map(lambda v, g: v + g.astype(v.dtype), vector, gradients)


def make_kernels(dots: DotsFn = inner_products, shardings: Any = None) -> Kernels:
    """Jit the commands' functions; each compiles once per shapes and static arguments.

    Args:
      dots: how inner products are computed.
      shardings: tree of shardings that every vector has; None: as they come.

    Returns:
      The functions.
    """
    jit: Any = functools.partial(jax.jit, out_shardings=shardings)
    return Kernels(
        dots=jax.jit(dots, static_argnums=1),
        combine=jit(_combine, static_argnums=2),
        elementwise=jit(_elementwise, static_argnums=0),
        copy=jit(_copy, static_argnums=1),
        add=jit(_add),
    )


KERNELS = make_kernels()


def handle(
    state: VectorsState, message: Command, kernels: Kernels = KERNELS
) -> tuple[VectorsState, Reply]:
    """Carry out a command on this shard's part of the vectors.

    Args:
      state: the shard's vectors and whom it has heard.
      message: the command; it names vectors that are there.
      kernels: the jitted functions.

    Returns:
      The next state and the reply: the vector for `Get`, float64 `[pairs]` for `Dots`,
      names for `Names`, `Added` for `Add`, `Fenced` for `Fence`, else None.

    Raises:
      KeyError: there is no such vector or operation.
      ValueError: the command has the wrong number of vectors or numbers.
    """
    if isinstance(message, Get):
        return state, _named(state, (message.name,))[0]
    if isinstance(message, Dots):
        names = tuple(dict.fromkeys(name for pair in message.pairs for name in pair))
        place = {name: index for index, name in enumerate(names)}
        pairs = tuple((place[a], place[b]) for a, b in message.pairs)
        if not pairs:
            return state, np.zeros(0)
        by_leaf = kernels.dots(_named(state, names), pairs)
        return state, np.asarray(by_leaf, np.float64).sum(1)
    if isinstance(message, Fence):
        return _fence(state, message)
    if isinstance(message, Add):
        known = state.heard.get(message.replica, Heard())
        now = Heard(message.life, message.id + 1)
        if known.life == message.life and known.fenced or now <= known:
            return state, Added(False, state.version)
        (vector,) = _named(state, (message.into,))
        state = _with(state, message.into, kernels.add(vector, message.gradients))
        state = _hears(state, message.replica, now)
        state = state._replace(version=state.version + 1)
        return state, Added(True, state.version)
    if isinstance(message, Names):
        return state, list(state.vectors)
    if isinstance(message, Put):
        return _with(state, message.into, message.values), None
    if isinstance(message, Swap):
        a, b = _named(state, (message.a, message.b))
        return _with(_with(state, message.a, b), message.b, a), None
    return _with(state, message.into, _made(state, message, kernels)), None


def _made(
    state: VectorsState, message: Combine | Copy | Elementwise, kernels: Kernels
) -> Params:
    """Compute the vector that a command sets."""
    if isinstance(message, Copy):
        return kernels.copy(_named(state, (message.name,))[0], message.dtype)
    if isinstance(message, Combine):
        if not len(message.names) == len(message.coefficients) > 0:
            raise ValueError(
                f"Combine needs a coefficient for each of one or more vectors, got "
                f"{message.names} and {message.coefficients}"
            )
        coefficients = np.asarray(message.coefficients, np.float64)
        vectors = _named(state, message.names)
        return kernels.combine(vectors, coefficients, message.dtype)
    if message.operation not in OPERATIONS:
        raise KeyError(
            f"no operation {message.operation!r}; there are {sorted(OPERATIONS)}"
        )
    _, vectors, scalars = OPERATIONS[message.operation]
    if (len(message.names), len(message.scalars)) != (vectors, scalars):
        raise ValueError(
            f"{message.operation!r} takes {vectors} vectors and {scalars} numbers, got "
            f"{message.names} and {message.scalars}"
        )
    return kernels.elementwise(
        message.operation, _named(state, message.names), message.scalars
    )


def _fence(state: VectorsState, message: Fence) -> tuple[VectorsState, Fenced]:
    known = state.heard.get(message.replica, Heard())
    if known.life > message.life:  # long past
        return state, Fenced(0)
    if known.life < message.life:
        known = Heard(message.life)
    return _hears(state, message.replica, known._replace(fenced=True)), Fenced(
        known.next_id
    )


def _named(state: VectorsState, names: tuple[str, ...]) -> tuple[Params, ...]:
    for name in names:
        if name not in state.vectors:
            raise KeyError(f"no vector {name!r}; there are {sorted(state.vectors)}")
    return tuple(state.vectors[name] for name in names)


def _with(state: VectorsState, name: str, vector: Params) -> VectorsState:
    return state._replace(vectors={**state.vectors, name: vector})


def _hears(state: VectorsState, replica: int, heard: Heard) -> VectorsState:
    return state._replace(heard={**state.heard, replica: heard})
