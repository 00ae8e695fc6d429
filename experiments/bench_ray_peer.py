"""What `bench_ray` measures against: the parameter server of Ray's own documentation.

https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html, the
asynchronous version, written anew for JAX: one actor holds the parameters, others
compute gradients, and the driver passes references between them as gradients become
ready. Names are those of the example. Left out is its evaluation every ten updates;
what it adds up needlessly (one gradient at a time) is not added up.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ray

from dbjax.typing import Batch, Data, Gradients, LossFn, Params


def relu_loss(params: Params, batch: Batch) -> jax.Array:
    """Cross entropy of a network of rectified linear units, which both sides train."""
    h = batch["x"]
    for layer in params[:-1]:
        h = jax.nn.relu(h @ layer["w"] + layer["b"])
    logits = h @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def to_numpy(tree: Any) -> Any:
    """What is sent: arrays of NumPy, without a copy on a CPU."""
    return jax.tree.map(np.asarray, tree)


class ParameterServer:
    """Applies gradients, and gives the parameters back.

    Args:
      params: the first ones.
      optimizer: makes steps of gradients.
    """

    def __init__(self, params: Params, optimizer: optax.GradientTransformation) -> None:
        def step(
            params: Params, state: Any, gradients: Gradients
        ) -> tuple[Params, Any]:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        # Of the parameters there may still be a view: they cannot be donated.
        self._step = jax.jit(step, donate_argnums=1)
        self._params = jax.tree.map(jnp.array, params)
        self._state = optimizer.init(self._params)

    def apply_gradients(self, *gradients: Gradients) -> Params:
        """Apply the sum of some gradients."""
        total = jax.tree.map(lambda *g: functools.reduce(np.add, g), *gradients)
        self._params, self._state = self._step(self._params, self._state, total)
        return to_numpy(self._params)

    def get_weights(self) -> Params:
        """Give the newest parameters."""
        return to_numpy(self._params)


class DataWorker:
    """Computes gradients of its minibatches, one after the other.

    Args:
      loss_fn: `loss_fn(params, batch)`.
      data: gives minibatches.
      index: which of those who share the data.
    """

    def __init__(self, loss_fn: LossFn, data: Data, index: int) -> None:
        self._gradient = jax.jit(jax.grad(loss_fn))
        self._data, self._index, self._done = data, index, 0

    def compute_gradients(self, weights: Params) -> Gradients:
        """Give the gradient of the next minibatch."""
        batch = self._data.batch(self._index, self._done)
        self._done += 1
        return to_numpy(self._gradient(weights, batch))


class Peer:
    """The example's driver, on the cluster that this process is connected to.

    Args:
      loss_fn: `loss_fn(params, batch)`.
      params: the first ones.
      data: gives minibatches.
      optimizer: makes steps of gradients.
      most: gradients that are computed at once, at most.
    """

    def __init__(
        self,
        loss_fn: Callable[[Params, Batch], jax.Array],
        params: Params,
        data: Data,
        optimizer: optax.GradientTransformation,
        most: int,
    ) -> None:
        remote = ray.remote(num_cpus=0)
        server, worker = remote(ParameterServer), remote(DataWorker)
        self._server: Any = server.remote(params, optimizer)
        self._workers = [worker.remote(loss_fn, data, i) for i in range(most)]

    def run(self, replicas: int, steps: int) -> np.ndarray:
        """Process so many minibatches.

        Args:
          replicas: how many compute gradients.
          steps: minibatches, of all together.

        Returns:
          When the driver heard that each was done, in seconds, `[steps]`.
        """
        current_weights = self._server.get_weights.remote()
        gradients = {
            worker.compute_gradients.remote(current_weights): worker
            for worker in self._workers[:replicas]
        }
        done = []
        for _ in range(steps):
            ready, _ = ray.wait(list(gradients))
            done.append(time.perf_counter())
            worker = gradients.pop(ready[0])
            current_weights = self._server.apply_gradients.remote(ready[0])
            gradients[worker.compute_gradients.remote(current_weights)] = worker
        ray.get(list(gradients))
        return np.array(done)

    def close(self) -> None:
        """End the processes."""
        for actor in (self._server, *self._workers):
            ray.kill(actor)
