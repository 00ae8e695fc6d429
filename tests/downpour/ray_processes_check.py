"""Replicas on Ray that span processes, of one device each and of two."""

import os
import pathlib
import signal
import sys
import time

import jax
from jax.sharding import PartitionSpec

import dbjax
from dbjax.trace import COMPUTE
from tests import problems

RULES = [("w", PartitionSpec(None, "model"))]


class Deadly:
    """Kills the second process of replica 1, once, at its minibatch 4.

    Replica 0 waits for that: the other one may be late to come.
    """

    def __init__(self, done: pathlib.Path) -> None:
        self.done = done

    def __call__(self, replica: int, step: int) -> None:
        while replica == 0 and step >= 4 and not self.done.exists():
            time.sleep(0.01)
        there = replica == 1 and jax.process_index() == 1
        if there and step == 4 and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def check(runtime: dbjax.Ray, data: problems.Wrapped, **keywords) -> dbjax.Trace:
    """Train, and replay in this process, on a mesh of its own."""
    problem = problems.loss_fn, problems.PARAMS
    where = {"mesh": keywords.pop("mesh"), "rules": RULES}
    run = dbjax.downpour.train(
        *problem, data, optimizer=problems.ADAGRAD, shards=2, runtime=runtime,
        **where, **keywords,
    )  # fmt: skip
    run.trace.validate()
    assert run.trace.header["replica_processes"] == 2
    assert jax.process_count() == 1
    again = dbjax.replay(
        run.trace, *problem, problems.DATA, optimizer=problems.ADAGRAD, verify=True,
        **where,
    )  # fmt: skip
    problems.assert_same_bits(again.params, run.params)
    return run.trace


def main(folder: pathlib.Path) -> None:
    """Check both, and say so."""
    deadly = problems.Wrapped(Deadly(folder / "done"))
    with dbjax.Ray(digest_every=1, replica_processes=2) as runtime:
        mesh = dbjax.make_mesh(model=2)
        trace = check(runtime, deadly, replicas=2, steps=24, mesh=mesh)
        assert deadly.before.done.exists()
        assert trace.header["deaths"] == {"replicas": 1, "shards": 0}
        assert sorted(trace.step[trace.kind == COMPUTE]) == list(range(24))
        print("a group dies as one, and replays")
        mesh = dbjax.make_mesh(data=2, model=2)
        check(runtime, problems.DATA, replicas=1, steps=8, mesh=mesh)
        print("two processes of two devices replay")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
