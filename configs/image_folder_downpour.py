"""A folder of images for each class, as ImageNet is kept: SGD against Downpour.

  python -m experiments.main --config=configs/image_folder_downpour.py \
    --workdir=runs/images --config.workload.path=data/images

The folder holds one per class, or `train` and `val`, which do. Images of any size, JPEG
or PNG for instance, are decoded when they are asked for, and ahead of that in threads.
Above is a small network, of 18 x 18 pixels; this is the paper's, which sees all of
ImageNet, 16 million images of 21 thousand classes, scaled to 100 x 100:

  python -m experiments.main --config=configs/image_folder_downpour.py:imagenet21k \
    --workdir=runs/imagenet21k --config.workload.path=data/imagenet21k

Expected: not run on photographs, which are not here. On 6,400 painted shapes of 24 x 24
pixels and 16 classes in PNG files, SGD came to a test accuracy of 99.4 %; Downpour
stood at 99.8 % after 1,400 of its 2,000 minibatches, where it was stopped for time.
:imagenet21k has not been run; 2,000 minibatches show it a sixtieth of its images.
"""

from ml_collections import ConfigDict

_SMALL = {"size": "small", "fit": "crop", "batch_size": 32, "test_size": 1_000}
# The test is small, as in vision_downpour.py; "stretch" is what "scaled" says.
_LARGE = {"size": "80M", "fit": "stretch", "batch_size": 128, "test_size": 500}
SIZES = {
    "small": {"path": "data/images", **_SMALL},
    "imagenet21k": {"path": "data/imagenet21k", **_LARGE},
}


def get_config(size: str = "small") -> ConfigDict:
    """Give the config of this run.

    Args:
      size: "small" or "imagenet21k".

    Returns:
      The config.

    Raises:
      ValueError: there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: allowed are {', '.join(SIZES)}")
    # The first step moves each weight by this much, and all inputs of a unit at once.
    adagrad = {"small": 0.02, "imagenet21k": 0.001}[size]
    return ConfigDict(
        {
            "methods": ("sgd", "downpour"),
            "seed": 0,
            "runtime": "emulated",
            "steps": 2_000,  # minibatches processed by all replicas together
            "eval_every": 200,
            "checkpoint_every": 1_000,
            "workload": {
                "name": "image_folder",
                **SIZES[size],
                "ahead": 2,  # minibatches decoded before a replica asks for them
                "threads": 2,  # that decode
            },
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
                "latency": 0.005,  # seconds for a message, each way
            },
        }
    )
