"""Measures this machine as one of a cluster: the operations of a core, and messages.

Each measurement runs in a process of its own, as the number of devices, and the core
that one device may use, are fixed when a process first uses them. Devices are parts of
the host's CPU, and "sending" is copying from one to another through its memory; only as
many of them as there are cores really work at once.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.sharding import NamedSharding, PartitionSpec

import dbjax
from dbjax.cluster import layers as layers_lib
from dbjax.cluster.partitions import Machine, power_tail
from dbjax.mesh import partition_costs

LAPS = 8  # of an exchange, within one program, so that starting it hardly counts


class Measured(NamedTuple):
    """What was measured here.

    Attributes:
      machine: one core of this machine, and how it sends to another.
      steps: seconds of a gradient, by the number of devices with a core each.
      sent: bytes that each of two devices sends in it, as the compiled program has it.
      widths: of the fully connected network whose gradient it is.
      batch: its mini-batch.
    """

    machine: Machine
    steps: dict[int, float]
    sent: float
    widths: tuple[int, ...]
    batch: int

    @property
    def layers(self) -> list[layers_lib.Full]:
        """Of the network."""
        return [
            layers_lib.Full(*pair)
            for pair in zip(self.widths, self.widths[1:], strict=False)
        ]


def measure(
    widths: Sequence[int], batch: int, *, rounds: int = 40, repeats: int = 4
) -> Measured:
    """Measure a core, messages between two, and a network on one and on both.

    Args:
      widths: of the network, `widths[0]` inputs.
      batch: examples in a mini-batch.
      rounds: how often a process takes each time; the best counts, as other programs
        only ever add to it.
      repeats: how many processes do so, those of one device and of two by turns.

    Returns:
      What was found.
    """
    about = {"widths": list(widths), "batch": batch, "rounds": rounds}
    turns = [[_child(devices=n, **about) for n in (1, 2)] for _ in range(repeats)]
    one, two = zip(*turns, strict=True)
    # t = (w + 2 g) / f for a layer's two phases, and t = l + b / d.
    rate, begin = _line(_best(found["flops"] for found in one))
    send, latency = _line(_best(found["bytes"] for found in two))
    spread = min(
        statistics.stdev(found["steps"]) / statistics.mean(found["steps"])
        for found in one
    )
    machine = Machine(
        flops=1 / rate,
        grain=begin / rate / 2,
        bandwidth=1 / send,
        latency=latency,
        pace=power_tail(max(spread, 1e-3)),
    )
    steps = {
        n: min(min(found["steps"]) for found in turn)
        for n, turn in ((1, one), (2, two))
    }
    return Measured(machine, steps, two[0]["sent"], tuple(widths), batch)


def _best(found: Iterable[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """Give each point `(x, seconds)` with the least seconds that any process took."""
    return [
        (points[0][0], min(seconds for _, seconds in points))
        for points in zip(*found, strict=True)
    ]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit seconds = slope * x + offset, least squares of the relative error.

    Neither is below 0; where noise hides the slope, the largest `x` gives it.
    """
    x, seconds = np.array(points).T
    rows = np.stack([x, np.ones_like(x)], -1) / seconds[:, None]
    (slope, offset), _ = scipy.optimize.nnls(rows, np.ones_like(x))
    return float(slope or seconds[-1] / x[-1]), float(offset)


def _child(**arguments: Any) -> dict[str, Any]:
    # XLA's pool must have room for all parts of a collective; but work is cut into as
    # many pieces as it has threads, and with 64 of them a step took 1.6 times as long.
    pool = {"NPROC": "1" if arguments["devices"] == 1 else "8"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.measure_machine", json.dumps(arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | pool,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _in_child(
    devices: int, widths: Sequence[int], batch: int, rounds: int
) -> dict[str, Any]:
    """Take all times of one process."""
    if hasattr(os, "sched_setaffinity"):  # a core for each device
        mine = sorted(os.sched_getaffinity(0))[:devices]
        os.sched_setaffinity(0, mine)
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = dbjax.make_mesh(model=devices)
    found: dict[str, Any] = {}
    if devices == 1:
        found["flops"] = [
            (6.0 * batch * width**2, _time(_layer(batch, width), rounds))
            for width in (max(widths) // 8, max(widths) // 4, max(widths) // 2)
        ]
    else:
        sizes = [4 * batch * width for width in (max(widths) // 8, *sorted(widths)[1:])]
        found["bytes"] = [
            (size / devices, _time(_exchange(mesh, size, kind), rounds) / LAPS)
            for size in sizes
            for kind in ("gather", "scatter")
        ]
    gradient, arguments = _network(mesh, widths, batch)
    compiled = gradient.lower(*arguments).compile()
    found["sent"] = partition_costs(compiled).total.sent_bytes
    found["steps"] = _times(lambda: compiled(*arguments), rounds)
    return found


def _times(run: Callable[[], Any], rounds: int) -> list[float]:
    jax.block_until_ready(run())
    seen = []
    for _ in range(rounds):
        begin = time.perf_counter()
        # One program with collectives in flight: on CPU more of them can deadlock.
        jax.block_until_ready(run())
        seen.append(time.perf_counter() - begin)
    return seen


def _time(run: Callable[[], Any], rounds: int) -> float:
    return min(_times(run, rounds))


def _layer(batch: int, width: int) -> Callable[[], Any]:
    """One layer forward and backward, both phases of it."""
    weights, x = jnp.ones((width, width)) / width, jnp.ones((batch, width))
    run = jax.jit(jax.grad(lambda pair: jnp.mean((pair[0] @ pair[1]) ** 2)))
    return lambda: run((x, weights))


def _exchange(mesh: jax.sharding.Mesh, size: int, kind: str) -> Callable[[], Any]:
    """All-gather results of `size` bytes, or sum and scatter operands of that size."""
    devices = mesh.size

    def lap(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        if kind == "gather":
            whole = jax.lax.all_gather(x, "model", tiled=True)
            return whole[: len(x)] * 0.5, None
        whole = jnp.concatenate([x] * devices)
        return jax.lax.psum_scatter(whole, "model", tiled=True) * 0.5, None

    def laps(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lap, x, None, LAPS)[0]

    spec = PartitionSpec("model")
    run = jax.jit(
        jax.shard_map(laps, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )
    x = jax.device_put(np.ones(size // 4, "f"), NamedSharding(mesh, spec))
    return lambda: run(x)


def _network(
    mesh: jax.sharding.Mesh, widths: Sequence[int], batch: int
) -> tuple[Any, tuple[Any, Any]]:
    """Give the gradient of a network cut by units, and its arguments on the mesh."""
    columns = PartitionSpec(None, "model")

    def loss(weights: list[jax.Array], x: jax.Array) -> jax.Array:
        for index, kernel in enumerate(weights):
            if index:
                x = jax.lax.all_gather(jax.nn.sigmoid(x), "model", axis=1, tiled=True)
            x = x @ kernel
        return jnp.mean(x**2)

    run = jax.shard_map(
        jax.grad(loss),
        mesh=mesh,
        in_specs=(columns, PartitionSpec()),
        out_specs=columns,
        check_vma=False,
    )
    rng = np.random.default_rng(0)
    weights = [
        jax.device_put(
            rng.standard_normal(pair, "f") / np.sqrt(np.float32(pair[0])),
            NamedSharding(mesh, columns),
        )
        for pair in zip(widths, widths[1:], strict=False)
    ]
    x = rng.standard_normal((batch, widths[0]), "f")
    return jax.jit(run), (
        weights,
        jax.device_put(x, NamedSharding(mesh, PartitionSpec())),
    )


if __name__ == "__main__":
    print(json.dumps(_in_child(**json.loads(sys.argv[1]))))
