"""Kill a training run again and again, resume it, and prove that nothing was lost.

  python -m experiments.kill_and_resume --kills=20 --seed=0
  python -m experiments.kill_and_resume --runtime=threads

A child process trains a small network and writes checkpoints often. It is ended with
SIGKILL while it starts, computes, or writes a checkpoint, and started again, until it
has been killed often enough and may finish. Every minibatch that a child begins stands
in a log that survives it. From that, and from what is on disk, it is checked:

- after each kill the newest checkpoint is whole, and none that was due is missing;
- the next child begins with the very minibatch that follows that checkpoint;
- emulated: parameters, optimizer state and Trace end in the same bits as in a run that
  was never killed;
- on threads, where no two runs are equal: every step was computed once, and the joined
  Trace, replayed, gives the same bits.

It prints a table and leaves with 1 if anything differs, with 0 otherwise. The seed
decides when to kill, in terms of the child's progress; the last milliseconds are up to
the machine.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
from absl import app, flags, logging

import dbjax
from dbjax import checkpoint
from dbjax.trace import COMPUTE, Trace
from dbjax.typing import Batch, Params

_KILLS = flags.DEFINE_integer("kills", 20, "How often to kill.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments to kill at.", lower_bound=0)
_RUNTIME = flags.DEFINE_enum("runtime", "emulated", ["emulated", "threads"], "Where.")
_STEPS = flags.DEFINE_integer("steps", 250, "Minibatches of the run.", lower_bound=1)
_EVERY = flags.DEFINE_integer(
    "checkpoint_every", 5, "Minibatches between checkpoints.", lower_bound=1
)
_N_FETCH = flags.DEFINE_integer("n_fetch", 2, "As in `train`.", lower_bound=1)
_N_PUSH = flags.DEFINE_integer("n_push", 3, "As in `train`.", lower_bound=1)
_KEEP = flags.DEFINE_string(
    "keep", None, "A new folder for all that is written; by default it is removed."
)
_CHILD = flags.DEFINE_string("child", None, "Used between this script's processes.")

_REPLICAS, _SHARDS = 6, 2
_STARTUP = 2.0  # seconds that a child takes to begin, about
_OPTIMIZER = dbjax.adagrad(0.05)
_PACE = 0.01  # seconds a minibatch, or writing checkpoints would be all there is
_PATIENCE = 300.0  # seconds that a child may need to get anywhere


class Job(NamedTuple):
    """What a child trains: the same whenever the same is asked for."""

    runtime: str
    steps: int
    checkpoint_every: int
    n_fetch: int
    n_push: int


class Life(NamedTuple):
    """What one child did.

    Attributes:
      begun: the `(replica, index)` of each minibatch that it began, in order.
      saved: the step of the newest checkpoint after it.
      writing: the step of the checkpoint that it left half written, if it did.
      seconds: how long it lived.
      finished: whether it reached its end.
    """

    begun: list[tuple[int, int]]
    saved: int
    writing: int | None
    seconds: float
    finished: bool


class Moment(NamedTuple):
    """When to kill: after `saves` checkpoints, in the middle of `what`, `delay` on."""

    what: str  # "starting", "computing" or "writing"
    saves: int
    delay: float


# What is trained.


def loss_fn(params: Params, batch: Batch) -> jax.Array:
    """The mean squared error of a network with one hidden layer."""
    hidden = jnp.tanh(batch["x"] @ params["in"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


def problem() -> tuple[Params, Any]:
    """Give the first parameters and the data."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 8)).astype(np.float32)
    y = np.sin(x.sum(axis=1)).astype(np.float32)
    params = {
        "in": 0.3 * rng.standard_normal((8, 16)).astype(np.float32),
        "out": 0.3 * rng.standard_normal(16).astype(np.float32),
    }
    return params, dbjax.from_arrays({"x": x, "y": y}, batch_size=16, seed=0)


class Logged:
    """Data that takes its time, and first writes down which minibatch is asked for."""

    def __init__(self, data: Any, path: pathlib.Path) -> None:
        """Begin an empty log."""
        self._data = data
        # Unbuffered: a line is the system's, and outlives the process, at once.
        self._file = path.open("wb", buffering=0)

    def batch(self, replica: int, step: int) -> Batch:
        """Give one minibatch."""
        self._file.write(f"{replica} {step}\n".encode())
        time.sleep(_PACE)
        return self._data.batch(replica, step)


def train(folder: pathlib.Path, job: Job) -> None:
    """Train to the end, or go on from the folder's checkpoint; leave the result."""
    params, data = problem()
    loss = jax.jit(loss_fn)
    cluster = dbjax.Cluster(slow=dbjax.Slow(factor=3.0, replicas=(1,)))
    runtimes = {
        "emulated": dbjax.Emulated(cluster, seed=1),
        "threads": dbjax.Threads(jitter=_PACE),
    }
    run = dbjax.downpour.train(
        loss_fn,
        params,
        Logged(data, folder / "log"),
        optimizer=_OPTIMIZER,
        replicas=_REPLICAS,
        shards=_SHARDS,
        n_fetch=job.n_fetch,
        n_push=job.n_push,
        steps=job.steps,
        eval_fn=lambda params, step, time: {"loss": loss(params, data.batch(0, 0))},
        eval_every=7,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every=job.checkpoint_every,
        runtime=runtimes[job.runtime],
    )
    run.trace.save(folder / "trace.npz")
    leaves: dict[str, Any] = arrays(run)
    np.savez(folder / "arrays.npz", **leaves)
    (folder / "info.json").write_text(json.dumps({"resumed_at": run.info.resumed_at}))


def arrays(run: Any) -> dict[str, np.ndarray]:
    """Give parameters and optimizer state of a run by the paths of their leaves."""
    tree = {"params": run.params, "optimizer_state": run.optimizer_state}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


# Killing.


def draw(rng: np.random.Generator) -> Moment:
    """Draw a moment."""
    what = str(rng.choice(["starting", "computing", "writing"], p=[0.1, 0.5, 0.4]))
    longest = {"starting": _STARTUP, "computing": 0.1, "writing": 0.03}[what]
    return Moment(what, int(rng.integers(0, 3)), longest * rng.random())


def live(folder: pathlib.Path, job: Job, moment: Moment | None) -> Life:
    """Let a child train until it has finished or its moment has come.

    Raises:
      RuntimeError: it failed by itself; the message holds what it said.
    """
    log, checkpoints = folder / "log", folder / "checkpoints"
    log.unlink(missing_ok=True)
    before, left = _newest(checkpoints), _partial(checkpoints)
    asked = {"child": folder.resolve(), **job._asdict()}
    arguments = [f"--{name}={value}" for name, value in asked.items()]
    begin = time.perf_counter()
    with (folder / "said").open("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments.kill_and_resume", *arguments],
            cwd=pathlib.Path(__file__).resolve().parents[1],
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            _await(child, folder, (before, left), moment)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        if child.returncode not in (0, -signal.SIGKILL):
            said.seek(0)
            raise RuntimeError(f"the child failed by itself:\n{said.read()}")
    seconds = time.perf_counter() - begin
    written = _partial(checkpoints) - left
    return Life(
        _read_log(log),
        _newest(checkpoints),
        max((step for step, _ in written), default=None),
        seconds,
        child.returncode == 0,
    )


def _await(
    child: subprocess.Popen[bytes],
    folder: pathlib.Path,
    before: tuple[int, set[tuple[int, int]]],
    moment: Moment | None,
) -> None:
    """Return when the child is to be killed, or has ended.

    Args:
      child: the process.
      folder: where it works.
      before: the newest checkpoint and the half written ones when it was started.
      moment: when to kill it; None to let it finish.
    """
    if moment is None:
        child.wait(_PATIENCE)
        return
    log, checkpoints, (newest, left) = folder / "log", folder / "checkpoints", before
    if moment.what != "starting":
        _until(lambda: len(_read_log(log)) > 0, child)
        for _ in range(moment.saves):
            _until(lambda newest=newest: _newest(checkpoints) > newest, child)
            newest = _newest(checkpoints)
    if moment.what == "writing":
        _until(lambda: bool(_partial(checkpoints) - left), child)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(moment.delay)


def _until(condition: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    """Wait until the condition holds or the child has ended."""
    deadline = time.monotonic() + _PATIENCE
    while child.poll() is None and not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the child got nowhere for {_PATIENCE:.0f} s")
        time.sleep(0.001)


def _newest(checkpoints: pathlib.Path) -> int:
    return max(checkpoint.steps(checkpoints), default=0)


def _partial(checkpoints: pathlib.Path) -> set[tuple[int, int]]:
    """Give step and time stamp of those that are being written, or were for ever."""
    found = set()
    for path in checkpoints.glob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # whole by now
            found.add((int(path.name.partition(".")[0]), path.stat().st_ctime_ns))
    return found


def _read_log(log: pathlib.Path) -> list[tuple[int, int]]:
    """Read which minibatches were begun; the first one asked for only shows shapes."""
    text = log.read_text() if log.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    pairs = [line.split() for line in lines[1:]]
    return [(int(replica), int(index)) for replica, index in pairs]


# Checking.


def look(
    folder: pathlib.Path, order: Sequence[tuple[int, int]]
) -> tuple[int, list[int], list[str]]:
    """Look at what the next child will find.

    Args:
      folder: where it will work.
      order: the minibatches of the run that was never killed, if there is one.

    Returns:
      The step of the newest checkpoint that is whole; the index of each replica's
      first minibatch after it; and what is wrong.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = checkpoint.latest(folder / "checkpoints")
    faults = [str(warning.message) for warning in caught]  # of what is damaged
    if saved is None:
        return 0, [0] * _REPLICAS, faults
    if order:
        done = [replica for replica, _ in order[: saved.step]]
        following = [done.count(replica) for replica in range(_REPLICAS)]
    else:
        following = list(saved.note["batches"])
    return saved.step, following, faults


def check_life(
    life: Life,
    saved: int,
    following: Sequence[int],
    order: Sequence[tuple[int, int]],
    job: Job,
) -> list[str]:
    """Say what a child did wrong.

    Args:
      life: what it did.
      saved: the step of the newest checkpoint before it.
      following: each replica's first minibatch after that checkpoint.
      order: the minibatches of the run that was never killed, if there is one.
      job: what was asked for.

    Returns:
      A sentence for each fault.
    """
    faults = []
    for replica in range(_REPLICAS):
        begun = [index for who, index in life.begun if who == replica]
        first = following[replica]
        if begun != list(range(first, first + len(begun))):
            faults.append(f"replica {replica} went on with {begun[:3]}, not {first}")
    if life.saved < saved:
        faults.append(f"checkpoint {saved} is gone, the newest is {life.saved}")
    computed = saved + len(life.begun)
    if life.finished and computed != job.steps:
        faults.append(f"{computed} minibatches were computed in all, not {job.steps}")
    if order:
        if life.begun != list(order[saved:computed]):
            faults.append("its minibatches are not the reference's")
        due = (computed - 1) // job.checkpoint_every * job.checkpoint_every
        if life.begun and life.saved < due:
            faults.append(f"checkpoint {due} was due, the newest is {life.saved}")
    return faults


def check_end(folder: pathlib.Path, reference: pathlib.Path | None) -> list[str]:
    """Say how a finished run differs from what it should be.

    Args:
      folder: of the run that was killed.
      reference: of the run that was not; None to compare with the replay of the Trace.

    Returns:
      A sentence for each difference.
    """
    trace = Trace.load(folder / "trace.npz")
    mine = dict(np.load(folder / "arrays.npz"))
    if reference is not None:
        faults = [trace.diff(Trace.load(reference / "trace.npz"))]
        theirs = dict(np.load(reference / "arrays.npz"))
    else:
        computed = np.sort(trace.step[trace.kind == COMPUTE])
        once = np.array_equal(computed, np.arange(trace.header["steps"]))
        faults = [None if once else "not every step was computed exactly once"]
        params, data = problem()
        again = dbjax.replay(
            trace, loss_fn, params, data, optimizer=_OPTIMIZER, verify=True
        )
        theirs = arrays(again)
    return [fault for fault in faults if fault] + same_bits(mine, theirs)


def same_bits(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    """Name the arrays that differ, in a single bit or in kind."""
    faults = []
    for name in sorted({**mine, **theirs}):
        one, other = mine.get(name), theirs.get(name)
        if one is None or other is None:
            faults.append(f"{name} is in one of the two only")
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            faults.append(f"{name} has another dtype or shape")
        elif one.tobytes() != other.tobytes():
            faults.append(f"{name} differs in its bits")
    return faults


# The script.


def prove(job: Job, kills: int, seed: int, home: pathlib.Path) -> list[str]:
    """Run it all in `home`, print the table, and give every fault that was found."""
    console, rng = rich.console.Console(), np.random.default_rng(seed)
    folder, reference = home / "killed", home / "reference"
    order: list[tuple[int, int]] = []
    faults: list[str] = []
    taken = 0
    if job.runtime == "emulated":
        reference.mkdir(parents=True)
        with console.status("the reference, which nobody kills"):
            train(reference, job)
        order = _read_log(reference / "log")
        if len(order) != job.steps:
            faults.append(f"the reference computed {len(order)} of {job.steps} steps")
    table = rich.table.Table(box=rich.box.SIMPLE)
    for column in ("life", "resumed at", "minibatches", "saved", "again", "lived"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("killed while", no_wrap=True)
    folder.mkdir(parents=True)
    while True:
        moment = draw(rng) if taken < kills else None
        saved, following, found = look(folder, order)
        with console.status(f"{taken} of {kills} kills"):
            life = live(folder, job, moment)
        found += check_life(life, saved, following, order, job)
        taken += not life.finished
        number = table.row_count + 1
        table.add_row(*describe(number, life, saved, following, job))
        if life.finished:
            resumed_at = json.loads((folder / "info.json").read_text())["resumed_at"]
            if resumed_at != saved:
                found.append(f"info.resumed_at is {resumed_at}, not {saved}")
            found += check_end(folder, reference if order else None)
        faults += [f"life {number}: {fault}" for fault in found]
        if life.finished and taken >= kills:
            break
        if life.finished:  # too fast for its moment: once more from the beginning
            shutil.rmtree(folder)
            folder.mkdir()
    console.print(table)
    return faults


def describe(
    number: int, life: Life, saved: int, following: Sequence[int], job: Job
) -> tuple[str, ...]:
    """Give a row of the table."""
    firsts = dict(reversed(life.begun))  # of each replica that began one
    resumed = saved + sum(first - following[who] for who, first in firsts.items())
    end = f"computing {saved + len(life.begun)}" if life.begun else "starting"
    end = f"saving {life.writing}" if life.writing else end
    end = "(finished)" if life.finished else end
    return (
        str(number),
        str(resumed) if life.begun else "-",
        str(len(life.begun)),
        str(life.saved),
        str(max(0, saved + len(life.begun) - life.saved)),
        f"{life.seconds:.1f} s",
        end,
    )


def main(argv: Sequence[str]) -> int:
    """Run what the flags ask for."""
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? There are only flags.")
    if flags.FLAGS.verbosity == logging.INFO:  # absl's default; orbax says a lot then
        logging.set_verbosity(logging.WARNING)
    job = Job(
        runtime=_RUNTIME.value,
        steps=_STEPS.value,
        checkpoint_every=_EVERY.value,
        n_fetch=_N_FETCH.value,
        n_push=_N_PUSH.value,
    )
    if _CHILD.value:
        train(pathlib.Path(_CHILD.value), job)
        return 0
    if _KEEP.value and os.path.exists(_KEEP.value):
        raise app.UsageError(f"--keep={_KEEP.value} is there already.")
    with tempfile.TemporaryDirectory() as scratch:
        home = pathlib.Path(_KEEP.value or scratch)
        faults = prove(job, _KILLS.value, _SEED.value, home)
    for fault in faults:
        print(f"DIFFERENT: {fault}")
    if not faults:
        other = "the run that was never killed"
        other = other if job.runtime == "emulated" else "the replay of its joined Trace"
        print(f"Killed {_KILLS.value} times; the same bits as {other}.")
    return 1 if faults else 0


if __name__ == "__main__":
    app.run(main)
