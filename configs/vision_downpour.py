"""The network for images of Dean et al. 2012, in partitions: SGD against Downpour.

  python -m experiments.main --config=configs/vision_downpour.py \
    --workdir=runs/vision

This is a network of the same kind for a laptop, 18 x 18 pixels and 64 classes. The
paper's are :80M, :330M and :1.7B, of 100 x 100 pixels and 21,000 classes, which 200
minibatches of 16 hardly show: they are for measuring what partitions cost. First look
at what they need:

  python -m experiments.main --config=configs/vision_downpour.py:80M --dry_run

Expected on a laptop: a test accuracy of 92 % with SGD after 996 emulated seconds, and
of 96 % with two replicas of Downpour and Adagrad after 540; it is computed in one to
two minutes on two cores. In a gradient, of 1.1 MB, each partition sends 280 KiB to the
other: rows at the border, the features and their gradients. With :80M it is 1.2 MiB, of
321 MB. On threads, --config.runtime=threads, Downpour came to 97 %.
"""

from ml_collections import ConfigDict

LAPTOP = {"size": "small", "classes": 64, "batch_size": 32, "test_size": 1_000}
SIZES = {
    "laptop": LAPTOP,
    # The classes are the paper's, and the test small: it is computed all at once.
    **{
        size: {"size": size, "classes": 21_000, "batch_size": 16, "test_size": 64}
        for size in ("80M", "330M", "1.7B")
    },
}


def get_config(size: str = "laptop") -> ConfigDict:
    """Give the config of this run.

    Args:
      size: "laptop", "80M", "330M" or "1.7B".

    Returns:
      The config.

    Raises:
      ValueError: there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: allowed are {', '.join(SIZES)}")
    # The first step moves each weight by this much, and all inputs of a unit at once.
    adagrad = 0.02 if size == "laptop" else 0.001
    few = 1 if size == "laptop" else 10
    return ConfigDict(
        {
            "methods": ("sgd", "downpour"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 2_000 // few,  # minibatches processed by all replicas together
            "eval_every": 100 // few,
            "checkpoint_every": 1_000 // few,
            "workload": {"name": "vision", **SIZES[size]},
            "mesh": {"replica": 2, "model": 2},  # devices: replicas x partitions
            "sgd": {"optimizer": "sgd", "learning_rate": 0.05},
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
