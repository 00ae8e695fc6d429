"""Programs on several devices, launched so that they cannot wait for one another.

A device that has reached a collective holds a thread of XLA's pool until all others of
its program are there. With several programs under way on the same devices, each may
hold the threads that the other needs, and the process hangs or is aborted. So a device
runs one such program at a time, to its end: then at most one thread a device is held,
and the pool has at least as many threads as there are devices.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

# The pool is the process's, so its devices' turns are, too. Reentrant: a loss that is
# looked at while its devices are held may be launched from the same thread.
_turns: collections.defaultdict[jax.Device, threading.RLock] = collections.defaultdict(
    threading.RLock
)


@contextlib.contextmanager
def turn(mesh: Mesh) -> Iterator[None]:
    """Have a mesh's devices for oneself, with the mesh set for what is traced."""
    with contextlib.ExitStack() as held:
        # In one order everywhere, so that meshes which overlap do not hold each other.
        for device in sorted(mesh.devices.flat, key=lambda device: device.id):
            held.enter_context(_turns[device])
        held.enter_context(jax.set_mesh(mesh))
        yield


def launch(mesh: Mesh, program: Callable[..., Any], *args: Any) -> Any:
    """Call `program(*args)` in the devices' turn and wait for its results.

    Args:
      mesh: the devices that the program runs on.
      program: a jitted function.
      *args: its arguments.

    Returns:
      What it returns, ready.
    """
    with turn(mesh):
        return jax.block_until_ready(program(*args))
