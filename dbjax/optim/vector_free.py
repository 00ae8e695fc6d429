"""L-BFGS on scalars: what the inner products of its vectors say, and nothing else.

Whoever holds the vectors (an optax transformation, a coordinator of shards) makes one
round of inner products, gives them to `absorb`, asks `coefficients`, and makes one
linear combination. Vectors are never seen here.

With rows ordered by age, the oldest first, `S` and `Y` the last `m` differences of
parameters and of gradients, `R` the upper triangle of `S Y'` and `D` its diagonal, the
two loops of the two-loop recursion are two triangular systems::

    R alpha = S g                                  (newest to oldest)
    R' c    = D alpha - gamma (Y g - Y Y' alpha)   (oldest to newest)
    H g     = gamma g + S' c - gamma Y' alpha

New in each round are only the products with the newest gradient: those with the newest
`y` follow, as `y = g - g_before` and the products with `g_before` are known.

`H g` here starts from `gamma I`. Where the vectors come in `k` *blocks*, such as the
leaves of a tree, it starts from `gamma D`, with `D` constant on each block: there
`sqrt(s s / y y)` of the newest pair, which is what an inverse Hessian has as its size
there, and `gamma = s y / y D y`, so that `D` decides between blocks and `gamma` over
all of them. Layers of a network differ in scale by orders of magnitude, and pairs are
too few to learn that. It takes the same products, kept apart by block.

Sources: Nocedal and Wright, Numerical Optimization (2006), algorithm 7.4; Byrd, Nocedal
and Schnabel (1994), theorem 2.2; Chen, Wang and Zhou (2014) for the vector-free form;
Oren and Luenberger (1974) for `gamma`, also under a metric `D`; Gilbert and Lemaréchal
(1989) for initial matrices that are not multiples of the unit matrix.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

# Powell's damping (Nocedal and Wright, procedure 18.2) lifts the curvature to this
# share of the model's, once it is below that share of it (or negative).
LIFTED, TOO_SMALL = 0.2, 1e-6
# Blocks differ from the whole by no more than this factor, up or down.
APART = 30.0
# Without a model, curvature counts as none below this.
FLAT = 1e-8

Scalar: TypeAlias = Any


class Products(NamedTuple):
    """What is known of the `m` pairs and of the latest gradient `g`; by age.

    With `k` blocks `yy`, `yg`, `gg` and `scale` have a leading axis of that length.

    Attributes:
        sy: `[m, m]`, `s_i y_j` for `i <= j`; the unit matrix where there is no pair.
        yy: `[m, m]`, `y_i y_j`; zero where there is no pair.
        sg: `[m]`, `s_i g`.
        yg: `[m]`, `y_i g`.
        gg: `g g`.
        scale: `D`, from the newest pair; 1 without blocks.
        slope: `g H g` of the latest direction; 0 if there is none to build a pair on.
        pairs: int32, how many pairs are held, at most `m`.
        next: int32, the row of the history that the next pair goes to.
        skipped: int32, pairs that were refused.
        damped: int32, pairs whose curvature was lifted.
        restarts: int32, directions that did not descend.
    """

    sy: jax.Array
    yy: jax.Array
    sg: jax.Array
    yg: jax.Array
    gg: jax.Array
    scale: jax.Array
    slope: jax.Array
    pairs: jax.Array
    next: jax.Array
    skipped: jax.Array
    damped: jax.Array
    restarts: jax.Array


class Round(NamedTuple):
    """One round of inner products, with `s`, `y` the newest differences.

    With `k` blocks `rows_yg`, `yy`, `yg`, `gg` and `ss` have a leading axis of that
    length.

    Attributes:
        rows_sg: `[m]`, the rows of `S`, in the order they are stored, with `g`.
        rows_yg: `[m]`, those of `Y`.
        sy: `s y`.
        yy: `y y`.
        sg: `s g`.
        yg: `y g`.
        gg: `g g`.
        ss: `s s`, which only blocks need.
    """

    rows_sg: jax.Array
    rows_yg: jax.Array
    sy: jax.Array
    yy: jax.Array
    sg: jax.Array
    yg: jax.Array
    gg: jax.Array
    ss: Any = None


class Pair(NamedTuple):
    """What to store: `s` and `theta y - tau g_before`, in `row`, if `accepted`."""

    accepted: jax.Array
    row: jax.Array
    theta: jax.Array
    tau: jax.Array


class Coefficients(NamedTuple):
    """The direction `H g = gamma g + s S + y Y`, in the order the rows are stored.

    With `k` blocks `gamma` and `y` have a leading axis of that length.
    """

    gamma: jax.Array
    s: jax.Array
    y: jax.Array


def no_products(
    memory_size: int, dtype: jnp.dtype, blocks: int | None = None
) -> Products:
    """Give what is known before the first gradient, of whole vectors or of `blocks`."""
    lead = () if blocks is None else (blocks,)
    zeros = [jnp.zeros([], jnp.int32) for _ in range(5)]
    return Products(
        sy=jnp.eye(memory_size, dtype=dtype),
        yy=jnp.zeros((*lead, memory_size, memory_size), dtype),
        sg=jnp.zeros(memory_size, dtype),
        yg=jnp.zeros((*lead, memory_size), dtype),
        gg=jnp.zeros(lead, dtype),
        scale=jnp.ones(lead, dtype),
        slope=jnp.zeros([], dtype),
        pairs=zeros[0],
        next=zeros[1],
        skipped=zeros[2],
        damped=zeros[3],
        restarts=zeros[4],
    )


def restart(products: Products) -> Products:
    """Forget all pairs; the counts stay, and so does the latest gradient."""
    fresh = no_products(len(products.sg), products.sg.dtype)
    return products._replace(
        sy=fresh.sy,
        yy=jnp.zeros_like(products.yy),
        sg=fresh.sg,
        yg=jnp.zeros_like(products.yg),
        scale=jnp.ones_like(products.scale),
        pairs=fresh.pairs,
    )


def absorb(products: Products, new: Round) -> tuple[Products, Pair]:
    r"""Judge the newest pair and take it, or not, into the products.

    The model says `B s = -t g_before` for a step of `t` along its own direction, and
    `t` follows from two products. Where `s y` is not above a small share of `s B s`,
    `y` is damped to `theta y + (1 - theta) B s`, so that `s y` becomes `0.2 s B s`.
    What is not finite, or leaves `s y` at zero, is skipped.

    Args:
        products: what was known.
        new: the round's products.

    Returns:
        What is known now, for `coefficients`, and what to do with the pair.
    """
    rows_sg = _by_age(products, new.rows_sg)
    rows_yg = _by_age(products, new.rows_yg)

    before = new.sg - new.sy, new.yg - new.yy  # s and y with the gradient before
    has_before = products.slope > 0
    t = -before[0] / jnp.where(has_before, products.slope, 1)
    model = -t * before[0]
    damps = ~(new.sy > TOO_SMALL * model * jnp.minimum(1, 1 / jnp.abs(t)))
    theta = jnp.where(damps, (1 - LIFTED) * model / (model - new.sy), 1)
    tau = jnp.where(damps, (1 - theta) * t, 0)

    def damp(y: jax.Array, g_before: jax.Array) -> jax.Array:
        return jnp.where(damps, theta * y - tau * g_before, y)

    y_before = damp(before[1], products.gg)
    damped = new._replace(
        sy=damp(new.sy, before[0]),
        yy=damp(damp(new.yy, before[1]), y_before),
        yg=damp(new.yg, new.gg - new.yg),
    )
    sum_of_all = sum(jnp.sum(x) for x in jax.tree.leaves((new, theta, tau)))
    yy = jnp.sum(damped.yy)
    accepted = has_before & (damped.sy > 0) & (yy > 0) & jnp.isfinite(sum_of_all)
    accepted &= jnp.isfinite(damped.sy / yy)
    after = _insert(
        products,
        damped,
        damp(rows_sg - products.sg, products.sg),
        damp(rows_yg - products.yg, products.yg),
        accepted,
    )
    after = after._replace(
        skipped=products.skipped + (has_before & ~accepted),
        damped=products.damped + (accepted & damps),
    )
    return after, Pair(accepted, products.next, theta, tau)


def absorb_apart(
    products: Products, new: Round, rows_sy: jax.Array, rows_yy: jax.Array, ss: Scalar
) -> tuple[Products, Pair]:
    """Take the newest pair where `y` is not the difference of the gradients `g`.

    So it is where batches change and `y` comes from what two of them share, and where
    the steps are projected. Nothing can be derived from earlier products then, and no
    model says what `s y` should be: a pair with `s y <= 1e-8 s s` is skipped (Berahas,
    Nocedal and Takac, 2016, section 3.2).

    Args:
        products: what was known.
        new: the round's products.
        rows_sy: `[m]`, the rows of `S`, in the order they are stored, with `y`.
        rows_yy: `[m]`, those of `Y`.
        ss: `s s`.

    Returns:
        What is known now, for `coefficients`, and what to do with the pair.
    """
    leaves = jax.tree.leaves((new, rows_sy, rows_yy, ss))
    sum_of_all = sum(jnp.sum(x) for x in leaves)
    accepted = (new.sy > FLAT * ss) & (ss > 0) & jnp.isfinite(sum_of_all)
    accepted &= jnp.isfinite(new.sy / jnp.sum(new.yy))
    after = _insert(
        products, new, _by_age(products, rows_sy), _by_age(products, rows_yy), accepted
    )
    after = after._replace(skipped=products.skipped + ((ss > 0) & ~accepted))
    one, zero = jnp.ones_like(new.sy), jnp.zeros_like(new.sy)
    return after, Pair(accepted, products.next, one, zero)


def _by_age(products: Products, stored: jax.Array) -> jax.Array:
    """Order what was stored by row, the oldest first; 0 where there is no pair."""
    m = len(products.sg)
    held = jnp.arange(m) >= m - products.pairs
    return jnp.where(held, jnp.roll(stored, -products.next, -1), 0)


def _insert(
    products: Products,
    new: Round,
    rows_sy: jax.Array,
    rows_yy: jax.Array,
    accepted: jax.Array,
) -> Products:
    """Put the newest pair and gradient into the products; the rows are by age."""
    rows_sg = _by_age(products, new.rows_sg)
    rows_yg = _by_age(products, new.rows_yg)
    m = len(rows_sg)
    with_pair = products._replace(
        sy=_grow(products.sy, jnp.zeros_like(rows_sy), rows_sy, new.sy),
        yy=_grow(products.yy, rows_yy, rows_yy, new.yy),
        sg=jnp.append(rows_sg[1:], new.sg),
        yg=jnp.append(rows_yg[..., 1:], new.yg[..., None], -1),
        scale=products.scale if new.ss is None else _scale(new.ss, new.yy),
        pairs=jnp.minimum(products.pairs + 1, m),
        next=(products.next + 1) % m,
    )
    without = products._replace(sg=rows_sg, yg=rows_yg)
    after = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), with_pair, without)
    return after._replace(gg=new.gg, slope=jnp.zeros_like(products.slope))


def coefficients(
    products: Products, scale_init_precond: bool = True
) -> tuple[Coefficients, Products]:
    """Give the coefficients of the direction; what is known then holds its slope.

    Without pairs `gamma` is `min(1, 1 / |g|)`, so that the first step is no longer than
    1 (Nocedal and Wright, after equation 6.20, leave it open), later `s y / y y` of the
    newest pair. A direction whose slope is not above rounding is replaced by the
    gradient, and the pairs are forgotten.

    Args:
        products: as `absorb` gave them.
        scale_init_precond: whether to use `gamma`; else it is 1.
    """
    sy, sg, d = products.sy, products.sg, products.scale

    def weighted(x: jax.Array) -> jax.Array:
        """The products of whole vectors in the metric `D`."""
        total = x * d.reshape(*d.shape, *[1] * (x.ndim - d.ndim))
        return jnp.sum(total, axis=tuple(range(d.ndim)))

    yy, yg, gg = map(weighted, (products.yy, products.yg, products.gg))
    whole = jnp.sum(products.gg)
    first = jnp.where(whole > 1, jax.lax.rsqrt(whole), 1) if scale_init_precond else 1.0
    first = jnp.asarray(first, gg.dtype)
    gamma = first
    if scale_init_precond:
        newest = sy[-1, -1] / jnp.where(products.pairs > 0, yy[-1, -1], 1)
        gamma = jnp.where(products.pairs > 0, newest, first)
    alpha = solve_triangular(sy, sg)
    right = jnp.diag(sy) * alpha - gamma * (yg - yy @ alpha)
    c = solve_triangular(sy, right, trans=1)
    terms = gamma * gg, jnp.sum(c * sg), -gamma * jnp.sum(alpha * yg)
    slope = sum(terms)
    size = gamma * gg + jnp.sum(jnp.abs(c * sg)) + gamma * jnp.sum(jnp.abs(alpha * yg))
    rounding = len(sg) * jnp.finfo(sg.dtype).eps * size
    failed = (products.pairs > 0) & jnp.isfinite(gg) & (gg > 0) & ~(slope > rounding)
    again = restart(products)._replace(restarts=products.restarts + 1)
    products = jax.tree.map(lambda a, b: jnp.where(failed, a, b), again, products)
    gamma = jnp.where(failed, first, gamma * d)
    slope = jnp.where(failed, first * whole, slope)
    slope = jnp.where(jnp.isfinite(slope), slope, 0)

    def stored(x: jax.Array) -> jax.Array:
        return jnp.roll(jnp.where(failed, 0, x), products.next)

    found = Coefficients(gamma, stored(c), gamma[..., None] * stored(-alpha))
    return found, products._replace(slope=slope)


def _scale(ss: jax.Array, yy: jax.Array) -> jax.Array:
    """The inverse Hessian's size on each block, over its size on the whole."""
    ratio = jnp.sqrt(ss / yy) / jnp.sqrt(jnp.sum(ss) / jnp.sum(yy))
    sound = (ss > 0) & (yy > 0) & jnp.isfinite(ratio)
    return jnp.where(sound, jnp.clip(ratio, 1 / APART, APART), 1)


def _grow(
    old: jax.Array, row: jax.Array, column: jax.Array, corner: jax.Array
) -> jax.Array:
    """Drop the oldest row and column and add the newest."""
    side = [(0, 0)] * (old.ndim - 2)
    grown = jnp.pad(old[..., 1:, 1:], [*side, (0, 1), (0, 1)])
    grown = grown.at[..., -1, :-1].set(row[..., 1:])
    grown = grown.at[..., :-1, -1].set(column[..., 1:])
    return grown.at[..., -1, -1].set(corner)
