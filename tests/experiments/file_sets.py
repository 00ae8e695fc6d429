"""Small data sets in files, for workloads that read them; made when first asked for."""

import functools
import pathlib
import tempfile

import numpy as np

from tests import data_files

SMALL = {
    "mnist": {"hidden": (16,), "batch_size": 8},
    "cifar": {"maps": (4,), "pools": ((4, 4),), "batch_size": 8},
    "arrays": {"hidden": (16,), "batch_size": 8},
    "image_folder": {
        "size": "small",
        "maps": (4,),
        "pools": ((4, 4),),
        "test_size": 6,
        "batch_size": 4,
    },
    "kaldi": {"hidden": (8, 8), "window": 3, "batch_size": 4},
}


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dbjax-sets")


@functools.cache
def places(name):
    """The options that say where the workload's files are; none, if it has none."""
    if name not in SMALL:
        return {}
    home = pathlib.Path(_home().name, name)
    home.mkdir()
    if name == "mnist":
        data_files.write_mnist(home)
    elif name == "cifar":
        data_files.write_cifar(home)
    elif name == "arrays":
        y = np.random.default_rng(0).integers(0, 3, 80).astype(np.uint8)
        x = np.random.default_rng(1).standard_normal((80, 4, 2))
        x[np.arange(80), y] += 3
        np.savez(home / "set.npz", x=x, y=y)
        home /= "set.npz"
    elif name == "image_folder":
        data_files.write_images(home)
    elif name == "kaldi":
        data_files.write_kaldi(home, count=6)
        return {"path": f"{home}/feats.scp", "alignments": f"{home}/ali.ark"}
    return {"path": str(home)}
