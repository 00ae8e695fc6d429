"""The notebooks are what their sources say, and run from top to bottom."""

import ast
import os
import pathlib
import re

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "colab"

# What each is run with here; with its own parameters it takes a minute or so.
SMOKE = {
    "01_downpour": {"STEPS": 160, "REPLICAS": 6, "CROWD": 12, "RATES": 2},
    "02_sandblaster": {"ITERATIONS": 10, "REPLICAS": 4, "STEPS": 120, "MACHINES": 60},
    "03_partitions": {"STEPS": 20, "WIDTH": 64, "PARTITIONS": (2,)},
    "04_record_and_replay": {"STEPS": 120, "REPLICAS": 3, "RATES": 2},
    "05_the_laboratory": {
        "STEPS": 40,
        "RATES": 2,
        "BATTERY": "--smoke --only=logistic --clusters=equal --seeds=2 --budget=1",
    },
}


def read(name):
    return jupytext.read(FOLDER / f"{name}.py")


def with_parameters(notebook, values):
    """The same notebook, with other values in its cell of parameters."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    known = {node.targets[0].id for node in ast.parse(cell.source).body}
    assert set(values) <= known
    lines = (f"{name} = {value!r}" for name, value in values.items())
    cell.source = "\n".join([cell.source, *lines])
    return notebook


def test_every_notebook_is_run_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SMOKE)
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMOKE)


@pytest.mark.parametrize("name", SMOKE)
def test_notebook_is_made_of_its_source(name):
    source = read(name)
    made = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(made)
    same = "run make notebooks, and commit what it changes"
    assert [(c.cell_type, c.source, c.metadata) for c in made.cells] == [
        (c.cell_type, c.source, c.metadata) for c in source.cells
    ], same
    assert made.metadata.kernelspec == source.metadata.kernelspec, same
    assert not any(c.get("outputs") or c.get("execution_count") for c in made.cells)


@pytest.mark.parametrize("name", SMOKE)
def test_notebook_begins_with_text_parameters_and_installation(name):
    text, parameters, install = read(name).cells[:3]
    assert text.source.startswith(f"# {name[:2]} ")
    assert "Colab" in text.source
    assert parameters.metadata["tags"] == ["parameters"]
    assert 'find_spec("dbjax") is None' in install.source
    assert re.search(r"^ +%pip install .*\{SOURCE\}", install.source, re.MULTILINE)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Compiling is what takes time here: do little of it, and nothing twice.

    Each run makes its functions anew, so equal programs are found on disk only.
    """
    return {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.mark.notebooks
@pytest.mark.parametrize("name", SMOKE)
def test_notebook_runs(name, environment):
    notebook = with_parameters(read(name), SMOKE[name])
    place = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(notebook, timeout=600, resources=place)
    client.execute(env=environment)  # raises what a cell raises
    outputs = [output for c in notebook.cells for output in c.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
    said = "".join(o.text for o in outputs if o.get("name") == "stderr")
    assert "Warning" not in said, said  # XLA may say there that a compiler was slow
