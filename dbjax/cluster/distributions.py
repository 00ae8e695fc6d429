"""Distributions of seconds and speeds, each given by its mean and its inverse CDF.

They hold no randomness: `draws.draw` puts keyed uniforms through `quantile`.
"""

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import scipy.special

SMALLEST = 2.0**-53
"""The smallest uniform that is ever drawn; the largest is `1 - SMALLEST`."""


@runtime_checkable
class Distribution(Protocol):
    """A distribution of numbers that are not negative."""

    @property
    def mean(self) -> float:
        """The expected value."""
        ...

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Give the inverse CDF at `u`, an array within (0, 1), elementwise."""
        ...


@dataclasses.dataclass(frozen=True)
class Constant:
    """Always `value`; a plain number given as a distribution means this.

    >>> Constant(2.0).mean
    2.0
    """

    value: float

    def __post_init__(self):
        """Check the value."""
        check_number("Constant value", self.value, least=0.0)

    @property
    def mean(self) -> float:
        """The value."""
        return float(self.value)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Give the value in the shape of `u`."""
        return np.full_like(u, self.value)


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """A lognormal whose standard deviation is `spread` times its mean.

    >>> LogNormal(1.0, spread=0.5).quantile(np.array([0.1, 0.5, 0.9])).round(3)
    array([0.488, 0.894, 1.639])
    """

    mean: float
    spread: float

    def __post_init__(self):
        """Check mean and spread."""
        check_number("LogNormal mean", self.mean, above=0.0)
        check_number("LogNormal spread", self.spread, least=0.0)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Give `exp(mu + sigma * Phi^-1(u))`."""
        variance = math.log1p(self.spread**2)
        values = np.asarray(scipy.special.ndtri(u))
        values *= math.sqrt(variance)
        values += math.log(self.mean) - variance / 2
        return np.exp(values, out=values)


@dataclasses.dataclass(frozen=True)
class Gamma:
    """A gamma; `shape` 1 is the exponential, a large one nearly constant.

    >>> Gamma(1.0, shape=4.0).quantile(np.array([0.1, 0.5, 0.9])).round(3)
    array([0.436, 0.918, 1.67 ])
    """

    mean: float
    shape: float

    def __post_init__(self):
        """Check mean and shape."""
        check_number("Gamma mean", self.mean, above=0.0)
        check_number("Gamma shape", self.shape, above=0.0)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Give the inverse of the regularised incomplete gamma function, scaled."""
        return scipy.special.gammaincinv(self.shape, u) * (self.mean / self.shape)


@dataclasses.dataclass(frozen=True)
class Exponential:
    """An exponential: how long it has lasted says nothing of how long it will last.

    >>> Exponential(1.0).quantile(np.array([0.1, 0.5, 0.9])).round(3)
    array([0.105, 0.693, 2.303])
    """

    mean: float

    def __post_init__(self):
        """Check the mean."""
        check_number("Exponential mean", self.mean, above=0.0)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Give `-mean * log(1 - u)`."""
        return np.log1p(-u) * -self.mean


@dataclasses.dataclass(frozen=True)
class Pareto:
    """A power tail, `P(X > x) ~ x**-shape`; its variance is infinite to `shape` 2.

    >>> Pareto(1.0, shape=2.5).quantile(np.array([0.1, 0.5, 0.9])).round(3)
    array([0.626, 0.792, 1.507])
    """

    mean: float
    shape: float

    def __post_init__(self):
        """Check mean and shape."""
        check_number("Pareto mean", self.mean, above=0.0)
        check_number("Pareto shape", self.shape, above=1.0)

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Give `least * (1 - u)**(-1 / shape)`, `least = mean (shape - 1) / shape`."""
        least = self.mean * (self.shape - 1) / self.shape
        return least * (1 - u) ** (-1 / self.shape)


@dataclasses.dataclass(frozen=True, repr=False)
class Empirical:
    """One of the `values`, each as likely as the others.

    >>> Empirical([3.0, 1.0, 2.0])
    Empirical(3 values of mean 2)
    """

    values: tuple[float, ...]

    def __init__(self, values: Sequence[float] | np.ndarray):
        """Take at least one value, finite and not negative, in any order."""
        ordered = check_sequence("Empirical values", values, least=0.0)
        object.__setattr__(self, "values", tuple(sorted(ordered)))

    def __repr__(self) -> str:
        """Name the number of values, which may be thousands."""
        return f"Empirical({len(self.values)} values of mean {self.mean:.6g})"

    @functools.cached_property
    def _sorted(self) -> np.ndarray:
        return np.array(self.values)

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return float(self._sorted.mean())

    def quantile(self, u: np.ndarray) -> np.ndarray:
        """Give the value of rank `floor(u * len(values))`."""
        # Rounding may lift u * n to n itself, one past the last rank.
        ranks = (u * len(self.values)).astype(np.int64)
        return self._sorted[np.minimum(ranks, len(self.values) - 1)]


PerReplica: TypeAlias = float | Sequence[float] | np.ndarray | Distribution
"""One number for all replicas, one for each, or a distribution drawn once for each."""


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    finite: bool = True,
) -> float:
    """Give `value` as a float, or say which number was expected.

    Args:
      name: what the value is called in the error.
      value: the value to check.
      least: the least value allowed.
      above: a bound that the value has to exceed.
      most: the greatest value allowed.
      finite: whether infinity is refused.

    Returns:
      The value as a float.

    Raises:
      TypeError: `value` is no number.
      ValueError: it lies outside of the range.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a number; got {value!r}.")
    number = float(value)
    if least <= number <= most and number > above:
        if math.isfinite(number) or not finite:
            return number
    bounds = ["a finite number" if finite else "a number"]
    bounds += [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"at most {most:g}"] if most < math.inf else []
    raise ValueError(f"{name} must be {', '.join(bounds)}; got {number:g}.")


def check_whole(name: str, value: Any) -> int:
    """Give `value` as an int of at least 0.

    Args:
      name: what the value is called in the error.
      value: the value to check.

    Returns:
      The value as an int.

    Raises:
      ValueError: it is no integer, or negative.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer of at least 0; got {value!r}.")
    return number


def check_sequence(
    name: str, values: Any, *, least: float = -math.inf, above: float = -math.inf
) -> tuple[float, ...]:
    """Give `values` as floats, one or more, each within bounds.

    Args:
      name: what the values are called in the error.
      values: the values to check.
      least: the least number allowed.
      above: a bound that each number has to exceed.

    Returns:
      The values as a tuple of floats.

    Raises:
      TypeError: `values` is no sequence of numbers.
      ValueError: there is none, or one lies outside of the range.
    """
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of numbers; got {values!r}.")
    if not values:
        raise ValueError(f"{name} must hold at least one number; got none.")
    return tuple(
        check_number(f"{name}[{index}]", value, least=least, above=above)
        for index, value in enumerate(values)
    )


def as_distribution(name: str, value: Any, *, positive: bool = False) -> Distribution:
    """Give `value` as a distribution; a number is that constant.

    Args:
      name: what the value is called in the error.
      value: a number or a distribution.
      positive: whether the mean has to be above 0, as of a time that must pass.

    Returns:
      The distribution.

    Raises:
      TypeError: `value` is neither a number nor a distribution.
      ValueError: it may be negative, or its mean is 0 or infinite.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_):
        value = Constant(check_number(name, value, least=0.0))
    # A class such as `Exponential` has the attributes too, but is not made yet.
    if isinstance(value, type) or not isinstance(value, Distribution):
        raise TypeError(
            f"{name} must be a number or a distribution such as "
            f"Exponential(1.0); got {value!r}."
        )
    if positive:
        check_number(f"{name}'s mean", value.mean, above=0.0)
    check_number(f"{name}'s mean", value.mean, least=0.0)
    least = np.asarray(value.quantile(np.array([SMALLEST])))[0]
    check_number(f"{name}'s smallest draw", least, least=0.0)
    return value


def as_per_replica(
    name: str, value: Any, *, positive: bool = False
) -> Distribution | tuple[float, ...]:
    """Give `value` as a distribution, or as one number for each replica.

    Args:
      name: what the value is called in the error.
      value: a number, a sequence of numbers or a distribution.
      positive: whether every number has to be above 0.

    Returns:
      A distribution or a tuple of floats.

    Raises:
      TypeError: `value` is none of the three.
      ValueError: a number is out of range.
    """
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        if positive:
            return check_sequence(name, value, above=0.0)
        return check_sequence(name, value, least=0.0)
    distribution = as_distribution(name, value, positive=positive)
    if positive:
        least = np.asarray(distribution.quantile(np.array([SMALLEST])))[0]
        check_number(f"{name}'s smallest draw", least, above=0.0)
    return distribution
