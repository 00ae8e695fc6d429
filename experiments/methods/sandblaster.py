"""Sandblaster: batch methods on a fixed set of examples, cut in portions.

Each of `kinds.KINDS` is the method `sandblaster_<name>`. A warm start is Downpour, or
SGD with one replica, on the same machines; the run's clock and evaluations begin with
it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

import dbjax
from dbjax import sandblaster
from dbjax.data import ArrayData
from dbjax.sandblaster.schedule import STRATEGIES, ideal_seconds
from dbjax.trace import Trace
from dbjax.typing import Params
from experiments import meshes, registry, runtimes
from experiments.methods import minibatches
from experiments.methods.base import Method, Plan, Session
from experiments.methods.kinds import (
    BATCH_VECTORS,
    BATCHES,
    KINDS,
    Kind,
    Options,
    options_of,
)
from experiments.workloads import Workload


def methods() -> dict[str, Method]:
    """Give all of them by the names that configs use."""
    return {
        f"sandblaster_{name}": Method(
            functools.partial(_plan, kind), functools.partial(_run, kind)
        )
        for name, kind in KINDS.items()
    }


def _plan(kind: Kind, config: ml_collections.ConfigDict, workload: Workload) -> Plan:
    """Say what the run would take."""
    options = options_of(config)
    data = _portions(options, workload)
    _check(options, data, config.seed)
    mesh, emulated = meshes.of_a_replica(config), config.runtime == "emulated"
    shared = emulated and "replica" not in meshes.axes_of(config)
    if mesh is not None and shared and options.shards > 1:
        raise registry.ConfigError(
            f"sandblaster.shards is {options.shards}: vectors lie on the mesh, which "
            'all replicas share. Leave it at 1, or give the mesh an axis "replica".'
        )
    minibatches.check_shards("sandblaster", options.shards, workload, mesh)
    kind.build(options)
    machines = _cluster(config, options, workload)
    runtimes.make_runtime(config, machines, minibatches=False)
    size = minibatches.num_bytes(jax.eval_shape(workload.init, config.seed))
    vectors = kind.vectors(options) + BATCH_VECTORS[options.batches]
    sampled = options.batches == "multi"
    portions = options.batch_portions if sampled else data.num_portions
    emulate = functools.partial(
        sandblaster.schedule, machines, replicas=options.replicas, portions=portions,
        shards=options.shards, strategy=options.strategy,
        push_every=options.push_every, copies=options.copies, seed=config.seed,
        parameter_bytes=size,
    )  # fmt: skip
    emulate()
    evaluations = round(kind.evaluations * options.iterations) + 1

    def clock() -> float:
        some = min(evaluations, 10)
        seconds = evaluations * float(emulate(evaluations=some).seconds.mean())
        return seconds + _emulate_warm_start(config, options)

    # The emulation adds one sum after another; on threads each replica has its own.
    holders = 1 if emulated else options.replicas
    warm = options.warmstart_steps * workload.batch_size / options.portion_size
    return Plan(
        steps=options.iterations,
        evaluations=options.iterations // options.eval_every + 1,
        copies=vectors + 2 * holders + 1,
        optimizer=None,
        saved=vectors,
        work=functools.partial(_work, workload, data, config.seed),
        count=evaluations * portions + round(warm),
        clock=clock,
        mesh=mesh,
    )


def _run(
    kind: Kind, config: ml_collections.ConfigDict, workload: Workload, session: Session
) -> sandblaster.Run:
    """Run it, after its warm start."""
    options = options_of(config)
    params, before, seconds = _warm_start(config, options, workload, session)

    def evaluate(params: Params, step: int, time: float) -> Mapping[str, float]:
        return session.evaluate(params, step, seconds + time)

    data = _portions(options, workload)
    machines = _cluster(config, options, workload)
    run = sandblaster.minimize(
        workload.loss,
        params,
        data,
        method=kind.build(options),
        batches=BATCHES[options.batches](options, config.seed),
        replicas=options.replicas,
        shards=options.shards,
        iterations=options.iterations,
        tolerance=options.tolerance,
        push_every=options.push_every,
        strategy=options.strategy,
        copies=options.copies,
        seed=config.seed,
        eval_fn=evaluate,
        eval_every=options.eval_every,
        checkpoint_dir=session.checkpoints,
        checkpoint_every=options.checkpoint_every,
        runtime=runtimes.make_runtime(config, machines, minibatches=False),
        **meshes.arguments(config, workload),
    )
    # What an iteration takes if nothing has to wait for anything.
    ideal = ideal_seconds(machines, options.replicas, 1, config.seed)
    header = {
        **run.trace.header,
        "examples": data.num_examples,
        "seconds_per_iteration": dict(run.info.seconds_per_iteration),
        "ideal_seconds_per_iteration": ideal
        * run.info.portions_evaluated
        / max(1, run.iterations),
    }
    each = data.num_examples / data.num_portions
    begun = options.warmstart_steps * workload.batch_size
    after = [
        row | {"examples": begun + round(each * row["portions"])}
        for row in run.trace.evaluations
    ]
    return run._replace(trace=_later(run.trace, seconds, header, before, after))


def _later(
    trace: Trace,
    seconds: float,
    header: dict[str, Any],
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
) -> Trace:
    """Let a Trace begin after a warm start, whose evaluations are `before`."""
    rows = [row | {"time": row["time"] + seconds} for row in after]
    return dataclasses.replace(
        trace,
        header=header,
        evaluations=(*before, *rows),
        time=trace.time + seconds,
        start=trace.start + seconds,
    )


def _warm_start(
    config: ml_collections.ConfigDict,
    options: Options,
    workload: Workload,
    session: Session,
) -> tuple[Params, list[dict[str, Any]], float]:
    """Train with minibatches first.

    Its evaluations count down to step 0, with which the first iteration begins.

    Returns:
      Parameters, the evaluations, and the seconds it took.
    """
    steps = options.warmstart_steps
    if not steps:
        return workload.init(config.seed), [], 0.0

    def evaluate(params: Params, step: int, time: float) -> Mapping[str, float]:
        return session.evaluate(params, step - steps, time)

    run = dbjax.downpour.train(
        workload.loss,
        workload.init(config.seed),
        workload.data,
        optimizer=_warm_optimizer(options),
        replicas=options.warmstart_replicas,
        shards=options.shards,
        steps=steps,
        eval_fn=evaluate,
        eval_every=min(steps, config.get("eval_every") or steps),
        checkpoint_dir=session.checkpoints.with_name("warmstart"),
        checkpoint_every=steps,
        runtime=runtimes.make_runtime(config, runtimes.make_cluster(config)),
        **meshes.arguments(config, workload),
    )
    rows = [
        {
            **row,
            "step": row["step"] - steps,
            "examples": row["step"] * workload.batch_size,
        }
        for row in run.trace.evaluations
        if row["step"] < steps
    ]
    return run.params, rows, float(run.trace.time.max())


def _check(options: Options, data: ArrayData, seed: int) -> None:
    """Raise if the run could not be, where `schedule` does not say so.

    Raises:
      registry.ConfigError: naming the key.
      ValueError: the library says what is wrong.
    """
    for key in ("iterations", "eval_every", "checkpoint_every"):
        if getattr(options, key) < 1:
            raise registry.ConfigError(
                f"sandblaster.{key} is {getattr(options, key)}; it must be 1 or more."
            )
    for key in ("tolerance", "warmstart_steps"):
        if not getattr(options, key) >= 0:
            raise registry.ConfigError(
                f"sandblaster.{key} is {getattr(options, key)}; it must be 0 or more."
            )
    registry.choose("sandblaster.strategy", options.strategy, dict.fromkeys(STRATEGIES))
    build = registry.choose("sandblaster.batches", options.batches, BATCHES)
    build(options, seed).check(data.num_portions)
    if options.warmstart_steps:
        _warm_optimizer(options)


def _warm_optimizer(options: Options) -> Any:
    build = registry.choose(
        "sandblaster.warmstart_optimizer",
        options.warmstart_optimizer,
        runtimes.OPTIMIZERS,
    )
    return build(options.warmstart_learning_rate)


def _emulate_warm_start(config: ml_collections.ConfigDict, options: Options) -> float:
    if not options.warmstart_steps:
        return 0.0
    return dbjax.simulate(
        runtimes.make_cluster(config),
        replicas=options.warmstart_replicas,
        shards=options.shards,
        steps=options.warmstart_steps,
        seed=config.seed,
    ).duration()


def _cluster(
    config: ml_collections.ConfigDict, options: Options, workload: Workload
) -> dbjax.Cluster:
    """The config's machines; a portion takes them as long as its examples should."""
    return runtimes.make_cluster(config, options.portion_size / workload.batch_size)


def _portions(options: Options, workload: Workload) -> ArrayData:
    """Cut the workload's examples."""
    if workload.fixed is None:
        raise registry.ConfigError(
            f"a batch method needs a fixed set of examples, which {workload.name} does "
            "not have as it is configured; digits has one with "
            "workload.train_on='fixed', breast_cancer always."
        )
    return dbjax.from_arrays(
        workload.fixed, workload.batch_size, portion_size=options.portion_size
    )


def _work(workload: Workload, data: ArrayData, seed: int) -> Callable[[int], None]:
    """Give the computing of one portion's gradient."""
    gradient = jax.jit(jax.value_and_grad(workload.loss))
    params = workload.init(seed)

    def do(i: int) -> None:
        jax.block_until_ready(gradient(params, data.portion(i % data.num_portions)))

    return do
