"""Memory shared by processes: what is read, when it is used again, and by whom not."""

import gc
import multiprocessing
import os
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from dbjax.runtime.shared_memory import SMALL, UNUSED, Memory, Packed, Place
from dbjax.runtime.transport import Gone

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux has memfd_create"
)

LARGE = SMALL // 4 + 1


def tree(value=1.0, size=LARGE):
    return {
        "a": np.full(size, value, np.float32),
        "b": [np.arange(6, dtype=np.int8).reshape(2, 3), None, "text", 3],
        "c": np.zeros((0, 4), np.float64),
        "d": np.full((), value, ml_dtypes.bfloat16),
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, np.ndarray):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        else:
            assert x == y


@pytest.fixture
def writer():
    return Memory()


@pytest.fixture
def reader():
    return Memory()


def test_what_is_lent_is_read_in_place(writer, reader):
    packed = writer.lend(tree(), reader.place)
    got = reader.open(packed)
    same(tree(), got)
    assert not got["a"].flags.writeable and not got["a"].flags.owndata
    array = jax.device_put(got["a"])
    assert array.unsafe_buffer_pointer() == got["a"].ctypes.data


def test_small_messages_go_as_they_are(writer, reader):
    small = tree(size=3)
    assert writer.lend(small, reader.place) is small


def test_a_slot_is_used_again_when_its_last_array_is_gone(writer, reader):
    first = writer.lend(tree(1), reader.place)
    got = reader.open(first)["a"][5:]  # a view keeps it, too
    second = writer.lend(tree(2), reader.place)
    assert second.loan.slot != first.loan.slot
    assert got[0] == 1
    del got
    gc.collect()
    third = writer.lend(tree(3), reader.place)
    assert third.loan.slot == first.loan.slot
    assert reader.open(second)["a"][0] == 2 and reader.open(third)["a"][0] == 3


def test_a_computation_keeps_its_slot(writer, reader):
    packed = writer.lend(tree(1), reader.place)
    array = jax.device_put(reader.open(packed)["a"])
    gc.collect()
    assert writer.lend(tree(2), reader.place).loan.slot != packed.loan.slot
    assert (np.asarray(array) == 1).all()


def test_what_is_not_opened_yet_is_not_written_over(writer, reader):
    lent = [writer.lend(tree(i), reader.place) for i in range(4)]
    assert len({packed.loan.slot for packed in lent}) == 4
    assert [reader.open(packed)["a"][0] for packed in lent] == [0, 1, 2, 3]


def test_what_was_taken_back_is_not_read(writer, reader):
    packed = writer.lend(tree(1), reader.place)
    reader.open(packed)
    gc.collect()
    again = writer.lend(tree(2), reader.place)
    assert again.loan.slot == packed.loan.slot
    with pytest.raises(Gone, match="taken back"):
        reader.open(packed)


def test_many_readers_of_what_is_shown_have_one_copy(writer):
    readers = [Memory() for _ in range(3)]
    shown = writer.show(tree(7))
    packed = [shown.to(reader.place) for reader in readers]
    assert len({one.loan.slot for one in packed}) == 1
    got = [reader.open(one) for reader, one in zip(readers, packed, strict=True)]
    same(shown.here(), tree(7))
    del shown
    for one in got:
        same(one, tree(7))
    assert writer.lend(tree(8), readers[0].place).loan.slot != packed[0].loan.slot
    del one, got
    gc.collect()
    slots = {writer.lend(tree(9), readers[0].place).loan.slot for _ in range(3)}
    assert packed[0].loan.slot in slots


def test_what_is_shown_stays_until_nobody_can_ask_for_it(writer, reader):
    shown = writer.show(tree(1))
    slot = shown.to(reader.place).loan.slot
    lent = [writer.lend(tree(2), reader.place).loan.slot for _ in range(3)]
    assert slot not in lent
    assert reader.open(shown.to(reader.place))["a"][0] == 1


def test_what_does_not_fit_any_more_is_given_up(writer, reader):
    reader.open(writer.lend(tree(size=100 * LARGE), reader.place))
    for _ in range(UNUSED + 1):
        reader.open(writer.lend(tree(), reader.place))
    two = [writer.lend(tree(), reader.place) for _ in range(2)]
    assert min(two[-1].loan.slots) > 0  # the large one was the first
    writer.close()
    assert len(writer.lend(tree(), reader.place).loan.slots) == 3


def test_only_who_has_the_secret_is_a_neighbour(writer, reader):
    assert reader.reads(writer.place)
    assert not reader.reads(writer.place._replace(token=b"x" * 16))
    assert not reader.reads(writer.place._replace(fd=10**6))
    assert not reader.reads(Place(2**22, 3, writer.place.token))


def child(connection, mode):
    memory = Memory()
    connection.send(memory.place)
    if mode == "read":
        got = memory.open(connection.recv())
        connection.send(float(got["a"].sum()))
    else:
        connection.send(memory.lend(tree(5), connection.recv()))
    connection.recv()  # until it is killed


@pytest.fixture
def start():
    context = multiprocessing.get_context("spawn")
    processes = []

    def start(mode):
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there, mode))
        process.start()
        processes.append(process)
        return process, here, here.recv()

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_reader_that_is_killed_gives_back_what_it_had(writer, start):
    process, connection, place = start("read")
    packed = writer.lend(tree(2), place)
    connection.send(packed)
    assert connection.recv() == 2 * LARGE
    assert writer.lend(tree(), place).loan.slot != packed.loan.slot
    process.kill()
    process.join()
    assert writer.lend(tree(), writer.place).loan.slot == packed.loan.slot


def test_what_an_owner_lent_outlives_it_if_it_was_opened(reader, start):
    process, connection, _ = start("lend")
    connection.send(reader.place)
    packed = connection.recv()
    assert isinstance(packed, Packed)
    got = reader.open(packed)
    process.kill()
    process.join()
    same(got, tree(5))


def test_an_owner_that_is_gone_is_named(reader, start):
    process, connection, place = start("lend")
    connection.send(reader.place)
    packed = connection.recv()
    process.kill()
    process.join()
    assert not reader.reads(place)
    with pytest.raises(Gone, match=f"process {process.pid}"):
        reader.open(packed)


def test_no_descriptor_is_left_behind(writer, reader):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    reader.open(writer.lend(tree(), reader.place))
    gc.collect()
    before = descriptors()
    for _ in range(50):
        reader.open(writer.lend(tree(), reader.place))
    gc.collect()
    assert descriptors() == before


def test_without_such_memory_nothing_is_lent(monkeypatch, reader):
    monkeypatch.delattr(os, "memfd_create")
    assert Memory().place is None


def test_where_memory_is_short_the_message_goes_as_it_is(monkeypatch, writer, reader):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = tree()
    assert writer.lend(message, reader.place) is message
    assert writer.show(message) is None
