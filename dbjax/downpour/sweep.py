"""`sweep`: one compiled replay over a grid of Traces, hyperparameters and seeds.

Letters: `T` Traces, `H` settings of the hyperparameters, `N` seeds. A phase diagram of
learning rate and staleness, say, is one call.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from dbjax.trace import NOT_FINITE, TAKEN, Trace
from dbjax.typing import Batch, Data, LossFn, Params


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
      data: gives `batch(replica, step)`; iterators serve one Trace and one seed.
      optimizer_fn: the optimizer; called as `optimizer_fn(**setting)` with traced
        scalars, or `optimizer_fn(value)` where `hyperparameters` is an array.
      hyperparameters: name to 1-d array of numbers, the grid being their product;
        or one array.
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
      TypeError, ValueError: a Trace does not fit, or an argument is wrong.

    >>> import jax.numpy as jnp, numpy as np, optax, dbjax
    >>> data = dbjax.from_arrays({"x": np.ones((8, 1), np.float32)}, batch_size=4)
    >>> loss = lambda p, b: jnp.mean((p["w"] - b["x"]) ** 2)
    >>> traces = [dbjax.Trace.from_delays(np.minimum(np.arange(30), d)) for d in (0, 3)]
    >>> grid = sweep(traces, loss, {"w": jnp.zeros(1)}, data, optax.sgd,
    ...              {"learning_rate": np.array([0.1, 0.2])})
    >>> list(grid.axes), grid.metrics["loss"].shape
    (['trace', 'learning_rate'], (2, 2))
    """
    if not callable(optimizer_fn):
        raise TypeError(
            f"optimizer_fn must be a function that makes an optimizer from "
            f"hyperparameters, got {optimizer_fn!r}"
        )
    if metrics_fn is not None and not callable(metrics_fn):
        raise TypeError(f"metrics_fn must be None or a function, got {metrics_fn!r}")
    all_traces = _check_traces(traces)
    axes, settings, build = _grid(hyperparameters, optimizer_fn)
    if not isinstance(traces, Trace):
        axes = _join("traces", {"trace": np.arange(len(all_traces))}, axes)
    keys = [0] if seeds is None else _check_seeds(seeds)
    if seeds is not None:
        if not callable(params):
            raise ValueError("seeds need params to be a function of the seed")
        axes = _join("seeds", axes, {"seed": np.asarray(keys)})
    if hasattr(data, "start") and len(all_traces) * len(keys) > 1:
        raise ValueError(
            f"data from iterators can be read only once, but {len(all_traces)} traces "
            f"and {len(keys)} seeds each need it anew: sweep one Trace and one seed, "
            f"or use from_arrays"
        )
    starts = [params] if seeds is None else [params(key) for key in keys]
    problems = [
        make_problem(
            loss_fn, start, data, optimizer=build(settings[0]),
            shards=int(all_traces[0].header["shards"]),
            replicas=max(int(trace.header["replicas"]) for trace in all_traces),
            provide=provide, split=split, per_shard=per_shard, rng=rng,
            has_aux=has_aux, seed=key,
        )
        for start, key in zip(starts, keys, strict=True)
    ]  # fmt: skip
    if metrics_fn is None:
        # Read now: iterators do not give their first minibatch once more.
        metrics_fn = _loss_of(problems[0].batch(0, 0), loss_fn, rng, has_aux)
    plans = _pad([make_plan(trace) for trace in all_traces])
    ends = _run(plans, problems, build, settings, same_loss=not rng)
    return _collect(axes, ends, metrics_fn)


def _check_traces(traces: Any) -> list[Trace]:
    """All Traces, or raise."""
    if isinstance(traces, Trace):
        traces = [traces]
    if not isinstance(traces, Iterable):
        raise TypeError(f"traces must be one dbjax.Trace or several, got {traces!r}")
    listed = list(traces)
    if not listed:
        raise ValueError("traces must hold at least one Trace, got none")
    for index, trace in enumerate(listed):
        check_trace(trace)
        if trace.incarnation.any():
            raise ValueError(
                f"traces[{index}] holds a shard that was restored from a snapshot, "
                "which only exact replay executes: call replay for each setting"
            )
    shards = {int(trace.header["shards"]) for trace in listed}
    if len(shards) > 1:
        raise ValueError(
            f"traces must all have the same number of shards, got {shards}"
        )
    return listed


def _check_seeds(seeds: Any) -> list[int]:
    """The seeds as integers, or raise."""
    try:
        keys = [operator.index(seed) for seed in seeds]
    except TypeError:  # no sequence, or not of integers
        keys = []
    if not keys:
        raise ValueError(
            f"seeds must be None or a sequence of at least one integer, got {seeds!r}"
        )
    return keys


def _join(
    argument: str, first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The axes of both, unless a hyperparameter has the name of the argument's axis."""
    for name in first.keys() & second.keys():
        raise ValueError(
            f"{argument} make an axis {name!r}, and hyperparameters has {name!r} too: "
            f"give the hyperparameter any other name"
        )
    return first | second


def _grid(
    hyperparameters: Any, optimizer_fn: Callable[..., optax.GradientTransformation]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], Callable[[Any], Any]]:
    """The axes, the product of all settings, and how to build an optimizer from one."""
    named = isinstance(hyperparameters, Mapping)
    given = hyperparameters if named else {"hyperparameter": hyperparameters}
    names = {name: np.asarray(values) for name, values in given.items()}
    for name, values in names.items():
        argument = f"hyperparameters[{name!r}]" if named else "hyperparameters"
        if values.ndim != 1 or not values.size:
            raise ValueError(
                f"{argument} must be a 1-d array with at least one value, got shape "
                f"{values.shape}"
            )
        if not any(jnp.issubdtype(values.dtype, kind) for kind in (np.number, bool)):
            raise ValueError(f"{argument} must hold numbers, got {given[name]!r}")
    # Weakly typed, as Python's numbers are: they do not widen narrow parameters.
    settings = [
        {name: jnp.asarray(x) for name, x in zip(names, combination, strict=True)}
        for combination in itertools.product(*(v.tolist() for v in names.values()))
    ]

    def build(setting: Any) -> optax.GradientTransformation:
        return optimizer_fn(**setting) if named else optimizer_fn(*setting.values())

    return names, settings, build


def _loss_of(
    batch: Batch, loss_fn: LossFn, rng: bool, has_aux: bool
) -> Callable[[Params], Mapping[str, float]]:
    """The default metric: the loss of one minibatch."""
    args = (jax.random.key(0),) if rng else ()
    jitted = jax.jit(lambda params: loss_fn(params, batch, *args))

    def metrics(params: Params) -> Mapping[str, float]:
        value = jitted(params)
        return {"loss": value[0] if has_aux else value}

    return metrics


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
    """A replay under way; `refused` has a `[K, S]` for each chunk done."""

    state: LoopState
    setting: Any
    refused: tuple[np.ndarray, ...] = ()


_End = tuple[tuple[Params, ...], tuple[np.ndarray, ...]]
"""A lane's final parameters by shard, and its `refused`."""


def _run(
    plans: list[Plan],
    problems: list[Problem],
    build: Callable[[Any], Any],
    settings: list[Any],
    same_loss: bool,
) -> list[tuple[Params, int]]:
    """Each lane's final parameters and rejected pushes, in the order of the axes.

    A chunk is stacked once for all settings.
    """
    kind = Kind(plans[0].direct, not all(p.taken.all() for p in plans), guarded=True)
    size = min(chunk_rows(plan, problems[0]) for plan in plans)
    batched = jax.local_devices()[0].platform != "cpu"

    def program(problem: Problem) -> tuple[Any, Any]:
        chunk = make_loop(problem, kind, build)

        def begin(parts: tuple[Params, ...], setting: Any) -> Any:
            return tuple(build(setting).init(part) for part in parts)

        if batched:
            chunk = jax.vmap(chunk, in_axes=(0, None, None, 0))
        return jax.jit(chunk, donate_argnums=(0,)), jax.jit(begin)

    shared = program(problems[0])
    ends: list[tuple[Params, int]] = []
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
            done = advance(plan, problem, mine, chunk, size)
            columns.append(
                [(problems[0].merge(end), _count(plan, seen)) for end, seen in done]
            )
        ends += [end for row in zip(*columns, strict=True) for end in row]
    return ends


def _spread(
    plan: Plan, problem: Problem, lanes: list[_Lane], chunk: Any, size: int
) -> list[_End]:
    """On CPU: a lane is a program, and the lanes share the cores."""
    for begin in range(0, len(plan), size):
        end = min(begin + size, len(plan))
        rows = jax.tree.map(jnp.asarray, take_rows(plan, problem, begin, end, size))

        def work(lane: _Lane, rows: Rows = rows, n: int = end - begin) -> _Lane:
            state, refused = chunk(lane.state, rows, n, lane.setting)
            return _Lane(state, lane.setting, (*lane.refused, np.asarray(refused)))

        lanes = spread(work, lanes)
    return [(lane.state.params, lane.refused) for lane in lanes]


def _batched(
    plan: Plan, problem: Problem, lanes: list[_Lane], chunk: Any, size: int
) -> list[_End]:
    """On an accelerator: all lanes are one batched program."""
    state, setting = jax.tree.map(
        lambda *x: jnp.stack(x), *[(lane.state, lane.setting) for lane in lanes]
    )
    chunks: list[np.ndarray] = []
    for begin in range(0, len(plan), size):
        end = min(begin + size, len(plan))
        rows = take_rows(plan, problem, begin, end, size)
        state, refused = chunk(state, rows, end - begin, setting)
        chunks.append(np.asarray(refused))
    return [
        (
            jax.tree.map(lambda x, i=i: x[i], state.params),
            tuple(refused[i] for refused in chunks),
        )
        for i in range(len(lanes))
    ]


def _count(plan: Plan, refused: tuple[np.ndarray, ...]) -> int:
    """Count rejected pushes as `replay` does: once, however many shards refused."""
    status = np.full_like(plan.trace.status, TAKEN)
    status[plan.row[np.concatenate(refused)[: len(plan)]]] = NOT_FINITE
    return dataclasses.replace(plan.trace, status=status).lost()["not_finite"]


def _collect(
    axes: dict[str, np.ndarray],
    ends: list[tuple[Params, int]],
    metrics_fn: Callable[[Params], Mapping[str, float]],
) -> Sweep:
    """Arrange the lanes along the axes."""
    shape = tuple(len(values) for values in axes.values())
    finals = [params for params, _ in ends]
    rows = [metrics_fn(final) for final in finals]
    not_finite = np.array([count for _, count in ends])
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
