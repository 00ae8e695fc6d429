"""The plain arguments of a Sandblaster run, checked before anything runs."""

import math
import os
import pathlib
import re
from typing import Any, NamedTuple

from jax.sharding import Mesh

from dbjax.data import checks
from dbjax.mesh import REPLICA, Rules
from dbjax.runtime.emulated import Emulated
from dbjax.runtime.ray import Ray
from dbjax.runtime.threads import Threads
from dbjax.sandblaster.batches import Batches
from dbjax.sandblaster.methods.base import Method
from dbjax.sandblaster.portions import Portions
from dbjax.sandblaster.schedule import desk_for
from dbjax.typing import EvalFn


class Arguments(NamedTuple):
    """What `minimize` was asked for, apart from the problem; see there."""

    method: Method
    batches: Batches
    replicas: int
    shards: int
    iterations: int
    tolerance: float
    push_every: int
    strategy: str
    copies: int
    split: str
    seed: int
    mesh: Mesh | None
    rules: Rules | None
    eval_fn: EvalFn | None
    eval_every: int
    checkpoint_dir: pathlib.Path | None
    checkpoint_every: int
    runtime: Emulated | Threads | Ray

    def describe(self) -> dict[str, Any]:
        """Those that decide what a run does, JSON-able."""
        return {
            "algorithm": "sandblaster",
            # Where a line search's functions lie is different in each process.
            "method": re.sub(r" at 0x[0-9a-f]+", "", repr(self.method)),
            "batches": repr(self.batches),
            "replicas": self.replicas,
            "shards": self.shards,
            "push_every": self.push_every,
            "strategy": self.strategy,
            "copies": self.copies,
        }

    def describe_runtime(self) -> str:
        """The runtime, but for where on Ray it is and how long one waits there."""
        return "Ray" if isinstance(self.runtime, Ray) else repr(self.runtime)

    @property
    def partitioned(self) -> bool:
        """Whether replicas are on a mesh and vectors on shards, not on the mesh too."""
        if self.mesh is None:
            return False
        return REPLICA in self.mesh.axis_names or isinstance(self.runtime, Threads)

    def desk(self, portions: int) -> Portions:
        """Make a desk that hands out portions of the batch."""
        return desk_for(
            self.strategy,
            portions=portions,
            replicas=self.replicas,
            shards=self.shards,
            push_every=self.push_every,
            copies=self.copies,
        )


def check_arguments(**given: Any) -> Arguments:
    """Check and complete the arguments.

    Args:
      **given: the attributes of `Arguments`.

    Returns:
      The arguments.

    Raises:
      ValueError, TypeError: naming the argument, its value, and what is allowed.
    """
    for name in ("replicas", "shards", "push_every", "copies"):
        given[name] = checks.positive(name, given[name])
    for name in ("iterations", "seed"):
        given[name] = checks.natural(name, given[name])
    for name in ("eval_every", "checkpoint_every"):
        if given[name] is not None:
            given[name] = checks.positive(name, given[name])
    given["eval_every"] = given["eval_every"] or 1
    given["checkpoint_every"] = given["checkpoint_every"] or max(
        1, given["iterations"] // 10
    )
    _check_kinds(**given)
    tolerance = given["tolerance"]
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: allowed are numbers from 0")
    if given["mesh"] is None and given["rules"] is not None:
        raise ValueError("rules are of a mesh: give mesh= as well")
    if isinstance(given["runtime"], Ray):
        _check_ray(given["runtime"], given["mesh"])
    arguments = Arguments(**given)
    if given["mesh"] is not None and given["shards"] > 1 and not arguments.partitioned:
        raise ValueError(
            f"shards={given['shards']}: vectors lie on the mesh, which all replicas "
            'share; leave shards at 1, or give the mesh an axis "replica"'
        )
    directory = given["checkpoint_dir"]
    if directory is not None:
        arguments = arguments._replace(checkpoint_dir=pathlib.Path(directory))
    return arguments


def _check_kinds(**given: Any) -> None:
    """Raise if something is not at all what it should be."""
    method = given["method"]
    if isinstance(method, type) or not hasattr(method, "direct"):
        raise TypeError(f"method must be one such as LBFGS(), got {method!r}")
    if not hasattr(given["batches"], "trial"):
        raise TypeError(
            f"batches must be a rule such as FullBatch(), got {given['batches']!r}"
        )
    if not isinstance(given["runtime"], Emulated | Threads | Ray):
        raise ValueError(
            "runtime must be Emulated(...), Threads(...) or Ray(...), got "
            f"{given['runtime']!r}"
        )
    if given["eval_fn"] is not None and not callable(given["eval_fn"]):
        raise ValueError(f"eval_fn must be a function, got {given['eval_fn']!r}")
    if given["mesh"] is not None and not isinstance(given["mesh"], Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {given['mesh']!r}")
    directory = given["checkpoint_dir"]
    if directory is not None and not isinstance(directory, str | os.PathLike):
        raise ValueError(f"checkpoint_dir must be a path, got {directory!r}")


def _check_ray(runtime: Ray, mesh: Mesh | None) -> None:
    """Raise where something is asked of Ray that Sandblaster does not have there."""
    if mesh is not None:
        raise ValueError(
            "mesh: with runtime=Ray(...) replicas are not partitioned; use Emulated() "
            "or Threads()"
        )
    names = "standby", "snapshot_every", "replicas_at", "watch", "replica_processes"
    for name in names:
        value = getattr(runtime, name)
        if value != getattr(Ray, name):
            raise ValueError(
                f"runtime: Ray({name}={value!r}) is for Downpour; a batch method goes "
                "on from its checkpoint_dir, with as many replicas as are given"
            )
