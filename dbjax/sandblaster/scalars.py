"""The coordinator's arithmetic: float64 on the host's CPU, whatever the vectors are.

Shards add products up in float64; what the coordinator makes of these is not rounded to
float32 again, and is too small to be worth an accelerator.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of scalars and small arrays compute in float64, on the CPU.

    Args:
      function: of jax; it may be jitted.

    Returns:
      The same function; what it gives are numpy arrays.

    >>> exactly(jax.numpy.sqrt)(np.float64(2.0))
    np.float64(1.4142135623730951)
    """

    def call(*args: Any) -> Any:
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            return jax.tree.map(_plain, function(*args))

    return call


def _plain(x: Any) -> Any:
    array = np.asarray(x)
    return array[()] if array.ndim == 0 else array
