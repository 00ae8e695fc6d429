"""The measurements of the benchmarks that need a process of their own."""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import optax

import dbjax
from experiments.bench_problems import SIZES, examples, initial, loss_fn

_ENVIRONMENT = {
    # XLA's pool must have room for all parts of a collective.
    "data_parallel": {"NPROC": "64"},
    "lbfgs_on_devices": {"NPROC": "64"},
    # glibc then gives large arrays back as they die, instead of keeping some for later:
    # what is left is what the emulation holds.
    "emulate_memory": {"MALLOC_MMAP_THRESHOLD_": "65536"},
}


def child(name: str, **arguments: Any) -> dict[str, Any]:
    """Call a function of this file, by name, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, name, json.dumps(arguments)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | _ENVIRONMENT.get(name, {}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def large_cluster(each: int) -> dict[str, Any]:
    """Simulate 10,000 replicas with so many steps each."""
    begin = time.perf_counter()
    trace = dbjax.simulate(dbjax.Cluster(), replicas=10_000, steps=10_000 * each)
    return {
        "seconds": time.perf_counter() - begin,
        "rows": len(trace),
        "peak": _peak_rss(),
    }


def data_parallel(steps: int) -> dict[str, Any]:
    """Train with each batch split over two host devices."""
    jax.config.update("jax_num_cpu_devices", 2)
    size = SIZES["670k"]
    data, tx = examples(size.widths), dbjax.adagrad(0.05)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    params = jax.device_put(initial(size.widths), everywhere)
    state = jax.device_put(tx.init(params), everywhere)
    seen = []
    for index in range(steps):
        begin = time.perf_counter()
        batch = jax.device_put(data.batch(0, index), split)
        params, state = jitted(params, state, batch)
        # At most one program with collectives in flight: on CPU they can deadlock.
        jax.block_until_ready(params)
        seen.append(time.perf_counter() - begin)
    return {"rate": 1 / statistics.mean(sorted(seen)[: int(0.9 * steps)])}


def lbfgs_on_devices(
    kind: str, jitted: bool, scaling: Any, devices: int = 8
) -> dict[str, Any]:
    """Count the collectives of an L-BFGS direction, and what its state takes.

    Args:
      kind: of the mesh's axis, Auto or Explicit.
      jitted: whether `init` is.
      scaling: see `dbjax.scale_by_lbfgs`.
      devices: host devices to make.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    axis = jax.sharding.AxisType[kind]
    mesh = jax.make_mesh((devices,), ("model",), axis_types=(axis,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", None))
    params = {name: jax.device_put(np.ones((1024, 64), "f"), split) for name in "ab"}

    def collectives(rule: Any) -> tuple[Any, dict[str, int]]:
        init = jax.jit(rule.init) if jitted else rule.init
        state = init(params)
        step = jax.jit(lambda g, state, p: rule.update(g, state, p), donate_argnums=1)
        text = step.lower(params, state, params).compile().as_text() or ""
        names = "all-reduce", "all-gather", "all-to-all", "collective-permute"
        counts = {n: text.count(f" {n}(") + text.count(f" {n}-start(") for n in names}
        return state, counts

    state, counts = collectives(dbjax.scale_by_lbfgs(10, scaling=scaling))
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1000]
    held = [sum(x.addressable_shards[d].data.nbytes for x in large)
            for d in range(devices)]  # fmt: skip
    try:
        found = collectives(optax.scale_by_lbfgs(10))[1]["all-reduce"]
        theirs = f"{found}, some of them in loops over the memory"
    except Exception as error:  # of whatever type: optax 0.2.8 fails on Explicit meshes
        theirs = type(error).__name__
    all_reduces = counts.pop("all-reduce")
    return {
        "all_reduces": all_reduces,
        "others": sum(counts.values()),
        "largest": max(held),
        "whole": sum(leaf.nbytes for leaf in large),
        "optax": theirs,
    }


def emulate_memory(
    size: str, replicas: int, steps: int, exact: bool, version_dtype: str | None = None
) -> dict[str, Any]:
    """Measure how much memory an emulation takes."""
    widths = SIZES[size].widths
    params, data, tx = initial(widths), examples(widths), dbjax.adagrad(0.05)
    trace = dbjax.simulate(dbjax.Cluster(), replicas=replicas, steps=steps)
    # What one step needs in any case (activations, programs, the gradient) is there.
    one = dbjax.simulate(dbjax.Cluster(), replicas=1, steps=1)
    dbjax.replay(one, loss_fn, params, data, optimizer=tx)
    before, begin = _rss(), time.perf_counter()
    run = dbjax.replay(
        trace, loss_fn, params, data, optimizer=tx, exact=exact,
        version_dtype=version_dtype,
    )  # fmt: skip
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "grown": _peak_rss() - before,
        "peak": _peak_rss(),
        "params": nbytes,
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(run.optimizer_state)),
        "copies": run.info.peak_copies,
        "executor": run.info.executor,
        "seconds": time.perf_counter() - begin,
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rss() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
