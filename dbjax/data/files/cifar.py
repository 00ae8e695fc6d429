"""CIFAR-10 and CIFAR-100, the binary version: rows of labels and 3 x 32 x 32 bytes."""

import pathlib
from typing import NamedTuple

import numpy as np

from dbjax.data.files.opening import Path, find, read_bytes

_PIXELS = 3 * 32 * 32


class _Kind(NamedTuple):
    """How a set is kept.

    Attributes:
        limits: how many values each label of a row has, in the order of the bytes.
        files: of each part.
    """

    limits: tuple[int, ...]
    files: dict[str, tuple[str, ...]]


_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_KINDS = {
    "cifar10": _Kind((10,), {"train": _BATCHES, "test": ("test_batch.bin",)}),
    "cifar100": _Kind((20, 100), {"train": ("train.bin",), "test": ("test.bin",)}),
}


def read_cifar(
    folder: Path, kind: str = "cifar10", *, coarse: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Read a CIFAR set.

    Args:
        folder: holds the `.bin` files: `data_batch_1.bin` to `data_batch_5.bin` and
          `test_batch.bin`, or for CIFAR-100 `train.bin` and `test.bin`.
        kind: "cifar10" or "cifar100".
        coarse: give the label among CIFAR-100's 20 groups, not its 100 classes.

    Returns:
        `train` and `test`, each with `image` `[N, 32, 32, 3]` uint8, in red, green and
        blue, and `label` `[N]` int32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not hold whole rows, or a label that there is not.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(map(repr, _KINDS))}")
    if coarse and kind != "cifar100":
        raise ValueError(f"coarse=True: only cifar100 has groups, not {kind}")
    limits, files = _KINDS[kind]
    label = -2 if coarse else -1  # which of the bytes before the pixels
    return {
        part: _join([_rows(find(pathlib.Path(folder) / name), limits)
                     for name in names], len(limits), label)
        for part, names in files.items()
    }  # fmt: skip


def _rows(path: pathlib.Path, limits: tuple[int, ...]) -> np.ndarray:
    """Read a file's rows `[N, labels + pixels]`, and check their labels."""
    content, row = np.frombuffer(read_bytes(path), np.uint8), len(limits) + _PIXELS
    if len(content) % row:
        raise ValueError(
            f"{path}: a row takes {row:,} bytes, {len(limits)} of labels and "
            f"{_PIXELS:,} of pixels; its {len(content):,} bytes are "
            f"{len(content) / row:.2f} rows"
        )
    rows = content.reshape(-1, row)
    for i, limit in enumerate(limits):
        if (wrong := rows[:, i] >= limit).any():
            at = int(wrong.argmax())
            raise ValueError(
                f"{path}: row {at} has the label {rows[at, i]}; allowed are 0 to "
                f"{limit - 1}"
            )
    return rows


def _join(parts: list[np.ndarray], labels: int, label: int) -> dict[str, np.ndarray]:
    rows = np.concatenate(parts)
    planes = rows[:, labels:].reshape(-1, 3, 32, 32)
    return {
        "image": np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
        "label": rows[:, labels + label].astype(np.int32),
    }
