"""Partitioned layers and networks, in a process of its own that has eight devices."""

import pathlib

import pytest

from dbjax.models import halo
from tests import many_devices


@pytest.mark.multidevice
def test_partitions_agree_and_send_exactly_the_borders():
    script = pathlib.Path(__file__).with_name("partition_check.py")
    lines = many_devices.run(script, XLA_FLAGS=many_devices.PLAIN_CODE)
    assert lines == [
        "network agrees",
        "examples may be cut too",
        "layers agree",
        "errors say why",
    ]


@pytest.mark.parametrize(
    ("rows", "above", "below", "parts", "expected"),
    [
        (8, 1, 2, 1, 0),
        (8, 1, 2, 2, 3),
        (8, 9, 0, 8, 7),  # of nine rows above, two are beyond all images
        (8, 4, 5, 8, 9),
        (8, 5, 0, 2, 4),  # there is one device above, with four rows
    ],
)
def test_halo_bytes(rows, above, below, parts, expected):
    assert halo.halo_bytes(rows, above, below, parts, row_bytes=10) == 10 * expected
