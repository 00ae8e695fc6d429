"""What `bench_downpour` measures on: networks, plain optax loops, and fair timing."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import dbjax
from dbjax.data import stack
from dbjax.downpour.plan import Plan
from dbjax.typing import Batch, Data, Params

BATCH = 128


class Size(NamedTuple):
    """A network to measure on.

    Attributes:
      widths: of its layers, inputs first.
      replicas: of the emulation.
      segment: rows a round.
      limit: the most that a replayed update may cost, in plain steps.
    """

    widths: tuple[int, ...]
    replicas: int
    segment: int
    limit: float


SIZES = {
    "10k": Size((64, 128, 10), 20, 12_288, 1.10),
    "670k": Size((784, 512, 512, 10), 20, 160, 1.10),
    "4.6M": Size((784, 1800, 1700, 64), 20, 30, 1.05),
    "42M": Size((440, 2560, 2560, 2560, 2560, 8192), 10, 4, 1.05),
}


def initial(widths: tuple[int, ...]) -> Params:
    """A tanh network's parameters."""
    rng = np.random.default_rng(0)
    return [
        {
            "w": (rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32),
            "b": np.zeros(b, np.float32),
        }
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    """Cross entropy of a tanh network."""
    h = batch["x"]
    for layer in params[:-1]:
        h = jnp.tanh(h @ layer["w"] + layer["b"])
    logits = h @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def examples(widths: tuple[int, ...], count: int = 10_000) -> Data:
    """Random examples, served as a user's would be."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, widths[0]), dtype=np.float32)
    y = rng.integers(0, widths[-1], count).astype(np.int32)
    return dbjax.from_arrays({"x": x, "y": y}, batch_size=BATCH)


class Times(NamedTuple):
    """Seconds a row, round by round, by name.

    Attributes:
      wall: on the clock.
      cpu: of all threads; tells a busy machine from slow code.
      first: seconds of each one's first segment, compilation included; not counted.
    """

    wall: dict[Any, list[float]]
    cpu: dict[Any, list[float]]
    first: dict[Any, float]

    def median(self, name: Any) -> float:
        """The median of a side's seconds a row."""
        return statistics.median(self.wall[name])

    def ratios(self, name: Any, base: Any, cpu: bool = False) -> list[float]:
        """One side over another, round by round."""
        times = self.cpu if cpu else self.wall
        return [a / b for a, b in zip(times[name], times[base], strict=True)]


def interleave(
    runs: dict[Any, Callable[[int], None]], segment: int, warm: int, rounds: int
) -> Times:
    """Call `run(rows)` of each in turn, first with `warm` rows, which do not count."""
    times = Times({name: [] for name in runs}, {name: [] for name in runs}, {})
    for name, run in runs.items():
        begin = time.perf_counter()
        run(warm)
        times.first[name] = time.perf_counter() - begin
    for _ in range(rounds):
        for name, run in runs.items():
            begin, cpu = time.perf_counter(), time.process_time()
            run(segment)
            times.wall[name].append((time.perf_counter() - begin) / segment)
            times.cpu[name].append((time.process_time() - cpu) / segment)
    return times


def host_loop(params: Params, data: Data, plan: Plan, tx: Any) -> Callable[[int], None]:
    """Plain optax steps on the minibatches of a plan, one donated program each."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, batch: Batch) -> Any:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    carry, row = (jax.tree.map(jnp.array, params), jax.jit(tx.init)(params)), 0

    def run(rows: int) -> None:
        nonlocal carry, row
        for r in range(row, row + rows):
            batch = data.batch(int(plan.replica[r]), int(plan.batch[r]))
            carry = step(*carry, batch)
        row += rows
        jax.block_until_ready(carry)

    return run


def scan_loop(
    params: Params, data: Data, plan: Plan, tx: Any, chunk: int
) -> Callable[[int], None]:
    """Plain optax steps in `lax.scan` over stacked chunks of the same minibatches."""

    @functools.partial(jax.jit, donate_argnums=(0,))
    def steps(carry: Any, batches: Batch) -> Any:
        def step(carry: Any, batch: Batch) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, carry, batches)[0]

    carry, row = (jax.tree.map(jnp.array, params), jax.jit(tx.init)(params)), 0

    def run(rows: int) -> None:
        nonlocal carry, row
        for begin in range(row, row + rows, chunk):
            at = slice(begin, begin + chunk)
            carry = steps(carry, stack(data, plan.replica[at], plan.batch[at]))
        row += rows
        jax.block_until_ready(carry)

    return run
