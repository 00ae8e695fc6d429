"""What coordinator, replicas and shards say to one another: plain values, no behaviour.

Letters: `S` shards. A replica is named with its **life**, which counts how often it has
joined: whoever was declared dead goes on under a new one, so that nothing sent in a
former life can be mistaken for its own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dbjax.typing import Gradients, Params

# From replicas, or about them, to the coordinator.


class Joined(NamedTuple):
    """A replica is here, for the first time or again."""

    replica: int


class Finished(NamedTuple):
    """The gradient of a portion is computed; it is not added to any sum yet.

    Attributes:
      replica: who has computed it.
      life: in which life.
      task: from the `Compute`; a portion may be given to one replica again.
      value: the portion's mean loss.
      square: the inner product of its mean gradient with itself, where asked for.
    """

    replica: int
    life: int
    task: int
    value: float = 0.0
    square: float = 0.0


class Pushed(NamedTuple):
    """All shards that a `Push` was for have added it."""

    replica: int
    life: int
    id: int


class Died(NamedTuple):
    """A replica is dead, and every shard has fenced it: nothing more of it will count.

    Attributes:
      replica: who.
      life: which life is over.
      landed: `[S]` the ids of this life's pushes below this are added (`Fenced`).
    """

    replica: int
    life: int
    landed: tuple[int, ...]


# The coordinator's orders. A replica carries out those of its present life, in the
# order they were given.


class Compute(NamedTuple):
    """Compute a portion's gradient, fetching first if this evaluation is new to it.

    Attributes:
      replica: who is to do it.
      life: in which life.
      task: 0, 1, 2, ... over all its lives.
      evaluation: of the batch: all its portions see the same parameters.
      portion: its place among the portions of this evaluation.
      upcoming: the portion likely to come next, to prefetch; -1: not known.
      copy: 0 for the first copy handed out; others are backups.
    """

    replica: int
    life: int
    task: int
    evaluation: int
    portion: int
    upcoming: int = -1
    copy: int = 0


class Keep(NamedTuple):
    """Add the finished gradient, times the portion's examples, to the accrued sum."""

    replica: int
    life: int
    portion: int


class Drop(NamedTuple):
    """Ignore the finished gradient: another replica was first, or it is too late."""

    replica: int
    life: int
    portion: int


class Push(NamedTuple):
    """Send the accrued sum to shards, then zero it; beside a computation if need be.

    Attributes:
      replica: who.
      life: in which life.
      id: 0, 1, 2, ... over all its lives.
      portions: what the sum holds.
      shards: which shards it is for; None: all.
    """

    replica: int
    life: int
    id: int
    portions: tuple[int, ...]
    shards: tuple[int, ...] | None = None


class Forget(NamedTuple):
    """You were declared dead: forget all you hold, and join again."""

    replica: int
    life: int


class Done(NamedTuple):
    """Every portion counts, exactly once, on every shard."""

    evaluation: int


# To shards, about named vectors.


class Put(NamedTuple):
    """Set a vector."""

    into: str
    values: Params


class Get(NamedTuple):
    """Ask for a vector; whoever gets it must not change it."""

    name: str


class Names(NamedTuple):
    """Ask which vectors there are."""


class Dots(NamedTuple):
    """Inner products of many pairs of vectors, in one round.

    The reply is the shard's part of them, `[pairs]` float64.
    """

    pairs: tuple[tuple[str, str], ...]


class Combine(NamedTuple):
    """Set a vector to `sum_i coefficients[i] names[i]`.

    Attributes:
      into: the vector set; it may be among `names`.
      names: the vectors combined, at least one.
      coefficients: as many.
      dtype: of the result; that of the first vector if None.
    """

    into: str
    names: tuple[str, ...]
    coefficients: tuple[float, ...]
    dtype: Any = None


def combination(into: str, terms: Mapping[str, float], dtype: Any = None) -> Combine:
    """Write a `Combine` as a mapping from names to coefficients."""
    coefficients = tuple(float(c) for c in terms.values())
    return Combine(into, tuple(terms), coefficients, dtype)


class Copy(NamedTuple):
    """Set a vector to another's value, in another dtype if one is given."""

    into: str
    name: str
    dtype: Any = None


class Swap(NamedTuple):
    """Let two vectors exchange their names, which moves nothing."""

    a: str
    b: str


class Elementwise(NamedTuple):
    """Set a vector to a function of others, coefficient by coefficient.

    Attributes:
      into: the vector set; it may be among `names`.
      operation: a name of `operations.OPERATIONS`.
      names: its vectors.
      scalars: its numbers.
    """

    into: str
    operation: str
    names: tuple[str, ...]
    scalars: tuple[float, ...] = ()


class Add(NamedTuple):
    """A replica's `Push` on its way: add a sum to a vector, at most once.

    Attributes:
      into: the vector.
      gradients: the shard's part of the accrued sum.
      replica: who pushes.
      life: in which life.
      id: which of its pushes; they arrive in the order of their ids.
    """

    into: str
    gradients: Gradients
    replica: int
    life: int
    id: int


class Added(NamedTuple):
    """The answer to `Add`.

    Attributes:
      taken: False where it was a repetition or came from the dead.
      version: the sums that the shard has added by now.
    """

    taken: bool
    version: int = 0


class Fence(NamedTuple):
    """Take nothing more from a replica's life."""

    replica: int
    life: int


class Fenced(NamedTuple):
    """The answer to `Fence`: of that life the ids below this are added, and no more."""

    landed: int


# From a method to whoever runs it, beside commands to shards.


class Evaluate(NamedTuple):
    """Compute the loss and the gradient of portions at a vector.

    Attributes:
      at: the vector.
      groups: `(into, portions)`: the mean gradient of each group's portions, weighted
        by their numbers of examples, goes into a vector of its own. No portion stands
        twice.
      squares: whether to report the square of each portion's gradient.
    """

    at: str
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    squares: bool = False


class Reached(NamedTuple):
    """The step is taken: `x` is where it led. Nothing is in flight now."""

    iteration: int


class Evaluated(NamedTuple):
    """The answer to `Evaluate`; lists are in the order of its portions.

    Attributes:
      examples: how many each portion has.
      values: each one's mean loss.
      squares: each one's `g g`, if asked for.
    """

    examples: tuple[int, ...]
    values: tuple[float, ...]
    squares: tuple[float, ...] = ()
