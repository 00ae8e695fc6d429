"""The speech network of Dean et al. 2012, in model partitions: SGD against Downpour.

  python -m experiments.main --config=configs/speech_downpour.py \
    --workdir=runs/speech

The whole network, 42 million parameters on 8192 states; `--dry_run` says what it needs.
On a laptop, a network of four layers of 256 on 64 states:

  python -m experiments.main --config=configs/speech_downpour.py:laptop \
    --workdir=runs/speech_laptop

Expected on a laptop: of the frames 77 % are recognised with both, with SGD after 996
emulated seconds and with two replicas of Downpour after 540; it is computed in a minute
on two cores. In a gradient, of 1.3 MB, each partition sends 257 KiB to the other, in 6
all-reduces. On threads, --config.runtime=threads, Downpour came to 78 or 79 %.

The paper's size takes a quarter of an hour there for each method, and 2,000 minibatches
show 8192 states 31 times each: it is for measuring what partitions cost, and has not
been run to its end. (In its first 90 minibatches Downpour's test loss falls from 9.07
to 9.02; log 8192 is 9.01.)
"""

from ml_collections import ConfigDict

SIZES = {
    "paper": {"batch_size": 128, "states": 8192, "hidden": (2560,) * 4},
    "laptop": {"batch_size": 64, "states": 64, "hidden": (256,) * 4},
}


def get_config(size: str = "paper") -> ConfigDict:
    """Give the config of this run.

    Args:
      size: "paper" or "laptop".

    Returns:
      The config.

    Raises:
      ValueError: there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: allowed are {', '.join(SIZES)}")
    # The first step moves each weight by this much, and all inputs of a unit at once.
    adagrad = {"paper": 0.001, "laptop": 0.01}[size]
    return ConfigDict(
        {
            "methods": ("sgd", "downpour"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 2_000,  # minibatches processed by all replicas together
            "eval_every": 100,
            "checkpoint_every": 1_000,
            "workload": {"name": "speech", **SIZES[size]},
            "mesh": {"replica": 2, "model": 2},  # devices: replicas x partitions
            "sgd": {"optimizer": "sgd", "learning_rate": 0.5},
            "downpour": {
                "replicas": 2,
                "shards": 4,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": adagrad,
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
