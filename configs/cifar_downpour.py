"""CIFAR-10 or CIFAR-100, the binary version: SGD against Downpour with 8 replicas.

  python -m experiments.main --config=configs/cifar_downpour.py --workdir=runs/cifar10 \
    --config.workload.path=data/cifar-10-batches-bin
  python -m experiments.main --config=configs/cifar_downpour.py:cifar100 \
    --workdir=runs/cifar100 --config.workload.path=data/cifar-100-binary

The network is locally connected, as the paper's for larger images.

Expected: not run on CIFAR, which is not here. On 10,000 painted shapes of 10 classes in
CIFAR-10's files, SGD came to a test accuracy of 97.9 % after 200 minibatches and of
99.7 % after 600.
"""

from ml_collections import ConfigDict

KINDS = {"cifar10": "data/cifar-10-batches-bin", "cifar100": "data/cifar-100-binary"}


def get_config(kind: str = "cifar10") -> ConfigDict:
    """Give the config of this run.

    Args:
      kind: "cifar10" or "cifar100".

    Returns:
      The config.

    Raises:
      ValueError: there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed are {', '.join(KINDS)}")
    return ConfigDict(
        {
            "methods": ("sgd", "downpour"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 4_000,  # minibatches processed by all replicas together
            "eval_every": 200,
            "checkpoint_every": 2_000,
            "workload": {
                "name": "cifar",
                "kind": kind,
                "path": KINDS[kind],
                "coarse": False,  # of CIFAR-100: its 20 groups, not its classes
                "batch_size": 32,
                "maps": (16, 16, 16),
            },
            "sgd": {"optimizer": "sgd", "learning_rate": 0.05},
            "downpour": {
                "replicas": 8,
                "shards": 4,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": 0.01,
            },
            "cluster": {
                "step_time": 0.1,  # seconds for a minibatch, mean
                "spread": 0.3,  # its standard deviation, as a part of the mean
                "slow_replicas": (),
                "slow_factor": 1.0,
                "latency": 0.005,  # seconds for a message, each way
            },
        }
    )
