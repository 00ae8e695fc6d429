r"""`probe`: replay a Trace exactly, and measure at its pushes what asynchrony did.

At a push, :math:`w` is what it meets: each shard's parameters as it reaches that
shard; :math:`w_{old}` is what its oldest gradient was computed on, of each shard the
version in the push's `base`. A push of one gradient that missed nothing has
:math:`w = w_{old}`.

What would have been is one call each:

  replay(trace.without_staleness(), ...)       # the same minibatches, nobody stale
  replay(trace.without_replicas(3), ...)       # the same run, replica 3 left out
  replay(trace, ..., optimizer=another)        # the same order, another rule

and `probe` takes the same Traces and rules.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax import trees
from dbjax.downpour.exact import Arrival, Exact
from dbjax.downpour.plan import make_plan
from dbjax.downpour.problem import Problem, copy, make_problem
from dbjax.downpour.replay import check_trace, finish
from dbjax.downpour.run import Run
from dbjax.loss import make_loss
from dbjax.optim import LocalRule, sharpness, stability_limit
from dbjax.optim.local import GRADIENTS, as_local_rule
from dbjax.trace import COMPUTE, Trace, statistics
from dbjax.typing import Batch, Data, LossFn, Params

PROBES = ("distance", "cosine", "stability")


class Probes(NamedTuple):
    """The result of `probe`; `K` pushes are sampled, of `S` shards.

    Attributes:
      axes: `"push"` (numbers, in the order of `trace.staleness()`) and `"shard"`.
      step: `[K]` the push's ticket.
      time: `[K]` when the last shard handled it.
      replica: `[K]` whose it is.
      staleness: `[K, S]` updates that it missed.
      skipped: pushes that were to be sampled, and that some shard never saw.
      values: name to `[K]` floats; see `probe`.
      run: the replay, as `replay` returns it.
    """

    axes: dict[str, np.ndarray]
    step: np.ndarray
    time: np.ndarray
    replica: np.ndarray
    staleness: np.ndarray
    skipped: int
    values: dict[str, np.ndarray]
    run: Run


def probe(
    trace: Trace,
    loss_fn: LossFn,
    params: Params,
    data: Data,
    *,
    optimizer: optax.GradientTransformation,
    probes: Sequence[str] = ("distance", "cosine"),
    every: int = 1,
    learning_rate: float | Callable[[Any], Params] | None = None,
    batch: Batch | None = None,
    provide: tuple[str, ...] = (),
    local_optimizer: optax.GradientTransformation | LocalRule | None = None,
    split: str = "even",
    per_shard: bool = False,
    version_dtype: Any = None,
    rng: bool = False,
    has_aux: bool = False,
    seed: int = 0,
) -> Probes:
    r"""Replay a Trace exactly and say what its asynchrony did.

    Of every sampled push, with what it meets, :math:`w`, what it was computed on,
    :math:`w_{old}`, and its largest staleness on any shard, :math:`\tau`:

    .. math::
      \text{distance} = \|w - w_{old}\|, \qquad
      \text{cosine} = \frac{\langle g_{old}, g \rangle}{\|g_{old}\| \|g\|}, \qquad
      \text{stability} = \eta \lambda \tau

    `"distance"` gives `distance` and, over :math:`\|w\|`, `relative_distance`.
    `"cosine"` compares the accrued gradients that are pushed with the sum over the same
    minibatches at :math:`w`; NaN where one of them is zero or not finite. With a
    `local_optimizer` the difference holds the replica's own steps as well.
    `"stability"` gives it, `eta_lambda`, with the largest curvature in size
    :math:`\lambda` at :math:`w`, and `eta_lambda_limit`, from where on SGD with that
    delay throughout would diverge; :math:`\eta` is the rate times the gradients that
    the push sums. Limits of other rules are others.

    Args:
      trace: as in `replay`; its shards were not restored. A push that some shard never
        saw is skipped, and counted.
      loss_fn: as in `replay`.
      params: as in `replay`.
      data: as in `replay`; `"cosine"` reads minibatches again.
      optimizer: as in `replay`.
      probes: what to measure, among `"distance"`, `"cosine"` and `"stability"`.
      every: pushes from one sample to the next, the first one being sampled.
      learning_rate: eta, which `"stability"` needs; or a function of a shard's
        optimizer state that gives the positive rate of each of its coordinates.
      batch: what the curvature is of; the first minibatch if not given.
      provide: as in `train`.
      local_optimizer: as in `train`; `"cosine"` needs one that pushes gradients.
      split: as in `train`.
      per_shard: as in `train`.
      version_dtype: as in `replay`.
      rng: as in `train`.
      has_aux: as in `train`.
      seed: as in `train`.

    Returns:
      The labelled arrays, and the run itself, bit for bit that of `replay`.

    Raises:
      ValueError: the Trace does not fit, or an argument is wrong.
      RejectedTooOften: training has come apart.

    >>> import dbjax
    >>> data = dbjax.from_arrays({"x": np.ones((8, 1), np.float32)}, batch_size=4)
    >>> loss = lambda p, b: jnp.mean((p["w"] - b["x"]) ** 2)
    >>> rule = {"optimizer": optax.sgd(0.25), "probes": PROBES, "learning_rate": 0.25}
    >>> trace, start = dbjax.Trace.from_delays([0, 1, 2, 2]), {"w": jnp.zeros(1)}
    >>> seen = probe(trace, loss, start, data, **rule)
    >>> seen.values["distance"].tolist(), seen.values["cosine"].tolist()
    ([0.0, 0.5, 1.0, 1.0], [1.0, 1.0, nan, -1.0])
    >>> seen.values["eta_lambda"].tolist(), seen.values["eta_lambda_limit"].round(2)
    ([0.5, 0.5, 0.5, 0.5], array([2.  , 1.  , 0.62, 0.62]))
    >>> probe(trace.without_staleness(), loss, start, data, **rule).values["distance"]
    array([0., 0., 0., 0.])
    """
    check_trace(trace)
    if trace.incarnation.any():
        raise ValueError("the Trace holds a shard that was restored from a snapshot")
    _check(data, probes, every, learning_rate, batch)
    local = None if local_optimizer is None else as_local_rule(local_optimizer)
    if local is not None and local.push != GRADIENTS and "cosine" in probes:
        raise ValueError(
            f"the probe 'cosine' compares gradients, and push={local.push!r} of the "
            f"local_optimizer pushes none: give probes=('distance',)"
        )
    problem = make_problem(
        loss_fn, params, data, optimizer=optimizer, shards=int(trace.header["shards"]),
        replicas=int(trace.header["replicas"]), provide=provide,
        local_optimizer=local_optimizer, split=split, per_shard=per_shard,
        version_dtype=version_dtype, rng=rng, has_aux=has_aux, seed=seed,
    )  # fmt: skip
    plan = make_plan(trace)
    sampled = _Sampled(trace, every)
    measures: list[Callable[[_Push], dict[str, float]]] = []
    if "distance" in probes:
        measures.append(functools.partial(_distance, problem))
    if "cosine" in probes:
        measures.append(functools.partial(_cosine, problem))
    if "stability" in probes:
        batch = problem.batch(0, 0) if batch is None else batch
        loss = make_loss(loss_fn, rng=rng, has_aux=has_aux, seed=seed)
        curvature = jax.jit(
            lambda params, scale: sharpness(
                lambda p, b: loss(p, b, 0, 0), params, batch, scale
            )
        )
        rate = None if callable(learning_rate) else learning_rate
        measures.append(functools.partial(_stability, curvature, rate))
    rates = learning_rate if callable(learning_rate) else None
    watch = _Watch(problem, sampled, measures, rates)
    machine = Exact(plan, problem)
    machine.watch = watch
    machine.run(len(plan))
    return Probes(
        axes={"push": sampled.push, "shard": np.arange(plan.shards)},
        step=sampled.step,
        time=sampled.time,
        replica=sampled.replica,
        staleness=sampled.staleness,
        skipped=sampled.skipped,
        values=watch.values(),
        run=finish(trace, machine, plan, "exact", []),
    )


def _check(
    data: Any, probes: Any, every: Any, learning_rate: Any, batch: Batch | None
) -> None:
    """Raise if an argument of `probe` is out of range."""
    names = None if isinstance(probes, str) else tuple(probes)
    if not names or not set(names) <= set(PROBES):
        raise ValueError(f"probes must be some of {PROBES}, got {probes!r}")
    if not isinstance(every, int | np.integer) or every < 1:
        raise ValueError(f"every={every!r}: allowed are integers from 1")
    if "stability" in names and learning_rate is None:
        raise ValueError("the probe 'stability' needs learning_rate=")
    if learning_rate is not None and not callable(learning_rate):
        if not 0 < float(learning_rate) < math.inf:
            raise ValueError(
                f"learning_rate={learning_rate}: allowed are positive numbers, or a "
                "function of the optimizer's state"
            )
    if not hasattr(data, "start"):
        return
    if "cosine" in names:
        raise ValueError(
            "the probe 'cosine' reads minibatches again, and iterators can be read "
            "only once: use from_arrays, or probes=('distance',)"
        )
    if "stability" in names and batch is None:
        raise ValueError(
            "the probe 'stability' would take the first minibatch away from iterators: "
            "give batch="
        )


class _Sampled:
    """Which pushes are sampled, by number: whose they are, and what is in them."""

    def __init__(self, trace: Trace, every: int) -> None:
        rows, push = statistics.push_index(trace)
        staleness = trace.staleness()
        chosen = np.arange(0, len(staleness), every)
        self.push = chosen[(staleness[chosen] >= 0).all(axis=1)]
        self.skipped = len(chosen) - len(self.push)
        self.staleness = staleness[self.push]
        last = np.zeros(len(staleness), np.int64)
        last[push] = rows  # the last assignment wins
        last = last[self.push]
        self.step, self.time = trace.step[last], trace.time[last]
        self.replica, self.count = trace.replica[last], trace.count[last]
        place = {number: k for k, number in enumerate(self.push.tolist())}
        self.place_of = {
            row: place[number]
            for row, number in zip(rows.tolist(), push.tolist(), strict=True)
            if number in place
        }
        # A push holds its replica's `count` newest gradients up to its ticket.
        computes = np.flatnonzero(trace.kind == COMPUTE)
        computes = computes[np.argsort(trace.replica[computes], kind="stable")]
        batches, steps = trace.batch[computes].tolist(), trace.step[computes].tolist()
        newest = {step: at for at, step in enumerate(steps)}
        ends = [newest[step] + 1 for step in self.step.tolist()]
        self.batches = [
            batches[end - count : end]
            for end, count in zip(ends, self.count.tolist(), strict=True)
        ]


class _Push(NamedTuple):
    """A sampled push that all shards have seen; trees are whole."""

    replica: int
    batches: list[int]
    staleness: int
    fresh: Params
    stale: Params
    gradients: Params
    rates: Params | None


class _Watch:
    """Puts together what shards see one after the other, and measures it."""

    def __init__(
        self,
        problem: Problem,
        sampled: _Sampled,
        measures: Sequence[Callable[[_Push], dict[str, float]]],
        rates: Callable[[Any], Params] | None,
    ) -> None:
        self.problem, self.sampled = problem, sampled
        self.measures, self.rates = measures, rates
        self._seen: dict[int, dict[int, Any]] = {}
        self._measured: dict[int, dict[str, float]] = {}

    def __call__(self, arrival: Arrival) -> None:
        """Keep what a shard sees; with the last shard's, measure."""
        at = self.sampled.place_of.get(arrival.row)
        if at is None:
            return
        rates = None if self.rates is None else self.rates(arrival.optimizer_state)
        seen = self._seen.setdefault(at, {})
        # Copies: the shard is about to write over some of it.
        parts = arrival.fresh, arrival.stale, arrival.gradients, rates
        seen[arrival.shard] = copy(parts)
        if len(seen) < self.problem.layout.shards:
            return
        parts = self._seen.pop(at)
        fresh, stale, gradients, rates = zip(
            *(parts[shard] for shard in sorted(parts)), strict=True
        )
        push = _Push(
            replica=int(self.sampled.replica[at]),
            batches=self.sampled.batches[at],
            staleness=int(self.sampled.staleness[at].max()),
            fresh=self.problem.fetch(fresh),
            stale=self.problem.fetch(stale),
            gradients=self.problem.merge(gradients),
            rates=None if self.rates is None else self.problem.merge(rates),
        )
        self._measured[at] = {
            name: value
            for measure in self.measures
            for name, value in measure(push).items()
        }

    def values(self) -> dict[str, np.ndarray]:
        """Give all that was measured, by name, in the order of the pushes."""
        rows = [self._measured[at] for at in range(len(self.sampled.push))]
        names = rows[0] if rows else {}
        return {name: np.array([row[name] for row in rows]) for name in names}


_vdot, _norm = jax.jit(trees.vdot), jax.jit(trees.norm)
_apart = jax.jit(lambda a, b: trees.norm(jax.tree.map(jnp.subtract, a, b)))


def _distance(problem: Problem, push: _Push) -> dict[str, float]:
    distance, size = float(_apart(push.fresh, push.stale)), float(_norm(push.fresh))
    relative = distance / size if size else math.inf if distance else 0.0
    return {"distance": distance, "relative_distance": relative}


def _cosine(problem: Problem, push: _Push) -> dict[str, float]:
    total: Any = None
    for index in push.batches:
        batch = problem.batch(push.replica, index)
        one, _ = problem.compute(push.fresh, batch, push.replica, index)
        total = one if total is None else problem.accrue(total, one)
    both = float(_vdot(push.gradients, total))
    # In Python's double precision: the cosine of equal gradients is 1 exactly.
    squares = float(_vdot(push.gradients, push.gradients)) * float(_vdot(total, total))
    defined = 0 < squares < math.inf
    return {"cosine": both / math.sqrt(squares) if defined else math.nan}


def _stability(
    curvature: Callable[..., jax.Array], rate: float | None, push: _Push
) -> dict[str, float]:
    largest = float(curvature(push.fresh, push.rates))
    product = largest * (1.0 if rate is None else rate) * len(push.batches)
    return {
        "eta_lambda": product,
        "eta_lambda_limit": float(stability_limit(push.staleness)),
        "stability": product * push.staleness,
    }
