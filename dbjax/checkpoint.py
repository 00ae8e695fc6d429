"""Checkpoints of named arrays and a note; the only file that knows orbax.

A checkpoint is a folder named by its step. It appears under that name at once or not
at all, so a killed process leaves none that is half written. It carries the checksums
of its files, so one that was damaged later is noticed.
"""

import json
import pathlib
import shutil
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dbjax.typing import Array

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_PARTIAL = ".partial"


class Saved(NamedTuple):
    """A checkpoint that was read back.

    Attributes:
        step: the step it was saved under.
        leaves: numpy arrays by name, with the dtype and the bits that were saved.
        note: the JSON-able dict that was saved beside them.
    """

    step: int
    leaves: dict[str, np.ndarray]
    note: dict[str, Any]


class _DamagedError(Exception):
    """What was read is not what was written."""


def save(
    directory: str | pathlib.Path,
    step: int,
    leaves: Mapping[str, Array | int | float],
    note: Mapping[str, Any],
    *,
    keep: int = 2,
) -> None:
    """Write the checkpoint of `step`, then remove what it makes superfluous.

    Superfluous are all but the newest `keep`, and those of later steps: a run that
    saves an earlier step has gone back, because the later ones were damaged. One
    process writes to a directory at a time.

    Args:
        directory: made if it is not there.
        step: at least 0. A checkpoint of the same step is replaced.
        leaves: arrays (jax or numpy) or plain numbers, by name.
        note: anything JSON can hold.
        keep: checkpoints to keep, at least 1.

    Raises:
        TypeError: a leaf is not an array of numbers, or the note is not JSON-able.
        ValueError: `step` or `keep` is not allowed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(directory, 7, {"w": np.ones(2)}, {"seed": 3})
        ...     latest(directory)
        Saved(step=7, leaves={'w': array([1., 1.])}, note={'seed': 3})
    """
    if step < 0:
        raise ValueError(f"step={step}: allowed are integers from 0")
    if keep < 1:
        raise ValueError(f"keep={keep}: allowed are integers from 1")
    arrays = {name: _numpy(name, leaf) for name, leaf in leaves.items()}
    manifest = {"note": note, "leaves": _records(arrays)}
    json.dumps(manifest)  # complains before anything is written
    folder = pathlib.Path(directory).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(f"*{_PARTIAL}*"):
        shutil.rmtree(unfinished)
    partial = folder / f"{step}{_PARTIAL}"
    partial.mkdir()
    if stored := _numbered(arrays):
        _orbax().save_checkpointables(partial / _ARRAYS, {"leaves": stored})
    _seal(partial, manifest)
    # A kill between these two lines loses this step's older checkpoint, no other.
    shutil.rmtree(folder / str(step), ignore_errors=True)
    partial.rename(folder / str(step))
    kept = [s for s in steps(folder) if s <= step][-keep:]
    for other in set(steps(folder)) - set(kept):
        shutil.rmtree(folder / str(other))


def latest(directory: str | pathlib.Path) -> Saved | None:
    """Read the newest checkpoint that is whole; see `save` for an example.

    Warns, naming it, of each newer one that is damaged.

    Args:
        directory: where `save` wrote; it need not exist.

    Returns:
        The checkpoint, or None where there has never been one.

    Raises:
        ValueError: there are checkpoints, but all of them are damaged.
    """
    folder = pathlib.Path(directory).resolve()
    found = steps(folder)
    for step in reversed(found):
        try:
            return _read(folder, step)
        except Exception as error:  # a damaged file breaks its reader in any way
            reason = str(error).partition("\n")[0][:200]
            warnings.warn(
                f"checkpoint {folder / str(step)} is damaged "
                f"({type(error).__name__}: {reason}); falling back to the one before",
                stacklevel=2,
            )
    if found:
        raise ValueError(
            f"all checkpoints in {folder} are damaged: steps {found}; "
            "remove them to begin anew"
        )
    return None


def steps(directory: str | pathlib.Path) -> list[int]:
    """The steps of the checkpoints in `directory`, ascending, damaged ones too."""
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name)
        for path in folder.iterdir()
        if path.name.isdecimal() and path.is_dir()
    )


def _read(folder: pathlib.Path, step: int) -> Saved:
    path = folder / str(step)
    manifest = _unseal(path)
    arrays = {
        record["name"]: np.empty(record["shape"], jnp.dtype(record["dtype"]))
        for record in manifest["leaves"]
    }
    if template := _numbered(arrays):
        items = _orbax().load_checkpointables(path / _ARRAYS, {"leaves": template})
        for number, name in enumerate(arrays):
            arrays[name] = np.asarray(items["leaves"].get(str(number), arrays[name]))
    return Saved(step, arrays, manifest["note"])


def _seal(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with the checksums of all files and then its own."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sums = {file.relative_to(path).as_posix(): _checksum(file) for file in files}
    text = json.dumps(manifest | {"files": sums})
    (path / _MANIFEST).write_text(f"{zlib.crc32(text.encode())}\n{text}", "utf-8")


def _unseal(path: pathlib.Path) -> dict[str, Any]:
    """Read the manifest; every file is checked before orbax opens the first."""
    checksum, _, text = (path / _MANIFEST).read_text("utf-8").partition("\n")
    if checksum != str(zlib.crc32(text.encode())):
        raise _DamagedError(f"{_MANIFEST} does not have its checksum")
    manifest = json.loads(text)
    for name, checksum in manifest["files"].items():
        if _checksum(path / name) != checksum:
            raise _DamagedError(f"{name} does not have its checksum")
    return manifest


def _checksum(file: pathlib.Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            total = zlib.crc32(chunk, total)
    return total


def _numbered(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What orbax stores: arrays under their number, as a name may be no path.

    Empty ones it cannot save; their record in the manifest says all there is.
    """
    return {str(i): a for i, a in enumerate(arrays.values()) if a.size}


def _records(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": a.dtype.name, "shape": list(a.shape)}
        for name, a in arrays.items()
    ]


def _numpy(name: str, leaf: Array | int | float) -> np.ndarray:
    array = np.asarray(leaf)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise TypeError(
            f"leaf {name!r} has dtype {array.dtype}: allowed are arrays of numbers"
        )
    return array


def _orbax() -> Any:
    # Not at the top: it is slow to import, and few uses of dbjax save anything.
    from orbax.checkpoint import v1

    return v1
