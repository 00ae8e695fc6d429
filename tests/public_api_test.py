"""What dbjax shows at its door, and that coming in has no side effects."""

import ast
import inspect
import pathlib
import subprocess
import sys
import types

import pytest

import dbjax

PUBLIC = {
    # training, and what happened in it
    "downpour",
    "sandblaster",
    "from_arrays",
    "from_iterators",
    "probe",
    "replay",
    "simulate",
    "sweep",
    "Trace",
    # what is trained
    "models",
    "from_linen",
    "from_nnx",
    # who runs, in which order
    "asynchronous",
    "delay_threshold",
    "ssp",
    "synchronous",
    "Emulated",
    "Threads",
    "Ray",
    # batch methods, and the batches they see
    "LBFGS",
    "GradientDescent",
    "ConjugateGradient",
    "OWLQN",
    "BoxLBFGS",
    "FullBatch",
    "MultiBatch",
    "ProgressiveBatch",
    # devices
    "make_mesh",
    "shard_params",
    # a cluster, and the distributions it is made of
    "Cluster",
    "Constant",
    "Empirical",
    "Exponential",
    "Failures",
    "Gamma",
    "LogNormal",
    "Pareto",
    "Slow",
    "Slowness",
    # optimizers
    "adagrad",
    "delay_gradients",
    "schedules",
    "lbfgs",
    "scale_by_lbfgs",
    "stale",
    "stale_params",
}


def test_exactly_these_names_are_public():
    assert sorted(dbjax.__all__) == sorted(PUBLIC)


def test_nothing_else_is_in_sight():
    """Only rooms, which Python itself puts there when they are imported."""
    others = {name for name in vars(dbjax) if not name.startswith("_")} - PUBLIC
    for name in others:
        module = getattr(dbjax, name)
        assert isinstance(module, types.ModuleType), name
        assert module.__name__ == f"dbjax.{name}"


def test_only_algorithms_models_and_schedules_are_rooms_with_a_public_door():
    rooms = {name for name in PUBLIC if inspect.ismodule(getattr(dbjax, name))}
    assert rooms == {"downpour", "sandblaster", "models", "schedules"}
    assert callable(dbjax.downpour.train) and callable(dbjax.sandblaster.minimize)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_has_a_docstring(name):
    value = getattr(dbjax, name)
    assert (value.__doc__ or "").strip()
    assert not value.__doc__.startswith(f"{name}("), "made up by the dataclass"
    for member, method in vars(value).items() if inspect.isclass(value) else ():
        method = getattr(method, "__func__", method)  # inside a class or static method
        if isinstance(method, types.FunctionType | property) and member[0] != "_":
            assert method.__doc__, f"{name}.{member}"


def test_the_door_lists_one_name_per_line_and_does_nothing_else():
    text = pathlib.Path(dbjax.__file__).read_text()
    docstring, *body, names = ast.parse(text).body
    assert isinstance(docstring, ast.Expr)
    imports = [line for line in body if isinstance(line, ast.Import | ast.ImportFrom)]
    assert imports == body
    assert isinstance(names, ast.Assign)
    assert ast.unparse(names.targets[0]) == "__all__"
    assert isinstance(names.value, ast.List | ast.Tuple)
    imported = [alias.lineno for line in imports for alias in line.names]
    listed = [name.lineno for name in names.value.elts]
    assert len(set(imported)) == len(imported)
    assert len(set(listed)) == len(listed)


def test_import_has_no_side_effects():
    """No device is taken, no thread started, ray not loaded, nothing logged."""
    script = """
import sys, threading
import dbjax
assert threading.active_count() == 1, threading.enumerate()
assert "ray" not in sys.modules
import logging
assert not logging.getLogger().handlers
import jax
jax.config.update("jax_num_cpu_devices", 3)  # an error once a device is in use
assert jax.device_count() == 3
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
