"""TODO."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Give the config of this run."""
    return ConfigDict(
        {
            "methods": ("sgd", "downpour", "sandblaster_lbfgs"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 6_000,  # minibatches processed by all replicas together
            "eval_every": 100,
            "checkpoint_every": 2_000,
            "workload": {
                "name": "digits",
                "train_on": "fixed",
                "fixed_examples": 10_000,
                "batch_size": 32,
                "hidden": (128,),
                "activation": "relu",
            },
            "sgd": {"optimizer": "sgd", "learning_rate": 0.2},
            "downpour": {
                "replicas": 20,
                "shards": 2,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": 0.05,
            },
            "sandblaster": {
                "replicas": 20,
                "shards": 2,
                "portion_size": 50,  # examples, of `fixed_examples`
                "iterations": 60,
                "tolerance": 1e-5,
                "memory_size": 20,
                "push_every": 4,
                "strategy": "backups",  # or "portions", "static"
                "copies": 4,
                "batches": "full",  # or "multi", "progressive"
                "batch_portions": 20,
                "overlap": 0.25,
                "theta": 0.9,
                "growth": 4.0,
                "eval_every": 1,
                "checkpoint_every": 20,
                "warmstart_steps": 0,
                "warmstart_replicas": 1,
                "warmstart_optimizer": "sgd",
                "warmstart_learning_rate": 0.2,
            },
            "cluster": {
                "step_time": 0.1,  # seconds for a minibatch, mean
                "spread": 0.3,  # its standard deviation, as a part of the mean
                "slow_replicas": (13,),
                "slow_factor": 10.0,
                "latency": 0.005,  # seconds for a message, each way
            },
        }
    )
