"""`minimize` on a mesh, in a process of its own that has eight devices."""

import pathlib

import pytest

from tests import many_devices


@pytest.mark.multidevice
def test_on_a_mesh_it_is_the_same_run_and_each_device_holds_its_part():
    script = pathlib.Path(__file__).with_name("mesh_run_check.py")
    lines = many_devices.run(script, XLA_FLAGS=many_devices.PLAIN_CODE)
    assert lines == [
        "methods 2",
        "short portions agree",
        "samples agree",
        "all-reduces 1 0",
    ]
