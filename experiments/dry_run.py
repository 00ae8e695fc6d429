"""`--dry_run`: what a run would need, without running it or writing a file."""

import os
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import rich.box
import rich.console
import rich.filesize
import rich.table

from dbjax import mesh as mesh_lib
from dbjax.mesh.memory import Memory
from experiments import meshes, plots, registry, train, workloads
from experiments.methods import Plan

_LEAST_SECONDS = 0.5  # of timed work


class Need(NamedTuple):
    """What one method would need.

    Attributes:
      parameters: bytes of one copy of the parameters.
      copies: copies held at most, those that replicas still compute on included.
      optimizer: bytes of the optimizer's state.
      checkpoint: bytes of one checkpoint; two are kept.
      seconds: estimated time to compute, here.
      clock: seconds on the run's own clock; None where that is the time to compute.
      each: what each of the devices of one copy holds, where there are several.
    """

    parameters: int
    copies: int
    optimizer: int
    checkpoint: int
    seconds: float
    clock: float | None
    each: Memory | None

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.parameters * self.copies + self.optimizer


def show(
    config: ml_collections.ConfigDict,
    console: rich.console.Console | None = None,
    *,
    budget: int | None = None,
) -> dict[str, Need]:
    """Print what each method of the config would need.

    Args:
      config: as the files in `configs/` give it.
      console: where to print; the terminal, if not given.
      budget: bytes there are, on each device, or for all if they share a machine's
        memory as those of a CPU do; by default, what there is here.

    Returns:
      The needs by method.

    Raises:
      registry.ConfigError: if the config asks for what does not exist, or for more
        memory than there is. Nothing of that size was allocated then.
    """
    console = console or rich.console.Console()
    workload, plans = train.prepare(config)
    console.print(workload.describe(), highlight=False, soft_wrap=True)
    if mesh := meshes.make(config):
        console.print(meshes.describe(mesh), highlight=False, soft_wrap=True)
    for name, plan in plans.items():
        check(name, plan, workload, config, _there() if budget is None else budget)
    table = rich.table.Table(box=rich.box.SIMPLE)
    table.add_column("method", no_wrap=True)
    for column in ("memory", "disk", "time here", "run's clock"):
        table.add_column(column, justify="right", no_wrap=True)
    needs = {}
    for name, plan in plans.items():
        need = needs[name] = estimate(plan, workload, config)
        state = f", {_size(need.optimizer)} of optimizer state" * bool(need.optimizer)
        console.print(
            f"{name}: {need.copies} copies of {_size(need.parameters)} of parameters"
            f"{state}",
            highlight=False,
            soft_wrap=True,
        )
        if plan.mesh is not None:
            console.print(
                f"{name}, each of {plan.mesh.size} devices of a replica: {need.each}",
                highlight=False,
                soft_wrap=True,
            )
        table.add_row(
            plots.short(name),
            _size(need.memory),
            f"2 x {_size(need.checkpoint)}",
            f"about {need.seconds:,.0f} s",
            "as here" if need.clock is None else f"{need.clock:,.1f} s",
        )
    console.print(table)
    console.print(
        "Memory is on top of Python, JAX and a minibatch's activations. Nothing was "
        "run or written.",
        soft_wrap=True,
    )
    return needs


def check(
    name: str,
    plan: Plan,
    workload: workloads.Workload,
    config: ml_collections.ConfigDict,
    budget: int,
) -> None:
    """Raise if a method's parameters and all that goes with them do not fit.

    Args:
      name: of the method.
      plan: the method's.
      workload: what is trained.
      config: of the run.
      budget: see `show`.

    Raises:
      registry.ConfigError: they do not; the message says what would.
    """
    # Devices of a CPU share its memory: together they need what one would.
    mesh = None if jax.default_backend() == "cpu" else plan.mesh
    shapes = jax.eval_shape(workload.init, config.seed)
    if meshes.axes_of(config) and plan.mesh is None:
        need = mesh_lib.estimate_memory(shapes, **_kept(plan))
        if need.total > budget:
            raise registry.ConfigError(
                f"{name} is not partitioned and needs {need} on one device; there are "
                f"{mesh_lib.memory.readable(budget)}. Leave it out of `methods`."
            )
        return
    try:
        mesh_lib.check_memory(budget, shapes, mesh, workload.rules, **_kept(plan))
    except ValueError as error:
        raise registry.ConfigError(f"{name}: {error}") from error


def estimate(
    plan: Plan, workload: workloads.Workload, config: ml_collections.ConfigDict
) -> Need:
    """Work out sizes from shapes, and time from a little of the work.

    Args:
      plan: the method's.
      workload: what is trained.
      config: of the run.

    Returns:
      The need.
    """
    shapes, each = jax.eval_shape(workload.init, config.seed), None
    whole = mesh_lib.estimate_memory(shapes, **_kept(plan))
    if plan.mesh is not None:
        each = mesh_lib.estimate_memory(
            shapes, plan.mesh, workload.rules, **_kept(plan)
        )
    compiling, step, evaluation = _stopwatch(plan, workload, config.seed)
    return Need(
        parameters=whole.parameters,
        copies=plan.copies,
        optimizer=whole.optimizer,
        checkpoint=whole.parameters * plan.saved + whole.optimizer,
        seconds=compiling + step * plan.count + evaluation * plan.evaluations,
        clock=plan.clock() if config.runtime == "emulated" else None,
        each=each,
    )


def _kept(plan: Plan) -> dict[str, Any]:
    """What is kept beside one copy of the parameters and one of a gradient."""
    return {"optimizer": plan.optimizer, "versions": plan.copies - 2}


def _there() -> int:
    """Bytes of a device's memory, or of this machine's, which is a CPU's."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _stopwatch(
    plan: Plan, workload: workloads.Workload, seed: int
) -> tuple[float, float, float]:
    """Time compiling, one piece of the plan's work, and one evaluation."""
    begin = time.perf_counter()
    do = plan.work()
    do(0)
    params = workload.init(seed)
    workload.evaluate(params)
    compiled = time.perf_counter()
    times = 0
    while times < 3 or time.perf_counter() - compiled < _LEAST_SECONDS:
        times += 1
        do(times)
    worked = time.perf_counter()
    workload.evaluate(params)
    evaluated = time.perf_counter()
    return compiled - begin, (worked - compiled) / times, evaluated - worked


def _size(count: int) -> str:
    return rich.filesize.decimal(count)
