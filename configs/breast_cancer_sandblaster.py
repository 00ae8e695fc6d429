"""Tumours, benign or not: four batch methods on one logistic regression.

  python -m experiments.main --config=configs/breast_cancer_sandblaster.py \
    --workdir=runs/breast_cancer_sandblaster

Expected: all but `owlqn` find the same minimum, 0.06334: L-BFGS in 40 evaluations and
2.5 emulated seconds, conjugate gradients in 94 and 5.8 s, gradient descent not quite
within its 100 iterations. `owlqn` adds an L1 norm, which makes 18 of 30 weights zero,
and has a minimum of its own, 0.1693. The test accuracy is 97 to 98 %. Replica 5 is
slow, and portions with backups take an iteration a third of what equal parts do. All is
computed in half a minute.

Variations, for other workdirs: --config.methods=sandblaster_box, weights from -0.5 to
0.5 (0.08080); --config.sandblaster.strategy=static; --config.runtime=threads.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Give the config of this run."""
    return ConfigDict(
        {
            "methods": (
                "sandblaster_lbfgs",
                "sandblaster_conjugate_gradient",
                "sandblaster_gradient_descent",
                "sandblaster_owlqn",
            ),
            "seed": 0,
            "runtime": "emulated",
            "workload": {"name": "breast_cancer", "batch_size": 16, "l2": 1e-3},
            "sandblaster": {
                "replicas": 8,
                "shards": 1,
                "portion_size": 8,  # examples, of 400
                "iterations": 100,
                "tolerance": 1e-5,
                "memory_size": 10,
                "l1": 0.01,  # for sandblaster_owlqn
                "lower": -0.5,  # for sandblaster_box, as is `upper`
                "upper": 0.5,
                "push_every": 2,
                "strategy": "backups",  # or "portions", "static"
                "copies": 4,
                "batches": "full",  # or "multi", "progressive"
                "batch_portions": 10,
                "overlap": 0.25,
                "theta": 0.9,
                "growth": 4.0,
                "eval_every": 1,
                "checkpoint_every": 25,
                "warmstart_steps": 0,
                "warmstart_replicas": 1,
                "warmstart_optimizer": "sgd",
                "warmstart_learning_rate": 0.1,
            },
            "cluster": {
                "step_time": 0.01,  # seconds for a minibatch, mean
                "spread": 0.3,  # its standard deviation, as a part of the mean
                "slow_replicas": (5,),
                "slow_factor": 5.0,
                "latency": 0.001,  # seconds for a message, each way
            },
        }
    )
