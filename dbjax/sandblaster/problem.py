"""What is minimised, compiled once: a loss on portions, and sums of its gradients."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dbjax import mesh as mesh_lib
from dbjax.loss import check_loss, make_loss
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


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss and its portions.

    Attributes:
      data: the portions.
      examples: how many each portion has, `[portions]`.
      compute: `compute(params, batch, portion, squares) -> value, square, gradients`,
        the means of a portion.
      keep: `keep(accrued or None, gradients, examples) -> accrued`, a sum.
      both: `both(accrued or None, params, batch, portion, examples, squares) ->
        accrued, value, square`, one after the other as one program.
      place: puts a batch where it is computed.
      settle: waits for results, where several programs at the same time would not do.
    """

    data: PortionData
    examples: tuple[int, ...]
    compute: Callable[..., tuple[jax.Array, jax.Array, Gradients]]
    keep: Callable[..., Gradients]
    both: Callable[..., tuple[Gradients, jax.Array, jax.Array]]
    place: Callable[[Batch], Batch]
    settle: Callable[[Any], Any]

    def portion(self, i: int) -> Batch:
        """Give a portion where it is computed."""
        return self.place(self.data.portion(i))


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
) -> Problem:
    """Check what can be checked before a run.

    Args:
      loss_fn: see `minimize`, as are `rng`, `has_aux` and `seed`.
      params: parameters of the shapes that are minimised over.
      data: the portions; the lengths of all are looked up.
      rng: the key is one for each portion, and stays the same for all of the run.
      has_aux: whether the loss returns more than a value.
      seed: of the keys.
      mesh: devices that each portion is spread over, if it is one.
      rules: how parameters, and their gradients, lie on the mesh.

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

    def place(batch: Batch) -> Batch:
        if mesh is None:
            return batch
        return jax.tree.map(jax.device_put, batch, mesh_lib.batch_sharding(batch, mesh))

    shardings = None if mesh is None else mesh_lib.shardings(params, mesh, rules)
    options = {"rng": rng, "has_aux": has_aux, "seed": seed}
    check_loss(loss_fn, params, place(data.portion(0)), finite=False, **options)
    value_and_grad = jax.value_and_grad(make_loss(loss_fn, **options))

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

    return Problem(
        data=data,
        examples=examples,
        compute=jax.jit(compute, static_argnums=3),
        keep=jax.jit(keep, donate_argnums=0, out_shardings=shardings),
        both=jax.jit(
            both,
            static_argnums=5,
            donate_argnums=0,
            out_shardings=None if shardings is None else (shardings, None, None),
        ),
        place=place,
        # XLA's collectives on CPU may deadlock with two programs under way.
        settle=(lambda x: x) if mesh is None else jax.block_until_ready,
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
