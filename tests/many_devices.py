"""Runs a script in a process of its own, which has eight devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(script: pathlib.Path, **environment: str) -> list[str]:
    """Give the lines it printed; it must end well, and without a warning."""
    settings = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "NPROC": "64",  # a small pool of threads may deadlock in collectives
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        env=settings | environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()
