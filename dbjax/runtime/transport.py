"""Objects in processes of their own, called by address: all that is asked of Ray.

A process holds one object and has two lanes. Calls on `WORK` are carried out one at a
time, in the order in which one caller sent them; those on `SIDE` beside them, several
at once. Arrays in messages and replies are NumPy's; what arrives is read-only.
"""

from collections.abc import Callable
from typing import Any, Protocol

WORK, SIDE = "work", "side"


class Gone(RuntimeError):
    """The process that was asked is no more, or cannot be reached."""


class Deposed(Gone):
    """The process is there, but another one has taken its place."""


class Late(TimeoutError):
    """No answer has come in time."""


class Reply(Protocol):
    """An answer under way."""

    def result(self, timeout: float | None = None) -> Any:
        """Wait for it.

        Raises:
          Gone: whoever was asked is no more.
          Late: after `timeout` seconds.
          Exception: whatever the call has raised.
        """
        ...

    def then(self, call: Callable[["Reply"], None]) -> None:
        """Have `call(self)` called, briefly and in some thread, once it is there."""
        ...


class Address(Protocol):
    """Where an object lives; may be sent to other processes."""

    @property
    def name(self) -> str:
        """What it is called in errors."""
        ...

    def ask(self, method: str, *args: Any, lane: str = WORK) -> Reply:
        """Call a method of the object."""
        ...


class Shared(Protocol):
    """A value that many processes read; sent as a reference."""

    def get(self, timeout: float | None = None) -> Any:
        """Give the value; its arrays are read-only, and in place where they can be.

        Raises:
          Gone: it was lost with the process that shared it.
          Late: after `timeout` seconds.
        """
        ...


class Transport(Protocol):
    """Starts processes and ends them."""

    def share(self, what: str, value: Any, keyed: bool = False) -> Shared:
        """Put a value where all processes can read it.

        References to equal values are equal if `keyed`.

        Raises:
          TypeError: it cannot be sent; names `what`.
          MemoryError: it does not fit.
        """
        ...

    @property
    def share_there(self) -> Callable[[str, Any], Shared]:
        """A function like `share`, to be sent along and called in any process."""
        ...

    def host(
        self,
        name: str,
        make: Callable[[], Any],
        *,
        kind: str = "replica",
        devices: int = 1,
        away_from: Address | None = None,
        processes: int = 1,
    ) -> tuple[Address, Reply]:
        """Start a process, and in it the object `make()`.

        Several are a group that shares a `jax.distributed` world and ends as one. Who
        leads it makes `make(group)`, each follower `make()`; see `dbjax.runtime.group`.

        Args:
          name: of the address.
          make: makes the object, in its process.
          kind: "replica" or "shard": replicas are packed, shards spread.
          devices: how many local devices it is to have, all processes together.
          away_from: on another machine than this one, if there is another.
          processes: how many to start.

        Returns:
          Its address, or the leader's, which may be asked at once, and the reply that
          says it is there. Asked on `SIDE` whether it is "alive", it answers when it is
          let go, and is `Gone` if it dies before.
        """
        ...

    def end(self, address: Address) -> None:
        """Let a process go, which is not needed any more."""
        ...

    def kill(self, address: Address) -> None:
        """End a process at once, whatever it does."""
        ...
