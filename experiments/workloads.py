"""What is trained, by name: a loss, its data, first parameters and a held-out test.

To add a workload, write a function that returns a `Workload` and add it to `WORKLOADS`;
its keyword arguments are what `config.workload` may hold.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import dbjax
from dbjax.typing import Batch, LossFn, Params
from experiments import file_workloads, registry, streams
from experiments.workload import Workload, arrows, split


def digits(
    *,
    seed: int,
    batch_size: int = 32,
    hidden: Sequence[int] = (128,),
    shift: float = 0.75,
    rotation: float = 12.0,
    zoom: float = 0.12,
    noise: float = 0.1,
    activation: str = "relu",
    train_on: str = "stream",
    fixed_examples: int = 10_000,
) -> Workload:
    """Handwritten digits: 1,797 real images of 8 x 8 pixels, from scikit-learn.

    Training sees moved, turned and noisy versions of 1,300 of them; the other 497 are
    the test, the same for every seed, and stay as they are.

    Args:
      seed: seeds the stream.
      batch_size: examples in a minibatch.
      hidden: units in each hidden layer.
      shift: as for `streams.AugmentedImages`, as are the following.
      rotation: in degrees.
      zoom: a relative size.
      noise: a standard deviation.
      activation: of the hidden layers, "relu" or "sigmoid".
      train_on: "stream", versions without end; "fixed", the first `fixed_examples` of
        them; "images", the 1,300 as they are. A batch method needs one of the latter.
      fixed_examples: see `train_on`.

    Returns:
      The workload.
    """
    from sklearn import datasets

    function = registry.choose("workload.activation", activation, _ACTIVATIONS)
    bunch = datasets.load_digits()
    images = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int32)
    train, test = split(len(labels), held_out=497)
    stream = streams.AugmentedImages(
        images[train],
        labels[train],
        batch_size,
        seed=seed,
        shift=shift,
        rotation=rotation,
        zoom=zoom,
        noise=noise,
    )
    flat = images.reshape(-1, 64) - stream.mean
    plain = {"image": flat[train], "label": labels[train]}
    what, fixed = _training_set(train_on, stream, fixed_examples, plain)
    data = stream if fixed is None else dbjax.from_arrays(fixed, batch_size, seed=seed)
    sizes = (64, *hidden, 10)
    network = _Network(sizes, function, inputs="image", labels="label")
    return Workload(
        "digits",
        f"8 x 8 images, {what}, network {arrows(sizes)}",
        network.init,
        network.loss,
        data,
        batch_size,
        _evaluation(
            network.scores,
            network.loss,
            test={"image": flat[test], "label": labels[test]},
            train=plain if fixed is None else fixed,
        ),
        fixed,
    )


def breast_cancer(*, seed: int, batch_size: int = 16, l2: float = 1e-3) -> Workload:
    """Logistic regression on 569 tumours with 30 measurements each, standardised.

    Args:
      seed: seeds the permutations.
      batch_size: examples in a minibatch.
      l2: half of it times the squared weights is added to the loss.

    Returns:
      The workload.
    """
    from sklearn import datasets

    bunch = datasets.load_breast_cancer()
    train, test = split(len(bunch.target), held_out=169)
    mean, deviation = bunch.data[train].mean(0), bunch.data[train].std(0)
    features = ((bunch.data - mean) / deviation).astype(np.float32)
    target = bunch.target.astype(np.int32)

    def init(seed: int) -> Params:
        del seed  # A convex problem: everybody starts at zero.
        return {"weights": jnp.zeros(30), "bias": jnp.zeros(())}

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = batch["features"] @ params["weights"] + params["bias"]
        losses = optax.sigmoid_binary_cross_entropy(logits, batch["benign"])
        return losses, (logits > 0) == batch["benign"]

    def loss(params: Params, batch: Batch) -> jax.Array:
        penalty = 0.5 * l2 * jnp.sum(params["weights"] ** 2)
        return scores(params, batch)[0].mean() + penalty

    def rows(which: np.ndarray) -> dict[str, np.ndarray]:
        return {"features": features[which], "benign": target[which]}

    return Workload(
        "breast_cancer",
        "30 measurements of a tumour, logistic regression",
        init,
        loss,
        dbjax.from_arrays(rows(train), batch_size, seed=seed),
        batch_size,
        _evaluation(scores, loss, test=rows(test), train=rows(train)),
        fixed=rows(train),
    )


def speech_frames(
    *,
    seed: int,
    batch_size: int = 64,
    states: int = 64,
    hidden: Sequence[int] = (256, 256),
    noise: float = 2.0,
    test_size: int = 2_000,
) -> Workload:
    """Frames of artificial speech: which of `states` hidden states is being spoken?

    The input is that of Dean et al. 2012, section 5: 11 frames of 40 log-energies; with
    `states=8192` and `hidden=(2560,) * 4` so is the network, of 42 million parameters.

    Args:
      seed: seeds the source and its stream.
      batch_size: examples in a minibatch.
      states: hidden states, the classes.
      hidden: units in each hidden layer (sigmoid).
      noise: as for `streams.MarkovFrames`.
      test_size: clips in the test.

    Returns:
      The workload.
    """
    data = streams.MarkovFrames(batch_size, states=states, seed=seed, noise=noise)
    sizes = (data.window * data.features, *hidden, states)
    network = _Network(sizes, jax.nn.sigmoid, inputs="frames", labels="state")
    return Workload(
        "speech_frames",
        f"a generated stream of {data.window} x {data.features} frames from "
        f"{states} hidden states, network {arrows(sizes)}",
        network.init,
        network.loss,
        data,
        batch_size,
        _evaluation(network.scores, network.loss, test=data.held_out(test_size)),
    )


def speech(
    *,
    seed: int,
    batch_size: int = 128,
    states: int = 8192,
    hidden: Sequence[int] = (2560,) * 4,
    noise: float = 2.0,
    test_size: int = 2_000,
) -> Workload:
    """The paper's speech network, which can be partitioned, on artificial speech.

    Data as in `speech_frames`; first weights are those of `dbjax.models.dense`, with
    which four layers of sigmoids learn.

    Args:
      seed: seeds the source and its stream.
      batch_size: examples in a minibatch.
      states: hidden states, the classes.
      hidden: units in each hidden layer (sigmoid).
      noise: as for `streams.MarkovFrames`.
      test_size: clips in the test.

    Returns:
      The workload.
    """
    data = streams.MarkovFrames(batch_size, states=states, seed=seed, noise=noise)
    sizes = (data.window * data.features, *hidden, states)
    model = dbjax.models.dense(sizes, name="speech")

    def loss(params: Params, batch: Batch) -> jax.Array:
        return model.loss(params, (batch["frames"], batch["state"]))

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        outputs = model.apply(params, batch["frames"])
        losses = model.losses(outputs, batch["state"])
        return losses, outputs.argmax(-1) == batch["state"]

    return Workload(
        "speech",
        f"a generated stream of {data.window} x {data.features} frames from "
        f"{states:,} hidden states, network {arrows(sizes)}",
        jax.jit(lambda seed: model.init(jax.random.key(seed))),
        loss,
        data,
        batch_size,
        _evaluation(scores, loss, test=data.held_out(test_size)),
        rules=model.rules,
    )


def vision(
    *,
    seed: int,
    batch_size: int = 32,
    size: str = "small",
    classes: int | None = None,
    maps: Sequence[int] | None = None,
    pools: Sequence[tuple[int, int]] | None = None,
    shift: float = 0.15,
    noise: float = 0.5,
    test_size: int = 1_000,
) -> Workload:
    """The paper's network for images, which can be partitioned, on painted shapes.

    Args:
      seed: seeds the classes and their stream.
      batch_size: examples in a minibatch.
      size: of the network and the images, as for `dbjax.models.vision`: "80M", "330M"
        and "1.7B" see images of 100 x 100, "small" of 18 x 18.
      classes: how many; those of the size, if not given.
      maps: likewise, for each stage.
      pools: likewise, `(size, stride)` for each stage.
      shift: as for `streams.PaintedShapes`.
      noise: likewise.
      test_size: images in the test.

    Returns:
      The workload.
    """
    model = dbjax.models.vision(size, classes=classes, maps=maps, pools=pools)
    side = model.input_shape[0]
    data = streams.PaintedShapes(
        *(batch_size,), classes=model.classes, seed=seed, size=side, shift=shift,
        noise=noise,
    )  # fmt: skip

    def scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        outputs = model.apply(params, batch["image"])
        losses = model.losses(outputs, batch["label"])
        return losses, outputs.argmax(-1) == batch["label"]

    return Workload(
        "vision",
        f"a generated stream of {side} x {side} images of {model.classes:,} painted "
        f"shapes, network {size!r}",
        jax.jit(lambda seed: model.init(jax.random.key(seed))),
        model.loss,
        data,
        batch_size,
        _evaluation(scores, model.loss, test=data.held_out(test_size)),
        rules=model.rules,
    )


WORKLOADS: Mapping[str, Callable[..., Workload]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "speech_frames": speech_frames,
    "speech": speech,
    "vision": vision,
    "mnist": file_workloads.mnist,
    "cifar": file_workloads.cifar,
    "arrays": file_workloads.arrays,
    "image_folder": file_workloads.image_folder,
    "kaldi": file_workloads.kaldi,
}


def make(config: ml_collections.ConfigDict, seed: int) -> Workload:
    """Build the workload that `config.name` asks for.

    Args:
      config: `name`, and any of that workload's own arguments.
      seed: seeds the data stream.

    Returns:
      The workload.

    Raises:
      registry.ConfigError: if the name, an argument or a file does not exist, or a
        package that it takes to read the file.
    """
    options = config.to_dict()
    build = registry.choose("workload.name", options.pop("name"), WORKLOADS)
    allowed = [name for name in inspect.signature(build).parameters if name != "seed"]
    for name in options:
        registry.choose("a key of workload", name, dict.fromkeys(allowed))
    try:
        return build(seed=seed, **options)
    except (OSError, ImportError) as error:
        where = [f"workload.{key}" for key in allowed if key in file_workloads.PLACES]
        hint = f" Say where it is with {' and '.join(where)}." if where else ""
        raise registry.ConfigError(f"workload {config.name}: {error}.{hint}") from error


_ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class _Network:
    """A fully connected classifier with layers of `sizes`."""

    sizes: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    inputs: str
    labels: str

    def init(self, seed: int) -> Params:
        keys = jax.random.split(jax.random.key(seed), len(self.sizes) - 1)
        params = []
        for key, n, m in zip(keys, self.sizes[:-1], self.sizes[1:], strict=True):
            kernel = jax.random.normal(key, (n, m)) / math.sqrt(n)
            params.append({"kernel": kernel, "bias": jnp.zeros(m)})
        return params

    def scores(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Give each example's loss, and whether it was classified rightly."""
        x = batch[self.inputs]
        for layer in params[:-1]:
            x = self.activation(x @ layer["kernel"] + layer["bias"])
        logits = x @ params[-1]["kernel"] + params[-1]["bias"]
        labels = batch[self.labels]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, logits.argmax(-1) == labels

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        return self.scores(params, batch)[0].mean()


def _evaluation(
    scores: Callable[..., Any], loss: LossFn, **splits: Batch
) -> Callable[..., Any]:
    """Make `evaluate(params)`: loss and accuracy on each of the splits.

    On "train" the loss is the one that is minimised; elsewhere it has no penalty.
    """

    @jax.jit
    def measure(params: Params, splits: Mapping[str, Batch]) -> dict[str, jax.Array]:
        results = {}
        for name, batch in splits.items():
            losses, right = scores(params, batch)
            minimised = name == "train"
            results[f"{name}_loss"] = (
                loss(params, batch) if minimised else losses.mean()
            )
            results[f"{name}_accuracy"] = right.mean()
        return results

    def evaluate(params: Params) -> dict[str, float]:
        return {name: float(value) for name, value in measure(params, splits).items()}

    return evaluate


def _training_set(
    name: str, stream: streams.AugmentedImages, count: int, plain: Batch
) -> tuple[str, Batch | None]:
    """Say what digits trains on, and give it if it has an end."""
    words, make = registry.choose(
        "workload.train_on",
        name,
        {
            "stream": ("augmented without end", lambda: None),
            "fixed": (f"{count:,} augmented versions", lambda: _first(stream, count)),
            "images": (f"{len(plain['label']):,} of them", lambda: plain),
        },
    )
    return words, make()


def _first(stream: streams.AugmentedImages, count: int) -> Batch:
    """Give the first examples that replica 0 of a stream would see."""
    steps = np.arange(-(-count // stream.batch_size))
    batches = stream.batches(np.zeros_like(steps), steps)
    return {
        name: values.reshape(-1, *values.shape[2:])[:count]
        for name, values in batches.items()
    }
