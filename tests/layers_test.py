"""The order of the rooms: who may import whom, and what lives in one room only."""

import ast
import pathlib
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "dbjax"

# A room is a module or a folder of dbjax/. Imports go to a lower level or stay inside
# the room; rooms on one level do not import each other.
LEVELS = (
    ("typing", "whole"),
    ("trees", "mesh", "loss", "data", "trace", "schedules", "checkpoint"),
    ("cluster", "models", "optim", "server"),
    ("runtime",),
    ("downpour", "sandblaster"),
    ("__init__",),  # the door
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Module -> the files, or folders ending in a slash, that may import it.
HOMES = {
    "orbax": ("checkpoint.py",),
    "ray": ("runtime/ray.py",),
    "flax": ("models/",),
    "threading": ("runtime/",),
    "queue": ("runtime/",),
    "time": ("runtime/",),
    "concurrent": ("runtime/",),
    "absl": (),
    "ml_collections": (),
    "experiments": (),
    "configs": (),
    "tests": (),
}

# (file, what it imports) -> the reason why it may.
EXCEPTIONS: dict[tuple[str, str], str] = {}

ENVIRONMENT = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the full dotted name of everything a file imports, at any depth."""
    package = ["dbjax", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def wrong_import(path: str, name: str) -> str | None:
    """Say why the file `path` may not import `name`; None if it may."""
    top, *rest = name.split(".")
    if top in HOMES and not path.startswith(HOMES[top] or ("nowhere",)):
        return f"{top} belongs to {' '.join(HOMES[top]) or 'no file of dbjax'}"
    if top != "dbjax":
        return None
    here = room_of(path)
    room = rest[0] if rest and rest[0] in LEVEL else "__init__"
    if room == here or LEVEL[room] < LEVEL[here]:
        return None
    way = "sideways" if LEVEL[room] == LEVEL[here] else "upward"
    return f"{way}, from level {LEVEL[here]} to level {LEVEL[room]}"


def reads_environment(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ENVIRONMENT:
                    yield node.lineno, alias.name


def violations(
    sources: Mapping[str, str],
    exceptions: Mapping[tuple[str, str], str] = EXCEPTIONS,
) -> list[str]:
    """Everything that breaks the order in `sources`, path under dbjax/ -> text."""
    found, used = [], set()
    for path, text in sources.items():
        if room_of(path) not in LEVEL:
            found.append(f"{path}: a room without a level; give it one in LEVELS")
            continue
        tree = ast.parse(text, path)
        for line, name in imports(path, tree):
            why = wrong_import(path, name)
            if (path, name) in exceptions:
                used.add((path, name))
            elif why:
                found.append(f"{path}:{line}: imports {name}: {why}")
        for line, name in reads_environment(tree):
            found.append(f"{path}:{line}: {name}: the library reads no environment")
    for path, name in sorted(set(exceptions) - used):
        found.append(f"{path}: the exception for {name} is not needed any more")
    return found


def test_rooms_import_downward_only():
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for path in sorted(ROOT.rglob("*.py"))
    }
    assert sources
    assert violations(sources) == []


def test_exceptions_have_a_reason():
    assert all(reason.strip() for reason in EXCEPTIONS.values())


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("trace.py", "import dbjax.runtime", "upward"),
        ("trace.py", "import dbjax.runtime.emulated as e", "upward"),
        ("trace.py", "from dbjax.downpour import replica", "upward"),
        ("trace.py", "from dbjax import Cluster", "upward"),
        ("trace.py", "import dbjax", "upward"),
        ("trace.py", "from . import cluster", "upward"),
        ("trace.py", "def f():\n    from .server import layout", "upward"),
        ("server/layout.py", "from ..runtime import base", "upward"),
        ("server/layout.py", "from dbjax.cluster import Cluster", "sideways"),
        ("server/layout.py", "from .. import optim", "sideways"),
        ("sandblaster/__init__.py", "from dbjax import downpour", "sideways"),
        ("data.py", "from dbjax.trees import dot", "sideways"),
        ("helpers.py", "", "without a level"),
        ("data.py", "from orbax.checkpoint import v1", "belongs to checkpoint.py"),
        ("runtime/base.py", "import ray", "belongs to runtime/ray.py"),
        ("runtime/ray.py", "import absl.flags", "belongs to no file"),
        ("optim/adagrad.py", "import flax", "belongs to models/"),
        ("data.py", "import numpy, threading", "threading belongs to runtime/"),
        ("data.py", "from time import sleep", "time belongs to runtime/"),
        ("data.py", "from concurrent import futures", "concurrent belongs to"),
        ("data.py", "import concurrent.futures", "concurrent belongs to"),
        ("data.py", "import tests.textbook", "belongs to no file"),
        ("data.py", "import os\nos.environ['A']", "reads no environment"),
        ("data.py", "import os as o\no.getenv('A')", "reads no environment"),
        ("runtime/ray.py", "from os import environ", "reads no environment"),
    ],
)
def test_a_planted_violation_is_found(path, text, complaint):
    (found,) = violations({path: text}, exceptions={})
    assert found.startswith(path)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "__init__.py",
            "from dbjax import downpour\nfrom dbjax.cluster import Cluster",
        ),
        ("downpour/train.py", "from dbjax import runtime, trace\nimport dbjax.typing"),
        ("downpour/train.py", "from . import replica\nfrom .. import server"),
        ("server/shard.py", "from .layout import Layout\nfrom ..typing import Params"),
        ("runtime/threads.py", "import queue, threading, time, concurrent.futures"),
        ("runtime/ray.py", "def start():\n    import ray"),
        ("checkpoint.py", "from orbax.checkpoint import v1 as ocp"),
        ("data.py", "import os\nos.path.join('a', 'b')\ntime = 'a plain name'"),
    ],
)
def test_a_clean_file_passes(path, text):
    assert violations({path: text}, exceptions={}) == []


def test_an_exception_covers_its_import_only_and_must_be_needed():
    reasons = {("data.py", "threading"): "a lock"}
    assert violations({"data.py": "import threading"}, reasons) == []
    (found,) = violations({"data.py": "import threading, queue"}, reasons)
    assert "imports queue" in found
    (found,) = violations({"data.py": ""}, reasons)
    assert "not needed any more" in found
