"""What a method is: a plan that says what a run would take, and the run."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import optax
from jax.sharding import Mesh

from dbjax.runtime.ray import Progress
from dbjax.typing import EvalFn
from experiments.workloads import Workload


class Session(NamedTuple):
    """What `train.py` lends a method for one run.

    Attributes:
      evaluate: to be called with the step as the method counts it, now and then, and
        at the end.
      checkpoints: the folder for them.
      watch: for a runtime that says how the run goes.
    """

    evaluate: EvalFn
    checkpoints: pathlib.Path
    watch: Callable[[Progress], None] | None = None


class Plan(NamedTuple):
    """What a run would take, before it runs.

    Attributes:
      steps: of the run, as its evaluations count them.
      evaluations: how often `Session.evaluate` would be called.
      copies: of the parameters, held at once at most.
      optimizer: whose state is held beside them; None if there is none.
      saved: copies in a checkpoint, which holds the optimizer state too.
      work: `work()` gives `do(i)`, the computing of one minibatch, or of one portion;
        it returns when that is done.
      count: how often `do` would be called.
      clock: `clock()` emulates the run without its training; seconds.
      batch_size: examples in a step, where all steps have as many; else None.
      mesh: the devices that one copy of the parameters lies on, where it is not one.
    """

    steps: int
    evaluations: int
    copies: int
    optimizer: optax.GradientTransformation | None
    saved: int
    work: Callable[[], Callable[[int], None]]
    count: int
    clock: Callable[[], float]
    batch_size: int | None = None
    mesh: Mesh | None = None


class Method(NamedTuple):
    """A way to find parameters.

    Attributes:
      plan: `plan(config, workload) -> Plan`; refuses what could not be run.
      run: `run(config, workload, session) -> run`, with `.params`, `.trace` and
        `.info`, that resumes from `session.checkpoints` if there is something.
    """

    plan: Callable[[ml_collections.ConfigDict, Workload], Plan]
    run: Callable[[ml_collections.ConfigDict, Workload, Session], Any]
