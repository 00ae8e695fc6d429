"""The driver that `chaos_ray` starts, kills and starts again: one training run.

Its folder ends up with `places`, who lives in which process on which node, a line when
somebody begins there; with checkpoints; and, once it has finished, `result.json`.
"""

import concurrent.futures
import faulthandler
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import dbjax
from configs import digits_downpour
from dbjax.downpour.run import Run
from dbjax.runtime.ray import Session
from dbjax.runtime.remote_shards import RemoteShards
from dbjax.runtime.transport import SIDE
from dbjax.trace import COMPUTE
from dbjax.typing import Batch
from experiments import kill_and_resume, runtimes, workloads

_PATIENCE = 30.0  # seconds until a process must have said where it is


class Job(NamedTuple):
    """What a driver trains: the same whenever the same is asked for."""

    address: str
    steps: int
    replicas: int
    shards: int
    n_push: int
    pace: float
    timeout: float


class Paced:
    """Data that takes its time, or a run would be over before it is killed."""

    def __init__(self, data: Any, pace: float) -> None:
        self._data, self._pace = data, pace

    def batch(self, replica: int, step: int) -> Batch:
        """Give one minibatch."""
        time.sleep(self._pace)
        return self._data.batch(replica, step)


def record(path: pathlib.Path) -> None:
    """Write down who lives where.

    Replicas when they start, shards and standbys when they have their place.
    """
    # Unbuffered: a line is the system's, and outlives the process, at once.
    file = path.open("wb", buffering=0)
    writer = concurrent.futures.ThreadPoolExecutor(1, "who lives where")
    host, watch = Session.host, RemoteShards._watch

    def write(name: str, *asked: Any) -> None:
        try:
            pid, node = (reply.result(_PATIENCE) for reply in asked)
        except (RuntimeError, TimeoutError):  # dead already
            return
        row = {"name": name, "pid": pid, "node": node}
        file.write((json.dumps(row) + "\n").encode())

    def note(name: str, address: Any) -> None:
        asked = [address.ask(what, lane=SIDE) for what in ("pid", "node")]
        writer.submit(write, name, *asked)

    def host_and_note(self: Any, name: str, *args: Any, **options: Any) -> Any:
        address, reply = host(self, name, *args, **options)
        if name.startswith("replica"):
            note(name, address)
        return address, reply

    def watch_and_note(self: Any, shard: int, address: Any) -> None:
        watch(self, shard, address)
        role = "shard" if address is self._homes[shard] else "standby"
        note(f"{role} {shard}", address)

    setattr(Session, "host", host_and_note)  # noqa: B010
    setattr(RemoteShards, "_watch", watch_and_note)  # noqa: B010


def train(folder: pathlib.Path, job: Job) -> dict[str, Any]:
    """Train to the end, or go on from the folder's checkpoint; say how it went."""
    config = digits_downpour.get_config()
    workload = workloads.make(config.workload, config.seed)
    optimizer = runtimes.make_optimizer("downpour", config.downpour)
    problem = workload.loss, workload.init(config.seed)
    run = dbjax.downpour.train(
        *problem,
        Paced(workload.data, job.pace),
        optimizer=optimizer,
        replicas=job.replicas,
        shards=job.shards,
        n_push=job.n_push,
        steps=job.steps,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=max(1, job.steps // 20),
        runtime=dbjax.Ray(
            address=job.address,
            standby=1,
            replica_cpus=0.1,
            shard_cpus=0.1,
            timeout=job.timeout,
        ),
    )
    run.trace.save(folder / "trace.npz")
    return {
        "accuracy": workload.evaluate(run.params)["test_accuracy"],
        "lost": run.info.lost_updates,
        "promotions": run.trace.header["promotions"],
        "faults": check(
            run,
            lambda: dbjax.replay(
                run.trace, *problem, workload.data, optimizer=optimizer, verify=True
            ),
        ),
    }


def check(run: Run, replay: Callable[[], Run]) -> list[str]:
    """Say what is wrong with a run, or differs from its replay, a sentence for each."""
    trace, faults = run.trace, []
    computed = np.sort(trace.step[trace.kind == COMPUTE])
    if not np.array_equal(computed, np.arange(trace.header["steps"])):
        faults.append("not every step was computed exactly once")
    if run.info.lost_updates:
        faults.append(f"{run.info.lost_updates} acknowledged updates are lost")
    try:
        trace.validate()
        again = replay()
    except (ValueError, RuntimeError) as error:
        return [*faults, f"it cannot be replayed: {error}"]
    one, other = kill_and_resume.arrays(run), kill_and_resume.arrays(again)
    return faults + kill_and_resume.same_bits(one, other)


def main(folder: pathlib.Path, job: Job) -> None:
    """Train, and leave the result."""
    faulthandler.register(signal.SIGUSR1)  # to see where one that hangs hangs
    record(folder / "places")
    result = train(folder, job)
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), Job(**json.loads(sys.argv[2])))
