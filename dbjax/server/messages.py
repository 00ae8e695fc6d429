"""What replicas and shards say to one another: plain values, no behaviour."""

from typing import NamedTuple

from dbjax.typing import Gradients, Params


class Fetch(NamedTuple):
    """Ask a shard for its parameters."""

    replica: int
    step: int


class Fetched(NamedTuple):
    """A shard's parameters and the version they are."""

    params: Params
    version: int


class Push(NamedTuple):
    """The sum of a replica's gradients since its last push.

    `base` is the version the oldest of them was computed on, and `stale_params` that
    version itself, for rules that ask for it. `(replica, id)` names the push.
    """

    replica: int
    id: int
    step: int
    gradients: Gradients
    base: int
    taken: bool = True
    stale_params: Params = None


class Pushed(NamedTuple):
    """The version after a push."""

    version: int
