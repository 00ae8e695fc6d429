"""Tumours, benign or not: logistic regression, SGD against Downpour with 8 replicas.

  python -m experiments.main --config=configs/breast_cancer_downpour.py \
    --workdir=runs/breast_cancer

Expected: a test accuracy of 99 % with both, at a loss of 0.05, in 20 emulated seconds
with SGD and 3 with Downpour; it is computed in a quarter of a minute.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Give the config of this run."""
    return ConfigDict(
        {
            "methods": ("sgd", "downpour"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 2_000,  # minibatches processed by all replicas together
            "eval_every": 20,
            "checkpoint_every": 1_000,
            "workload": {"name": "breast_cancer", "batch_size": 16},
            "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
            "downpour": {
                "replicas": 8,
                "shards": 1,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": 0.1,
            },
            "cluster": {
                "step_time": 0.01,  # seconds for a minibatch, mean
                "spread": 0.3,  # its standard deviation, as a part of the mean
                "slow_replicas": (),
                "slow_factor": 1.0,
                "latency": 0.001,  # seconds for a message, each way
            },
        }
    )
