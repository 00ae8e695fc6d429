"""What is minimised, compiled once: a loss on portions, and sums of its gradients."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dbjax import mesh as mesh_lib
from dbjax.loss import check_loss, make_loss
from dbjax.runtime.launch import launch, turn
from dbjax.server.placement import Placement
from dbjax.typing import Batch, Gradients, LossFn, Params


class PortionData(Protocol):
    """What a batch method asks of data: the batch, cut in portions."""

    @property
    def num_portions(self) -> int:
        """How many portions the batch has."""
        ...

    def portion(self, i: int) -> Batch:
        """Give the `i`-th portion, arrays `[P, ...]`; portions may differ in length."""
        ...


class Programs(NamedTuple):
    """What is compiled of a loss, made by `make_programs`.

    Attributes:
      compute: `compute(params, batch, portion, squares) -> value, square, gradients`,
        the means of a portion.
      keep: `keep(accrued or None, gradients, examples) -> accrued`, a sum.
      both: `both(accrued or None, params, batch, portion, examples, squares) ->
        accrued, value, square`, one after the other as one program.
    """

    compute: Callable[..., tuple[jax.Array, jax.Array, Gradients]]
    keep: Callable[..., Gradients]
    both: Callable[..., tuple[Gradients, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss and its portions.

    Attributes:
      data: the portions.
      examples: how many each portion has, `[portions]`.
      compute: see `Programs`, as are `keep` and `both`.
      keep: a sum.
      both: one after the other as one program.
      places: `[k]` the devices of a replica each, which replicas share if there are
        more of them; none where replicas have no devices of their own.
      rules: how parameters lie on these.
      placement: how parameters come there from shards.
    """

    data: PortionData
    examples: tuple[int, ...]
    compute: Callable[..., tuple[jax.Array, jax.Array, Gradients]]
    keep: Callable[..., Gradients]
    both: Callable[..., tuple[Gradients, jax.Array, jax.Array]]
    places: tuple[Mesh, ...] = ()
    rules: mesh_lib.Rules | None = None
    placement: Placement | None = None

    def portion(self, i: int, on: int = 0) -> Batch:
        """Give a portion where replica `on` computes."""
        batch = self.data.portion(i)
        if not self.places:
            return batch
        where = mesh_lib.batch_sharding(batch, self._mesh(on), self.rules)
        return jax.tree.map(jax.device_put, batch, where)

    def here(self, params: Params, on: int) -> Params:
        """Give parameters that lie on replica 0's devices on those of replica `on`."""
        if self.placement is None or on % len(self.places) == 0:
            return params
        return self.placement.merge(self.placement.split(params), on)

    def call(self, on: int, program: Callable[..., Any], *args: Any) -> Any:
        """Call a program on the devices of replica `on`."""
        if not self.places:
            return program(*args)
        return launch(self._mesh(on), program, *args)

    def _mesh(self, on: int) -> Mesh:
        return self.places[on % len(self.places)]


def make_problem(
    loss_fn: LossFn,
    params: Params,
    data: PortionData,
    *,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: mesh_lib.Rules | None = None,
    placement: Placement | None = None,
) -> Problem:
    """Check what can be checked before a run.

    Args:
      loss_fn: see `minimize`, as are `rng`, `has_aux` and `seed`.
      params: parameters of the shapes that are minimised over.
      data: the portions; the lengths of all are looked up.
      rng: the key is one for each portion, and stays the same for all of the run.
      has_aux: whether the loss returns more than a value.
      seed: of the keys.
      mesh: devices that each portion is computed on, if it is one.
      rules: how parameters, and their gradients, lie on the mesh.
      placement: instead of a mesh, where each replica has devices of its own.

    Returns:
      The problem.

    Raises:
      TypeError, ValueError: what is wrong with the loss or the data.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")
    if not hasattr(data, "num_portions") or not callable(
        getattr(data, "portion", None)
    ):
        raise TypeError(
            "data must give num_portions and portion(i), as from_arrays does; a "
            f"{type(data).__name__} does not"
        )
    examples = tuple(_length(i, data.portion(i)) for i in range(data.num_portions))
    if not sum(examples):
        raise ValueError("data holds no examples: the batch must not be empty")

    places: tuple[Mesh, ...] = () if mesh is None else (mesh,)
    specs = None
    if placement is not None:
        places = placement.meshes
    if places:
        shardings = mesh_lib.shardings(params, places[0], rules)
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
    options = {"rng": rng, "has_aux": has_aux, "seed": seed}
    with turn(places[0]) if places else contextlib.nullcontext():
        check_loss(loss_fn, params, data.portion(0), finite=False, **options)
    return Problem(
        data,
        examples,
        *make_programs(loss_fn, specs=specs, **options),
        places=places,
        rules=rules,
        placement=placement,
    )


def make_programs(
    loss_fn: LossFn,
    *,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
    specs: Any = None,
) -> Programs:
    """Make what is compiled of a loss, which was checked.

    Args:
      loss_fn: see `minimize`, as are `rng`, `has_aux` and `seed`.
      rng: whether it takes a key.
      has_aux: whether it returns more than a value.
      seed: of the keys.
      specs: tree of how gradients lie on a mesh.

    Returns:
      The jitted functions.
    """
    loss = make_loss(loss_fn, rng=rng, has_aux=has_aux, seed=seed)
    value_and_grad = jax.value_and_grad(loss)

    def compute(params: Params, batch: Batch, portion: Any, squares: bool) -> Any:
        value, gradients = value_and_grad(params, batch, portion)
        square = jnp.zeros([])
        if squares:
            square = sum(jnp.sum(_wide(g) ** 2) for g in jax.tree.leaves(gradients))
        return value, square, gradients

    def keep(accrued: Gradients | None, gradients: Gradients, examples: Any) -> Any:
        weighted = jax.tree.map(lambda g: examples * _wide(g), gradients)
        if accrued is None:
            return weighted
        return jax.tree.map(jnp.add, accrued, weighted)

    def both(
        accrued: Gradients | None,
        params: Params,
        batch: Batch,
        portion: Any,
        examples: Any,
        squares: bool,
    ) -> Any:
        value, square, gradients = compute(params, batch, portion, squares)
        return keep(accrued, gradients, examples), value, square

    return Programs(
        compute=jax.jit(
            compute,
            static_argnums=3,
            out_shardings=None if specs is None else (None, None, specs),
        ),
        keep=jax.jit(keep, donate_argnums=0, out_shardings=specs),
        both=jax.jit(
            both,
            static_argnums=5,
            donate_argnums=0,
            out_shardings=None if specs is None else (specs, None, None),
        ),
    )


def _wide(g: jax.Array) -> jax.Array:
    """Sums are taken in float32 at least."""
    return g.astype(jnp.promote_types(g.dtype, jnp.float32))


def _length(i: int, batch: Batch) -> int:
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"portion {i} of data: its arrays must share axis 0, the examples; their "
            f"lengths are {sorted(lengths)}"
        )
    (length,) = lengths.pop()
    if not length:
        raise ValueError(f"portion {i} of data holds no examples")
    return int(length)


def scattered(portions: Sequence[tuple[str, tuple[int, ...]]]) -> list[int]:
    """List the portions of all groups, in their order."""
    return [portion for _, group in portions for portion in group]
