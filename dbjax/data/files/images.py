"""A folder of images as ImageNet is kept: one folder for each class, files inside."""

import copy
import os
import pathlib

import numpy as np

from dbjax.data import checks
from dbjax.data.files.decode import FITS, decode
from dbjax.data.files.opening import Path, contents

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


class ImageFolder:
    """The images below a folder, decoded when they are asked for.

    `path/<class>/<file>`: labels count the classes' names, sorted; other files, and
    folders in folders, are passed over. A source for `from_source`. All that is kept of
    an image is its name, so that there may be many millions.

    Args:
        path: the folder.
        size: pixels on a side of what is served, whatever the files' own sizes.
        fit: how they are brought to that size: "crop" takes the largest square in the
          middle, "stretch" all of an image; see `decode`.

    Attributes:
        classes: their names, in the order of the labels.
        labels: `[N]` int32.

    Raises:
        FileNotFoundError: there is no such folder, or no class in it.
        ValueError: a class has no image, or an argument is not allowed.
    """

    def __init__(self, path: Path, *, size: int, fit: str = "crop"):
        if fit not in FITS:
            raise ValueError(f"fit={fit!r}: allowed are {', '.join(map(repr, FITS))}")
        self.path, self.fit = pathlib.Path(path), fit
        self.size = checks.positive("size", size)
        self.classes = _class_names(self.path)
        found = [_image_names(self.path / name) for name in self.classes]
        # As bytes in one array: millions of strings would take gigabytes.
        self._names = np.concatenate(found)
        counts = [len(names) for names in found]
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Decode `image` `[B, size, size, 3]` uint8, and give `label` `[B]` int32.

        Raises:
            ValueError: a file is not an image, or is cut off.
        """
        rows = np.asarray(rows)
        image = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        for i, row in enumerate(rows):
            image[i] = decode(self.file(row), self.size, self.fit)
        return {"image": image, "label": self.labels[rows]}

    def file(self, row: int) -> pathlib.Path:
        """Say which file an example is."""
        name = os.fsdecode(bytes(self._names[row]))
        return self.path / self.classes[self.labels[row]] / name

    def select(self, rows: np.ndarray) -> "ImageFolder":
        """Give a folder of some of the images, with the same classes.

        Args:
            rows: `[M]` integers, those to keep, in this order.

        Returns:
            The folder; nothing is read.
        """
        other = copy.copy(self)
        other._names, other.labels = self._names[rows], self.labels[rows]
        return other


def _class_names(path: pathlib.Path) -> tuple[str, ...]:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; it should hold one per class")
    with os.scandir(path) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
    if not names:
        raise FileNotFoundError(f"there is no folder of a class in {contents(path)}")
    return tuple(names)


def _image_names(folder: pathlib.Path) -> np.ndarray:
    names = [name for name in os.listdir(folder) if name.lower().endswith(ENDINGS)]
    if not names:
        raise ValueError(
            f"there is no image in {contents(folder)}; allowed are {', '.join(ENDINGS)}"
        )
    return np.array(sorted(map(os.fsencode, names)))
