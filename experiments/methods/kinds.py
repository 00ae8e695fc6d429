"""Batch methods and their batches by name, and what `config.sandblaster` may hold.

One more batch method is one more entry of `KINDS`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_collections

from dbjax import sandblaster
from dbjax.sandblaster.batches import Batches
from dbjax.sandblaster.methods import Method as BatchMethod
from experiments import registry


class Options(NamedTuple):
    """What `config.sandblaster` may hold; `minimize` knows more of most.

    Attributes:
      replicas, shards, iterations, tolerance, push_every, strategy, copies: as there.
      portion_size: examples in a portion.
      memory_size: pairs that L-BFGS and its relatives keep.
      l1: weight of the L1 norm, for `owlqn`.
      lower, upper: the bounds of every parameter, for `box`.
      batches: "full", "multi" or "progressive".
      batch_portions: portions in a sample, or in the first batch.
      overlap: the share of a sample that is in the next one too, for "multi".
      theta, growth: how much noise is allowed, and the most that a batch grows by at
        once, for "progressive".
      eval_every, checkpoint_every: iterations between them.
      warmstart_steps: minibatches before the first iteration.
      warmstart_replicas, warmstart_optimizer, warmstart_learning_rate: who computes
        them, and how.
    """

    replicas: int = 8
    shards: int = 1
    portion_size: int = 50
    iterations: int = 100
    tolerance: float = 1e-5
    push_every: int = 4
    strategy: str = "backups"
    copies: int = 4
    memory_size: int = 10
    l1: float = 0.001
    lower: float = -1.0
    upper: float = 1.0
    batches: str = "full"
    batch_portions: int = 8
    overlap: float = 0.25
    theta: float = 0.9
    growth: float = 4.0
    eval_every: int = 1
    checkpoint_every: int = 20
    warmstart_steps: int = 0
    warmstart_replicas: int = 1
    warmstart_optimizer: str = "sgd"
    warmstart_learning_rate: float = 0.1


class Kind(NamedTuple):
    """A batch method by name.

    Attributes:
      build: `build(options) -> method`.
      vectors: `vectors(options)`, how many there are on the shards.
      evaluations: of the batch that an iteration usually takes.
    """

    build: Callable[[Options], BatchMethod]
    vectors: Callable[[Options], int]
    evaluations: float


_HAND = 6  # vectors that every method has: x, x+, g, g+, d, y+

KINDS: Mapping[str, Kind] = {
    "lbfgs": Kind(
        lambda o: sandblaster.LBFGS(memory_size=o.memory_size),
        lambda o: _HAND + 1 + 2 * o.memory_size,
        evaluations=1.1,
    ),
    "gradient_descent": Kind(
        lambda o: sandblaster.GradientDescent(), lambda o: _HAND, evaluations=1.2
    ),
    "conjugate_gradient": Kind(
        lambda o: sandblaster.ConjugateGradient(), lambda o: _HAND, evaluations=2.0
    ),
    "owlqn": Kind(
        lambda o: sandblaster.OWLQN(o.l1, memory_size=o.memory_size),
        lambda o: _HAND + 6 + 2 * o.memory_size,
        evaluations=1.2,
    ),
    "box": Kind(
        lambda o: sandblaster.BoxLBFGS(o.lower, o.upper, memory_size=o.memory_size),
        lambda o: _HAND + 5 + 2 * o.memory_size,
        evaluations=1.2,
    ),
}

BATCHES: Mapping[str, Callable[[Options, int], Batches]] = {
    "full": lambda o, seed: sandblaster.FullBatch(),
    "multi": lambda o, seed: sandblaster.MultiBatch(
        o.batch_portions, overlap=o.overlap, seed=seed
    ),
    "progressive": lambda o, seed: sandblaster.ProgressiveBatch(
        o.batch_portions, theta=o.theta, growth=o.growth, seed=seed
    ),
}
BATCH_VECTORS = {"full": 0, "multi": 4, "progressive": 1}


def options_of(config: ml_collections.ConfigDict) -> Options:
    """Read `config.sandblaster`.

    Raises:
      registry.ConfigError: it has a key that does not exist.
    """
    given = config.sandblaster.to_dict()
    for name in given:
        registry.choose("a key of sandblaster", name, dict.fromkeys(Options._fields))
    return Options(**given)
