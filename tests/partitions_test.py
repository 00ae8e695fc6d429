"""Replicas x partitions, in a process of its own that has eight devices."""

import pathlib

import pytest

from tests import many_devices, partitions_check

CHECKS = sorted(name for name in vars(partitions_check) if name.startswith("check_"))


@pytest.mark.multidevice
def test_replicas_with_partitions():
    script = pathlib.Path(partitions_check.__file__)
    # Without NPROC: runs must not need a large pool of threads.
    lines = many_devices.run(script, NPROC="")
    assert lines == CHECKS
