"""How a curve of figures 4 and 5 is run: a replica alone, Downpour, or Sandblaster.

Asynchrony is a Trace that does not depend on values, so all seeds and learning rates
share one. L-BFGS does not depend on who computes which portion, but for rounding: one
replica computes all of them here, and what the paper's many would take is its time.
"""

import functools
import math
import pathlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dbjax
from dbjax import sandblaster
from dbjax.optim.adagrad import ScaleByAdagradState, scale_by_adagrad
from dbjax.runtime.base import RejectedTooOften
from dbjax.typing import Params
from experiments import figure_curves, figure_task
from experiments.figure_cluster import Clock
from experiments.figure_curves import HOLD, Curve, Result

_PORTION = 4_096  # examples of an evaluation of a batch at once
_SLACK = 1.2  # of a deadline, to see whether a target that was crossed holds
_EVERY = 512  # minibatches between looks at the clock, at most: a compiled chunk


def run(curve: Curve, folder: pathlib.Path) -> Result:
    """Run a curve, or read what an earlier call left.

    Args:
      curve: what to run.
      folder: of the cache.

    Returns:
      The result.
    """
    file = folder / f"{figure_curves.key(curve)}.npz"
    if (arrays := figure_curves.load(file)) is not None:
        return figure_curves.to_result(arrays)
    kinds = {"sgd": _sgd, "lbfgs": _lbfgs}
    result = kinds.get(curve.kind, _downpour)(curve, folder)
    figure_curves.save(file, figure_curves.to_arrays(curve, result))
    return result


class _Stop(Exception):
    """There is nothing more to be seen."""


class _Watch:
    """An `eval_fn` that evaluates when a curve is due.

    Args:
      curve: the run.
      hours_of: hours on the axis from a run's own time.
      due: hours, if they are not the curve's; likewise `deadline`.
      deadline: see `due`.
    """

    def __init__(
        self,
        curve: Curve,
        hours_of: Callable[[float], float],
        due: np.ndarray | None = None,
        deadline: float | None = None,
    ) -> None:
        self._curve, self._hours_of = curve, hours_of
        self._due = curve.due if due is None else due
        end = min(curve.hours, curve.deadline)
        self._deadline = end if deadline is None else deadline
        self._sets = figure_task.make(curve.task)
        self._accuracy = figure_task.accuracy_of(curve.task)
        self._rows: list[tuple[float, ...]] = []
        self.diverged = self._crossed = False

    def __call__(self, params: Params, step: int, time: float) -> dict[str, float]:
        """Evaluate if it is time.

        Raises:
          _Stop: the target holds, the deadline is over, or parameters are not finite.
        """
        hours = self._hours_of(time)
        # Whatever fell due since the last call is looked at once.
        if len(self._due) and hours >= 0.9999 * self._due[0]:
            self._due = self._due[self._due > hours]
            self.look(params, step, hours)
            last = [row[2] for row in self._rows[-HOLD:]]
            target = self._curve.target or math.inf
            holds = len(last) == HOLD and min(last) >= target
            # At the deadline a target may be crossed, and has to show that it holds.
            self._crossed = last[-1] >= target and len(self._due) > 0
            if self.diverged or holds:
                raise _Stop
        if hours > self._deadline and not self._crossed:
            raise _Stop
        return {}

    def look(self, params: Params, step: int, hours: float) -> None:
        """Evaluate now."""
        sets, accuracy = self._sets, self._accuracy
        leaves = jax.tree.leaves(params)
        self.diverged = not all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
        row = [hours, float(step), accuracy(params, sets.validation)]
        count = len(sets.validation.state)
        seen = figure_task.Examples(*(column[:count] for column in sets.training))
        shown = self._curve.final
        row += [accuracy(params, s) if shown else math.nan for s in (seen, sets.test)]
        self._rows.append(tuple(row))

    def result(self, staleness: float = 0.0) -> Result:
        """Put the rows together."""
        columns = np.array(self._rows).reshape(-1, 5).T
        return Result(*columns, staleness=staleness, diverged=self.diverged)


# A replica alone, and the warm start.


def _sgd(curve: Curve, folder: pathlib.Path) -> Result:
    """SGD without a server."""
    del folder
    seconds = curve.clock.machines.sgd / curve.speed
    hours = min(curve.hours, _SLACK * curve.deadline)
    steps = round(hours / curve.clock.hours(seconds))
    watch = _Watch(curve, curve.clock.hours)
    trace = dbjax.simulate(dbjax.Cluster(step_time=seconds), replicas=1, steps=steps)
    _replay(curve, trace, _first_params(curve), _at_rate(curve.rate), watch)
    return watch.result()


class _WarmStart(NamedTuple):
    """Parameters, and the sums of squares that Adagrad would have."""

    params: Params
    squares: Params


def _warm_start(curve: Curve, folder: pathlib.Path) -> _WarmStart:
    """The first minibatches of SGD[1], run once for all curves of a seed."""
    told = (curve.task, curve.clock.warm_steps, curve.warm_rate, curve.seed)
    file = folder / f"warm-{figure_curves.key(*told)}.npz"
    with _lock(file.name):
        if not file.exists():
            warm = _warm_up(curve)
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(warm)]
            figure_curves.save(file, {str(i): leaf for i, leaf in enumerate(leaves)})
    saved = figure_curves.load(file) or {}
    shapes = jax.eval_shape(lambda: (_first_params(curve),) * 2)
    leaves = [jnp.array(saved[str(i)]) for i in range(len(saved))]
    return _WarmStart(*jax.tree.unflatten(jax.tree.structure(shapes), leaves))


def steps_at_start(curve: Curve, folder: pathlib.Path) -> tuple[Params, Params]:
    """Where Downpour begins, and what it multiplies rate and gradient with there."""
    warm = _warm_start(curve, folder)
    if curve.kind != "adagrad":
        return warm.params, jax.tree.map(jnp.ones_like, warm.params)
    return warm.params, jax.tree.map(_inverse_root, warm.squares)


def _inverse_root(square: jax.Array) -> jax.Array:
    return jnp.where(square > 0, jax.lax.rsqrt(square), 0.0)


def _warm_up(curve: Curve) -> _WarmStart:
    steps = curve.clock.warm_steps
    trace = dbjax.simulate(dbjax.Cluster(step_time=1.0), replicas=1, steps=steps)
    run = dbjax.replay(
        trace, figure_task.loss_of(curve.task), _first_params(curve),
        _minibatches(curve, 1), exact=False,
        optimizer=optax.chain(_sum_squares(), optax.sgd(curve.warm_rate)),
    )  # fmt: skip
    return _WarmStart(run.params, run.optimizer_state[0][0].sum_of_squares)


def _sum_squares() -> optax.GradientTransformation:
    """Sum squares as Adagrad does, and leave gradients as they are."""
    rule = scale_by_adagrad()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return updates, rule.update(updates, state, params)[1]

    return optax.GradientTransformation(rule.init, update)


# Downpour.


def _downpour(curve: Curve, folder: pathlib.Path) -> Result:
    """Downpour on the cluster, from the warm start on."""
    clock, warm = curve.clock, _warm_start(curve, folder)
    with _lock("order"):  # it holds the interpreter, two would not be faster
        trace = _order(clock, curve.replicas, curve.n_push, curve.hours)
    optimizer = _at_rate(curve.rate)
    if curve.kind == "adagrad":
        optimizer = optax.chain(_adagrad_from(warm.squares), optimizer)
    watch = _Watch(curve, lambda time: clock.warm_hours + clock.hours(time))
    watch.look(warm.params, 0, clock.warm_hours)
    _replay(curve, trace, warm.params, optimizer, watch)
    staleness = trace.staleness()
    return watch.result(float(staleness[staleness >= 0].mean()))


@functools.lru_cache(4)
def _order(clock: Clock, replicas: int, n_push: int, hours: float) -> dbjax.Trace:
    """Simulate Downpour until an hour."""
    machines = clock.machines
    seconds = (hours - clock.warm_hours) * 3600 / clock.compression
    steps = math.ceil(1.1 * seconds / machines.update(replicas, n_push))
    return dbjax.simulate(
        machines.downpour(replicas), replicas=replicas, steps=max(steps, replicas),
        n_fetch=n_push, n_push=n_push, overlap=machines.assumed.overlap,
        parameter_bytes=machines.parameter_bytes,
    )  # fmt: skip


def _at_rate(rate: float) -> optax.GradientTransformation:
    """A fixed rate, held by the state: all rates are one program, compiled once."""

    def init(params: Params) -> jax.Array:
        del params
        return jnp.float32(rate)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda u: -state * u, updates), state

    return optax.GradientTransformation(init, update)


def _adagrad_from(squares: Params) -> optax.GradientTransformation:
    """Adagrad whose sums began with the warm start."""

    def init(params: Params) -> ScaleByAdagradState:
        del params
        return ScaleByAdagradState(squares)

    return optax.GradientTransformation(init, scale_by_adagrad().update)


def _replay(
    curve: Curve,
    trace: dbjax.Trace,
    params: Params,
    optimizer: optax.GradientTransformation,
    watch: _Watch,
) -> None:
    # Evaluations are denser at the beginning, so looks at the clock are denser still.
    every = max(1, min(_EVERY, int(trace.header["steps"]) // (6 * curve.points)))
    try:
        dbjax.replay(
            trace, figure_task.loss_of(curve.task), params,
            _minibatches(curve, curve.replicas), optimizer=optimizer, exact=False,
            eval_fn=watch, eval_every=every,
        )  # fmt: skip
    except _Stop:
        pass
    except RejectedTooOften:
        watch.diverged = True


def _minibatches(curve: Curve, subsets: int) -> Any:
    training = figure_task.make(curve.task).training
    return dbjax.from_arrays(
        training._asdict(), curve.task.batch, seed=curve.seed, subsets=subsets
    )


def _first_params(curve: Curve) -> Params:
    return jax.jit(curve.task.model.init)(jax.random.key(curve.seed))


# Sandblaster.


def _lbfgs(curve: Curve, folder: pathlib.Path) -> Result:
    """L-BFGS from the warm start on: the same evaluations, however many replicas."""
    clock, each = curve.clock, curve.clock.hours(evaluation_seconds(curve))
    span = min(curve.hours, _SLACK * curve.deadline) - clock.warm_hours
    limit = max(HOLD, math.floor(span / each))
    told = (curve.task, clock.warm_steps, curve.warm_rate, curve.seed)
    told += (curve.examples, curve.memory, curve.final)
    file = folder / f"batch-{figure_curves.key(*told)}.npz"
    with _lock(file.name):
        arrays = figure_curves.load(file)
        if arrays is None or not _serves(arrays, curve.target, limit):
            result = _minimize(curve, folder, limit)
            arrays = figure_curves.to_arrays(curve, result)
            figure_curves.save(file, arrays)
    result = figure_curves.to_result(arrays)
    seen = result.steps <= limit
    steps, validation, training, test = (column[seen] for column in result[1:5])
    return Result(clock.warm_hours + each * steps, steps, validation, training, test)


def _serves(arrays: dict[str, np.ndarray], target: float, limit: int) -> bool:
    """Whether a run of a batch went on for long enough."""
    result = figure_curves.to_result(arrays)
    held = figure_curves.crossing(result.steps, result.validation, target or math.inf)
    # It may have ended where another target held; then what was seen ends there.
    return float(result.steps[-1]) >= 0.8 * limit or math.isfinite(held)


def _minimize(curve: Curve, folder: pathlib.Path, limit: int) -> Result:
    """Evaluate the batch so often; `steps` count evaluations."""
    warm = _warm_start(curve, folder)
    training = figure_task.make(curve.task).training
    batch = {name: x[: curve.examples] for name, x in training._asdict().items()}
    data = dbjax.from_arrays(
        batch, curve.task.batch, portion_size=min(_PORTION, curve.examples)
    )

    def evaluations(time: float) -> float:
        # On the emulated clock of one replica a portion takes a second.
        return round(time / data.num_portions)

    due = np.unique(np.geomspace(1, 1e5, 120).round())
    watch = _Watch(curve, evaluations, due=due, deadline=limit)
    watch.look(warm.params, 0, 0.0)
    try:
        sandblaster.minimize(
            figure_task.loss_of(curve.task), warm.params, data, tolerance=0.0,
            method=sandblaster.LBFGS(memory_size=curve.memory), strategy="static",
            iterations=limit, eval_fn=watch, eval_every=1, seed=curve.seed,
            runtime=dbjax.Emulated(dbjax.Cluster(step_time=1.0)),
        )  # fmt: skip
    except _Stop:
        pass
    result = watch.result()
    return result._replace(steps=result.hours)


_LOCKS: dict[str, threading.Lock] = {}


def _lock(name: str) -> threading.Lock:
    return _LOCKS.setdefault(name, threading.Lock())


def evaluation_seconds(curve: Curve) -> float:
    """How long the paper's machines take to evaluate the batch of L-BFGS once.

    An example of ours stands for as many of theirs as make minibatches equal.
    """
    machines = curve.clock.machines
    theirs = curve.examples * machines.assumed.batch / curve.task.batch
    return machines.evaluation(curve.replicas, theirs)
