import numpy as np
import pytest

from dbjax.data.files import read_cifar
from tests import data_files


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_images_and_labels_are_read(tmp_path, kind):
    wrote = data_files.write_cifar(tmp_path, kind)
    got = read_cifar(tmp_path, kind)
    for part in ("train", "test"):
        np.testing.assert_array_equal(got[part]["image"], wrote[part]["image"])
        np.testing.assert_array_equal(got[part]["label"], wrote[part]["label"])
    assert len(got["train"]["label"]) == (60 if kind == "cifar10" else 12)
    assert got["train"]["image"].flags.c_contiguous


def test_groups_of_cifar100(tmp_path):
    wrote = data_files.write_cifar(tmp_path, "cifar100")
    got = read_cifar(tmp_path, "cifar100", coarse=True)
    np.testing.assert_array_equal(got["test"]["label"], wrote["test"]["group"])


def test_colours_are_planes_in_the_file(tmp_path):
    data_files.write_cifar(tmp_path)
    row = bytes([7]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
    (tmp_path / "test_batch.bin").write_bytes(row)
    test = read_cifar(tmp_path)["test"]
    assert test["label"].tolist() == [7] and test["image"].shape == (1, 32, 32, 3)
    assert (test["image"] == [1, 2, 3]).all()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\1" * 3073 + b"\1" * 100, "takes 3,073 bytes.* 3,173 bytes are 1.03 rows"),
        (b"\1" * 3074, "3,074 bytes are 1.00 rows"),  # a row of CIFAR-100
        (b"\1" * 3073 + b"\x0a" * 3073, "row 1 has the label 10; allowed are 0 to 9"),
    ],
)
def test_what_is_wrong_is_said_with_the_files_name(tmp_path, content, words):
    data_files.write_cifar(tmp_path)
    (tmp_path / "data_batch_4.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_4.bin.*{words}"):
        read_cifar(tmp_path)


def test_wrong_kinds_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="kind='cifar': allowed are 'cifar10'"):
        read_cifar(tmp_path, "cifar")
    with pytest.raises(ValueError, match="coarse=True: only cifar100"):
        read_cifar(tmp_path, coarse=True)
    data_files.write_cifar(tmp_path)
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2.bin in .*which holds"):
        read_cifar(tmp_path)
    with pytest.raises(FileNotFoundError, match="train.bin in .*data_batch_1.bin"):
        read_cifar(tmp_path, "cifar100")


def test_each_label_of_a_row_has_its_own_limit(tmp_path):
    data_files.write_cifar(tmp_path, "cifar100")
    image = np.zeros((2, 32, 32, 3), np.uint8)
    rows = data_files.cifar_rows(image, np.array([3, 20]), np.array([99, 99]))
    (tmp_path / "test.bin").write_bytes(rows)
    with pytest.raises(ValueError, match="test.bin: row 1 has the label 20.*0 to 19"):
        read_cifar(tmp_path, "cifar100")
