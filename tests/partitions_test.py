"""Replicas x partitions, in a process of its own that has eight devices."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests import partitions_check

ROOT = pathlib.Path(__file__).parents[1]
CHECKS = sorted(name for name in vars(partitions_check) if name.startswith("check_"))


@pytest.mark.multidevice
def test_replicas_with_partitions(tmp_path):
    script = pathlib.Path(partitions_check.__file__)
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    # NPROC too: runs must not need a large pool of threads.
    del environment["NPROC"]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == CHECKS
