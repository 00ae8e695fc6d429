"""Kaldi's archives of features and alignments, read with kaldiio (extra `speech`).

An `.ark` holds utterances one after another, each a name and a value; an `.scp` has
lines of a name and where its value is, `path:offset`. Values are binary, compressed or
text, as Kaldi writes them; nothing is unpickled and no command is run, though kaldiio
would do both.
"""

import contextlib
import gzip
import pathlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from dbjax.data.files.opening import Path, find, need


class Utterance(NamedTuple):
    """What was said, frame by frame.

    Attributes:
        name: of the utterance.
        frames: `[T, F]` float32 coefficients.
        states: `[T]` int32, the state that each frame is aligned to.
    """

    name: str
    frames: np.ndarray
    states: np.ndarray


def read_kaldi(features: Path, alignments: Path) -> list[Utterance]:
    """Read utterances that have both features and an alignment.

    Those with features only are left out, as not all can be aligned.

    Args:
        features: an `.scp` or an archive of matrices `[T, F]`, also compressed ones.
        alignments: likewise, of integer vectors `[T]`; of the numbers that are to be
          recognised (`ali-to-pdf` gives them). Archives may be packed with gzip.

    Returns:
        The utterances, in the order of the features.

    Raises:
        ModuleNotFoundError: kaldiio is not installed.
        FileNotFoundError: there is no such file, or one that an `.scp` names.
        ValueError: a file is empty, cut off, or of another format; an utterance has
          more or fewer states than frames; or none has both.
    """
    need("kaldiio", "reading Kaldi's archives", "speech")
    aligned = {name: _states(alignments, name, a) for name, a in _values(alignments)}
    utterances, width = [], None
    for name, value in _values(features):
        frames = _frames(features, name, value)
        width = width or frames.shape[1]
        if frames.shape[1] != width:
            raise ValueError(
                f"{features}: utterance {name!r} has {frames.shape[1]} coefficients in "
                f"a frame; those before it have {width}"
            )
        if name not in aligned:
            continue
        if len(aligned[name]) != len(frames):
            raise ValueError(
                f"utterance {name!r} has {len(frames)} frames in {features}, but "
                f"{len(aligned[name])} states in {alignments}: allowed is one for each"
            )
        utterances.append(Utterance(name, frames, aligned[name]))
    if not utterances:
        raise ValueError(
            f"no utterance is both in {features} and in {alignments}, which has "
            f"{', '.join(list(aligned)[:3])}, ..."
        )
    return utterances


def _frames(path: Path, name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != 2 or not value.size:
        raise ValueError(
            f"{path}: utterance {name!r} holds {_describe(value)}; features are a "
            "matrix of frames and coefficients"
        )
    return value.astype(np.float32, copy=False)


def _states(path: Path, name: str, value: Any) -> np.ndarray:
    whole = isinstance(value, np.ndarray) and value.ndim == 1 and value.size
    if not whole or (value != np.floor(value)).any() or value.min() < 0:
        raise ValueError(
            f"{path}: utterance {name!r} holds {_describe(value)}; an alignment is a "
            "vector of integers from 0"
        )
    return value.astype(np.int32)


def _describe(value: Any) -> str:
    return f"{list(value.shape)} of {value.dtype}" if hasattr(value, "shape") else "?"


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Give every utterance's name and value."""
    path = find(path)
    names: set[str] = set()
    entries = _script(path) if path.suffix == ".scp" else _archive(path)
    for name, value in entries:
        if name in names:
            raise ValueError(f"{path}: utterance {name!r} is there twice")
        names.add(name)
        yield name, value
    if not names:
        raise ValueError(f"{path} is empty: it has no utterance")


def _archive(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        while name := _name(path, file):
            yield name, _value(path, name, file)


def _script(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """Follow the lines of an `.scp`; archives stay open from line to line."""
    with contextlib.ExitStack() as stack:
        current, file = None, None
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            name, _, where = line.strip().partition(" ")
            archive, _, offset = where.strip().rpartition(":")
            if "|" in where or not archive or not offset.isdigit():
                raise ValueError(
                    f"{path}, line {number}: {line.strip()!r}: allowed is a name and "
                    "path:offset, no range and no command"
                )
            if archive != current:
                stack.close()
                found = _beside(path, archive)
                current, file = archive, stack.enter_context(_open(found))
            assert file is not None
            file.seek(int(offset))
            yield name, _value(archive, name, file)


def _beside(script: pathlib.Path, archive: str) -> pathlib.Path:
    """Find an archive, as Kaldi from where we are, or else from where the `.scp` is."""
    with contextlib.suppress(FileNotFoundError):
        return find(archive)
    return find(script.parent / archive)


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            yield raw
            return
        with gzip.open(raw) as unpacked:
            yield unpacked  # type: ignore[misc]


def _name(path: pathlib.Path, file: IO[bytes]) -> str:
    """Read up to the blank after an utterance's name; nothing at the end."""
    letters = bytearray()
    try:
        while (letter := file.read(1)) not in (b"", b" "):
            if letters or not letter.isspace():  # text values end with a line
                letters += letter
        name = letters.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not an archive of Kaldi's ({error})") from error
    if name and not letter or len(name.split()) > 1:
        raise ValueError(
            f"{path} is not an archive of Kaldi's, or is cut off: where the name of an "
            f"utterance and a blank should be, it has {name[:40]!r}"
        )
    return name


def _value(path: Path, name: str, file: IO[bytes]) -> Any:
    from kaldiio.matio import read_kaldi as read

    try:
        start = file.tell()
        head = file.read(5)
        text = head.lstrip()[:1]
        if head[:2] != b"\0B" and (not text or text not in b"[0123456789"):
            raise ValueError(f"it begins with {head!r}, not with \\0B or [")
        file.seek(start)
        return read(file)
    except Exception as error:  # kaldiio has no kind of its own
        raise ValueError(
            f"{path}: utterance {name!r} is cut off, or not Kaldi's: "
            f"{error or type(error).__name__}"
        ) from error
