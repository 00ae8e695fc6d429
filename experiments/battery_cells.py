"""A cell of the battery: what it depends on, what it came to, and its file.

A cell is a rule with a setting, on a workload, on a cluster, with a seed. Each is kept
in a small file of its own, named after all that it depends on, so that a battery that
was stopped goes on at the cell where it was.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from experiments.battery_rules import Rule, Setting, said
from experiments.battery_runs import Curve
from experiments.figure_curves import crossing

VERSION = 1  # of what cells compute; another one makes all files void
TUNE, REPORT = "tune", "report"
TUNING_SEED = 1_000  # none of those that are reported
T = TypeVar("T")
LAST = 3  # evaluations whose mean is a run's end


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a battery is.

    Attributes:
      steps: pushes of a run, at most.
      replicas: that share them.
      points: evaluations.
      budget: settings that are tried.
      seeds: runs with the best of them.
    """

    steps: int = 4_000
    replicas: int = 16
    points: int = 24
    budget: int = 16
    seeds: int = 8


SMOKE = Size(steps=240, replicas=8, points=6, budget=3, seeds=2)


class Cell(NamedTuple):
    """One run; see the module."""

    rule: Rule
    workload: str
    cluster: str
    stage: str
    seed: int
    setting: Setting
    size: Size

    @property
    def about(self) -> dict[str, Any]:
        """In words, as the file has it."""
        return {
            "version": VERSION,
            "rule": self.rule.name,
            "source": hashlib.sha256(self.rule.source.encode()).hexdigest(),
            "workload": self.workload,
            "cluster": self.cluster,
            "stage": self.stage,
            "seed": self.seed,
            "setting": self.setting,
            # How many others there are changes nothing.
            "steps": self.size.steps,
            "replicas": self.size.replicas,
            "points": self.size.points,
        }

    @property
    def file(self) -> str:
        """The file's name."""
        text = json.dumps(self.about, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return (
            f"{self.rule.name}-{self.workload}-{self.cluster}-{self.stage}-{key}.json"
        )


class Outcome(NamedTuple):
    """A cell, and its curve; or what went wrong."""

    cell: Cell
    curve: Curve | None
    error: str = ""

    @property
    def diverged(self) -> bool:
        """Whether it came apart."""
        return self.curve is not None and self.curve.diverged

    @property
    def end(self) -> float:
        """The held-out loss at the end; infinite where there is none."""
        if self.curve is None or self.curve.diverged:
            return math.inf
        return float(np.mean(self.curve.losses[-LAST:]))

    @property
    def accuracy(self) -> float:
        """The held-out accuracy at the end, NaN where there is none."""
        if self.curve is None or self.curve.diverged:
            return math.nan
        return float(np.mean(self.curve.accuracies[-LAST:]))

    def time_to(self, target: float) -> float:
        """Simulated seconds to a held-out loss that holds; infinite if never."""
        if self.curve is None:
            return math.inf
        losses = np.array(self.curve.losses)
        finite = np.where(np.isfinite(losses), losses, 1e30)
        return crossing(np.array(self.curve.seconds), -finite, -target)


def keep(
    cell: Cell,
    folder: pathlib.Path,
    prepare: Callable[[], T],
    run: Callable[[T], Curve],
) -> Outcome:
    """Read a cell, or run it and write it.

    Args:
      cell: what is asked for.
      folder: of the files.
      prepare: gives what the run needs and no rule has a part in.
      run: runs it.

    Returns:
      What came of it. An error of `run`, so of the rule, is an outcome too, and is not
      written.
    """
    file = folder / cell.file
    saved = _read(file)
    if saved is not None:
        return Outcome(cell, saved)
    ready = prepare()
    try:
        curve = run(ready)
    except Exception as error:  # whatever a stranger's rule may raise
        return Outcome(cell, None, said(error))
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    part.write_text(json.dumps(cell.about | {"curve": curve._asdict()}))
    part.replace(file)
    return Outcome(cell, curve)


def _read(file: pathlib.Path) -> Curve | None:
    """A curve that was written whole."""
    try:
        return Curve(**json.loads(file.read_text())["curve"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
