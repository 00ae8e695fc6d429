"""Handwritten digits, SGD on one machine against Downpour with 20 replicas.

  python -m experiments.main --config=configs/digits_downpour.py --workdir=runs/digits

Expected: a test accuracy of 98 to 99 % with both (98.2 % and 98.2 % with this seed),
600 emulated seconds with SGD and 34 with Downpour; it is computed in less than a minute
on two cores. Staleness is 19 on average, as 20 replicas take turns; replica 13 is slow.

Variations, for other workdirs: --config.downpour.replicas=50 (97.8 %, 13 s),
--config.downpour.n_push=5 --config.downpour.n_fetch=5 (97.6 %), and
--config.runtime=threads --config.downpour.replicas=4; or --dry_run, without one.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Give the config of this run."""
    return ConfigDict(
        {
            "methods": ("sgd", "downpour"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 6_000,  # minibatches processed by all replicas together
            "eval_every": 100,
            "checkpoint_every": 2_000,
            "workload": {"name": "digits", "batch_size": 32, "hidden": (128,)},
            "sgd": {"optimizer": "sgd", "learning_rate": 0.2},
            "downpour": {
                "replicas": 20,
                "shards": 4,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": 0.05,
            },
            "cluster": {
                "step_time": 0.1,  # seconds for a minibatch, mean
                "spread": 0.3,  # its standard deviation, as a part of the mean
                "slow_replicas": (13,),
                "slow_factor": 3.0,
                "latency": 0.005,  # seconds for a message, each way
            },
        }
    )
