"""Artificial speech, frame by frame: SGD against Downpour with 16 replicas.

  python -m experiments.main --config=configs/speech_frames_downpour.py \
    --workdir=runs/speech_frames

Expected: of the frames, 80 % are recognised with SGD after 1,994 emulated seconds and
78 % with Downpour after 135; it is computed in one to two minutes on two cores.

The network of Dean et al. 2012, 42 million parameters; first look at what it needs:

  --config.workload.hidden="(2560, 2560, 2560, 2560)" --config.workload.states=8192
  --config.workload.batch_size=128 --config.steps=200 --dry_run
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Give the config of this run."""
    return ConfigDict(
        {
            "methods": ("sgd", "downpour"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 4_000,  # minibatches processed by all replicas together
            "eval_every": 100,
            "checkpoint_every": 1_000,
            "workload": {
                "name": "speech_frames",
                "batch_size": 64,
                "states": 64,
                "hidden": (256, 256),
            },
            "sgd": {"optimizer": "sgd", "learning_rate": 0.5},
            "downpour": {
                "replicas": 16,
                "shards": 4,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": 0.01,
            },
            "cluster": {
                "step_time": 0.5,  # seconds for a minibatch, mean
                "spread": 0.3,  # its standard deviation, as a part of the mean
                "slow_replicas": (),
                "slow_factor": 1.0,
                "latency": 0.02,  # seconds for a message, each way
            },
        }
    )
