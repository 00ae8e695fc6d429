"""What a run says of itself: in its Trace's header, and to one that resumes it."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from dbjax.downpour.arguments import Arguments
from dbjax.downpour.problem import Problem, digest
from dbjax.runtime.lanes import cores


def describe_machine(problem: Problem) -> dict[str, Any]:
    """What a Trace's header says of the problem and the machine.

    Args:
      problem: what is trained.

    Returns:
      JSON-able: leaf shapes and dtypes, sizes, the version of JAX, device and threads;
      how replicas are partitioned, if they are.
    """
    # Not from the data: iterators do not go back.
    shape = problem.batch_spec[1][0] if len(problem.batch_spec) > 1 else ()
    layout = problem.layout
    names = zip(layout.names, layout.shapes, layout.dtypes, strict=True)
    partitions = problem.placement.describe() if problem.placement else {}
    return partitions | {
        "shapes": {n: [list(shape), str(dtype)] for n, shape, dtype in names},
        "shard_sizes": list(layout.sizes),
        "batch_size": int(shape[0]) if shape else 1,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "threads": cores(),
    }


def describe_problem(problem: Problem) -> dict[str, str]:
    """What a checkpoint's arrays depend on, so that a resumed run has the same."""

    def shapes(tree: Any) -> str:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        keys = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
        return ", ".join(f"{key} {leaf.dtype}{list(leaf.shape)}" for key, leaf in keys)

    def state(rule: Any) -> str:
        return "none" if rule is None else shapes(jax.eval_shape(rule.init, params))

    params, local = problem.params, problem.local_optimizer
    return {
        "params": shapes(params),
        "a start of checksum": str(digest(params)),
        "seed": str(problem.seed),
        "split": ", ".join(map(str, problem.layout.sizes)),
        "optimizer state": state(problem.optimizer),
        "local_optimizer state": state(local and local.optimizer),
        "local_optimizer": "none" if local is None else str(local[1:]),
        "batches of": ", ".join(map(str, problem.batch_spec[1:])),
        "provide": ", ".join(problem.provide),
        "version_dtype": str(problem.version_dtype),
    }


def describe_run(
    arguments: Arguments, problem: Problem, kind: str, fingerprint: str = ""
) -> dict[str, Any]:
    """What a checkpoint's note says of its run, for `check_same`.

    Args:
      arguments: those of the run.
      problem: what is trained.
      kind: the kind of runtime.
      fingerprint: of the order of events, where that is known beforehand.

    Returns:
      A part of the note, JSON-able.
    """
    return {
        "kind": kind,
        "arguments": arguments.describe(),
        "problem": describe_problem(problem),
        "fingerprint": fingerprint,
    }


def stream_state(problem: Problem, counts: Sequence[int]) -> Any:
    """Where the data's own iterators stand, for a checkpoint's note.

    Args:
      problem: its data is asked.
      counts: batches that the checkpoint has used, by replica.

    Returns:
      JSON-able; None if the data has no state or has been read further.
    """
    after = getattr(problem.data, "state_after", None)
    return None if after is None else after(counts)


def restore_streams(problem: Problem, state: Any) -> None:
    """Take the data's own iterators back to what `stream_state` gave."""
    if state is not None:
        problem.data.set_state(state)  # type: ignore[attr-defined]


def check_same(note: dict[str, Any], mine: dict[str, Any], directory: Any) -> None:
    """Raise unless a checkpoint is of the run that goes on.

    Args:
      note: the checkpoint's.
      mine: `describe_run` of the run that goes on.
      directory: where the checkpoint is, for the message.

    Raises:
      ValueError: naming the first argument in which they differ.
    """
    where = f"checkpoint_dir {os.fspath(directory)!r}"
    if note.get("kind") != mine["kind"]:
        raise ValueError(f"{where} holds a run of another runtime ({note.get('kind')})")
    theirs = note["arguments"] | note["problem"]
    for name, value in (mine["arguments"] | mine["problem"]).items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{where} holds a run with {name}={theirs.get(name)!r}, not "
                f"{value!r}: use another directory, or the same arguments"
            )
    if note["fingerprint"] != mine["fingerprint"]:
        raise ValueError(f"{where} holds a run on another cluster or seed")
