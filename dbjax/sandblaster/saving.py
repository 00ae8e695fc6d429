"""Checkpoints of a run: its vectors, its scalars, and what is still to be done."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dbjax import checkpoint
from dbjax.sandblaster.coordinator import CoordinatorState, Request
from dbjax.sandblaster.plain import decode, encode

if TYPE_CHECKING:
    from dbjax.sandblaster.running import Running


def save(run: "Running", state: CoordinatorState, rest: Sequence[Request]) -> None:
    """Save where nothing is in flight.

    Args:
      run: the run.
      state: of its coordinator.
      rest: the requests that come next.
    """
    leaves = {}
    names = run.vectors.names()
    for name in names:
        for i, leaf in enumerate(jax.tree.leaves(run.vectors.get(name))):
            leaves[f"{name}/{i}"] = np.asarray(leaf)
    note = {
        "run": _describe(run),
        "vectors": names,
        "state": encode(state),
        "rest": encode(tuple(rest)),
        "rows": run.rows,
        "replicas": run.replicas.save(),
    }
    assert run.a.checkpoint_dir is not None
    checkpoint.save(run.a.checkpoint_dir, state.iterations, leaves, note)


def restore(run: "Running") -> tuple[CoordinatorState, Sequence[Request]] | None:
    """Go on from the newest checkpoint, if there is one.

    Args:
      run: at its beginning.

    Returns:
      The coordinator's state and the requests that come next.

    Raises:
      ValueError: the checkpoint is of another run.
    """
    directory = run.a.checkpoint_dir
    assert directory is not None
    saved = checkpoint.latest(directory)
    if saved is None:
        return None
    note, mine = saved.note, _describe(run)
    for name, value in mine.items():
        theirs = note.get("run", {}).get(name)
        if theirs != value:
            raise ValueError(
                f"checkpoint_dir {str(directory)!r} holds a run with {name}={theirs!r},"
                f" not {value!r}: use another directory, or the same arguments"
            )
    treedef = jax.tree.structure(run.vectors.get("x"))
    for name in note["vectors"]:
        places = range(treedef.num_leaves)
        leaves = [saved.leaves[f"{name}/{i}"] for i in places]
        run.vectors.put(name, treedef.unflatten(leaves))
    _check_constants(run, saved.leaves)
    run.rows = note["rows"]
    run.replicas.restore(note["replicas"])
    run.resumed_at = saved.step
    return run.coordinator.resume(decode(note["state"]), decode(note["rest"]))


def _check_constants(run: "Running", saved: Mapping[str, np.ndarray]) -> None:
    """Raise unless the method's arrays are those saved; as text they may look alike."""
    assert run.a.checkpoint_dir is not None
    for name, vector in run.a.method.constants(run.vectors.get("x")).items():
        for i, leaf in enumerate(jax.tree.leaves(vector)):
            if not np.array_equal(np.asarray(leaf), saved[f"{name}/{i}"]):
                raise ValueError(
                    f"checkpoint_dir {str(run.a.checkpoint_dir)!r} holds a run with "
                    f"another {name}: use another directory, or the same arguments"
                )


def _describe(run: "Running") -> dict[str, Any]:
    """What must be the same when a run goes on."""
    layout = run.layout
    return {
        **run.a.describe(),
        "runtime": run.a.describe_runtime(),
        "params": [
            f"{name} {dtype}{list(shape)}"
            for name, shape, dtype in zip(
                layout.names, layout.shapes, layout.dtypes, strict=True
            )
        ],
        "examples": list(run.problem.examples),
        "tolerance": run.a.tolerance,
        "seed": run.a.seed,
    }
