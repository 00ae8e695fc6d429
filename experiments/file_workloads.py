"""Workloads on data that people have, in files; `path` says where.

Bytes stay bytes until they are on the device, where they are brought to mean 0 and
deviation 1: many replicas at once tolerate only a well-conditioned problem.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import dbjax
from dbjax.data import files, from_source
from dbjax.models import dense, vision
from dbjax.runtime.prefetch import prefetch
from dbjax.typing import Array
from experiments import registry
from experiments.workload import Workload, arrows, of_model, split

PLACES = ("path", "alignments", "test_path")  # the arguments that name files


def mnist(
    *,
    seed: int,
    path: str = "data/mnist",
    batch_size: int = 32,
    hidden: Sequence[int] = (512, 512),
) -> Workload:
    """Handwritten digits, or whatever is kept like MNIST; a network of relus.

    Args:
      seed: seeds the permutations.
      path: the folder of its four files, packed or not.
      batch_size: examples in a minibatch.
      hidden: units in each hidden layer.

    Returns:
      The workload.
    """
    parts = files.read_mnist(path)
    train, test = parts["train"], parts["test"]
    return _dense("mnist", train, test, ("image", "label"), hidden, batch_size, seed)


def cifar(
    *,
    seed: int,
    path: str = "data/cifar-10-batches-bin",
    kind: str = "cifar10",
    coarse: bool = False,
    batch_size: int = 32,
    maps: Sequence[int] = (16, 16, 16),
    pools: Sequence[tuple[int, int]] = ((4, 2), (4, 2), (3, 1)),
) -> Workload:
    """Colour images of 32 x 32; a locally connected network like the paper's.

    Args:
      seed: seeds the permutations.
      path: the folder of its `.bin` files.
      kind: "cifar10" or "cifar100".
      coarse: train on CIFAR-100's 20 groups.
      batch_size: examples in a minibatch.
      maps: nodes that share a patch, for each stage.
      pools: likewise, `(size, stride)` for each stage.

    Returns:
      The workload.
    """
    parts = files.read_cifar(path, kind, coarse=coarse)
    train, test = parts["train"], parts["test"]
    classes = {"cifar10": 10, "cifar100": 20 if coarse else 100}[kind]
    model = vision(
        "small", image=32, patch=5, grid=32, maps=maps, pools=pools, classes=classes
    )
    pixels = train["image"][:10_000]
    count = len(train["label"])
    about = f"{count:,} images of {classes} classes, network of maps {tuple(maps)}"
    return of_model(
        kind,
        about,
        model,
        dbjax.from_arrays(train, batch_size, seed=seed),
        batch_size,
        test=test,
        prepare=_standardize(pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))),
        fixed=train,
    )


def arrays(
    *,
    seed: int,
    path: str = "data.npz",
    test_path: str = "",
    inputs: str = "x",
    labels: str = "y",
    batch_size: int = 32,
    hidden: Sequence[int] = (256,),
    held_out: float = 0.1,
) -> Workload:
    """Any inputs and classes from NumPy's files; a network of relus.

    Args:
      seed: seeds the permutations.
      path: an `.npz`, or a folder of `.npy` files.
      test_path: likewise, of the test; without it, a part of `path` is held out.
      inputs: the name of the array of inputs.
      labels: of the array of integers from 0, the classes.
      batch_size: examples in a minibatch.
      hidden: units in each hidden layer.
      held_out: the part that is the test, where it has no files of its own.

    Returns:
      The workload.
    """
    both = [_pick(one, (inputs, labels)) for one in (path, test_path) if one]
    if not test_path:
        count = len(both[0][labels])
        parts = split(count, _held_out(count, held_out))
        both = [{key: v[rows] for key, v in both[0].items()} for rows in parts]
    train, test = both
    return _dense("arrays", train, test, (inputs, labels), hidden, batch_size, seed)


def image_folder(
    *,
    seed: int,
    path: str = "data/images",
    batch_size: int = 32,
    size: str = "80M",
    fit: str = "crop",
    maps: Sequence[int] | None = None,
    pools: Sequence[tuple[int, int]] | None = None,
    test_size: int = 1_000,
    ahead: int = 2,
    threads: int = 2,
) -> Workload:
    """A folder of images for each class; the paper's network for images.

    Args:
      seed: seeds the orders.
      path: holds the classes' folders; or `train` and `val`, which hold them.
      batch_size: examples in a minibatch.
      size: of the network and of what it sees, as for `dbjax.models.vision`: "80M",
        "330M" and "1.7B" see 100 x 100 pixels, "small" 18 x 18.
      fit: "crop" takes the largest square in an image's middle, "stretch" all of it.
      maps: nodes that share a patch, for each stage; those of the size, if not given.
      pools: likewise, `(size, stride)` for each stage.
      test_size: images in the test, of `val`, or else held out.
      ahead: minibatches that are decoded before a replica asks for them.
      threads: that decode.

    Returns:
      The workload.
    """
    home = pathlib.Path(path)
    parted = (home / "train").is_dir() and (home / "val").is_dir()
    side = vision(size).input_shape[0]
    train = files.ImageFolder(home / "train" if parted else home, size=side, fit=fit)
    if parted:
        test = files.ImageFolder(home / "val", size=side, fit=fit)
        if test.classes != train.classes:
            odd = sorted(set(test.classes) ^ set(train.classes))[:3]
            raise ValueError(f"{home}: train and val differ in the classes {odd}")
        rows = split(len(test), min(test_size, len(test)))[1]
    else:
        kept, rows = split(len(train), min(test_size, len(train) // 2))
        train, test = train.select(kept), train
    model = vision(size, classes=len(train.classes), maps=maps, pools=pools)
    # Colours are from 0 to 255; what all of them have on average is not known.
    return of_model(
        "image_folder",
        f"{len(train):,} images of {len(train.classes):,} classes, decoded to {side} x "
        f"{side}, network {size!r}",
        model,
        prefetch(
            from_source(train, batch_size, seed=seed), ahead=ahead, threads=threads
        ),
        batch_size,
        test=test[rows],
        prepare=_standardize(127.5, 64.0),
    )


def kaldi(
    *,
    seed: int,
    path: str = "data/feats.scp",
    alignments: str = "data/ali.ark",
    batch_size: int = 128,
    window: int = 11,
    states: int | None = None,
    hidden: Sequence[int] = (2560,) * 4,
    held_out: float = 0.1,
    train_on: str = "stream",
) -> Workload:
    """Frames of speech from Kaldi's archives; the paper's speech network.

    Args:
      seed: seeds the orders.
      path: an `.scp` or `.ark` of features.
      alignments: likewise, of each frame's state.
      batch_size: examples in a minibatch.
      window: frames that are seen at once.
      states: the classes; as many as the alignments have, if not given.
      hidden: units in each hidden layer (sigmoid).
      held_out: the part of the utterances that is the test.
      train_on: "stream" splices a minibatch when it is asked for; "fixed" all frames at
        the beginning, which batch methods need, in `window` times the memory.

    Returns:
      The workload.
    """
    stream = registry.choose(
        "workload.train_on", train_on, {"stream": True, "fixed": False}
    )
    utterances = files.read_kaldi(path, alignments)
    parts = split(len(utterances), _held_out(len(utterances), held_out))
    train, test = (
        files.SplicedFrames([utterances[i] for i in part], window=window)
        for part in parts
    )
    least = 1 + max(int(part.states.max()) for part in (train, test))
    states = least if states is None else states
    if states < least:
        raise ValueError(f"states={states}: {alignments} has {least}, from 0")
    mean, deviation = train.frames.mean(0), train.frames.std(0)
    for part in (train, test):
        part.standardize(mean, deviation)
    width = window * train.frames.shape[1]
    sizes = (width, *hidden, states)
    fixed = None if stream else train[np.arange(len(train))]
    return of_model(
        "kaldi",
        f"{len(train):,} frames of {len(parts[0]):,} utterances, in windows of {window}"
        f", network {arrows(sizes)}",
        dense(sizes, name="kaldi"),
        from_source(train, batch_size, seed=seed)
        if fixed is None
        else dbjax.from_arrays(fixed, batch_size, seed=seed),
        batch_size,
        test=test[np.arange(len(test))],
        keys=("frames", "state"),
        fixed=fixed,
    )


def _dense(
    name: str,
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    keys: tuple[str, str],
    hidden: Sequence[int],
    batch_size: int,
    seed: int,
) -> Workload:
    """Make a workload of inputs of any shape, flattened, and a network of relus."""
    inputs, labels = keys
    flat = train[inputs].reshape(len(train[inputs]), -1)
    classes = 1 + max(int(part[labels].max()) for part in (train, test))
    sizes = (flat.shape[1], *hidden, classes)
    mean = flat.mean(0, dtype=np.float32).reshape(train[inputs].shape[1:])
    # One for all: an input that hardly ever differs is not blown up.
    deviation = math.sqrt(flat.var(0, dtype=np.float64).mean()) or 1.0
    return of_model(
        name,
        f"{len(flat):,} examples, network {arrows(sizes)}",
        dense(sizes, activation=jax.nn.relu, gain=math.sqrt(2), name=name),
        dbjax.from_arrays(train, batch_size, seed=seed),
        batch_size,
        test=test,
        keys=keys,
        prepare=_standardize(mean, deviation, flat=True),
        fixed=train,
    )


def _standardize(
    mean: np.ndarray | float, deviation: np.ndarray | float, *, flat: bool = False
) -> Callable[[Array], jax.Array]:
    """Make the function that brings inputs to mean 0 and deviation 1."""
    about, scale = np.asarray(mean, np.float32), np.asarray(deviation, np.float32)

    def prepare(inputs: Array) -> jax.Array:
        x = (jnp.asarray(inputs, jnp.float32) - about) / scale
        return x.reshape(len(x), -1) if flat else x

    return prepare


def _pick(path: str, keys: tuple[str, str]) -> dict[str, np.ndarray]:
    """Read the inputs and the labels of a file."""
    found: Mapping[str, np.ndarray] = files.read_arrays(path)
    for key in keys:
        if key not in found:
            raise ValueError(
                f"{path} has no array {key!r}, but {', '.join(found)}; say which with "
                "workload.inputs and workload.labels"
            )
    inputs, labels = (found[key] for key in keys)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise ValueError(
            f"{path}: {keys[1]} is {list(labels.shape)} of {labels.dtype}; labels are "
            "one integer from 0 for each example"
        )
    return {keys[0]: inputs, keys[1]: labels.astype(np.int32)}


def _held_out(count: int, part: float) -> int:
    """Say how many of `count` are the test: at least one, and not all."""
    if not 0 < part < 1 or count < 2:
        raise ValueError(
            f"held_out={part} of {count}: allowed is a part between 0 and 1, of two or "
            "more"
        )
    return min(count - 1, max(1, round(count * part)))
