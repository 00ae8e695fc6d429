import struct

import numpy as np
import pytest

from dbjax.data.files import read_arrays

ARRAYS = {"image": np.arange(12.0).reshape(6, 2), "label": np.arange(6)}


def npy(array: np.ndarray) -> bytes:
    """An `.npy` file of version 1.0, as its specification says."""
    head = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, "
    head += f"'shape': {array.shape}, }}"
    head += " " * (-(len(head) + 11) % 64) + "\n"
    return (
        b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head.encode() + bytes(array)
    )


def equal(got, want):
    assert list(got) == list(want)
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_its_arrays(tmp_path, save):
    save(tmp_path / "data.npz", **ARRAYS)
    equal(read_arrays(tmp_path / "data.npz"), ARRAYS)


def test_a_folder_gives_its_npy_files_and_a_file_itself(tmp_path):
    for name, array in ARRAYS.items():
        (tmp_path / f"{name}.npy").write_bytes(npy(array))
    (tmp_path / "notes.txt").write_text("passed over")
    equal(read_arrays(tmp_path), ARRAYS)
    equal(read_arrays(tmp_path / "label.npy"), {"label": ARRAYS["label"]})


def test_damaged_files_are_named(tmp_path):
    np.savez(tmp_path / "good.npz", **ARRAYS)
    content = (tmp_path / "good.npz").read_bytes()
    array = npy(ARRAYS["image"])
    for name, damaged, words in (
        ("cut.npz", content[:-30], "cut off, damaged or something else.*bytes"),
        ("half.npz", content[: len(content) // 2], "cut off, damaged"),
        ("empty.npz", b"", "is empty"),
        ("text.npz", b"1 2 3\n", "cut off, damaged or something else.*6 bytes"),
        ("array.npz", array, "called .npz, but is the other"),
        ("cut.npy", array[:-1], "cut off, damaged"),
        ("head.npy", array[:40], "cut off, damaged"),
        ("zip.npy", content, "called .npy, but is the other"),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.*{words}"):
            read_arrays(tmp_path / name)


def test_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    with pytest.raises(ValueError, match="objects.npy cannot be read.*pickled"):
        read_arrays(tmp_path / "objects.npy")


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.ones(3), "y": np.ones(4)},
        {"x": np.ones(3), "y": np.array(1)},
        {"x": np.ones((0, 3))},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_named(tmp_path, arrays):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=r"odd.npz holds arrays of the shapes.*'x': "):
        read_arrays(tmp_path / "odd.npz")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .npy file in .*holds nothing"):
        read_arrays(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file data.npz in"):
        read_arrays(tmp_path / "data.npz")
    with pytest.raises(ValueError, match=r"data.csv: allowed are .npz, .npy, and"):
        read_arrays(tmp_path / "data.csv")
    np.savez(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="none.npz holds no array"):
        read_arrays(tmp_path / "none.npz")
