"""A curve of figures 4 and 5: what it depends on, what it came to, and its cache.

Letters: `E` evaluations of a run.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import threading
from typing import Any, NamedTuple

import numpy as np

from experiments.figure_cluster import Clock
from experiments.figure_task import Task

VERSION = 1  # of what runs compute; another one makes all caches void
HOLD = 3  # evaluations in a row that a target has to hold for
KINDS = ("sgd", "downpour", "adagrad", "lbfgs")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run; equal ones are the same run.

    Attributes:
      task: what is trained.
      clock: how long that takes.
      kind: "sgd", a replica alone and no server; "downpour", with a fixed rate;
        "adagrad", Downpour with Adagrad; "lbfgs", Sandblaster.
      replicas: of the kinds after the first.
      speed: of the machine of "sgd"; that of SGD[1] is 1.
      rate: the learning rate; gamma for Adagrad.
      n_push: minibatches between pushes, and between fetches.
      examples: in the batch of L-BFGS.
      memory: pairs that it keeps.
      warm_rate: the learning rate of the warm start that all but "sgd" begin with.
      seed: of first parameters and the order of examples.
      hours: what evaluations are spread over, the warm start included.
      deadline: when the run ends, if before; a little later if the target is crossed.
      points: evaluations.
      target: validation accuracy that ends the run when it holds; 0: none does.
      final: evaluate training and test, as figures show, and not only validation.
    """

    task: Task
    clock: Clock
    kind: str
    replicas: int = 1
    speed: float = 1.0
    rate: float = 0.0
    n_push: int = 1
    examples: int = 0
    memory: int = 10
    warm_rate: float = 0.0
    seed: int = 0
    hours: float = 120.0
    deadline: float = math.inf
    points: int = 48
    target: float = 0.0
    final: bool = False

    def __post_init__(self) -> None:
        """Check the kind."""
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")

    @property
    def begin(self) -> float:
        """The hour at which the run begins."""
        return 0.0 if self.kind == "sgd" else self.clock.warm_hours

    @property
    def due(self) -> np.ndarray:
        """When to evaluate: evenly in the root of the run's own time."""
        places = np.arange(1, self.points + 1) / self.points
        return self.begin + (self.hours - self.begin) * places**2


class Result(NamedTuple):
    """What a run came to.

    Attributes:
      hours: of the evaluations, `[E]`, the warm start's included.
      steps: minibatches, or evaluations of the batch, since the warm start `[E]`.
      validation: accuracy `[E]`.
      training: likewise, NaN unless the curve is final.
      test: likewise.
      staleness: the mean over pushes; 0 where there are none.
      diverged: whether it came apart.
    """

    hours: np.ndarray
    steps: np.ndarray
    validation: np.ndarray
    training: np.ndarray
    test: np.ndarray
    staleness: float = 0.0
    diverged: bool = False


def key(*parts: Any) -> str:
    """Name what depends on these parts, dataclasses or plain values.

    >>> key(1, "a") == key(1, "a") != key(1, "b")
    True
    """
    plain = [dataclasses.asdict(p) if dataclasses.is_dataclass(p) else p for p in parts]  # type: ignore[arg-type]
    text = json.dumps([VERSION, *plain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(file: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Write a file whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    with part.open("wb") as out:
        np.savez(out, **arrays)
    part.replace(file)


def load(file: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Read what `save` wrote, if it did."""
    if not file.exists():
        return None
    with np.load(file) as saved:
        return {name: saved[name] for name in saved.files}


def to_arrays(curve: Curve, result: Result) -> dict[str, Any]:
    """What to save of a result, with the curve in words."""
    about = json.dumps(dataclasses.asdict(curve))
    return result._asdict() | {"curve": np.array(about)}


def to_result(arrays: dict[str, np.ndarray]) -> Result:
    """The result that was saved."""
    columns = {name: arrays[name] for name in Result._fields[:5]}
    staleness, diverged = float(arrays["staleness"]), bool(arrays["diverged"])
    return Result(**columns, staleness=staleness, diverged=diverged)


def crossing(hours: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """Say when an accuracy came to stay.

    That is where it is crossed upwards and then holds for `HOLD` evaluations in a row,
    between the two evaluations linearly.

    Args:
      hours: of the evaluations `[E]`; anything that grows, such as steps.
      accuracy: `[E]`.
      target: the accuracy.

    Returns:
      Hours; infinity if that never happened.

    >>> crossing(np.arange(6.0), np.array([0.0, 3, 1, 2, 2, 2]), 2.0)
    3.0
    """
    above = np.asarray(accuracy) >= target
    for at in range(len(above) - HOLD + 1):
        if above[at : at + HOLD].all():
            if at == 0:
                return float(hours[0])
            rise = accuracy[at] - accuracy[at - 1]
            share = (target - accuracy[at - 1]) / rise
            return float(hours[at - 1] + share * (hours[at] - hours[at - 1]))
    return math.inf
