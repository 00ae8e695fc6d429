"""`minimize` on a mesh, in a process of its own that has eight devices."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.multidevice
def test_on_a_mesh_it_is_the_same_run_and_each_device_holds_its_part():
    script = pathlib.Path(__file__).with_name("mesh_run_check.py")
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "NPROC": "64",  # a small pool of threads may deadlock in collectives
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == [
        "methods 2",
        "short portions agree",
        "samples agree",
        "all-reduces 1 0",
    ]
