"""`sweep`: one compiled replay over a grid of Traces, hyperparameters and seeds.

Letters: `T` Traces, `H` settings of the hyperparameters, `N` seeds. A phase diagram of
learning rate and staleness, say, is one call.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.downpour.compiled import (
    Kind,
    LoopState,
    Rows,
    chunk_rows,
    make_loop,
    start_state,
    take_rows,
)
from dbjax.downpour.plan import Plan, make_plan
from dbjax.downpour.problem import Problem, make_problem
from dbjax.downpour.replay import check_trace
from dbjax.runtime.lanes import spread
from dbjax.trace import Trace
from dbjax.typing import Data, LossFn, Params


class Sweep(NamedTuple):
    """The result of `sweep`: arrays over the grid, and the grid's axes.

    Attributes:
      axes: name to values, in the order of the arrays' axes: `"trace"` (indices) if
        several Traces were given, the hyperparameters' names, `"seed"` if seeds were
        given.
      params: the final parameters, each leaf with the axes in front.
      metrics: name to array; `"loss"` unless `metrics_fn` says otherwise.
      not_finite: pushes rejected as not finite, an int array.
      diverged: where any push was rejected or a final parameter is not finite; such
        lanes are kept.
    """

    axes: dict[str, np.ndarray]
    params: Params
    metrics: dict[str, np.ndarray]
    not_finite: np.ndarray
    diverged: np.ndarray


def sweep(
    traces: Trace | Sequence[Trace],
    loss_fn: LossFn,
    params: Params | Callable[[int], Params],
    data: Data,
    optimizer_fn: Callable[..., optax.GradientTransformation],
    hyperparameters: Mapping[str, Any] | Any,
    *,
    seeds: Sequence[int] | None = None,
    metrics_fn: Callable[[Params], Mapping[str, float]] | None = None,
    provide: tuple[str, ...] = (),
    split: str = "even",
    per_shard: bool = False,
    rng: bool = False,
    has_aux: bool = False,
) -> Sweep:
    """Replay every Trace with every setting, compiled once.

    Args:
      traces: one Trace or several, all with the same number of shards; they may differ
        in length and replicas.
      loss_fn: `loss_fn(params, batch) -> scalar`.
      params: the initial parameters, or with `seeds` a function of the seed.
      data: gives `batch(replica, step)`.
      optimizer_fn: the optimizer; called as `optimizer_fn(**setting)` with traced
        scalars, or `optimizer_fn(value)` where `hyperparameters` is an array.
      hyperparameters: name to 1-d array, the grid being their product; or one array.
      seeds: seeds for `params` and for the loss's keys.
      metrics_fn: `metrics_fn(params) -> {name: scalar}` of each lane's final
        parameters; by default the loss of the first minibatch.
      provide: as in `train`.
      split: as in `train`.
      per_shard: as in `train`.
      rng: as in `train`.
      has_aux: as in `train`.

    Returns:
      The labelled arrays.

    Raises:
      ValueError: a Trace does not fit, or a hyperparameter is not a 1-d array.

    >>> import jax.numpy as jnp, numpy as np, optax, dbjax
    >>> data = dbjax.from_arrays({"x": np.ones((8, 1), np.float32)}, batch_size=4)
    >>> loss = lambda p, b: jnp.mean((p["w"] - b["x"]) ** 2)
    >>> traces = [dbjax.Trace.from_delays(np.minimum(np.arange(30), d)) for d in (0, 3)]
    >>> grid = sweep(traces, loss, {"w": jnp.zeros(1)}, data, optax.sgd,
    ...              {"learning_rate": np.array([0.1, 0.2])})
    >>> list(grid.axes), grid.metrics["loss"].shape
    (['trace', 'learning_rate'], (2, 2))
    """
    several = not isinstance(traces, Trace)
    all_traces = list(traces) if several else [traces]
    if not all_traces:
        raise ValueError("traces must hold at least one Trace, got none")
    for trace in all_traces:
        check_trace(trace)
    shards = {int(trace.header["shards"]) for trace in all_traces}
    if len(shards) > 1:
        raise ValueError(
            f"traces must all have the same number of shards, got {shards}"
        )
    if seeds is not None and not callable(params):
        raise ValueError("seeds need params to be a function of the seed")
    names, settings, build = _grid(hyperparameters, optimizer_fn)
    starts = [params(int(seed)) for seed in seeds] if seeds is not None else [params]
    keys = list(seeds) if seeds is not None else [0]
    replicas = max(int(trace.header["replicas"]) for trace in all_traces)
    problems = [
        make_problem(
            loss_fn, start, data, optimizer=build(settings[0]),
            shards=shards.copy().pop(), replicas=replicas, provide=provide, split=split,
            per_shard=per_shard, rng=rng, has_aux=has_aux, seed=int(key),
        )
        for start, key in zip(starts, keys, strict=True)
    ]  # fmt: skip
    plans = _pad([make_plan(trace) for trace in all_traces])
    lanes = _run(plans, problems, build, settings, same_loss=not rng)
    axes: dict[str, np.ndarray] = {}
    if several:
        axes["trace"] = np.arange(len(plans))
    axes |= names
    if seeds is not None:
        axes["seed"] = np.asarray(seeds)
    return _collect(axes, lanes, problems[0], loss_fn, metrics_fn, rng, has_aux)


def _grid(
    hyperparameters: Any, optimizer_fn: Callable[..., optax.GradientTransformation]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], Callable[[Any], Any]]:
    """The axes, the product of all settings, and how to build an optimizer from one."""
    named = isinstance(hyperparameters, Mapping)
    given = hyperparameters if named else {"hyperparameter": hyperparameters}
    names = {name: np.asarray(values) for name, values in given.items()}
    for name, values in names.items():
        if values.ndim != 1 or not values.size:
            raise ValueError(
                f"hyperparameters[{name!r}] must be a 1-d array with at least one "
                f"value, got shape {values.shape}"
            )
    settings = [
        {
            name: jnp.asarray(value)
            for name, value in zip(names, combination, strict=True)
        }
        for combination in itertools.product(*names.values())
    ]

    def build(setting: Any) -> optax.GradientTransformation:
        return optimizer_fn(**setting) if named else optimizer_fn(*setting.values())

    return names, settings, build


def _pad(plans: list[Plan]) -> list[Plan]:
    """Give all plans the same number of slots, so that one program serves them all."""
    slots = max(plan.slots for plan in plans)
    gradient_slots = max(plan.gradient_slots for plan in plans)
    direct = all(plan.direct for plan in plans)
    return [
        dataclasses.replace(
            p, slots=slots, gradient_slots=gradient_slots, direct=direct
        )
        for p in plans
    ]


class _Lane(NamedTuple):
    state: LoopState
    setting: Any
    not_finite: int = 0


def _run(
    plans: list[Plan],
    problems: list[Problem],
    build: Callable[[Any], Any],
    settings: list[Any],
    same_loss: bool,
) -> list[_Lane]:
    """All lanes, in the order of the axes; a chunk is stacked once for all of them."""
    kind = Kind(plans[0].direct, not all(p.taken.all() for p in plans), guarded=True)
    size = min(chunk_rows(plan, problems[0]) for plan in plans)
    batched = jax.local_devices()[0].platform != "cpu"

    def program(problem: Problem) -> tuple[Any, Any]:
        loop = make_loop(problem, kind, build)

        def chunk(state: LoopState, rows: Rows, n: Any, setting: Any) -> Any:
            state, refused = loop(state, rows, n, setting)
            return state, refused.any(axis=1).sum()

        def begin(parts: tuple[Params, ...], setting: Any) -> Any:
            return tuple(build(setting).init(part) for part in parts)

        if batched:
            chunk = jax.vmap(chunk, in_axes=(0, None, None, 0))
        return jax.jit(chunk, donate_argnums=(0,)), jax.jit(begin)

    shared = program(problems[0])
    lanes: list[_Lane] = []
    for plan in plans:
        columns = []  # one a seed: the lanes of all settings
        for problem in problems:
            chunk, begin = shared if same_loss else program(problem)
            parts = problem.split(problem.params)
            mine = [
                _Lane(start_state(plan, problem, problem.params, begin(parts, s)), s)
                for s in settings
            ]
            advance = _batched if batched else _spread
            columns.append(advance(plan, problem, mine, chunk, size))
        lanes += [lane for row in zip(*columns, strict=True) for lane in row]
    return lanes


def _spread(
    plan: Plan, problem: Problem, lanes: list[_Lane], chunk: Any, size: int
) -> list[_Lane]:
    """On CPU: a lane is a program, and the lanes share the cores."""
    for begin in range(0, len(plan), size):
        end = min(begin + size, len(plan))
        rows = jax.tree.map(jnp.asarray, take_rows(plan, problem, begin, end, size))

        def work(lane: _Lane, rows: Rows = rows, n: int = end - begin) -> _Lane:
            state, refused = chunk(lane.state, rows, n, lane.setting)
            return _Lane(state, lane.setting, lane.not_finite + int(refused))

        lanes = spread(work, lanes)
    return lanes


def _batched(
    plan: Plan, problem: Problem, lanes: list[_Lane], chunk: Any, size: int
) -> list[_Lane]:
    """On an accelerator: all lanes are one batched program."""
    state, setting = jax.tree.map(
        lambda *x: jnp.stack(x), *[(lane.state, lane.setting) for lane in lanes]
    )
    total = np.zeros(len(lanes), int)
    for begin in range(0, len(plan), size):
        end = min(begin + size, len(plan))
        rows = take_rows(plan, problem, begin, end, size)
        state, refused = chunk(state, rows, end - begin, setting)
        total += np.asarray(refused)
    return [
        _Lane(jax.tree.map(lambda x, i=i: x[i], state), lane.setting, int(total[i]))
        for i, lane in enumerate(lanes)
    ]


def _collect(
    axes: dict[str, np.ndarray],
    lanes: list[_Lane],
    problem: Problem,
    loss_fn: LossFn,
    metrics_fn: Callable[[Params], Mapping[str, float]] | None,
    rng: bool,
    has_aux: bool,
) -> Sweep:
    """Arrange the lanes along the axes."""
    if metrics_fn is None:
        batch = problem.batch(0, 0)
        args = (jax.random.key(0),) if rng else ()
        jitted = jax.jit(lambda p: loss_fn(p, batch, *args))
        metrics_fn = lambda p: {"loss": jitted(p)[0] if has_aux else jitted(p)}  # noqa: E731
    shape = tuple(len(values) for values in axes.values())
    finals = [problem.merge(lane.state.params) for lane in lanes]
    rows = [metrics_fn(final) for final in finals]
    not_finite = np.array([lane.not_finite for lane in lanes])
    whole = np.array(
        [all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(p)) for p in finals]
    )
    return Sweep(
        axes,
        jax.tree.map(
            lambda *x: np.stack([np.asarray(one) for one in x]).reshape(
                *shape, *x[0].shape
            ),
            *finals,
        ),
        {
            name: np.array([float(row[name]) for row in rows]).reshape(shape)
            for name in rows[0]
        },
        not_finite.reshape(shape),
        ((not_finite > 0) | ~whole).reshape(shape),
    )
