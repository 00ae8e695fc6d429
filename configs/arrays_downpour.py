"""Any inputs and classes in NumPy's files: SGD against Downpour with 8 replicas.

  python -m experiments.main --config=configs/arrays_downpour.py --workdir=runs/arrays \
    --config.workload.path=data.npz --config.workload.inputs=x \
    --config.workload.labels=y

An `.npz`, or a folder of `.npy` files. A tenth is held out as the test, unless
`--config.workload.test_path` names another file.

Expected: what the data allows. With scikit-learn's breast cancer, standardised, in an
`.npz`, 1,000 minibatches came to a test accuracy of 96.5 % with both, after 100
emulated seconds with SGD and 14 with Downpour; it was computed in less than a minute.
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
            "eval_every": 100,
            "checkpoint_every": 1_000,
            "workload": {
                "name": "arrays",
                "path": "data.npz",
                "test_path": "",
                "inputs": "x",
                "labels": "y",
                "batch_size": 32,
                "hidden": (256,),
                "held_out": 0.1,  # the part that is the test, without test_path
            },
            "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
            "downpour": {
                "replicas": 8,
                "shards": 2,
                "n_fetch": 1,
                "n_push": 1,
                "overlap": False,
                "warmstart_steps": 0,
                "optimizer": "adagrad",
                "learning_rate": 0.02,
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
