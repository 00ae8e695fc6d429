"""Handwritten digits, a fixed set of 10,000: Sandblaster L-BFGS, Downpour and SGD.

  python -m experiments.main --config=configs/digits_sandblaster.py \
    --workdir=runs/digits_sandblaster

Expected: a test accuracy of about 98 % with all three. SGD and Downpour end at a
training loss of 0.07 and 0.08 after 599 and 35 emulated seconds; L-BFGS, on as many
machines as Downpour, passes that after 75 s and goes on to 0.0001 at 122 s, in 63
evaluations, by when it has begun to learn the images by heart (test loss 0.3). Replica
13 takes ten times as long as others: an iteration lasts 2.0 s with portions and backup
copies, 2.9 s without copies, and 16.5 s if each replica computes a twentieth. All is
computed in half a minute on two cores.

Variations, for other workdirs. With five times the machines L-BFGS is at 0.0001 after
31 s: --config.sandblaster.replicas=100 --config.sandblaster.portion_size=10. A warm
start: --config.sandblaster.warmstart_steps=300. Samples of the batch, or a growing one:
--config.sandblaster.batches=multi (or progressive). Threads:
--config.runtime=threads --config.downpour.replicas=4 --config.sandblaster.replicas=4.
Sigmoids on the 1,300 images as they are, in a minute: --config.workload.train_on=images
--config.workload.activation=sigmoid --config.workload.hidden="(512, 512)" (97.2 % and
0.0001 in 28 s; Downpour's learning rate is too much for that network).
"""

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
