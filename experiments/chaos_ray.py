"""Kill whatever a run on Ray consists of, at random times, and check what it ends with.

  python -m experiments.chaos_ray --runs=50 --seed=0

A Ray cluster of several nodes is started on this machine, and digits are trained on it,
run after run, with a standby for each shard. Meanwhile replicas, shards, standbys and
the driver are ended with SIGKILL, and whole nodes removed; nodes are replaced, and the
driver is started again and goes on from its last checkpoint. The next kill waits until
each shard has its standby again: two deaths at once may lose updates, by design. Of
each run it is checked that

- it ends, in bounded time;
- no acknowledged update is lost, and each step was computed once;
- its Trace can have happened, and its exact replay gives the same bits;
- its test accuracy is not below that of runs which nobody disturbs.

It prints a table and leaves with 1 if a check fails, with 0 otherwise. The seed decides
who is killed and how long after the last one has been replaced. It takes about a minute
a run, and needs Linux and the extra `ray`.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table

VICTIMS = {"replica": 0.35, "shard": 0.2, "standby": 0.15, "node": 0.15, "driver": 0.15}
"""Who is killed, and how often of all times."""

_LONGEST = 3.0  # seconds between everybody being there and the next kill
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
# A node that is gone is noticed in seconds, and a slow one is not taken for it.
_SETTINGS = {
    "health_check_initial_delay_ms": 2_000,
    "health_check_period_ms": 1_000,
    "health_check_timeout_ms": 5_000,
    "health_check_failure_threshold": 3,
}
_NOISE = 0.01  # of the test accuracy, at least


class Place(NamedTuple):
    """A process, and the node it is on."""

    pid: int
    node: str


class Life(NamedTuple):
    """How a run went.

    Attributes:
      killed: who, in order.
      seconds: how long it took.
      result: what its driver says, see there; nothing if it did not get there.
      faults: what was wrong, a sentence for each.
    """

    killed: list[str]
    seconds: float
    result: dict[str, Any]
    faults: list[str]


class Hangs(Exception):
    """It should have ended by now."""


# Who is there.


def read(path: pathlib.Path) -> dict[str, Place]:
    """Read who lives where, and is alive.

    Args:
      path: what the driver writes.

    Returns:
      Processes by name, such as "replica 3", "shard 0" and "standby 0".
    """
    text = path.read_text() if path.exists() else ""
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    newest = {row["name"]: Place(row["pid"], row["node"]) for row in rows}
    return {name: place for name, place in newest.items() if _alive(place.pid)}


def _alive(pid: int) -> bool:
    """Whether a process is there, and one of Ray's still."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def complete(places: dict[str, Place], shards: int) -> bool:
    """Whether each shard has its standby, and there is a replica."""
    pairs = [
        (places.get(f"shard {s}"), places.get(f"standby {s}")) for s in range(shards)
    ]
    there = all(home and standby and home.pid != standby.pid for home, standby in pairs)
    return there and any(name.startswith("replica") for name in places)


def spared(places: dict[str, Place], shards: int) -> set[str]:
    """Give the nodes that hold a shard together with its standby."""
    pairs = [
        (places.get(f"shard {s}"), places.get(f"standby {s}")) for s in range(shards)
    ]
    return {a.node for a, b in pairs if a is not None and b and a.node == b.node}


# Killing.


class Run:
    """A run under way.

    Args:
      cluster: Ray's, of which nodes may be removed.
      folder: for all that it writes.
      job: what is trained, see the driver's `Job`.
      limit: seconds until it must have ended.
    """

    def __init__(
        self, cluster: Any, folder: pathlib.Path, job: dict[str, Any], limit: float
    ) -> None:
        self._cluster, self._folder, self._job = cluster, folder, job
        self._begin, self._limit = time.monotonic(), limit
        folder.mkdir(parents=True)
        self._child = self._start()

    def live(self, victims: Sequence[str], rng: np.random.Generator) -> Life:
        """See it through to its end, and kill on the way.

        Args:
          victims: what kinds of them, one after the other.
          rng: decides which, and when.

        Returns:
          How it went; it is over by then.
        """
        killed: list[str] = []
        faults: list[str] = []
        try:
            for victim in victims:
                self._until(lambda: complete(self._places(), self._job["shards"]))
                self._until(lambda: False, _LONGEST * rng.random())
                if self._child.poll() is not None:
                    break
                killed.append(self._kill(victim, rng))
            self._until(lambda: False)
        except Hangs as error:
            self._child.send_signal(signal.SIGUSR1)  # says where it is
            time.sleep(1.0)
            faults.append(str(error))
        finally:
            self._child.kill()
            self._child.wait()
        seconds = time.monotonic() - self._begin
        path = self._folder / "result.json"
        if path.exists():
            result = json.loads(path.read_text())
            return Life(killed, seconds, result, faults + result["faults"])
        lines = (self._folder / "said").read_text().splitlines(keepends=True)
        said = "".join(line for line in lines if "(raylet)" not in line)[-4_000:]
        return Life(
            killed, seconds, {}, [*faults, f"it has no result; it said:\n{said}"]
        )

    def _start(self) -> subprocess.Popen[bytes]:
        (self._folder / "places").unlink(missing_ok=True)
        script = [sys.executable, "-m", "experiments.chaos_ray_driver"]
        with (self._folder / "said").open("a") as said:
            return subprocess.Popen(
                [*script, str(self._folder.resolve()), json.dumps(self._job)],
                cwd=_ROOT,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def _places(self) -> dict[str, Place]:
        return read(self._folder / "places")

    def _until(self, condition: Callable[[], bool], seconds: float = 1e9) -> None:
        """Wait until it holds, the driver has ended, or some time is over."""
        end = time.monotonic() + seconds
        while self._child.poll() is None and not condition() and time.monotonic() < end:
            if time.monotonic() - self._begin > self._limit:
                raise Hangs(f"it has not ended after {self._limit:.0f} s")
            time.sleep(0.05)

    def _kill(self, victim: str, rng: np.random.Generator) -> str:
        """Kill one of a kind, or a replica where there is none; say who it was.

        They are gone by then: one that is only about to die would seem to be there.
        """
        places = self._places()
        if victim == "driver":
            self._child.kill()
            self._child.wait()
            self._child = self._start()
            return "driver"
        if victim == "node":
            keep = spared(places, self._job["shards"])
            held = {place.node for place in places.values()} - keep
            nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
            if nodes := [node for node in nodes if node.node_id in held]:
                node = nodes[rng.integers(len(nodes))]
                gone = [p for p in places.values() if p.node == node.node_id]
                self._cluster.remove_node(node, allow_graceful=False)
                self._await_end(gone)
                self._cluster.add_node(**_NODE)
                return f"node of {len(gone)}"
            victim = "replica"
        names = sorted(name for name in places if name.startswith(victim))
        if not names:
            return "nobody"
        name = names[rng.integers(len(names))]
        with contextlib.suppress(ProcessLookupError):
            os.kill(places[name].pid, signal.SIGKILL)
        self._await_end([places[name]])
        return name

    def _await_end(self, gone: Sequence[Place]) -> None:
        self._until(lambda: not any(_alive(place.pid) for place in gone))


# The script.


def prove(options: argparse.Namespace, home: pathlib.Path) -> list[str]:
    """Run it all in `home`, print the table, and give every fault that was found."""
    from ray.cluster_utils import Cluster

    console, rng = rich.console.Console(), np.random.default_rng(options.seed)
    table = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("run", "kills", "seconds", "lost", "promotions", "accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("killed")
    faults, quiet = [], []
    names = [f"quiet {i + 1}" for i in range(options.undisturbed)]
    names += [str(i + 1) for i in range(options.runs)]
    head = {"include_dashboard": False, "_system_config": _SETTINGS, **_NODE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(options.nodes):
            cluster.add_node(**_NODE)
        job = {
            "address": cluster.address,
            **{name: getattr(options, name) for name in _OF_JOB},
        }
        for name in names:
            disturbed = not name.startswith("quiet")
            count = options.kills if disturbed else 0
            victims = rng.choice([*VICTIMS], size=count, p=[*VICTIMS.values()]).tolist()
            folder = home / name.replace(" ", "_")
            with console.status(f"run {name} of {options.runs}"):
                life = Run(cluster, folder, job, options.limit).live(victims, rng)
            found, accuracy = [*life.faults], life.result.get("accuracy")
            if accuracy is not None and disturbed:
                found += check_accuracy(accuracy, quiet)
            elif accuracy is not None:
                quiet.append(accuracy)
            life = life._replace(faults=found)
            table.add_row(*describe(name, life))
            faults += [f"run {name}: {fault}" for fault in found]
            if not console.is_terminal:
                console.print(*describe(name, life), highlight=False, soft_wrap=True)
    finally:
        cluster.shutdown()
        console.print(table)
    return faults


_OF_JOB = ("steps", "replicas", "shards", "n_push", "pace", "timeout")


def check_accuracy(accuracy: float, quiet: Sequence[float]) -> list[str]:
    """Say whether an accuracy is below those of undisturbed runs, beyond noise."""
    if not quiet:
        return []
    least = float(np.mean(quiet) - max(3 * np.std(quiet), _NOISE))
    if accuracy >= least:
        return []
    return [f"its test accuracy is {accuracy:.1%}, undisturbed at least {least:.1%}"]


def describe(name: str, life: Life) -> tuple[str, ...]:
    """Give a row of the table."""
    result = life.result
    return (
        name,
        str(len(life.killed)),
        f"{life.seconds:.0f}",
        str(result.get("lost", "-")),
        str(result.get("promotions", "-")),
        f"{result['accuracy']:.1%}" if result else "-",
        ", ".join(life.killed) + " FAILED" * bool(life.faults),
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Kills whatever a run on Ray consists of; checks its end."
    )
    for name, kind, default, what in (
        ("runs", int, 50, "runs to disturb"),
        ("seed", int, 0, "of who is killed, and when"),
        ("kills", int, 4, "in a run, if it lasts long enough"),
        ("undisturbed", int, 3, "runs to compare accuracies with"),
        ("steps", int, 1_500, "minibatches of a run"),
        ("replicas", int, 4, "model replicas"),
        ("shards", int, 2, "each with a standby"),
        ("n_push", int, 1, "as in `train`"),
        ("nodes", int, 3, "beside the head"),
        ("pace", float, 0.1, "seconds that each minibatch takes longer"),
        ("timeout", float, 60.0, "as in `Ray`"),
        ("limit", float, 400.0, "seconds until a run must have ended"),
        ("keep", str, None, "a new folder for all that is written; else it is removed"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=what)
    options = parser.parse_args(argv)
    for name in ("replicas", "shards", "steps", "n_push", "nodes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if options.keep and os.path.exists(options.keep):
        parser.error(f"--keep={options.keep} is there already")
    return options


def main(argv: Sequence[str]) -> int:
    """Run what the command line asks for."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        faults = prove(options, pathlib.Path(options.keep or scratch))
    for fault in faults:
        print(f"FAILED: {fault}")
    if not faults:
        print(f"{options.runs} runs disturbed: all ended, and nothing was lost.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
