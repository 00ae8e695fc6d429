"""Runs a script in a process of its own, which has eight devices."""

import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]

# For scripts that count bytes and compare with a tolerance: what is partitioned and
# exchanged is decided before LLVM turns it into machine code, which takes the time.
PLAIN_CODE = "--xla_backend_optimization_level=0"


def run(script: pathlib.Path, *args: str, **environment: str) -> list[str]:
    """Give the lines it printed; it must end well, and without a warning."""
    settings = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "NPROC": "64",  # a small pool of threads may deadlock in collectives
        "PYTHONPATH": str(ROOT),
        # What several runs compile alike is compiled once.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with tempfile.TemporaryDirectory() as programs:
        settings["JAX_COMPILATION_CACHE_DIR"] = programs
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script), *args],
            capture_output=True,
            text=True,
            env=settings | environment,
            timeout=400,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()
