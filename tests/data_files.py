"""Small files in the formats people have, made byte by byte, and their contents."""

import gzip
import pathlib
import struct

import numpy as np

IDX_TYPES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array: np.ndarray) -> bytes:
    """An array as an IDX file holds it."""
    head = bytes([0, 0, IDX_TYPES[array.dtype.str[1:]], array.ndim])
    shape = b"".join(struct.pack(">I", side) for side in array.shape)
    return head + shape + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, train=60, test=20, side=28, pack=False, seed=0):
    """The four files; an image's brightest row says which digit it is."""
    random, parts = np.random.default_rng(seed), {}
    for part, name, count in (("train", "train", train), ("test", "t10k", test)):
        label = random.integers(0, 10, count).astype(np.uint8)
        image = random.integers(0, 100, (count, side, side)).astype(np.uint8)
        image[np.arange(count), label] += 150
        for what, array in (("images-idx3", image), ("labels-idx1", label)):
            content = idx(array)
            path = pathlib.Path(folder, f"{name}-{what}-ubyte")
            if pack:
                path = path.with_name(path.name + ".gz")
            path.write_bytes(gzip.compress(content) if pack else content)
        parts[part] = {"image": image, "label": label}
    return parts


def cifar_rows(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """Rows of labels and of the red, green and blue planes `[N, 32, 32, 3]`."""
    rows = bytearray()
    for i, image in enumerate(images):
        rows += bytes(int(column[i]) for column in labels)
        for channel in range(3):
            rows += image[:, :, channel].tobytes()
    return bytes(rows)


def write_cifar(folder, kind="cifar10", count=12, seed=0):
    """All files of a set, each of `count` rows; a bright line tells the label."""
    random, parts = np.random.default_rng(seed), {}
    names = {
        "cifar10": {
            "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
            "test": ["test_batch.bin"],
        },
        "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
    }[kind]
    for part, files in names.items():
        images, labels, groups = [], [], []
        for name in files:
            image = random.integers(0, 156, (count, 32, 32, 3)).astype(np.uint8)
            label = random.integers(0, 10 if kind == "cifar10" else 100, count)
            image[np.arange(count), 3 * label % 32] += 100  # a bright row
            group = label // 5
            columns = (label,) if kind == "cifar10" else (group, label)
            pathlib.Path(folder, name).write_bytes(cifar_rows(image, *columns))
            images.append(image), labels.append(label), groups.append(group)
        parts[part] = {
            "image": np.concatenate(images),
            "label": np.concatenate(labels),
            "group": np.concatenate(groups),
        }
    return parts


def kaldi_matrix(matrix: np.ndarray) -> bytes:
    """A matrix as Kaldi writes it in binary, of floats or doubles."""
    kind = {"<f4": b"FM ", "<f8": b"DM "}[matrix.dtype.str]
    rows, cols = matrix.shape
    head = b"\0B" + kind + struct.pack("<bi", 4, rows) + struct.pack("<bi", 4, cols)
    return head + matrix.tobytes()


def kaldi_integers(values) -> bytes:
    """A vector of integers as Kaldi writes it in binary: each with its size before."""
    numbers = b"".join(struct.pack("<bi", 4, value) for value in values)
    return b"\0B" + struct.pack("<bi", 4, len(values)) + numbers


def write_ark(path, entries: dict[str, bytes]) -> dict[str, int]:
    """An archive of values; gives the offset of each, for an `.scp`."""
    content, offsets = bytearray(), {}
    for name, value in entries.items():
        content += name.encode() + b" "
        offsets[name] = len(content)
        content += value
    pathlib.Path(path).write_bytes(content)
    return offsets


def write_scp(path, archive, offsets: dict[str, int]) -> None:
    lines = [f"{name} {archive}:{offset}\n" for name, offset in offsets.items()]
    pathlib.Path(path).write_text("".join(lines))


def utterances(count=4, features=5, states=3, seed=0):
    """Frames and states of a few utterances of different lengths; states can be seen."""
    random, made = np.random.default_rng(seed), {}
    for i in range(count):
        length = 3 + 4 * i
        state = random.integers(0, states, length)
        frames = random.standard_normal((length, features)).astype(np.float32)
        frames[np.arange(length), state] += 3
        made[f"speaker-{i}"] = frames, state
    return made


def write_kaldi(folder, **options):
    """`feats.ark`, `feats.scp` and `ali.ark`, and what is in them."""
    folder, made = pathlib.Path(folder), utterances(**options)
    frames = {name: kaldi_matrix(f) for name, (f, _) in made.items()}
    offsets = write_ark(folder / "feats.ark", frames)
    write_scp(folder / "feats.scp", folder / "feats.ark", offsets)
    write_ark(folder / "ali.ark", {n: kaldi_integers(s) for n, (_, s) in made.items()})
    return made


def write_images(folder, classes=3, count=8, size=(24, 30), ending="png", seed=0):
    """A folder for each class; its images are of one colour, with some noise."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for label in range(classes):
        home = pathlib.Path(folder, f"n{label:04}")
        home.mkdir(parents=True)
        colour = np.array([40 + 60 * label, 200 - 60 * label, 90])
        for i in range(count):
            noise = random.integers(-20, 20, (*size, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(home / f"{i}.{ending}")
