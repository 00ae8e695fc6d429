"""Who can read this process's memory, and what is said to those who can.

Messages to and from a process on another machine carry their arrays themselves, and so
do the first ones to a neighbour: who can read a secret of ours in our memory is one.
"""

import collections
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dbjax.runtime.line import Line, Way
from dbjax.runtime.shared_memory import Memory, Packed, Place, Shown
from dbjax.runtime.transport import Shared


class Greeting(NamedTuple):
    """What processes tell each other in each message.

    Attributes:
      place: where the sender's memory is found.
      reads: whether the sender can read the other's.
    """

    place: Place | None
    reads: bool


class Neighbours:
    """What this process knows of the others that it talks to."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._read: dict[Place, bool] = {}
        self._heard: dict[Any, Greeting] = {}
        self._ways: collections.defaultdict[Any, Way] = collections.defaultdict(Way)

    def greet(self, other: Any) -> Greeting:
        """What to tell an actor."""
        heard = self._heard.get(other)
        return self.reply_to(heard) if heard else Greeting(self.memory.place, False)

    def reply_to(self, greeting: Greeting) -> Greeting:
        """What to tell whoever has sent this."""
        place = greeting.place
        if place is not None and place not in self._read:
            self._read[place] = self.memory.reads(place)
        reads = place is not None and self._read[place]
        return Greeting(self.memory.place, reads)

    def hear(self, other: Any, greeting: Greeting) -> None:
        """Take note of what an actor has told."""
        self._heard[other] = greeting

    def reader(self, other: Any) -> Place | None:
        """An actor that can read what this process lends."""
        heard = self._heard.get(other)
        return heard.place if heard is not None and heard.reads else None

    def way(self, other: Any) -> Way:
        """How calls get to an actor."""
        return self._ways[other]

    def line(self, other: Any) -> Line | None:
        """Give the line to an actor, if there is one: both can read the other's."""
        place = self.reader(other)
        if place is None or not self.greet(other).reads:
            return None
        return self._ways[other].line(place)

    def is_far(self, other: Any) -> bool:
        """Whether it is known that there will be no line to an actor."""
        return other in self._heard and self.reader(other) is None

    def pack(self, greeting: Greeting, message: Any, reader: Place | None) -> Any:
        """Give what is sent; `reader`: a neighbour to whom arrays are lent, or None."""
        message = jax.tree.map(
            lambda x: x.to(reader) if isinstance(x, Published) else x, message
        )
        if reader is None:
            return greeting, message
        wire = greeting, self.memory.lend(message, reader)
        try:
            return _pickled(wire)
        except Exception:  # Ray knows better how, or says why not
            return wire

    def unpack(self, wire: Any) -> tuple[Greeting, Any]:
        """Give the greeting and the message of what was sent."""
        greeting, message = pickle.loads(wire) if isinstance(wire, bytes) else wire
        return greeting, jax.tree.map(
            lambda x: Here(self._open(x.value)) if isinstance(x, Here) else x,
            self._open(message),
        )

    def _open(self, message: Any) -> Any:
        return self.memory.open(message) if isinstance(message, Packed) else message

    def forget(self) -> None:
        """Give up what was lent to processes that are no more."""
        self._heard, self._read = {}, {}
        self._ways.clear()
        self.memory.close()


@functools.cache
def neighbours() -> Neighbours:
    """Give this process's: its memory is one, whatever runs in it."""
    return Neighbours()


class _Pickler(pickle.Pickler):
    """Pickles what is the same in all processes; much faster than Ray does."""

    def reducer_override(self, obj: Any) -> Any:
        for what in (obj, type(obj)):
            home = getattr(what, "__module__", None) or ""
            # Ray counts its references; what a script defines is only there.
            if home == "__main__" or home.partition(".")[0] == "ray":
                raise pickle.PicklingError(f"{what!r} is of {home}")
        return NotImplemented


def _pickled(message: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(message)
    return file.getvalue()


class Here:
    """A value that is shared in memory; see `Shared`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self, timeout: float | None = None) -> Any:
        """See `Shared.get`."""
        return self.value


class Published:
    """A value that this process shares: in memory, and in a store with who is far.

    Args:
      what: what it is, for errors.
      value: it.
      share: puts it into the store.
    """

    def __init__(
        self, what: str, value: Any, share: Callable[[str, Any], Shared]
    ) -> None:
        self._what, self._value, self._share = what, value, share
        self._shown: Shown | None = None
        self._shared: Shared | None = None
        self._lock = threading.Lock()

    def to(self, reader: Place | None) -> Shared:
        """What to send to somebody; the first one decides where the value lies."""
        with self._lock:
            value, self._value = self._value, None  # others may want its memory
            if value is not None and reader is not None:
                self._shown = neighbours().memory.show(value)
            packed = None
            if self._shown is not None and reader is not None:
                packed = self._shown.to(reader)
            if packed is not None:
                return Here(packed)
            if self._shared is None:
                if self._shown is not None:
                    value = self._shown.here()
                self._shared = self._share(self._what, value)
            return self._shared

    def get(self, timeout: float | None = None) -> Any:
        """See `Shared.get`."""
        return self.to(None).get(timeout)

    def __reduce__(self) -> Any:
        return _itself, (self.to(None),)


def _itself(shared: Shared) -> Shared:
    return shared
