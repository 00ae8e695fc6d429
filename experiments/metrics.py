"""One writer for all that is measured: JSON lines, TensorBoard, and the console.

`metrics.jsonl` holds one object a line: method, step, time (the run's own clock, in
seconds), examples seen, wall (seconds since this process started the method), and
scalars. A step is a minibatch or, with a batch method, an iteration; such a method's
warm start has steps below 0, and what only the run knows (evaluations, examples, ...)
is added when it has ended. A run on Ray also has lines of how it goes: updates per
second, their staleness, replicas at work, and deaths so far.
"""

import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.progress

from dbjax.runtime.ray import Progress

try:
    from tensorboardX import SummaryWriter
except ImportError:  # An extra: without it there are just no event files.
    SummaryWriter = None


class Writer:
    """Writes what `method` measures below `workdir`, and shows how far it is.

    A resumed run repeats the steps since its last checkpoint. What an earlier process
    wrote about them is replaced, so every (method, step) stands in the file once, and
    once more if it was looked at how the run goes. Any thread may write.

    Args:
      workdir: the run's folder.
      method: whose numbers these are; its events go to the folder of that name.
      steps: in the whole run, for the progress bar.
      batch_size: examples in a step, if all have as many.
      console: where to show progress: a bar on a terminal, a few lines elsewhere.

    Attributes:
      rows_written: evaluations that this writer has written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        method: str,
        *,
        steps: int,
        batch_size: int | None,
        console: rich.console.Console,
    ):
        """Look at what is there; nothing is shown before `with`."""
        self._path = workdir / "metrics.jsonl"
        self._folder = workdir / method
        self._method, self._steps, self._batch_size = method, steps, batch_size
        self._begin = time.perf_counter()
        self._events = None
        self.rows_written = 0
        rows = read(self._path)
        _rewrite(self._path, rows)  # without a line that was torn by a kill
        self._last_steps = {False: -math.inf, True: -math.inf}  # True: how it goes
        for row in rows:
            if row["method"] == method:
                kind = _is_progress(row)
                self._last_steps[kind] = max(self._last_steps[kind], row["step"])
        self._lock = threading.Lock()
        self._console = console
        self._tenths = -1
        self._scores = self._pace = ""
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:>10}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[said]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(method, total=steps, said="")

    def __enter__(self) -> "Writer":
        """Start the progress bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the bar and close the event file."""
        self._bar.stop()
        if self._events is not None:
            self._events.close()

    def write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        """Write one evaluation everywhere; it is on disk when this returns.

        Args:
          step: steps taken so far.
          seconds: the run's own clock.
          scalars: what was measured.
        """
        with self._lock:
            self._scores = f"test accuracy {scalars['test_accuracy']:.1%}"
            self._write(step, seconds, scalars)
            self.rows_written += 1
            self._show_tenth(step)

    def watch(self, progress: Progress) -> None:
        """Write how the run goes; what `dbjax.Ray(watch=...)` calls.

        Args:
          progress: see there.
        """
        scalars = progress._asdict()
        step, seconds = scalars.pop("step"), scalars.pop("time")
        with self._lock:
            many = {name: scalars[name] for name in ("replicas", "deaths")}
            counts = [
                f"{n} {name[: -1 if n == 1 else None]}" for name, n in many.items()
            ]
            self._pace = (
                f"{progress.updates_per_second:,.0f} updates/s, staleness "
                f"{progress.staleness:.1f}, "
                + ", ".join(counts[: 1 + bool(progress.deaths)])
            )
            self._write(step, seconds, scalars)

    def complete(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Add what the run has recorded of its evaluations, and the rows lack.

        Args:
          evaluations: those of its Trace.
        """
        known = {row["step"]: row for row in evaluations}
        rows = read(self._path)
        for row in rows:
            if row["method"] == self._method and not _is_progress(row):
                for name, value in known.get(row["step"], {}).items():
                    row.setdefault(
                        name, value if isinstance(value, int) else _finite(value)
                    )
        _rewrite(self._path, rows)

    def _write(self, step: int, seconds: float, scalars: Mapping[str, float]) -> None:
        size = self._batch_size
        row = {
            "method": self._method,
            "step": int(step),
            "time": float(seconds),
            **({"examples": int(step) * size} if size else {}),
            "wall": round(time.perf_counter() - self._begin, 3),
            **{name: _finite(value) for name, value in scalars.items()},
        }
        self._append(row)
        self._write_events(row, scalars)
        said = ", ".join(filter(None, (self._scores, self._pace)))
        self._bar.update(self._task, completed=max(0, int(step)), said=said)

    def _append(self, row: dict[str, Any]) -> None:
        kind = _is_progress(row)
        if row["step"] <= self._last_steps[kind]:
            kept = [
                old
                for old in read(self._path)
                if (old["method"], _is_progress(old)) != (self._method, kind)
                or old["step"] < row["step"]
            ]
            _rewrite(self._path, kept)
        self._last_steps[kind] = row["step"]
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _write_events(self, row: dict[str, Any], scalars: Mapping[str, float]) -> None:
        if SummaryWriter is None:
            return
        if self._events is None:
            self._events = SummaryWriter(str(self._folder), purge_step=row["step"])
        for name in ("time", "wall", *scalars):
            self._events.add_scalar(name, {**row, **scalars}[name], row["step"])
        self._events.flush()

    def _show_tenth(self, step: int) -> None:
        """Say a line where there is no terminal, if a tenth more is done."""
        tenths = 10 * int(step) // self._steps
        if not self._console.is_terminal and tenths > self._tenths:
            self._tenths = tenths
            said = ", ".join(filter(None, (self._scores, self._pace)))
            line = f"{self._method} {step:,} of {self._steps:,}: {said}"
            self._console.print(line, soft_wrap=True)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Read all whole lines; a last one that a killed process left torn is skipped.

    Args:
      path: the file; it need not exist.

    Returns:
      The objects, one a line.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def replace(path: pathlib.Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def _is_progress(row: Mapping[str, Any]) -> bool:
    """Whether a row says how the run goes, and not what an evaluation found."""
    return "updates_per_second" in row


def _rewrite(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows or path.exists():
        replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def _finite(value: float) -> float | None:
    """JSON knows no NaN: what is not finite is null there."""
    return float(value) if math.isfinite(value) else None
