"""Getting at files: what is missing, empty or cut off is said in plain words."""

import gzip
import importlib
import os
import pathlib
import zlib
from typing import Any, TypeAlias

Path: TypeAlias = str | os.PathLike[str]


def read_bytes(path: Path) -> bytes:
    """Read a file whole, and unpack it if it is packed with gzip.

    Args:
        path: of the file; what it is called does not matter.

    Returns:
        What it holds, not nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or its gzip is damaged.
    """
    path = find(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path}: its gzip is cut off or damaged ({error}); it has "
                f"{path.stat().st_size:,} bytes"
            ) from error
    if not content:
        raise ValueError(f"{path} is empty")
    return content


def find(path: Path, *others: str) -> pathlib.Path:
    """Give the path of a file that is there.

    Args:
        path: of the file.
        others: names it may have instead, in the same folder.

    Returns:
        The first that is there.

    Raises:
        FileNotFoundError: none is; the message says what is in the folder.
    """
    first = pathlib.Path(path)
    for one in (first, *(first.parent / other for other in others)):
        if one.is_file():
            return one
    names = " or ".join((first.name, *others))
    raise FileNotFoundError(f"there is no file {names} in {contents(first.parent)}")


def contents(folder: pathlib.Path) -> str:
    """Say what a folder holds, for a message."""
    if not folder.is_dir():
        return f"{folder}, which is not a folder"
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder}, which holds {', '.join(names[:5]) or 'nothing'}{more}"


def need(module: str, what: str, extra: str) -> Any:
    """Import a package that not everybody has.

    Args:
        module: its name.
        what: what it is needed for.
        extra: the extra of dbjax that brings it.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {module.partition('.')[0]}, which is not installed; it "
            f"comes with: pip install 'dbjax[{extra}]'"
        ) from error
