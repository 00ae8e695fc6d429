"""IDX, the format of MNIST: a short header, then numbers, the last axis fastest."""

import math
import pathlib
import struct

import numpy as np

from dbjax.data.files.opening import Path, find, read_bytes

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PARTS = {"train": "train", "test": "t10k"}  # how MNIST calls them


def read_idx(path: Path) -> np.ndarray:
    r"""Read an IDX file, packed with gzip or not.

    Args:
        path: of the file.

    Returns:
        The array it holds, in the machine's own byte order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, of another format, or has not as many bytes as its
          header says.

    Examples:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "two-idx1-ubyte")
        >>> path.write_bytes(b"\0\0\x08\x01" + b"\0\0\0\x02" + b"\x05\x07")
        10
        >>> read_idx(path)
        array([5, 7], dtype=uint8)
    """
    content = read_bytes(path)
    if content[:2] != b"\0\0" or len(content) < 4 or content[2] not in _DTYPES:
        kinds = ", ".join(f"{kind:02x}" for kind in _DTYPES)
        raise ValueError(
            f"{path} is not an IDX file: it begins with {content[:4].hex(' ')}, an IDX "
            f"file with 00 00, one of {kinds}, and the number of axes"
        )
    dtype, axes = np.dtype(_DTYPES[content[2]]), content[3]
    begin = 4 + 4 * axes
    if axes == 0 or len(content) < begin:
        raise ValueError(
            f"{path}: its header is for {axes} axes and takes {begin} bytes; the file "
            f"has {len(content)}, and allowed is 1 axis or more"
        )
    shape = struct.unpack(f">{axes}I", content[4:begin])
    expected = begin + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(
            f"{path}: {list(shape)} of {dtype.name}, as its header says, take "
            f"{expected:,} bytes; it has {len(content):,}"
        )
    numbers = np.frombuffer(content, dtype, offset=begin).reshape(shape)
    return numbers.astype(dtype.newbyteorder("="))


def read_mnist(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Read MNIST, or any data set that is kept like it (Fashion-MNIST, KMNIST).

    Args:
        folder: holds `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same
          with `t10k`, each as it is or with `.gz`.

    Returns:
        `train` and `test`, each with `image` `[N, H, W]` uint8 and `label` `[N]` int32.

    Raises:
        FileNotFoundError: one of the four is missing.
        ValueError: a file is not as it should be, or two do not fit each other.
    """
    return {part: _pair(pathlib.Path(folder), name) for part, name in _PARTS.items()}


def _pair(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    arrays, paths = [], []
    for what, axes in (("images", 3), ("labels", 1)):
        names = [f"{name}-{what}{dot}idx{axes}-ubyte" for dot in "-."]
        names = [n + suffix for n in names for suffix in ("", ".gz")]
        paths.append(find(folder / names[0], *names[1:]))
        arrays.append(read_idx(paths[-1]))
        if arrays[-1].ndim != axes or arrays[-1].dtype != np.uint8:
            raise ValueError(
                f"{paths[-1]} holds {list(arrays[-1].shape)} of {arrays[-1].dtype}; "
                f"{what} have {axes} axes and are uint8"
            )
    image, label = arrays
    if len(image) != len(label) or not len(image):
        raise ValueError(
            f"{paths[0]} holds {len(image):,} images and {paths[1]} {len(label):,} "
            "labels; allowed is one label for each, and one image or more"
        )
    return {"image": image, "label": label.astype(np.int32)}
