"""Other data for figures 4 and 5: frames of one's own, or augmented digits.

  python -m experiments.figure4 --data=frames.npz --out=runs/figures-mine
  python -m experiments.figure4 --data=digits --out=runs/figures-digits

A file of NumPy's has `frame` `[N, D]`, floats, and `state` `[N]`, integers from 0. A
tenth of it, 50,000 at most, is the test, half of that chooses hyperparameters, and the
rest is trained on; who is where is drawn. Digits are moved, turned and noisy versions
of scikit-learn's 1,797 real ones; those of the test come from other images than those
of training. The best possible accuracy is not known for either.
"""

import dataclasses
import hashlib
import math
import pathlib

import numpy as np

from experiments import streams
from experiments.figure_task import Examples, Sets, Task

DIGITS = "digits"
_MOST = 50_000
_AT_ONCE = 1_000


def task_of(data: str, like: Task) -> Task:
    """Make the task that trains on some data, with a network like another task's.

    Args:
      data: a file, or "digits".
      like: whose hidden layers and minibatches to take, and at most how many examples.

    Returns:
      The task.

    Raises:
      ValueError: the file is not as it should be; it is named, and what is wrong.
    """
    if data == DIGITS:
        test = min(_MOST, like.test)
        return dataclasses.replace(
            like, states=10, bands=64, training=min(like.training, 200_000),
            validation=min(like.validation, test), test=test, data=DIGITS,
        )  # fmt: skip
    examples = _load(data)
    count = len(examples.state)
    test = min(_MOST, count // 10)
    return dataclasses.replace(
        like, states=int(examples.state.max()) + 1, bands=examples.frame.shape[1],
        training=min(like.training, count - test - test // 2), validation=test // 2,
        test=test, data=data, digest=_digest(data),
    )  # fmt: skip


def sets(task: Task) -> Sets:
    """Give the examples of a task that `task_of` has made.

    Args:
      task: it.

    Returns:
      Frames with a mean of 0 and a variance of 1 over all of them.

    Raises:
      ValueError: the file is not what it was.
    """
    if task.data == DIGITS:
        return _digits(task)
    if _digest(task.data) != task.digest:
        raise ValueError(f"{task.data} has changed since the study began")
    examples = _load(task.data)
    order = np.random.default_rng(task.seed).permutation(len(examples.state))
    ends = np.cumsum([task.test, task.validation, task.training])
    parts = np.split(order[: ends[-1]], ends[:-1])
    return _scaled(*(Examples(*(column[p] for column in examples)) for p in parts))


def _digits(task: Task) -> Sets:
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = (bunch.images / 16).astype(np.float32)
    order = np.random.default_rng(task.seed).permutation(len(images))
    counts = task.test, task.validation, task.training
    drawn = []
    for seed, part in enumerate(np.split(order, [497, 697])):
        stream = streams.AugmentedImages(
            images[part], bunch.target[part], _AT_ONCE, seed=task.seed + seed
        )
        steps = range(-(-counts[seed] // _AT_ONCE))
        batches = [stream.batch(0, step) for step in steps]
        frame = np.concatenate([one["image"] + stream.mean for one in batches])
        state = np.concatenate([one["label"] for one in batches])
        drawn.append(Examples(frame[: counts[seed]], state[: counts[seed]]))
    return _scaled(*drawn)


def _scaled(test: Examples, validation: Examples, training: Examples) -> Sets:
    mean, scale = training.frame.mean(0), 1 / training.frame.std()

    def scaled(part: Examples) -> Examples:
        return part._replace(frame=((part.frame - mean) * scale).astype(np.float32))

    return Sets(scaled(training), scaled(validation), scaled(test), math.nan)


def _load(file: str) -> Examples:
    if not pathlib.Path(file).is_file():
        raise ValueError(f'--data={file}: allowed are a file and "{DIGITS}"')
    try:
        with np.load(file, allow_pickle=False) as saved:
            frame, state = saved["frame"], saved["state"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file}: not a NumPy archive with `frame` and `state`: {error}"
        ) from None
    if frame.ndim != 2 or frame.dtype.kind != "f" or state.shape != frame.shape[:1]:
        raise ValueError(
            f"{file}: frame is {frame.dtype} {frame.shape} and state {state.shape}: "
            "allowed are floats [N, D] and [N]"
        )
    if state.dtype.kind not in "iu" or len(state) < 100 or state.min() < 0:
        raise ValueError(
            f"{file}: state must be 100 or more integers from 0, got {len(state)} of "
            f"{state.dtype}"
        )
    if not np.isfinite(frame).all():
        row = int((~np.isfinite(frame)).any(1).argmax())
        raise ValueError(f"{file}: frame[{row}] is not finite")
    return Examples(frame, state.astype(np.int32))


def _digest(file: str) -> str:
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()[:16]
