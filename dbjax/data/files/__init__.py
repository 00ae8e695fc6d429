"""Readers of the file formats that people have, one file each; all give plain NumPy.

| format | reader | serve it with |
|---|---|---|
| MNIST's IDX, also `.gz` | `read_idx`, `read_mnist` | `from_arrays` |
| CIFAR-10 and CIFAR-100, binary | `read_cifar` | `from_arrays` |
| NumPy's `.npy` and `.npz` | `read_arrays` | `from_arrays` |
| Kaldi's `.ark` and `.scp` (extra `speech`) | `read_kaldi` | `from_source` |
| a folder of images for each class (extra `images`) | `ImageFolder` | `from_source` |

What is not here comes from any loader by `from_iterators`. A file that is not what it
should be is a `ValueError` that names it, with what was found and what is allowed; one
that is not there is a `FileNotFoundError`.
"""

from dbjax.data.files.cifar import read_cifar
from dbjax.data.files.frames import SplicedFrames
from dbjax.data.files.idx import read_idx, read_mnist
from dbjax.data.files.images import ImageFolder
from dbjax.data.files.kaldi import Utterance, read_kaldi
from dbjax.data.files.numpy_files import read_arrays

__all__ = [
    "ImageFolder",
    "SplicedFrames",
    "Utterance",
    "read_arrays",
    "read_cifar",
    "read_idx",
    "read_kaldi",
    "read_mnist",
]
