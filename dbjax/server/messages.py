"""What replicas and shards say to one another: plain values, no behaviour."""

from typing import NamedTuple

from dbjax.typing import Gradients, Params


class Fetch(NamedTuple):
    """Ask a shard for its parameters.

    Attributes:
      replica: who asks.
      step: the ticket it asks for.
    """

    replica: int
    step: int


class Fetched(NamedTuple):
    """The answer to a `Fetch`.

    Attributes:
      params: the shard's parameters; whoever holds them must not change them.
      version: the version they are.
      incarnation: the shard's incarnation that it is a version of.
    """

    params: Params
    version: int
    incarnation: int = 0


class Push(NamedTuple):
    """The sum of a replica's gradients since its last push; `(replica, id)` names it.

    Attributes:
      replica: who pushes.
      id: the replica's own push counter, the same on every shard.
      step: the newest ticket among the gradients.
      gradients: their sum, the shard's part of it.
      base: the shard's version that the oldest of them was computed on.
      taken: False where the push counts a version and changes nothing.
      stale_params: the parameters of version `base`, for rules that ask for them.
      origin: the shard's incarnation that `base` is a version of.
    """

    replica: int
    id: int
    step: int
    gradients: Gradients
    base: int
    taken: bool = True
    stale_params: Params = None
    origin: int = 0


class Pushed(NamedTuple):
    """The answer to a `Push`: the shard's version after it."""

    version: int
