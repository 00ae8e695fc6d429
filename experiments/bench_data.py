"""Data in files: how much of a step's time is spent waiting for the next minibatch.

  python -m experiments.bench_data --out=runs/bench_data

Every loader reads files made here, of the real formats and shapes, with random content.
A plain loop asks for minibatches of 128 and takes a gradient step on a network that
suits them; waiting is the time in `data.batch`, its share that of the loop's time.
"""

import functools
import pathlib
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import dbjax
from dbjax.data import files, from_source
from dbjax.models import dense, vision
from dbjax.models.base import Model
from dbjax.runtime.prefetch import prefetch
from dbjax.typing import Batch, Data, Params
from experiments.bench_table import Options, Row, Section, make_parser, run

BATCH = 128
LIMIT = "<= 0.05"


def idx(options: Options, home: pathlib.Path) -> list[Row]:
    """MNIST's four files, 60,000 images."""
    random = np.random.default_rng(0)
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        image = random.integers(0, 256, (count, 28, 28), np.uint8)
        label = random.integers(0, 10, count, np.uint8)
        for what, array in (("images-idx3", image), ("labels-idx1", label)):
            head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (home / f"{name}-{what}-ubyte").write_bytes(head + array.tobytes())
    data = dbjax.from_arrays(files.read_mnist(home)["train"], BATCH)
    model = dense((784, 512, 512, 10), activation=jax.nn.relu)
    return [_row(options, "idx", "MNIST, 784-512-512-10", data, model)]


def cifar(options: Options, home: pathlib.Path) -> list[Row]:
    """CIFAR-10's six files, 60,000 images."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name in names:
        rows = random.integers(0, 256, (10_000, 3073), np.uint8)
        rows[:, 0] %= 10
        (home / name).write_bytes(rows.tobytes())
    data = dbjax.from_arrays(files.read_cifar(home)["train"], BATCH)
    model = vision("small", image=32, patch=5, grid=32, maps=(16,) * 3, classes=10,
                   pools=((4, 2), (4, 2), (3, 1)))  # fmt: skip
    return [_row(options, "cifar", "CIFAR-10, locally connected", data, model)]


def npz(options: Options, home: pathlib.Path) -> list[Row]:
    """An `.npz` of 60,000 rows of 784 floats."""
    random = np.random.default_rng(0)
    x = random.standard_normal((60_000, 784), np.float32)
    np.savez(home / "data.npz", image=x, label=random.integers(0, 10, len(x)))
    data = dbjax.from_arrays(files.read_arrays(home / "data.npz"), BATCH)
    model = dense((784, 512, 512, 10), activation=jax.nn.relu)
    return [_row(options, "npz", "float32, 784-512-512-10", data, model)]


def kaldi(options: Options, home: pathlib.Path) -> list[Row]:
    """Kaldi's archives of an hour of speech, in windows of 11 frames."""
    random = np.random.default_rng(0)
    with open(home / "feats", "wb") as feats, open(home / "ali", "wb") as alignments:
        for i in range(36 if options.quick else 360):
            frames = random.standard_normal((1_000, 40), np.float32)
            shape = struct.pack("<bibi", 4, 1_000, 4, 40)
            feats.write(f"u{i} ".encode() + b"\0BFM " + shape + frames.tobytes())
            states = np.empty(1_000, [("size", "i1"), ("state", "<i4")])
            states["size"], states["state"] = 4, random.integers(0, 8192, 1_000)
            head = b"\0B" + struct.pack("<bi", 4, 1_000)
            alignments.write(f"u{i} ".encode() + head + states.tobytes())
    source = files.SplicedFrames(files.read_kaldi(home / "feats", home / "ali"))
    data, keys = from_source(source, BATCH), ("frames", "state")
    rows = []
    for name, sizes in {
        "the paper's network, 42M": (440, *(2560,) * 4, 8192),
        "440-256-256-256-256-8192": (440, *(256,) * 4, 8192),
    }.items():
        rows.append(_row(options, "kaldi", name, data, dense(sizes), keys=keys))
    return rows


def images(options: Options, home: pathlib.Path) -> list[Row]:
    """A folder of JPEGs of 500 x 375, as many of ImageNet's are, to 100 x 100."""
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(BATCH if options.quick else 512):
        # About as smooth as a photograph: a JPEG of 65 kB.
        coarse = random.integers(0, 256, (48, 64, 3), np.uint8)
        fine = random.integers(-6, 7, (375, 500, 3))
        smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(smooth) + fine, 0, 255).astype(np.uint8)
        (folder := home / f"class{i % 8}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    plain = from_source(files.ImageFolder(home, size=100), BATCH)
    models = {"vision, 2 maps": vision("80M", maps=(2, 2, 2), classes=100)}
    if not options.quick:
        models["vision 80M"] = vision("80M")
    return [
        _row(options, "images", f"JPEG 500x375, {name}, {how}", data, model, slow=True)
        for name, model in models.items()
        for how, data in (("in place", plain), ("prefetched", prefetch(plain)))
    ]


def _row(
    options: Options,
    section: str,
    what: str,
    data: Data,
    model: Model,
    *,
    keys: tuple[str, str] = ("image", "label"),
    slow: bool = False,
) -> Row:
    """Train for a few steps, and say how long each waits and how long it takes."""
    step = _training(model, *keys)
    steps = options.rounds if slow else 10 * options.rounds
    waits, wholes = [], []
    for i in range(-2, 6 if options.quick else steps):
        begin = time.perf_counter()
        batch = data.batch(0, i + 2)
        got = time.perf_counter()
        step(batch)
        if i >= 0:  # warm
            waits.append(got - begin)
            wholes.append(time.perf_counter() - begin)
    share = sum(waits) / sum(wholes)
    return Row(
        section, f"{what}, batch {BATCH}: waiting",
        f"{1e3 * statistics.median(waits):.2f} ms",
        f"a step, {1e3 * statistics.median(wholes):.1f} ms", share, LIMIT,
        f"{len(waits)} steps, shares of the totals",
    )  # fmt: skip


def _training(model: Model, inputs: str, labels: str) -> Callable[[Batch], None]:
    """Give a step of SGD that is waited for."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        x = batch[inputs].astype(np.float32) / 128 - 1
        x = x.reshape(len(x), *model.input_shape)
        return model.loss(params, (x, batch[labels]))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(params: Params, batch: Batch) -> Any:
        gradients = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients)

    params = jax.jit(model.init)(jax.random.key(0))

    def step(batch: Batch) -> None:
        nonlocal params
        params = jax.block_until_ready(update(params, batch))

    return step


def _in_files(make: Callable[[Options, pathlib.Path], list[Row]]) -> Section:
    """Lend a section a folder for its files."""

    def section(options: Options) -> list[Row]:
        with tempfile.TemporaryDirectory() as home:
            return make(options, pathlib.Path(home))

    return section


SECTIONS: dict[str, Section] = {
    make.__name__: _in_files(make) for make in (idx, cifar, npz, kaldi, images)
}


def main() -> None:
    """Run the sections asked for."""
    parser = make_parser("Data in files.", SECTIONS, rounds=5)
    run(SECTIONS, parser.parse_args())


if __name__ == "__main__":
    main()
