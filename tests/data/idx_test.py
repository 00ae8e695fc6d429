import gzip

import numpy as np
import pytest

from dbjax.data import from_arrays
from dbjax.data.files import read_idx, read_mnist
from tests import data_files


@pytest.mark.parametrize("dtype", data_files.IDX_TYPES)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("pack", [False, True])
def test_every_type_and_shape_is_read(tmp_path, dtype, shape, pack):
    array = (np.arange(np.prod(shape)) - 2).astype(dtype).reshape(shape)
    content = data_files.idx(array)
    path = tmp_path / "file"  # what it is called does not matter
    path.write_bytes(gzip.compress(content) if pack else content)
    got = read_idx(path)
    np.testing.assert_array_equal(got, array)
    assert got.dtype == np.dtype(dtype) and got.dtype.isnative


def test_the_bytes_are_those_of_the_format(tmp_path):
    (tmp_path / "x").write_bytes(bytes.fromhex("00000b02 00000001 00000002 0102fffe"))
    assert read_idx(tmp_path / "x").tolist() == [[0x0102, -2]]


@pytest.mark.parametrize("pack", [False, True])
def test_mnist_is_four_files(tmp_path, pack):
    wrote = data_files.write_mnist(tmp_path, pack=pack)
    got = read_mnist(tmp_path)
    for part in ("train", "test"):
        for name in ("image", "label"):
            np.testing.assert_array_equal(got[part][name], wrote[part][name])
    assert got["train"]["label"].dtype == np.int32
    batch = from_arrays(got["train"], batch_size=16).batch(3, 1)
    assert batch["image"].shape == (16, 28, 28)


def test_names_with_a_dot_are_found(tmp_path):
    data_files.write_mnist(tmp_path)
    old = tmp_path / "t10k-labels-idx1-ubyte"
    old.rename(tmp_path / "t10k-labels.idx1-ubyte")
    assert len(read_mnist(tmp_path)["test"]["label"]) == 20


WHOLE = data_files.idx(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\0\0", "not an IDX file: it begins with 00 00"),
        (b"\x89PNG\r\n\x1a\n", "not an IDX file: it begins with 89 50 4e 47"),
        (b"\0\0\x07\x01" + WHOLE[4:], "one of 08, 09, 0b"),
        (WHOLE[:9], "2 axes and takes 12 bytes; the file has 9"),
        (b"\0\0\x08\0", "0 axes .* allowed is 1 axis or more"),
        (WHOLE[:-1], r"\[2, 3\] of uint8.* take 18 bytes; it has 17"),
        (WHOLE + b"\0", r"take 18 bytes; it has 19"),
        (gzip.compress(WHOLE, mtime=0)[:-9], "gzip is cut off or damaged.*bytes"),
        (gzip.compress(b"", mtime=0), "is empty"),
    ],
)
def test_what_is_wrong_is_said_with_the_files_name(tmp_path, content, words):
    path = tmp_path / "some-images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-images.*{words}"):
        read_idx(path)


def test_files_that_do_not_fit_each_other_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte or .*nothing"):
        read_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere, which is not a folder"):
        read_mnist(tmp_path / "nowhere")
    data_files.write_mnist(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(data_files.idx(np.zeros(59, np.uint8)))
    with pytest.raises(ValueError, match="holds 60 images and .* 59 labels"):
        read_mnist(tmp_path)
    labels.write_bytes(data_files.idx(np.zeros((60, 1), np.uint8)))
    with pytest.raises(ValueError, match=r"holds \[60, 1\] of uint8; labels have 1"):
        read_mnist(tmp_path)
