"""Vector algebra over pytrees: a tree of float arrays is one long vector.

Nothing here knows an optimizer. `m` vectors of one shape are kept as *rows*: a tree
whose leaves are `[m, ...]`, so that all products with one vector are one pass.

Inner products accumulate in at least float32, within a leaf by XLA's blocked kernels
and from leaf to leaf in `scalar_dtype()`: float64 where x64 is on. What scalars are
made from them (coefficients, slopes) then loses nothing more. Complex leaves count as
pairs of reals: an inner product is its real part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dbjax.typing import Params

FEW = 10  # rows that are combined term by term


def scalar_dtype() -> jnp.dtype:
    """Give the dtype of inner products: float64 where x64 is on, else float32."""
    return jnp.dtype(jax.dtypes.canonicalize_dtype(jnp.float64))


def vdot(a: Params, b: Params) -> jax.Array:
    """Give the inner product of two trees, a real scalar of `scalar_dtype()`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dbjax import trees
        >>> a = {"w": jnp.ones(3), "b": 2.0}
        >>> print(trees.vdot(a, a))
        7.0
    """
    return jnp.sum(leaf_vdots(a, b))


def leaf_vdots(a: Params, b: Params) -> jax.Array:
    """Give the inner products of two trees leaf by leaf, `[leaves]`."""
    return _stacked(jax.tree.map(_leaf_vdot, a, b), ())


def norm(a: Params) -> jax.Array:
    """Give the Euclidean norm of a tree."""
    return jnp.sqrt(vdot(a, a))


def axpy(alpha: Any, x: Params, y: Params) -> Params:
    """Give `alpha x + y` in the dtypes of `y`, rounded once.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dbjax import trees
        >>> print(trees.axpy(2.0, jnp.arange(3.0), jnp.ones(3)))
        [1. 3. 5.]
    """

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        wide = _wide(y)
        total = jnp.asarray(alpha, _real(wide)) * x.astype(wide) + y.astype(wide)
        return total.astype(y.dtype)

    return jax.tree.map(lambda x, y: leaf(jnp.asarray(x), jnp.asarray(y)), x, y)


def where(condition: Any, a: Params, b: Params) -> Params:
    """Give `a` where the scalar condition holds, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def rows_vdot(rows: Params, v: Params) -> jax.Array:
    """Give the inner products of all rows with `v`, `[m]`, reading the rows once.

    Args:
        rows: leaves `[m, ...]`.
        v: leaves `[...]`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from dbjax import trees
        >>> print(trees.rows_vdot(jnp.eye(3)[:2], jnp.array([5.0, 6.0, 7.0])))
        [5. 6.]
    """
    return jnp.sum(leaf_rows_vdots(rows, v), 0)


def leaf_rows_vdots(rows: Params, v: Params) -> jax.Array:
    """Give the inner products of all rows with `v` leaf by leaf, `[leaves, m]`."""
    m = [len(leaf) for leaf in jax.tree.leaves(rows)[:1]]
    return _stacked(jax.tree.map(_leaf_rows_vdot, rows, v), m or [0])


def combine(coefficients: jax.Array, rows: Params) -> Params:
    """Give the sum of the rows, each times its coefficient, reading the rows once.

    Args:
        coefficients: `[m]`, or `[leaves, m]` if each leaf has its own.
        rows: leaves `[m, ...]`.

    Returns:
        Leaves `[...]`, in float32 where the rows are 16-bit.
    """
    axes = coefficients.ndim - 1
    return jax.tree.map(_leaf_combine, split(coefficients, rows, axes), rows)


def split(x: jax.Array, tree: Params, axes: int | None = None) -> Params:
    """Give each leaf its part of `x` if that has a leading axis, or else all of it.

    Args:
        x: `[leaves, ...]` or `[...]`.
        tree: whose leaves are meant.
        axes: 1 or 0, whether there is that axis; by default, whether `x` has any.
    """
    axes = x.ndim if axes is None else axes
    treedef = jax.tree.structure(tree)
    return treedef.unflatten(list(x) if axes else [x] * treedef.num_leaves)


def set_row(
    rows: Params,
    index: jax.Array,
    v: Any,
    condition: Any,
    make: Callable[..., jax.Array] | None = None,
) -> Params:
    """Put `v` into row `index` if the condition holds; in place where it is donated.

    With `make`, `v` is a tuple of trees, and the row is what `make` gives of their
    leaves and those of `rows`, made as it is written.
    """

    def put(rows: Params) -> Params:
        new = v if make is None else jax.tree.map(make, *v, rows)
        return jax.tree.map(
            lambda rows, v: jax.lax.dynamic_update_index_in_dim(
                rows, v.astype(rows.dtype), index, 0
            ),
            *(rows, new),
        )

    # A branch, and not a choice of what to write: XLA would merge that with what reads
    # the rows next, and copy them whole for it.
    return jax.lax.cond(condition, put, lambda rows: rows, rows)


def zeros_like(
    leaf: jax.Array, dtype: Any = None, rows: int | None = None
) -> jax.Array:
    """Give zeros like a leaf, or `rows` of them, in a buffer of their own.

    They are sharded like the leaf: where it lies if it is concrete; inside jit, where
    nobody can ask, by telling XLA that the two belong together.
    """
    leaf = jnp.asarray(leaf)
    shape = leaf.shape if rows is None else (rows, *leaf.shape)
    dtype = leaf.dtype if dtype is None else dtype
    if not isinstance(leaf, jax.core.Tracer):
        place = leaf.sharding if leaf.committed else None
        return jnp.zeros(shape, dtype, device=_rows_sharding(place, leaf.ndim, rows))
    zeros = jnp.zeros(shape, dtype)
    if explicit := _explicit(leaf):
        zeros, _ = jax.lax.optimization_barrier((zeros, leaf))  # else it is not used
        return jax.sharding.reshard(zeros, _rows_sharding(explicit, leaf.ndim, rows))
    return shard_alike(zeros, jnp.broadcast_to(leaf, shape).astype(dtype))[0]


def replicated(params: Params, value: Any, dtype: Any) -> jax.Array:
    """Give a small array that lies whole on every device that holds the params."""
    array = jnp.array(value, dtype)
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.core.Tracer):
            sharding = _explicit(leaf)
        else:
            sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            place = _written(NamedSharding(sharding.mesh, PartitionSpec()), array.ndim)
            traced = isinstance(array, jax.core.Tracer)
            return (jax.sharding.reshard if traced else jax.device_put)(array, place)
    return array


def _leaf_vdot(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = jnp.asarray(a), jnp.asarray(b)
    wide = jnp.promote_types(_wide(a), _wide(b))
    return jnp.sum((jnp.conj(a.astype(wide)) * b.astype(wide)).real)


def _leaf_rows_vdot(rows: jax.Array, v: jax.Array) -> jax.Array:
    if rows.dtype.itemsize < 4:  # a product with conversions, which XLA fuses
        wide = _wide(v)
        axes = tuple(range(1, rows.ndim))
        return jnp.sum((rows.astype(wide) * v.astype(wide)).real, axes)
    axes = tuple(range(1, rows.ndim)), tuple(range(v.ndim))
    sharding = _explicit(v)
    out = NamedSharding(sharding.mesh, PartitionSpec(None)) if sharding else None
    return jax.lax.dot_general(
        jnp.conj(rows) if jnp.iscomplexobj(rows) else rows,
        v.astype(rows.dtype),
        (axes, ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=out,
    ).real


def _leaf_combine(coefficients: jax.Array, rows: jax.Array) -> jax.Array:
    wide = _wide(rows)
    coefficients = coefficients.astype(_real(wide))
    if len(rows) > FEW and rows.dtype == wide:
        return jax.lax.dot_general(
            coefficients.astype(wide),
            rows,
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
    # Term by term, which XLA makes one loop with what comes before and after; that
    # many streams at once are all a processor can follow.
    terms = [coefficients[i] * rows[i].astype(wide) for i in range(len(rows))]
    return sum(terms[1:], start=terms[0])


def _stacked(products: Params, shape: Any) -> jax.Array:
    leaves = [x.astype(scalar_dtype()) for x in jax.tree.leaves(products)]
    return jnp.stack(leaves) if leaves else jnp.zeros((0, *shape), scalar_dtype())


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _real(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.finfo(dtype).dtype


def _explicit(x: jax.Array) -> NamedSharding | None:
    """The sharding in an array's type, where the mesh has axes of the Explicit kind."""
    sharding = jax.typeof(x).sharding
    return sharding if _is_explicit(sharding) else None


def _is_explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


def _rows_sharding(sharding: Any, ndim: int, rows: int | None) -> Any:
    """The sharding of a leaf of `ndim` axes, or of rows of it."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    first = [] if rows is None else [None]
    spec = PartitionSpec(*first, *sharding.spec)
    return _written(NamedSharding(sharding.mesh, spec), ndim + len(first))


def _written(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """The same sharding as jit writes it, or a second compilation follows."""
    spec = list(sharding.spec)
    while spec and spec[-1] is None:
        spec.pop()
    if _is_explicit(sharding):
        spec += [None] * (ndim - len(spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
