"""`--dry_run`: what a run would need, without running it or writing a file."""

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
import rich.box
import rich.console
import rich.filesize
import rich.table

from dbjax.typing import Batch, Params
from experiments import train, workloads
from experiments.methods import Plan

_LEAST_SECONDS = 0.5  # of timed steps


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
        console.print(
            f"{name}: {need.copies} copies of {_size(need.parameters)} of parameters, "
            f"{_size(need.optimizer)} of optimizer state",
            highlight=False,
        )
        table.add_row(
            name,
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
    """Work out sizes from shapes, and time from a few steps of the plain loop.

    Args:
      plan: the method's.
      workload: what is trained.
      config: of the run.

    Returns:
      The need.
    """
    shapes = jax.eval_shape(workload.init, config.seed)
    parameters = _bytes(shapes)
    optimizer = _bytes(jax.eval_shape(plan.optimizer.init, shapes))
    compiling, step, evaluation = _stopwatch(plan.optimizer, workload, config.seed)
    evaluations = config.steps // config.eval_every + 1
    clock = None
    if config.runtime == "emulated":
        clock = plan.simulate(config.steps).duration()
    return Need(
        parameters=parameters,
        copies=plan.copies,
        optimizer=optimizer,
        # A checkpoint between two fetches holds what the replicas compute on, too.
        checkpoint=parameters * plan.copies + optimizer,
        seconds=compiling + step * config.steps + evaluation * evaluations,
        clock=clock,
    )


def _stopwatch(
    optimizer: optax.GradientTransformation, workload: workloads.Workload, seed: int
) -> tuple[float, float, float]:
    """Time compiling, one step (batch, gradient and update) and one evaluation."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, state: optax.OptState, batch: Batch) -> Any:
        gradients = jax.grad(workload.loss)(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    begin = time.perf_counter()
    params = workload.init(seed)
    state = optimizer.init(params)
    params, state = update(params, state, workload.data.batch(0, 0))
    workload.evaluate(params)
    jax.block_until_ready(params)
    compiled = time.perf_counter()
    steps = 0
    while steps < 3 or time.perf_counter() - compiled < _LEAST_SECONDS:
        steps += 1
        params, state = update(params, state, workload.data.batch(0, steps))
        jax.block_until_ready(params)
    stepped = time.perf_counter()
    workload.evaluate(params)
    evaluated = time.perf_counter()
    return compiled - begin, (stepped - compiled) / steps, evaluated - stepped


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _size(count: int) -> str:
    return rich.filesize.decimal(count)
