"""Memory that processes of one machine share: a message's arrays, copied once.

A process copies arrays into a slot and sends a `Loan` along, which says where they lie.
Whoever opens it has arrays in the same memory, and when the last of them is gone the
slot is given back and used again: pages stay warm, and a run that goes on allocates
nothing. Slots have no name in any file system (`memfd_create`), so the kernel frees
them with the last process that has them, however that ends. Nothing is written to
another process's memory but one byte a loan: that it is given back.
"""

import contextlib
import dataclasses
import mmap
import os
import secrets
import select
import struct
import threading
import weakref
from typing import Any, NamedTuple

import jax
import numpy as np

from dbjax.runtime.transport import Gone

SMALL = 16 * 1024
"""Bytes below which arrays go with the message itself."""

UNUSED = 256
"""A slot that is free for so many loans is given up."""

_HEADER = mmap.PAGESIZE
_FILL = struct.Struct("=Q")  # how often a slot has been filled: the header's last bytes
_FILL_AT = _HEADER - _FILL.size
_LENT, _RETURNED = 1, 2
_ALIGNED = 64  # bytes, as XLA wants arrays that it takes in place


class Place(NamedTuple):
    """Where a process's memory is found, on a machine that is not named.

    Attributes:
      pid: the process.
      fd: its descriptor of a page that begins with the token.
      token: says whether that process is the one that was meant.
    """

    pid: int
    fd: int
    token: bytes


class Loan(NamedTuple):
    """A slot, as lent to one reader.

    Attributes:
      owner: whose it is.
      slot: its number.
      fd: the owner's descriptor of it.
      capacity: bytes, without the header.
      fill: how often it has been filled.
      grant: the byte of the header that gives it back.
      slots: all that the owner still has.
    """

    owner: Place
    slot: int
    fd: int
    capacity: int
    fill: int
    grant: int
    slots: tuple[int, ...]


class Packed(NamedTuple):
    """A tree whose arrays lie elsewhere.

    Attributes:
      tree: with an `At` in the place of each array.
      loan: where they are.
    """

    tree: Any
    loan: Loan


@dataclasses.dataclass(frozen=True, slots=True)
class At:
    """Where an array lies in a slot."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Shown:
    """A tree in memory that any number of readers look at, while this lives."""

    def __init__(self, memory: "Memory", tree: Any, slot: "_Slot") -> None:
        self._memory, self._tree, self._slot = memory, tree, slot
        weakref.finalize(self, slot.unpin)

    def to(self, reader: Place) -> Packed | None:
        """Lend it to one of them; None if there are too many."""
        loan = self._memory._grant(self._slot, reader)
        return None if loan is None else Packed(self._tree, loan)

    def here(self) -> Any:
        """Give the tree to this process itself."""
        return _put_back(self._tree, memoryview(self._slot.data).toreadonly())


class Memory:
    """What this process lends, and what it has borrowed.

    Attributes:
      place: where others find it; None where the system has no such memory.
    """

    def __init__(self) -> None:
        self.place: Place | None = None
        self._lock = threading.Lock()
        self._slots: dict[int, _Slot] = {}
        self._made = self._lent = 0
        self._readers: dict[bytes, int | None] = {}  # a pidfd, None if it is dead
        self._maps: dict[Place, dict[int, tuple[mmap.mmap, mmap.mmap]]] = {}
        if hasattr(os, "memfd_create") and hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                token, fd = secrets.token_bytes(16), os.memfd_create("dbjax")
                os.write(fd, token)
                self.place = Place(os.getpid(), fd, token)

    # What is lent.

    def lend(self, tree: Any, reader: Place) -> Any:
        """Copy a tree's arrays to where a reader finds them.

        Returns:
          A `Packed`, or the tree itself where it is small or memory is short.
        """
        slot, packed = self._fill(tree)
        if slot is None:
            return tree
        loan = self._grant(slot, reader)
        slot.unpin()
        return tree if loan is None else Packed(packed, loan)

    def show(self, tree: Any) -> Shown | None:
        """Copy a tree's arrays to where many find them; None where memory is short."""
        slot, packed = self._fill(tree)
        return None if slot is None else Shown(self, packed, slot)

    def close(self) -> None:
        """Give up what nobody uses."""
        with self._lock:
            self._look_for_the_dead()
            for slot in list(self._slots.values()):
                if self._is_free(slot):
                    del self._slots[slot.number]

    def _fill(self, tree: Any) -> tuple["_Slot | None", Any]:
        """Give a slot with a tree's arrays, pinned, and the tree without them."""
        size, places, arrays = 0, [], []
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
                places.append(At(size, leaf.dtype, leaf.shape))
                arrays.append(leaf)
                size += -(-leaf.nbytes // _ALIGNED) * _ALIGNED
        if size < SMALL:
            return None, tree
        with self._lock:
            slot = self._free_slot(size)
        if slot is None:
            return None, tree
        for at, array in zip(places, arrays, strict=True):
            np.copyto(_array(slot.data, at), array)
        left = iter(places)

        def place(leaf: Any) -> Any:
            lies_there = isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject
            return next(left) if lies_there else leaf

        return slot, jax.tree.map(place, tree)

    def _grant(self, slot: "_Slot", reader: Place) -> Loan | None:
        assert self.place is not None
        with self._lock:
            if reader.token not in self._readers:
                self._readers[reader.token] = _pidfd(reader.pid)
            grant = slot.grant(reader.token)
            if grant is None:
                return None
            return Loan(
                *(self.place, slot.number, slot.fd, slot.capacity, slot.filled, grant),
                tuple(self._slots),
            )

    def _free_slot(self, size: int) -> "_Slot | None":
        """Give a slot that nobody uses, pinned; a new one if there is none."""
        self._lent += 1
        slot = self._fitting(size)
        if slot is None:
            self._look_for_the_dead()
            slot = self._fitting(size)
        if slot is None:
            for other in list(self._slots.values()):
                if self._is_free(other) and self._lent - other.used > UNUSED:
                    del self._slots[other.number]
            try:
                slot = _Slot(self._made, size)
            except OSError:
                return None
            self._made += 1
            self._slots[slot.number] = slot
        slot.refill(self._lent)
        return slot

    def _fitting(self, size: int) -> "_Slot | None":
        fitting = [
            slot
            for slot in self._slots.values()
            if size <= slot.capacity <= 4 * size and self._is_free(slot)
        ]
        return min(fitting, key=lambda slot: slot.capacity, default=None)

    def _is_free(self, slot: "_Slot") -> bool:
        return slot.is_free([t for t, fd in self._readers.items() if fd is None])

    def _look_for_the_dead(self) -> None:
        for token, fd in self._readers.items():
            if fd is not None and _is_dead(fd):
                os.close(fd)
                self._readers[token] = None

    # What is borrowed.

    def reads(self, place: Place) -> bool:
        """Whether this process can open what another one lends."""
        with contextlib.suppress(OSError):
            fd = _open(place, place.fd)
            try:
                return os.pread(fd, len(place.token), 0) == place.token
            finally:
                os.close(fd)
        return False

    def open(self, packed: Packed) -> Any:
        """Give a tree its arrays, read-only, where they lie.

        Raises:
          Gone: their owner is no more.
        """
        loan = packed.loan
        header, data = self._mapped(loan)
        if _FILL.unpack_from(header, _FILL_AT)[0] != loan.fill:
            raise Gone("what was lent has been taken back")
        # Of views, NumPy knows only the owner of the memory: this one object, which
        # they all have by a memoryview, is gone when they are.
        whole = np.frombuffer(data, np.uint8)
        weakref.finalize(whole, _give_back, header, loan.grant)
        return _put_back(packed.tree, whole.data)

    def _mapped(self, loan: Loan) -> tuple[mmap.mmap, mmap.mmap]:
        with self._lock:
            maps = self._maps.get(loan.owner)
            if maps is None:
                for other in [p for p in self._maps if not self.reads(p)]:
                    del self._maps[other]  # which has died
                maps = self._maps[loan.owner] = {}
            for number in [n for n in maps if n not in loan.slots]:
                if number < loan.slot:  # an older message may come late
                    del maps[number]
            if loan.slot not in maps:
                maps[loan.slot] = _map(loan)
            return maps[loan.slot]


class _Slot:
    """Memory that can be lent: a header, and room for arrays."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.capacity = number, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create("dbjax")
        weakref.finalize(self, os.close, self.fd)
        # At once, or a machine that is full would kill whoever touches a page first.
        os.posix_fallocate(self.fd, 0, _HEADER + self.capacity)
        self._header = mmap.mmap(self.fd, _HEADER)
        self.data = mmap.mmap(self.fd, self.capacity, offset=_HEADER)
        self.filled = self.used = 0
        self._pinned = False
        self._grants: dict[int, bytes] = {}

    def refill(self, turn: int) -> None:
        """Take it for other arrays."""
        self.filled, self.used, self._pinned = self.filled + 1, turn, True
        self._grants = {}
        _FILL.pack_into(self._header, _FILL_AT, self.filled)

    def unpin(self) -> None:
        """From now on only its readers need it."""
        self._pinned = False

    def grant(self, token: bytes) -> int | None:
        """Lend it to one more; None if the header has no room."""
        for grant in range(_FILL_AT):
            if self._grants.get(grant) is None or self._header[grant] == _RETURNED:
                self._grants[grant] = token
                self._header[grant] = _LENT
                return grant
        return None

    def is_free(self, dead: list[bytes]) -> bool:
        """Whether nobody alive uses it."""
        return not self._pinned and all(
            self._header[grant] == _RETURNED or token in dead
            for grant, token in self._grants.items()
        )


def _array(buffer: Any, at: At) -> np.ndarray:
    return np.ndarray(at.shape, at.dtype, buffer, at.offset)


def _put_back(tree: Any, buffer: memoryview) -> Any:
    return jax.tree.map(lambda x: _array(buffer, x) if isinstance(x, At) else x, tree)


def _give_back(header: mmap.mmap, grant: int) -> None:
    header[grant] = _RETURNED


def _open(place: Place, fd: int, flags: int = os.O_RDONLY) -> int:
    return os.open(f"/proc/{place.pid}/fd/{fd}", flags | os.O_CLOEXEC)


def _map(loan: Loan) -> tuple[mmap.mmap, mmap.mmap]:
    try:
        fd = _open(loan.owner, loan.fd, os.O_RDWR)
    except OSError as error:
        raise Gone(f"process {loan.owner.pid}, which lent this: {error}") from None
    try:
        header = mmap.mmap(fd, _HEADER)
        data = mmap.mmap(
            fd, loan.capacity, prot=mmap.PROT_READ, offset=_HEADER,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise Gone(f"process {loan.owner.pid}, which lent this: {error}") from None
    finally:
        os.close(fd)
    return header, data


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _is_dead(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
