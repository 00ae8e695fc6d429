"""What the studies of published orderings train, and how each method is tuned.

Settings are chosen with seeds of their own. A seed stands for first parameters, an
order of the examples and, in its studies, what chance does on the cluster; within one
all methods have the same.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import dbjax
from dbjax import downpour

TEST = 400
Settings: TypeAlias = dict[str, Any]


class Size(NamedTuple):
    """How much is done.

    Attributes:
      steps: minibatches of a run.
      seeds: reported.
      tuning: seeds that settings are chosen with.
      rates: to choose from.
    """

    steps: int = 1_600
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    tuning: tuple[int, ...] = (11, 12, 13, 14)
    rates: tuple[float, ...] = tuple(2.0 ** np.arange(-8, 2))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Those to choose with, and those reported."""
        return self.tuning + self.seeds


SMOKE = Size(200, (1, 2), (11,), (0.03, 0.125, 0.5))


class Study(NamedTuple):
    """What a study found.

    Attributes:
      measure: what `values` are; less is better, unless `claims` say otherwise.
      values: by method, one for each seed; infinite where it was never reached.
      claims: `(more, less, source)`, that the first one's values are the larger.
      logarithmic: whether ratios are compared, not differences.
    """

    measure: str
    values: Mapping[str, Sequence[float]]
    claims: Sequence[tuple[str, str, str]]
    logarithmic: bool = True


class Task(NamedTuple):
    """What is trained, and how it is judged."""

    loss: Callable[..., jax.Array]
    init: Callable[[int], Any]
    data: Callable[[int], Any]
    held_out: Callable[[Any], Any]


@functools.cache
def digits() -> Task:
    """Handwritten digits, 32 hidden units."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = np.asarray(images / 16, np.float32)[order], labels[order]
    model = dbjax.models.dense((64, 32, 10), activation=jnp.tanh, gain=1.0)
    rest = {"x": jnp.asarray(x[:TEST]), "label": jnp.asarray(y[:TEST])}

    def data(seed: int) -> Any:
        examples = {"x": x[TEST:], "label": y[TEST:]}
        return dbjax.from_arrays(examples, batch_size=32, seed=seed)

    return Task(
        model.loss,
        lambda seed: model.init(jax.random.key(seed)),
        data,
        jax.jit(lambda params: model.loss(params, rest)),
    )


@functools.cache
def regression() -> Task:
    """Least squares without noise, curvatures from 1 to 100: momentum decides."""
    chance = np.random.default_rng(0)
    scale = np.sqrt(np.geomspace(0.01, 1, 20))
    x = (chance.standard_normal((512, 20)) * scale).astype(np.float32)
    y = x @ (chance.standard_normal(20) / scale).astype(np.float32)

    def loss(params: Any, batch: Mapping[str, Any]) -> jax.Array:
        return 0.5 * jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)

    whole = {"x": x, "y": y}
    return Task(
        loss,
        lambda seed: {"w": 0.1 * jax.random.normal(jax.random.key(seed), (20,))},
        lambda seed: dbjax.from_arrays(whole, batch_size=128, seed=seed),
        jax.jit(lambda params: loss(params, whole)),
    )


def ends(
    task: Task,
    traces: Callable[[int], Sequence[dbjax.Trace]],
    make: Callable[..., Any],
    settings: Mapping[str, Any],
    seeds: Sequence[int],
    provide: tuple[str, ...] = (),
) -> np.ndarray:
    """Losses at the end of each Trace's run with each setting.

    Args:
      task: what is trained.
      traces: gives those of a seed.
      make: gives the optimizer of a setting.
      settings: names to 1-d arrays.
      seeds: of the runs.
      provide: what the optimizer asks for.

    Returns:
      `[traces, *settings, seeds]`, infinite where training came apart.
    """
    found = []
    for seed in seeds:
        grid = dbjax.sweep(
            traces(seed), task.loss, task.init(seed), task.data(seed), make,
            settings, provide=provide,
            metrics_fn=lambda params: {"loss": task.held_out(params)},
        )  # fmt: skip
        lost = grid.diverged | ~np.isfinite(grid.metrics["loss"])
        found.append(np.where(lost, np.inf, grid.metrics["loss"]))
    return np.stack(found, -1)


def reported(
    found: np.ndarray, size: Size, at: tuple[Any, ...] | None = None
) -> list[float]:
    """Give what a setting leads to.

    Args:
      found: of one Trace, `[*settings, tuning and reported seeds]`.
      size: says which seeds are which.
      at: the setting's place; by default it is the best for the seeds that tune.

    Returns:
      The losses of the reported seeds.
    """
    place = best(found, size) if at is None else at
    return found[place][len(size.tuning) :].tolist()


def best(found: np.ndarray, size: Size) -> tuple[Any, ...]:
    """Give the place of the setting that is best for the seeds that tune."""
    mean = np.log(found[..., : len(size.tuning)]).mean(-1)
    return np.unravel_index(mean.argmin(), mean.shape)


def run_to(
    size: Size,
    seed: int,
    cluster: dbjax.Cluster,
    settings: Settings,
    target: float | None = None,
    every: int = 25,
) -> float:
    """Train on digits.

    Args:
      size: says for how long.
      seed: of everything.
      cluster: emulated.
      settings: arguments of `train`.
      target: a held-out loss.
      every: updates between two looks at it.

    Returns:
      The seconds to the target, or without one the held-out loss at the end.
    """
    task = digits()
    try:
        run = downpour.train(
            task.loss, task.init(seed), task.data(seed), steps=size.steps,
            eval_fn=lambda params, step, time: {"loss": task.held_out(params)},
            eval_every=every if target else size.steps,
            runtime=dbjax.Emulated(cluster, seed=seed), **settings,
        )  # fmt: skip
    except RuntimeError:  # it has come apart
        return math.inf
    rows = run.trace.evaluations
    if target is None:
        end = float(rows[-1]["loss"])
        return end if math.isfinite(end) else math.inf
    return next((row["time"] for row in rows if row["loss"] <= target), math.inf)


def tuned(
    size: Size,
    cluster: dbjax.Cluster,
    make: Callable[..., Settings],
    grid: Sequence[Sequence[float]],
    target: float | None = None,
    every: int = 25,
) -> list[float]:
    """Run the setting that is best for the seeds that tune, with those reported.

    Args:
      size: says which seeds are which.
      cluster: emulated.
      make: gives arguments of `train` of a setting's numbers.
      grid: the values of each number.
      target: as in `run_to`.
      every: as in `run_to`.

    Returns:
      One value for each reported seed.
    """

    def score(setting: Sequence[float]) -> float:
        made = make(*setting)
        found = [run_to(size, s, cluster, made, target, every) for s in size.tuning]
        return float(np.log(found).mean())

    made = make(*min(itertools.product(*grid), key=score))
    return [run_to(size, seed, cluster, made, target, every) for seed in size.seeds]


def sgd(rate: float) -> optax.GradientTransformation:
    """SGD whose rate is part of its state: one compiled program serves all rates."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
