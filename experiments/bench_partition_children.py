"""What bench_partitions measures in processes that have devices of their own."""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

import dbjax
from dbjax.mesh import partition_costs
from dbjax.trace import COMPUTE
from experiments import workloads


def child(name: str, **arguments: Any) -> tuple[dict[str, Any], int]:
    """Call a function of this file in a fresh process.

    Returns:
      What it returned; and the most memory it held, in bytes, by the kernel's account.
    """
    command = [sys.executable, "-m", __name__, name, json.dumps(arguments)]
    # As many threads for XLA as there are devices to serve: more only get in the way.
    environment = os.environ | {"NPROC": str(max(2, arguments.get("devices", 1)))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} {arguments} ended with {process.returncode}")
    return json.loads(text.splitlines()[-1]), usage.ru_maxrss * 1024


def speech_gradient(devices: int, cores: int, rounds: int, batch: int) -> Any:
    """Time loss and gradient of the speech network, its parameters cut over devices."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    jax.config.update("jax_num_cpu_devices", devices)
    model, mesh = dbjax.models.speech(), dbjax.make_mesh(model=devices)
    where = dbjax.mesh.shardings(model.shapes, mesh, model.rules)
    with jax.set_mesh(mesh):
        params = jax.jit(model.init, out_shardings=where)(jax.random.key(0))
        random = np.random.default_rng(0)
        examples = (
            random.standard_normal((batch, 440)).astype(np.float32),
            random.integers(8192, size=batch).astype(np.int32),
        )
        step = jax.jit(
            jax.value_and_grad(model.loss),
            out_shardings=(None, jax.tree.map(lambda x: x.spec, where)),
        )
        jax.block_until_ready(step(params, examples))
        seen = []
        for _ in range(rounds):
            begin = time.perf_counter()
            jax.block_until_ready(step(params, examples))
            seen.append(time.perf_counter() - begin)
        costs = partition_costs(step, params, examples)
    return {"seconds": seen, "sent": costs.total.sent_bytes}


def vision_bytes(preset: str, devices: int, batch: int) -> dict[str, float]:
    """Read what a device sends in loss and gradient of a vision network."""
    jax.config.update("jax_num_cpu_devices", devices)
    model = dbjax.models.vision(preset)
    images = np.zeros((batch, *model.input_shape), np.float32)
    costs, _ = _costs(model, devices, (images, np.zeros(batch, np.int32)))
    return {kind: total.sent_bytes for kind, total in costs.by_kind().items()}


def _costs(model: Any, devices: int, batch: Any) -> tuple[Any, Any]:
    """What loss and gradient cost, and the mesh; nothing is allocated."""
    mesh = dbjax.make_mesh(model=devices)
    where = dbjax.mesh.shardings(model.shapes, mesh, model.rules)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        *(model.shapes, where),
    )
    specs = jax.tree.map(lambda x: x.spec, where)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(model.loss), out_shardings=(None, specs))
        return partition_costs(step, shapes, batch), mesh


def speech_downpour(replicas: int, devices: int, batch: int, steps: int) -> Any:
    """Train the speech network on threads, each replica partitioned; replay it."""
    jax.config.update("jax_num_cpu_devices", replicas * devices)
    mesh = dbjax.make_mesh(replica=replicas, model=devices)
    work = workloads.speech(seed=0, batch_size=batch, states=8192, hidden=(2560,) * 4)
    options: dict[str, Any] = {
        "optimizer": dbjax.adagrad(1e-3), "mesh": mesh, "rules": work.rules
    }  # fmt: skip
    params = jax.jit(work.init, static_argnums=0)(0)
    begin = time.perf_counter()
    run = dbjax.downpour.train(
        *(work.loss, params, work.data), **options, replicas=replicas, shards=2,
        steps=steps, runtime=dbjax.Threads(digest_every=5),
        eval_fn=lambda params, step, time: work.evaluate(params), eval_every=steps // 2,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    again = dbjax.replay(
        run.trace, work.loss, params, work.data, **options, verify=True
    )
    pairs = zip(*map(jax.tree.leaves, (run.params, again.params)), strict=True)
    return {
        "seconds": seconds,
        "same": all(np.array_equal(a, b) for a, b in pairs),
        "before": work.evaluate(params)["test_loss"],
        "after": run.trace.evaluations[-1]["test_loss"],
        "exchanged": run.trace.partition_bytes().tolist(),
        "staleness": float(run.trace.staleness().mean()),
    }


class Noise:
    """Images of noise, any labels: what is measured does not depend on them."""

    def __init__(self, batch: int, classes: int) -> None:
        self.size, self.classes = batch, classes

    def batch(self, replica: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Give a minibatch."""
        random = np.random.default_rng((replica, step))
        images = random.standard_normal((self.size, 100, 100, 3), np.float32)
        return images, random.integers(self.classes, size=self.size).astype(np.int32)


def train_vision(preset: str, devices: int, batch: int, steps: int) -> Any:
    """Train with Downpour and Adagrad: one replica, a shard for each partition."""
    jax.config.update("jax_num_cpu_devices", devices)
    model = dbjax.models.vision(preset)
    data = Noise(batch, model.classes)
    costs, mesh = _costs(model, devices, data.batch(0, 0))
    begin, parameters = time.perf_counter(), model.num_parameters
    run = dbjax.downpour.train(
        model.loss,
        functools.partial(model.init, jax.random.key(0)),
        data,
        optimizer=dbjax.adagrad(1e-3),
        replicas=1,
        shards=devices,
        steps=steps,
        mesh=mesh,
        rules=model.rules,
        runtime=dbjax.Threads(digest_every=0),
    )
    ends = run.trace.time[run.trace.kind == COMPUTE]
    lost = run.trace.lost()
    assert not any(lost.values()), lost
    return {
        "parameters": parameters,
        "all": time.perf_counter() - begin,
        "step": statistics.median(np.diff(ends).tolist()),
        "temporary": costs.temporary_bytes * devices,
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
