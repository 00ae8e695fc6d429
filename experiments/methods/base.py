"""What a method is: a plan that says what a run would take, and the run."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import optax

from dbjax.trace import Trace
from dbjax.typing import EvalFn
from experiments.workloads import Workload


class Session(NamedTuple):
    """What `train.py` lends a method for one run.

    Attributes:
      evaluate: to be called every `config.eval_every` minibatches and at the end.
      checkpoints: the folder for them.
    """

    evaluate: EvalFn
    checkpoints: pathlib.Path


class Plan(NamedTuple):
    """What a run would take, before it runs.

    Attributes:
      optimizer: the rule that is run.
      copies: of the parameters, held at once at most; optimizer state not counted.
      simulate: `simulate(steps) -> trace`, the order of the run without its training.
    """

    optimizer: optax.GradientTransformation
    copies: int
    simulate: Callable[[int], Trace]


class Method(NamedTuple):
    """A way to find parameters.

    Attributes:
      plan: `plan(config, workload) -> Plan`.
      run: `run(config, workload, session) -> run`, with `.params`, `.trace` and
        `.info`, that resumes from `session.checkpoints` if there is something.
    """

    plan: Callable[[ml_collections.ConfigDict, Workload], Plan]
    run: Callable[[ml_collections.ConfigDict, Workload, Session], Any]
