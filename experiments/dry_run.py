"""`--dry_run`: what a run would need, without running it or writing a file."""

import time
from typing import NamedTuple

import jax
import ml_collections
import rich.box
import rich.console
import rich.filesize
import rich.table

from experiments import plots, train, workloads
from experiments.methods import Plan, minibatches

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
    """

    parameters: int
    copies: int
    optimizer: int
    checkpoint: int
    seconds: float
    clock: float | None

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.parameters * self.copies + self.optimizer


def show(
    config: ml_collections.ConfigDict, console: rich.console.Console | None = None
) -> dict[str, Need]:
    """Print what each method of the config would need.

    Args:
      config: as the files in `configs/` give it.
      console: where to print; the terminal, if not given.

    Returns:
      The needs by method.

    Raises:
      registry.ConfigError: if the config asks for what does not exist.
    """
    console = console or rich.console.Console()
    workload, plans = train.prepare(config)
    console.print(workload.describe(), highlight=False, soft_wrap=True)
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
        )
        table.add_row(
            plots.short(name),
            _size(need.memory),
            f"2 x {_size(need.checkpoint)}",
            f"about {need.seconds:,.0f} s",
            "as here" if need.clock is None else f"{need.clock:,.1f} s",
        )
    console.print(table)
    console.print("Memory is on top of Python and JAX. Nothing was run or written.")
    return needs


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
    parameters = minibatches.num_bytes(jax.eval_shape(workload.init, config.seed))
    compiling, each, evaluation = _stopwatch(plan, workload, config.seed)
    return Need(
        parameters=parameters,
        copies=plan.copies,
        optimizer=plan.state,
        checkpoint=parameters * plan.saved + plan.state,
        seconds=compiling + each * plan.count + evaluation * plan.evaluations,
        clock=plan.clock() if config.runtime == "emulated" else None,
    )


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
