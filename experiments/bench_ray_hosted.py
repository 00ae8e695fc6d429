"""What `bench_ray` puts into processes of their own: a shard, and those who measure."""

import functools
import pickle
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbjax
from dbjax.downpour.hosting import Kit, make_kit, make_shard
from dbjax.downpour.problem import Problem, make_problem
from dbjax.runtime.parcels import Answer, Held, Parcel, from_wire, to_wire
from dbjax.runtime.ray import Session
from dbjax.runtime.transport import SIDE, Address, Shared
from dbjax.server.messages import Push
from dbjax.server.shard import make_shard as make_functions
from dbjax.typing import Batch, Params
from experiments.bench_problems import SIZES, examples, initial
from experiments.bench_ray_peer import relu_loss

OPTIMIZER = optax.sgd(1e-3)
"""The example's, on both sides."""

_TIMEOUT = 120.0
_PAUSE = 0.002
"""Seconds between fetches, so that they meet pushes at any moment."""


class Here:
    """A value that is shared with nobody else: a `Shared`."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self, timeout: float | None = None) -> Any:
        """Give it."""
        return self._value


def problem_of(name: str) -> Problem:
    """The network of a size, as `train` would have it, on one shard."""
    widths = SIZES[name].widths
    return make_problem(
        relu_loss, initial(widths), examples(widths), optimizer=OPTIMIZER, shards=1
    )


def shard_maker(
    problem: Problem,
    put: Callable[[str, Any, bool], Shared],
    publish: Callable[[str, Any], Shared],
) -> Callable[[], Any]:
    """Give what makes a problem's only shard, the way `dbjax.Ray` does."""
    kit: Kit = make_kit(problem, "even")
    held = Held(to_wire(problem.split(problem.params)[0]))
    return functools.partial(
        make_shard, put("the problem", kit, True), dbjax.asynchronous(), 0, _TIMEOUT,
        publish, 0, put("shard 0", held, False), time.time(),
    )  # fmt: skip


def host(session: Session, name: str, make: Callable[[], Any], kind: str) -> Any:
    """Start a process, wait until its object is there, and give its address."""
    address, reply = session.host(name, make, kind=kind)
    reply.result(_TIMEOUT)
    return address


def host_shard(session: Session, problem: Problem) -> Address:
    """Start a shard's process."""
    make = shard_maker(problem, session.share, session.share_there)
    return host(session, "shard 0", make, "shard")


def message_bytes(message: Any) -> int:
    """Bytes of a message: in the pickle, and in the buffers beside it."""
    beside: list[pickle.PickleBuffer] = []
    within = pickle.dumps(message, protocol=5, buffer_callback=beside.append)
    return len(within) + sum(buffer.raw().nbytes for buffer in beside)


def exchange(problem: Problem) -> tuple[Parcel, Answer]:
    """A push to a shard in this process, and the answer, which brings parameters."""
    here = lambda what, value, keyed=False: Here(value)  # noqa: E731
    shard = shard_maker(problem, here, here)()
    gradients = jax.tree.map(jnp.ones_like, problem.params)
    parcel = make_parcel(gradients, replica=0, id_=0, fetches=True)
    return parcel, shard.push(parcel)


def make_parcel(
    gradients: Params, replica: int, id_: int, fetches: bool, taken: bool = True
) -> Parcel:
    """A push of one gradient, as a replica sends it."""
    push = Push(replica, id_, id_, to_wire(gradients), base=id_, taken=taken)
    return Parcel(push, 0, 1, ((id_, 0),), fetches=fetches)


class Exchanger:
    """A replica that computes nothing: pushes, fetches, and says how long it took.

    Args:
      shard: where the only shard is.
      shapes: of its parameters.
      replica: which it is.
    """

    def __init__(self, shard: Address, shapes: Params, replica: int) -> None:
        self._shard, self._replica, self._next = shard, replica, 0
        self._gradients = jax.tree.map(
            lambda leaf: jnp.full(leaf.shape, 1e-6, leaf.dtype), shapes
        )
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._gradients))
        self._stopped = threading.Event()

    def push(self, fetches: bool = False, taken: bool = True) -> float:
        """Push once; seconds until the answer is there, and what it brings."""
        begin = time.perf_counter()
        parcel = make_parcel(self._gradients, self._replica, self._next, fetches, taken)
        self._next += 1
        answer = self._shard.ask("push", parcel).result(_TIMEOUT)
        jax.block_until_ready(from_wire(answer.params))
        return time.perf_counter() - begin

    def fetch(self) -> float:
        """Fetch once, as a replica does; seconds."""
        begin = time.perf_counter()
        reply = self._shard.ask("fetch", lane=SIDE)
        params = reply.result(_TIMEOUT).params.get(_TIMEOUT)
        jax.block_until_ready(from_wire(params))
        return time.perf_counter() - begin

    def fetch_new(self) -> float:
        """Fetch a version that nobody has fetched yet."""
        self.push()
        return self.fetch()

    def copy(self) -> float:
        """Copy as many bytes as the shard holds, into memory that is there; seconds."""
        source, target = (np.ones(self._bytes // 4, np.float32) for _ in range(2))
        return median_seconds(lambda: np.copyto(target, source), 5)

    def fetches(self, times: int, new: bool) -> list[float]:
        """Fetch so often, with pauses; with `new`, push before each."""
        seen = []
        for _ in range(times):
            seen.append(self.fetch_new() if new else self.fetch())
            time.sleep(_PAUSE)
        return seen

    def keep_pushing(self) -> tuple[int, float]:
        """Push until told to stop; how many pushes that were, and seconds."""
        self._stopped.clear()
        first, begin = self._next, time.perf_counter()
        while not self._stopped.is_set():
            self.push()
        return self._next - first, time.perf_counter() - begin

    def stop(self) -> None:
        """Let `keep_pushing` end; on the other lane."""
        self._stopped.set()


class Probe:
    """Takes and gives as much as a shard holds; computes by itself, to be timed.

    Args:
      params: as much as that.
      batch: a minibatch.
    """

    def __init__(self, params: Params, batch: Batch) -> None:
        self._params, self._batch = jax.tree.map(jnp.array, params), batch
        self._gradient = jax.jit(jax.grad(relu_loss))
        self._shard = make_functions(OPTIMIZER)

    def nothing(self) -> None:
        """An empty call."""

    def take(self, tree: Params) -> None:
        """A call that carries something."""

    def give(self) -> Params:
        """A call whose answer carries something."""
        return to_wire(self._params)

    def gradient_seconds(self, times: int) -> float:
        """Compute a gradient so often; the median of seconds."""
        gradient = lambda: self._gradient(self._params, self._batch)  # noqa: E731
        return median_seconds(gradient, times)

    def update_seconds(self, times: int) -> float:
        """Handle a push so often, memory recycled; the median of seconds."""
        state, spare = self._shard.init(self._params), None
        gradients = jax.tree.map(jnp.zeros_like, self._params)

        def update() -> Params:
            nonlocal state, spare
            push = Push(0, 0, 0, gradients, base=0)
            old = None if state.params is self._params else state.params
            state, _ = self._shard.handle(state, push, spare=spare)
            spare = old
            return state.params

        return median_seconds(update, times)


def median_seconds(call: Callable[[], Any], times: int) -> float:
    """Call so often, after three times that do not count; the median of seconds."""
    seen = []
    for _ in range(times + 3):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seen.append(time.perf_counter() - begin)
    return statistics.median(seen[3:])
