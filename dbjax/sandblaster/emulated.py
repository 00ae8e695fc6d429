"""Evaluations on an emulated cluster: its events first, then their arithmetic.

Who computes what, and when, does not depend on values. So the cluster's events happen
first, and then every sum that reached a shard is computed and added to it, in the order
in which it did: a portion counts exactly once because the events say so, and the shards
refuse what comes twice.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dbjax.runtime.emulated import Emulated
from dbjax.sandblaster.arguments import Arguments
from dbjax.sandblaster.emulation import Emulation
from dbjax.sandblaster.messages import Evaluate, Evaluated, Push
from dbjax.sandblaster.portions import Portions, PortionsInfo
from dbjax.sandblaster.problem import Problem, scattered
from dbjax.sandblaster.schedule import STRATEGIES
from dbjax.sandblaster.vectors import Vectors

COMPARED = 20
"""So many evaluations of a run are emulated again with the other strategies."""


class EmulatedReplicas:
    """Evaluates portions as the replicas of an emulated cluster would.

    Args:
      problem: what is minimised.
      vectors: where the vectors live.
      arguments: of the run.
      runtime: the cluster and its seed.
      nbytes: size of the parameters.
    """

    def __init__(
        self,
        problem: Problem,
        vectors: Vectors,
        arguments: Arguments,
        runtime: Emulated,
        nbytes: float,
    ) -> None:
        self._problem, self._vectors = problem, vectors
        self._arguments, self._runtime, self._nbytes = arguments, runtime, nbytes
        self._history: list[list[int]] = []  # groups evaluated; []: a round of scalars
        self._desk, self._events = self._begin(arguments)

    def at_work(self) -> contextlib.AbstractContextManager[None]:
        """Nobody has to come."""
        return contextlib.nullcontext()

    def now(self) -> float:
        """Give the emulated seconds since the run began."""
        return self._events.now

    def asked(self) -> None:
        """The coordinator has asked every shard for scalars."""
        self._history.append([])
        self._events.round()

    def evaluate(self, request: Evaluate) -> Evaluated:
        """Evaluate portions.

        Args:
          request: what, where, and into which vectors.

        Returns:
          Their losses.
        """
        problem, vectors = self._problem, self._vectors
        portions = scattered(request.groups)
        groups = [len(group) for _, group in request.groups]
        self._history.append(groups)
        self._events.evaluate(groups)
        for into, _ in request.groups:
            vectors.elementwise(into, "zero", request.at)
        params = vectors.get(request.at)
        losses: dict[int, list[Any]] = {}
        for push, shards in _by_push(self._events.landed).items():
            accrued = None
            for place in push.portions:
                i = portions[place]
                accrued, *losses[place] = problem.call(
                    0,
                    problem.both,
                    accrued,
                    params,
                    problem.portion(i),
                    i,
                    float(problem.examples[i]),
                    request.squares,
                )
            vectors.add(
                group_of(request, push.portions[0]), accrued, push.replica, push.life,
                push.id, shards,
            )  # fmt: skip
        return finish(request, problem, vectors, losses)

    def columns(self) -> dict[str, Any]:
        """Give the Trace's columns."""
        return self._events.columns()

    def info(self) -> PortionsInfo:
        """Give what was done beyond computing each portion once."""
        return self._desk.info

    def seconds_per_iteration(self, iterations: int) -> dict[str, float]:
        """Emulate the run's first evaluations once more, with each strategy.

        Args:
          iterations: of the run.

        Returns:
          Seconds by strategy; all of the run's evaluations are taken to last as long.
        """
        evaluations = [at for at, groups in enumerate(self._history) if groups]
        if not evaluations or not iterations:
            return {}
        some = [*evaluations, len(self._history)][: COMPARED + 1]
        scale = len(evaluations) / (len(some) - 1) / iterations
        seconds = {}
        for strategy in STRATEGIES:
            _, events = self._begin(self._arguments._replace(strategy=strategy))
            with contextlib.suppress(RuntimeError):  # it can never be done
                seconds[strategy] = scale * _again(events, self._history[: some[-1]])
        return seconds

    def save(self) -> dict[str, Any]:
        """Give the order of what was asked: the rest follows from the seed."""
        return {"history": self._history}

    def restore(self, saved: dict[str, Any]) -> None:
        """Let all of it happen again, but for the arithmetic."""
        self._history = [list(groups) for groups in saved["history"]]
        _again(self._events, self._history)

    def _begin(self, arguments: Arguments) -> tuple[Portions, Emulation]:
        desk = arguments.desk(len(self._problem.examples))
        cluster, seed = self._runtime.cluster, self._runtime.seed
        return desk, Emulation(desk, cluster, seed, self._nbytes / desk.shards)


def _again(events: Emulation, history: Sequence[Sequence[int]]) -> float:
    """Let what was asked happen; give the time at which it is done."""
    for groups in history:
        if groups:
            events.evaluate(groups)
        else:
            events.round()
    return events.now


def finish(
    request: Evaluate,
    problem: Problem,
    vectors: Vectors,
    losses: Mapping[int, Sequence[Any]],
) -> Evaluated:
    """Divide each group's sum by its number of examples, and list the losses.

    Args:
      request: what was asked.
      problem: what is minimised.
      vectors: where the sums are.
      losses: value and square of each portion, by its place in the request.

    Returns:
      The answer.
    """
    examples = tuple(problem.examples[i] for i in scattered(request.groups))
    begin = 0
    for into, group in request.groups:
        count = sum(examples[begin : begin + len(group)])
        vectors.combine(into, {into: 1 / max(count, 1)})
        begin += len(group)
    table = [(float(v), float(q)) for v, q in (losses[p] for p in range(len(examples)))]
    values, squares = zip(*table, strict=True)
    return Evaluated(examples, values, squares)


def _by_push(landed: list[tuple[Push, int]]) -> dict[Push, list[int]]:
    """The shards that each push reached, in the order of their first."""
    reached: dict[Push, list[int]] = {}
    for push, shard in landed:
        reached.setdefault(push, []).append(shard)
    return reached


def group_of(request: Evaluate, place: int) -> str:
    """The vector that a portion's gradient goes into."""
    ends = np.cumsum([len(group) for _, group in request.groups])
    return request.groups[int(np.searchsorted(ends, place, side="right"))][0]
