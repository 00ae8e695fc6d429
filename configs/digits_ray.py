"""Handwritten digits on Ray: Downpour and L-BFGS as processes of this machine.

  python -m experiments.main --config=configs/digits_ray.py --workdir=runs/digits_ray

Needs the extra `ray`. Expected: a test accuracy of 98 to 99 % with both, after one to
three minutes on two cores, half of which processes take to start. Staleness is 2, as
three replicas take turns. No two runs are equal; each one's Trace is what it did.

Variations, for other workdirs. A standby for each of Downpour's shards, so that any
process may die: --config.ray.standby=1. A cluster that runs already, see
docs/cluster.md: --config.ray.address=auto --config.ray.working_dir=. with
--config.ray.replica_cpus=1 --config.ray.shard_cpus=1. The same on threads:
--config.runtime=threads.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Give the config of this run."""
    return ConfigDict(
        {
            "methods": ("downpour", "sandblaster_lbfgs"),
            "seed": 0,
            "runtime": "ray",
            "ray": {
                "address": "local",  # or "auto", "10.0.0.1:6379": a cluster that runs
                "standby": 0,  # 1: of each of Downpour's shards
                "replica_cpus": 0.0,  # set aside for each; here they share
                "shard_cpus": 0.0,
                "replica_gpus": 0.0,
                "working_dir": "",  # ".": send these modules to machines without
                "timeout": 120.0,  # seconds until a silent process is an error
            },
            "steps": 3_000,  # minibatches processed by all replicas together
            "eval_every": 250,
            "checkpoint_every": 1_000,
            "workload": {
                "name": "digits",
                "train_on": "fixed",
                "fixed_examples": 10_000,
                "batch_size": 32,
                "hidden": (128,),
            },
            "downpour": {
                "replicas": 3,
                "shards": 2,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": 0.05,
            },
            "sandblaster": {
                "replicas": 3,
                "shards": 2,
                "portion_size": 500,  # examples, of `fixed_examples`
                "iterations": 60,
                "tolerance": 1e-5,
                "memory_size": 20,
                "eval_every": 5,
                "checkpoint_every": 20,
            },
            "cluster": {  # for comparison: --config.runtime=emulated
                "step_time": 0.1,  # seconds for a minibatch, mean
                "spread": 0.3,  # its standard deviation, as a part of the mean
                "latency": 0.005,  # seconds for a message, each way
            },
        }
    )
