"""Many minibatches as one pytree, for programs that run over a chunk of steps."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dbjax.data import checks
from dbjax.typing import Batch, Data


def stack(
    data: Data, replicas: Sequence[int] | np.ndarray, steps: Sequence[int] | np.ndarray
) -> Batch:
    """Give `K` minibatches of any data as one pytree of arrays `[K, B, ...]`.

    Args:
        data: anything with `batch(replica, step)`; where it has `batches`, that is
          used.
        replicas: `[K]` integers.
        steps: `[K]` integers, each a step of the replica beside it.

    Returns:
        A pytree like a batch, with `K` in front of every shape.

    Raises:
        ValueError: a batch differs from the first one in structure, shape or dtype; the
          message names replica and step.

    Examples:
        >>> import numpy as np
        >>> from dbjax.data import from_arrays, stack
        >>> data = from_arrays({"x": np.arange(12).reshape(6, 2)}, batch_size=3)
        >>> stack(data, replicas=[0, 1, 0, 1], steps=[0, 0, 1, 1])["x"].shape
        (4, 3, 2)
    """
    batches = getattr(data, "batches", None)
    if batches is not None:
        return batches(replicas, steps)
    pairs = checks.pairs(replicas, steps)
    if not pairs:
        raise ValueError("no batches to stack: replicas and steps are empty")
    rows = []
    for replica, step in pairs:
        row = jax.tree.map(np.asarray, data.batch(replica, step))
        rows.append(row)
        if _spec(row) != _spec(rows[0]):
            first = "replica {}, step {}".format(*pairs[0])
            raise ValueError(
                f"the batch of replica {replica}, step {step} has {_describe(row)}, "
                f"but that of {first} has {_describe(rows[0])}: all batches of a run "
                "need the same shapes"
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _spec(batch: Batch) -> tuple[Any, list[tuple[tuple[int, ...], np.dtype]]]:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _describe(batch: Batch) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return ", ".join(
        f"{jax.tree_util.keystr(path) or 'an array'} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    )
