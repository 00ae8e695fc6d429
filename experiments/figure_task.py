"""What figures 4 and 5 train: the states of speech-like frames, with a known optimum.

A frame is a few log-energies. Each hidden state has several sounds, each a smooth
spectrum; what is heard of one is shifted along a few directions by speaker and channel,
which is most of its variance, and noisy:

  x = mean[state, sound] + channel * (h U) + noise * e,    h, e normal,

with states as unequally frequent as words are: `p[state] ~ 1 / (state + 5)`. So the
posterior of a state is known, and with it the best accuracy that anyone can reach.

The network is layers of sigmoids and a softmax, as the paper's.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dbjax
from dbjax.models.base import Model
from dbjax.typing import Params

_CEPSTRA, _DIRECTIONS = 12, 4
_PART = 10_000  # examples that are evaluated at once


@dataclasses.dataclass(frozen=True)
class Task:
    """A source of frames, how many of them there are, and the network.

    Attributes:
      states: classes.
      sounds: of each state.
      bands: log-energies in a frame.
      channel: standard deviation of what speaker and channel do; means have 1.
      noise: standard deviation of what is added to each log-energy.
      hidden: units of each layer.
      batch: examples in a minibatch.
      training: examples to train on.
      validation: examples by which hyperparameters are chosen.
      test: examples that the figures show.
      seed: of the source and all its examples.
      data: other data than the source's, as `figure_data` has it.
      digest: of a file with that.
    """

    states: int = 256
    sounds: int = 64
    bands: int = 32
    channel: float = 3.0
    noise: float = 1.2
    hidden: tuple[int, ...] = (48, 48)
    batch: int = 1
    training: int = 1_000_000
    validation: int = 10_000
    test: int = 50_000
    seed: int = 0
    data: str = ""
    digest: str = ""

    @property
    def model(self) -> Model:
        """The network."""
        return dbjax.models.dense((self.bands, *self.hidden, self.states))


SMOKE = Task(
    states=64, sounds=4, bands=24, channel=1.0, hidden=(32,),
    training=50_000, validation=2_000, test=5_000,
)  # fmt: skip


class Examples(NamedTuple):
    """Frames `[N, bands]`, scaled to a variance of 1, and their states `[N]`."""

    frame: np.ndarray
    state: np.ndarray


class Sets(NamedTuple):
    """All that is drawn from a source, and the best accuracy on its test, or NaN."""

    training: Examples
    validation: Examples
    test: Examples
    best: float


class _Source(NamedTuple):
    """Means `[states, sounds, bands]`, covariance of the rest, and frequencies."""

    means: np.ndarray
    directions: np.ndarray
    frequency: np.ndarray


@functools.lru_cache(1)
def make(task: Task) -> Sets:
    """Draw the examples of a task.

    Args:
      task: what to draw from.

    Returns:
      The same for the same task.
    """
    if task.data:
        from experiments import figure_data  # which makes tasks

        return figure_data.sets(task)
    chance = np.random.default_rng(task.seed)
    source = _source(task, chance)
    counts = task.test, task.validation, task.training
    test, validation, training = (_draw(task, source, n, chance) for n in counts)
    best = float((_posterior(task, source, test.frame) == test.state).mean())
    scale = np.float32(1 / test.frame.std())

    def scaled(drawn: Examples) -> Examples:
        return drawn._replace(frame=drawn.frame * scale)

    return Sets(scaled(training), scaled(validation), scaled(test), best)


def _source(task: Task, chance: np.random.Generator) -> _Source:
    order = np.arange(1, _CEPSTRA + 1)[:, None]
    place = np.arange(task.bands) + 0.5
    smooth = np.cos(np.pi * order * place / task.bands) / np.sqrt(order)
    state = chance.standard_normal((task.states, 1, _CEPSTRA))
    sound = chance.standard_normal((task.states, task.sounds, _CEPSTRA))
    means = (state + 0.7 * sound) @ smooth
    directions = chance.standard_normal((_DIRECTIONS, task.bands)) / _DIRECTIONS**0.5
    frequency = 1 / (np.arange(task.states) + 5)
    return _Source(
        means / means.std(), task.channel * directions, frequency / frequency.sum()
    )


def _draw(
    task: Task, source: _Source, count: int, chance: np.random.Generator
) -> Examples:
    state = chance.choice(task.states, size=count, p=source.frequency)
    sound = chance.integers(task.sounds, size=count)
    frame = chance.standard_normal((count, task.bands), np.float32)
    frame *= np.float32(task.noise)
    frame += source.means.astype(np.float32)[state, sound]
    heard = chance.standard_normal((count, _DIRECTIONS), np.float32)
    frame += heard @ source.directions.astype(np.float32)
    return Examples(frame, state.astype(np.int32))


def _posterior(task: Task, source: _Source, frame: np.ndarray) -> np.ndarray:
    """The most probable state of each frame, `[N]`."""
    covariance = source.directions.T @ source.directions
    covariance += task.noise**2 * np.eye(task.bands)
    white = np.linalg.inv(np.linalg.cholesky(covariance)).T
    means = source.means.reshape(-1, task.bands) @ white
    prior = np.repeat(np.log(source.frequency), task.sounds)
    bias = (prior - 0.5 * (means**2).sum(1)).astype(np.float32)
    means = means.T.astype(np.float32)

    @jax.jit
    def most_probable(part: jax.Array) -> jax.Array:
        score = (part @ means + bias).reshape(len(part), task.states, task.sounds)
        return jax.nn.logsumexp(score, axis=2).argmax(1)

    parts = range(0, len(frame), _PART // 5)
    whitened = (frame @ white).astype(np.float32)
    found = [most_probable(whitened[at : at + _PART // 5]) for at in parts]
    return np.concatenate([np.asarray(one) for one in found])


def loss_of(task: Task) -> Any:
    """Give `loss(params, batch)`."""
    model = task.model
    return lambda params, batch: model.loss(params, (batch["frame"], batch["state"]))


@functools.lru_cache(8)
def accuracy_of(task: Task) -> Any:
    """Give `accuracy(params, examples)`, a share."""
    model = task.model

    @jax.jit
    def right(params: Params, frame: Any, state: Any) -> jax.Array:
        return jnp.sum(model.apply(params, frame).argmax(-1) == state)

    def accuracy(params: Params, examples: Examples) -> float:
        total = len(examples.state)
        parts = [slice(at, at + _PART) for at in range(0, total, _PART)]
        counts = [right(params, examples.frame[p], examples.state[p]) for p in parts]
        return sum(int(count) for count in counts) / total

    return accuracy
