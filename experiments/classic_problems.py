"""The classic test problems of unconstrained minimisation, from their formulas.

All 35 of Moré, Garbow and Hillstrom, Testing Unconstrained Optimization Software, ACM
TOMS 7 (1981), in the order and with the numbers of section 3, each a sum of squares
with its standard start. Where `n` or `m` is free, it is small. All work in the dtype of
the point they are given.

A problem counts as solved at a point when, in float64 whatever dtype found it,

    f(x) - f* <= tau min(f0 - f*, max(1, |f*|))

for one of its published minima `f*`, local ones and those at infinity included (of the
paper, and for 18, 19, 26, 30 and 31 of Kappel and Kuntsevich's SolvOpt, 1997): the
point must be good on the scale of the start and on that of the solution. `tau` is
`eps^(1/2)` of the solver's dtype (half of its digits: 1.5e-8 in float64, 3.5e-4 in
float32), and `eps^(3/4)` (1.8e-12, 6.4e-6) for the strict count.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Residuals = Callable[[jax.Array], jax.Array]


class Problem(NamedTuple):
    """A test problem: minimise the sum of squares of the residuals.

    Attributes:
        number: in the source.
        name: as the source has it.
        residuals: `[n] -> [m]`.
        start: the standard start, `[n]`.
        minima: the values of its minima, the lowest first; the published six digits
        refined to more.
    """

    number: int
    name: str
    residuals: Residuals
    start: tuple[float, ...]
    minima: tuple[float, ...]

    def fun(self, x: jax.Array) -> jax.Array:
        """The value, a scalar in the dtype of `x`."""
        return jnp.sum(self.residuals(x) ** 2)

    def solved(self, value: float, tau: float) -> bool:
        """Whether a value is near enough to one of the minima.

        A minimum that is not the lowest must be met from both sides, to `tau` or the
        six digits that are published.
        """
        near = [
            abs(value - low) <= max(room, 1e-6 * low)
            for low, room in zip(self.minima, _rooms(self, tau), strict=True)
            if low > self.minima[0]
        ]
        return value <= self.minima[0] + _rooms(self, tau)[0] or any(near)


@functools.cache
def value_at(problem: Problem, point: tuple[float, ...]) -> float:
    """The value at a point, in float64."""
    with jax.enable_x64(True):
        return float(jax.jit(problem.fun)(jnp.asarray(point, jnp.float64)))


def _rooms(problem: Problem, tau: float) -> list[float]:
    """How far above each minimum a value may be."""
    first = value_at(problem, problem.start)
    return [tau * min(first - low, max(1.0, abs(low))) for low in problem.minima]


def tau_of(dtype: Any, strict: bool = False) -> float:
    """The tolerance that counts as solved for a solver that works in this dtype."""
    return float(jnp.finfo(dtype).eps) ** (0.75 if strict else 0.5)


def _like(x: jax.Array, data: Any) -> jax.Array:
    return jnp.asarray(data, x.dtype)


def _index(x: jax.Array, count: int) -> jax.Array:
    """The numbers from 1 to `count`."""
    return jnp.arange(1, count + 1, dtype=x.dtype)


def _rosenbrock(x: jax.Array) -> jax.Array:
    odd, even = x[::2], x[1::2]
    return jnp.concatenate([10 * (even - odd**2), 1 - odd])


def _freudenstein_roth(x: jax.Array) -> jax.Array:
    a, b = x
    first = -13 + a + ((5 - b) * b - 2) * b
    return jnp.stack([first, -29 + a + ((b + 1) * b - 14) * b])


def _powell_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.sum(jnp.exp(-x)) - 1.0001])


def _brown_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def _beale(x: jax.Array) -> jax.Array:
    return _like(x, [1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** _index(x, 3))


def _jennrich_sampson(x: jax.Array) -> jax.Array:
    i = _index(x, 10)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


def _helical_valley(x: jax.Array) -> jax.Array:
    # The angle jumps where x1 = 0 and x2 < 0, far from the start and from the minimum.
    theta = jnp.arctan2(-x[0], x[1]) / (2 * jnp.pi) + 0.25
    radius = jnp.sqrt(x[0] ** 2 + x[1] ** 2)
    return jnp.stack([10 * (x[2] - 10 * theta), 10 * (radius - 1), x[2]])


BARD = "0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39"


def _bard(x: jax.Array) -> jax.Array:
    u = _index(x, 15)
    v = 16 - u
    fitted = x[0] + u / (v * x[1] + jnp.minimum(u, v) * x[2])
    return _like(x, _numbers(BARD)) - fitted


GAUSSIAN = "0.0009 0.0044 0.0175 0.0540 0.1295 0.2420 0.3521 0.3989"


def _gaussian(x: jax.Array) -> jax.Array:
    t = (8 - _index(x, 15)) / 2
    half = _numbers(GAUSSIAN)
    y = _like(x, np.concatenate([half, half[-2::-1]]))
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


MEYER = (
    "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 "
    "2872"
)


def _meyer(x: jax.Array) -> jax.Array:
    t = 45 + 5 * _index(x, 16)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - _like(x, _numbers(MEYER))


def _gulf(x: jax.Array) -> jax.Array:
    # The source misprints `y_i - x2` as a product; so its minimum says.
    t = _index(x, 99) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def _box(x: jax.Array) -> jax.Array:
    t = _index(x, 10) / 10
    known = jnp.exp(-t) - jnp.exp(-10 * t)
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * known


def _powell_singular(x: jax.Array) -> jax.Array:
    a, b, c, d = x.reshape(-1, 4).T
    linear = jnp.concatenate([a + 10 * b, 5**0.5 * (c - d)])
    return jnp.concatenate([linear, (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


def _wood(x: jax.Array) -> jax.Array:
    a, b, c, d = x
    first = [10 * (b - a**2), 1 - a, 90**0.5 * (d - c**2), 1 - c]
    return jnp.stack([*first, 10**0.5 * (b + d - 2), 10**-0.5 * (b - d)])


KOWALIK = "0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246"
KOWALIK_U = "4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625"


def _kowalik_osborne(x: jax.Array) -> jax.Array:
    u = _like(x, _numbers(KOWALIK_U))
    fitted = x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])
    return _like(x, _numbers(KOWALIK)) - fitted


def _brown_dennis(x: jax.Array) -> jax.Array:
    t = _index(x, 20) / 5
    first = x[0] + t * x[1] - jnp.exp(t)
    return first**2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


OSBORNE_1 = (
    "0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 "
    "0.658 0.628 0.603 0.580 0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 "
    "0.438 0.431 0.424 0.420 0.414 0.411 0.406"
)


def _osborne_1(x: jax.Array) -> jax.Array:
    t = 10 * (_index(x, 33) - 1)
    fitted = x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4])
    return _like(x, _numbers(OSBORNE_1)) - fitted


def _biggs_exp6(x: jax.Array) -> jax.Array:
    t = _index(x, 13) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    first = x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1])
    return first + x[5] * jnp.exp(-t * x[4]) - y


OSBORNE_2 = (
    "1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 "
    "0.655 0.616 0.606 0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 "
    "0.612 0.558 0.533 0.495 0.500 0.423 0.395 0.375 0.372 0.391 0.396 0.405 0.428 "
    "0.429 0.523 0.562 0.607 0.653 0.672 0.708 0.633 0.668 0.645 0.632 0.591 0.559 "
    "0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581 0.428 0.292 0.162 0.098 0.054"
)


def _osborne_2(x: jax.Array) -> jax.Array:
    t = (_index(x, 65) - 1)[:, None] / 10
    peaks = jnp.exp(-((t - x[8:11]) ** 2) * x[5:8]) @ x[1:4]
    fitted = x[0] * jnp.exp(-t[:, 0] * x[4]) + peaks
    return _like(x, _numbers(OSBORNE_2)) - fitted


def _watson(x: jax.Array) -> jax.Array:
    t, j = _index(x, 29)[:, None] / 29, jnp.arange(x.size, dtype=x.dtype)
    powers = t ** jnp.arange(x.size)
    slope = powers[:, :-1] @ (j[1:] * x[1:])
    return jnp.append(
        slope - (powers @ x) ** 2 - 1, jnp.stack([x[0], x[1] - x[0] ** 2 - 1])
    )


def _penalty_1(x: jax.Array) -> jax.Array:
    return jnp.append(1e-5**0.5 * (x - 1), jnp.sum(x**2) - 0.25)


def _penalty_2(x: jax.Array) -> jax.Array:
    i = _index(x, x.size)
    e, known = jnp.exp(x / 10), jnp.exp(i / 10)
    pairs = e[1:] + e[:-1] - (known[1:] + known[:-1])
    small = 1e-5**0.5 * jnp.append(pairs, e[1:] - jnp.exp(_like(x, -0.1)))
    last = jnp.sum((x.size - i + 1) * x**2) - 1
    return jnp.concatenate([x[:1] - 0.2, small, last[None]])


def _variably_dimensioned(x: jax.Array) -> jax.Array:
    total = jnp.sum(_index(x, x.size) * (x - 1))
    return jnp.append(x - 1, jnp.stack([total, total**2]))


def _trigonometric(x: jax.Array) -> jax.Array:
    c, s = jnp.cos(x), jnp.sin(x)
    return x.size - jnp.sum(c) + _index(x, x.size) * (1 - c) - s


def _brown_almost_linear(x: jax.Array) -> jax.Array:
    return jnp.append(x[:-1] + jnp.sum(x) - (x.size + 1), jnp.prod(x) - 1)


def _discrete_boundary_value(x: jax.Array) -> jax.Array:
    h = 1 / (x.size + 1)
    padded = jnp.pad(x, 1)
    bend = 2 * x - padded[:-2] - padded[2:]
    return bend + h**2 * (x + h * _index(x, x.size) + 1) ** 3 / 2


def _discrete_integral_equation(x: jax.Array) -> jax.Array:
    h = 1 / (x.size + 1)
    t = h * _index(x, x.size)
    kernel = jnp.minimum(t[:, None], t) * (1 - jnp.maximum(t[:, None], t))
    return x + h * kernel @ (x + t + 1) ** 3 / 2


def _broyden_tridiagonal(x: jax.Array) -> jax.Array:
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def _broyden_banded(x: jax.Array) -> jax.Array:
    ones = np.ones((x.size, x.size))
    band = np.triu(ones, -5) * np.tril(ones, 1) - np.eye(x.size)
    return x * (2 + 5 * x**2) + 1 - _like(x, band) @ (x * (1 + x))


def _linear_full_rank(x: jax.Array, m: int = 20) -> jax.Array:
    return jnp.pad(x, (0, m - x.size)) - 2 / m * jnp.sum(x) - 1


def _linear_rank_1(x: jax.Array, m: int = 20) -> jax.Array:
    return _index(x, m) * jnp.sum(_index(x, x.size) * x) - 1


def _linear_rank_1_zeros(x: jax.Array, m: int = 20) -> jax.Array:
    total = jnp.sum(_index(x, x.size)[1:-1] * x[1:-1])
    return jnp.pad((_index(x, m) - 1)[:-1] * total, (0, 1)) - 1


def _chebyquad(x: jax.Array) -> jax.Array:
    before, now, means = jnp.ones_like(x), 2 * x - 1, []
    for i in range(1, x.size + 1):
        integral = -1 / (i**2 - 1) if i % 2 == 0 else 0.0
        means.append(jnp.mean(now) - integral)
        before, now = now, 2 * (2 * x - 1) * now - before
    return jnp.stack(means)


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), float)


def _grid(n: int) -> tuple[float, ...]:
    """The start of problems 28 and 29."""
    return tuple(i / (n + 1) * (i / (n + 1) - 1) for i in range(1, n + 1))


PROBLEMS = (
    Problem(1, "Rosenbrock", _rosenbrock, (-1.2, 1.0), (0.0,)),
    Problem(
        2,
        "Freudenstein and Roth",
        _freudenstein_roth,
        (0.5, -2.0),
        (0.0, 48.98425367924),
    ),
    Problem(3, "Powell badly scaled", _powell_badly_scaled, (0.0, 1.0), (0.0,)),
    Problem(4, "Brown badly scaled", _brown_badly_scaled, (1.0, 1.0), (0.0,)),
    Problem(5, "Beale", _beale, (1.0, 1.0), (0.0,)),
    Problem(
        6, "Jennrich and Sampson", _jennrich_sampson, (0.3, 0.4), (124.362182355615,)
    ),
    Problem(7, "Helical valley", _helical_valley, (-1.0, 0.0, 0.0), (0.0,)),
    Problem(8, "Bard", _bard, (1.0,) * 3, (8.214877306579e-3, 17.4286)),
    Problem(9, "Gaussian", _gaussian, (0.4, 1.0, 0.0), (1.12793276961896e-8,)),
    Problem(10, "Meyer", _meyer, (0.02, 4000.0, 250.0), (87.9458551707,)),
    Problem(11, "Gulf research", _gulf, (5.0, 2.5, 0.15), (0.0,)),
    Problem(12, "Box three-dimensional", _box, (0.0, 10.0, 20.0), (0.0,)),
    Problem(13, "Powell singular", _powell_singular, (3.0, -1.0, 0.0, 1.0), (0.0,)),
    Problem(14, "Wood", _wood, (-3.0, -1.0, -3.0, -1.0), (0.0,)),
    Problem(
        15,
        "Kowalik and Osborne",
        _kowalik_osborne,
        (0.25, 0.39, 0.415, 0.39),
        (3.0750560384924e-4, 1.02734e-3),
    ),
    Problem(
        16,
        "Brown and Dennis",
        _brown_dennis,
        (25.0, 5.0, -5.0, -1.0),
        (85822.2016263563,),
    ),
    Problem(
        17,
        "Osborne 1",
        _osborne_1,
        (0.5, 1.5, -1.0, 0.01, 0.02),
        (5.46489469748268e-5,),
    ),
    Problem(
        18,
        "Biggs EXP6",
        _biggs_exp6,
        (1.0, 2.0, 1.0, 1.0, 1.0, 1.0),
        (0.0, 5.6556499255e-3, 0.30636677262479),
    ),
    Problem(
        19,
        "Osborne 2",
        _osborne_2,
        (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5),
        (4.01377362935477e-2, 1.78981358688109),
    ),
    Problem(20, "Watson", _watson, (0.0,) * 6, (2.2876700535523e-3,)),
    Problem(21, "Extended Rosenbrock", _rosenbrock, (-1.2, 1.0) * 10, (0.0,)),
    Problem(22, "Extended Powell", _powell_singular, (3.0, -1.0, 0.0, 1.0) * 5, (0.0,)),
    Problem(
        23,
        "Penalty I",
        _penalty_1,
        tuple(map(float, range(1, 11))),
        (7.08765146709037e-5,),
    ),
    Problem(24, "Penalty II", _penalty_2, (0.5,) * 10, (2.93660537456746e-4,)),
    Problem(
        25,
        "Variably dimensioned",
        _variably_dimensioned,
        tuple(1 - i / 10 for i in range(1, 11)),
        (0.0,),
    ),
    Problem(
        26, "Trigonometric", _trigonometric, (0.1,) * 10, (0.0, 2.7950561218791e-5)
    ),
    Problem(27, "Brown almost linear", _brown_almost_linear, (0.5,) * 10, (0.0, 1.0)),
    Problem(28, "Discrete boundary value", _discrete_boundary_value, _grid(10), (0.0,)),
    Problem(
        29, "Discrete integral equation", _discrete_integral_equation, _grid(10), (0.0,)
    ),
    Problem(
        30,
        "Broyden tridiagonal",
        _broyden_tridiagonal,
        (-1.0,) * 10,
        (
            0.0,
            0.39737346895853,
            0.71260601731262,
            1.02865203567795,
            1.05122618838356,
            1.3495361237413,
            1.3602559047384,
        ),
    ),
    Problem(
        31,
        "Broyden banded",
        _broyden_banded,
        (-1.0,) * 10,
        (0.0, 2.68021992072616, 3.05727843),
    ),
    Problem(32, "Linear, full rank", _linear_full_rank, (1.0,) * 10, (10.0,)),
    Problem(33, "Linear, rank 1", _linear_rank_1, (1.0,) * 10, (190 / 41,)),
    Problem(
        34, "Linear, rank 1 with zeros", _linear_rank_1_zeros, (1.0,) * 10, (227 / 37,)
    ),
    Problem(
        35,
        "Chebyquad",
        _chebyquad,
        tuple(i / 9 for i in range(1, 9)),
        (3.5168737256779e-3,),
    ),
)
