"""NumPy's own files: an `.npz`, or one `.npy` or a folder of them."""

import pathlib
import zipfile
import zlib

import numpy as np

from dbjax.data.files.opening import Path, contents, find


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read arrays that share their first axis, the examples.

    Args:
        path: an `.npz`; an `.npy`; or a folder of `.npy` files. Pickled objects inside
          are never loaded.

    Returns:
        The arrays by name: those in the `.npz`, or the `.npy` files' own.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a file is cut off, of another format, or holds objects; or arrays
          differ in their number of examples.

    Examples:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "data.npz")
        >>> np.savez(path, x=np.zeros((5, 2)), y=np.arange(5))
        >>> {name: array.shape for name, array in read_arrays(path).items()}
        {'x': (5, 2), 'y': (5,)}
    """
    path = pathlib.Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise FileNotFoundError(f"there is no .npy file in {contents(path)}")
        arrays = {file.stem: _load(file)[""] for file in files}
    elif path.suffix == ".npy":
        arrays = {path.stem: _load(path)[""]}
    elif path.suffix == ".npz":
        arrays = _load(path)
    else:
        raise ValueError(f"{path}: allowed are .npz, .npy, and a folder of .npy files")
    _check(path, arrays)
    return arrays


def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Load a file; the array of an `.npy` has no name."""
    if not find(path).stat().st_size:
        raise ValueError(f"{path} is empty")
    damaged = (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error)
    try:
        with open(path, "rb") as file:  # NumPy would leave a damaged one open
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                found = {"": loaded}
            else:
                found = {name: loaded[name] for name in loaded.files}
    except damaged as error:
        raise ValueError(
            f"{path} cannot be read as {path.suffix} without pickled objects; it is "
            f"cut off, damaged or something else ({error}); it has "
            f"{path.stat().st_size:,} bytes"
        ) from error
    if ("" in found) != (path.suffix == ".npy"):
        raise ValueError(f"{path} is called {path.suffix}, but is the other of the two")
    return found


def _check(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    if not arrays:
        raise ValueError(f"{path} holds no array")
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    lengths = {shape[0] if shape else None for shape in shapes.values()}
    if len(lengths) > 1 or lengths & {None, 0}:
        raise ValueError(
            f"{path} holds arrays of the shapes {shapes}; allowed are arrays whose "
            "first axes are the same examples, one or more"
        )
