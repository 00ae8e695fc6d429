import pickle

import numpy as np
import pytest

from dbjax.data import from_source
from dbjax.data.files import ImageFolder
from dbjax.data.files.decode import decode
from tests import data_files

Image = pytest.importorskip("PIL.Image")


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_an_image_of_its_size_is_given_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    for fit in ("crop", "stretch"):
        got = decode(save(tmp_path / "a.png", pixels), 9, fit)
        np.testing.assert_array_equal(got, pixels)
        assert got.dtype == np.uint8


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_crop_takes_the_middle_and_stretch_takes_all(tmp_path, shape):
    pixels = np.zeros((*shape, 3), np.uint8)
    long = int(np.argmax(shape))
    middle = [slice(None), slice(None)]
    middle[long] = slice(6, 14)
    pixels[tuple(middle)] = (10, 200, 30)
    path = save(tmp_path / "a.png", pixels)
    assert (decode(path, 4, "crop") == [10, 200, 30]).all()
    stretched = decode(path, 4, "stretch")
    assert stretched.shape == (4, 4, 3)
    ends = np.moveaxis(stretched, long, 0)
    assert (ends[0] < 10).all() and (ends[2, :, 1] > 100).all()


def test_large_images_are_averaged_and_small_ones_enlarged(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    path = save(tmp_path / "a.png", board.astype(np.uint8))
    assert abs(decode(path, 8, "crop").astype(int) - 127).max() < 8
    assert decode(path, 100, "crop").shape == (100, 100, 3)


@pytest.mark.parametrize("size", [8, 20, 33, 64, 80])
def test_a_jpeg_decoded_at_a_part_of_its_size_looks_the_same(tmp_path, size):
    y, x = np.indices((64, 90))
    pixels = np.stack([2 * y, 2 * x, y + x], -1).astype(np.uint8)
    jpeg = save(tmp_path / "a.jpg", pixels, quality=95)
    png = save(tmp_path / "a.png", pixels)
    apart = decode(jpeg, size, "crop").astype(int) - decode(png, size, "crop")
    assert abs(apart).mean() < 3


MODES = ["L", "LA", "P", "RGBA", "1", "CMYK", "YCbCr", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_colour_becomes_red_green_and_blue(tmp_path, mode):
    pixels = np.full((6, 6, 3), 255, np.uint8)
    ending = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    if mode == "I;16":
        grey = np.full((6, 6), 0xFFFF, np.uint16)
        path = save(tmp_path / "a.png", grey)
    else:
        path = save(tmp_path / f"a.{ending}", pixels, mode)
    got = decode(path, 6, "crop")
    assert got.shape == (6, 6, 3) and got.min() > 250


def test_what_is_transparent_lies_on_black(tmp_path):
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[:2, :, 3] = 0
    got = decode(save(tmp_path / "a.png", pixels), 4, "crop")
    assert (got[:2] == 0).all() and (got[2:] == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    got = decode(tmp_path / "p.png", 4, "crop")
    assert got[0, 0].tolist() == [0, 255, 0] and (got[1:] == 0).all()


def test_sixteen_bits_become_eight_and_are_not_clipped(tmp_path):
    grey = np.arange(16, dtype=np.uint16).reshape(4, 4) << 12
    got = decode(save(tmp_path / "a.png", grey), 4, "crop")
    np.testing.assert_array_equal(got[..., 0], grey >> 8)


def folder(tmp_path, **options):
    data_files.write_images(tmp_path / "set", **options)
    return ImageFolder(tmp_path / "set", size=10)


def test_labels_count_the_folders_sorted(tmp_path):
    source = folder(tmp_path)
    save(tmp_path / "set" / "n0001" / "b é.JPEG", np.zeros((40, 9), np.uint8))
    (tmp_path / "set" / "n0001" / "notes.txt").write_text("passed over")
    (tmp_path / "set" / "list.txt").write_text("passed over")
    (tmp_path / "set" / ".cache").mkdir()
    source = ImageFolder(tmp_path / "set", size=10)
    assert source.classes == ("n0000", "n0001", "n0002")
    assert np.bincount(source.labels).tolist() == [8, 9, 8]
    assert source.file(16).name == "b é.JPEG" and source.file(3).name == "3.png"
    batch = source[np.array([16, 0, 24])]
    assert batch["image"].shape == (3, 10, 10, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].tolist() == [1, 0, 2] and batch["label"].dtype == np.int32
    assert batch["image"][0].max() == 0
    np.testing.assert_allclose(batch["image"][1].mean((0, 1)), [40, 200, 90], atol=8)


def test_files_of_any_size_make_one_batch(tmp_path):
    for i, shape in enumerate([(5, 5), (300, 20), (11, 90)]):
        for ending in ("png", "jpg"):
            home = tmp_path / f"class{i}"
            home.mkdir(exist_ok=True)
            save(home / f"x.{ending}", np.zeros(shape, np.uint8))
    batch = ImageFolder(tmp_path, size=16, fit="stretch")[np.arange(6)]
    assert batch["image"].shape == (6, 16, 16, 3)


def test_a_part_of_a_folder(tmp_path):
    source = folder(tmp_path)
    part = source.select(np.array([23, 1]))
    assert len(part) == 2 and part.labels.tolist() == [2, 0]
    assert part.classes == source.classes and len(source) == 24
    np.testing.assert_array_equal(
        part[np.array([1])]["image"], source[np.array([1])]["image"]
    )


def test_a_folder_is_a_source(tmp_path):
    data = from_source(folder(tmp_path), batch_size=5, seed=2)
    seen = [data.batch(1, step) for step in range(24)]
    labels = np.concatenate([batch["label"] for batch in seen])
    assert np.bincount(labels).tolist() == [40, 40, 40]  # five epochs
    again = pickle.loads(pickle.dumps(data)).batch(1, 7)
    np.testing.assert_array_equal(again["image"], seen[7]["image"])


@pytest.mark.parametrize("name", ["0.png", "0.jpg"])
@pytest.mark.parametrize("cut", [0, 5, 60, 700])
def test_a_file_that_is_cut_off_is_named(tmp_path, name, cut):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3)).astype(np.uint8)
    content = save(path, noise).read_bytes()
    path.write_bytes(content[:cut])
    words = f"{name} is not an image .* or is cut off .* has {cut} bytes and begins"
    with pytest.raises(ValueError, match=words):
        decode(path, 10, "crop")


def test_what_is_no_image_is_named(tmp_path):
    source = folder(tmp_path)
    source.file(3).write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="n0000/3.png is not an image.*b'<html>no'"):
        source[np.array([2, 3])]
    source.file(3).unlink()
    with pytest.raises(FileNotFoundError, match="n0000/3.png"):
        source[np.array([3])]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="set is not a folder; it should hold"):
        ImageFolder(tmp_path / "set", size=10)
    with pytest.raises(FileNotFoundError, match="no folder of a class in .*nothing"):
        ImageFolder(tmp_path, size=10)
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match="no image in .*cats.*allowed are .jpg"):
        ImageFolder(tmp_path, size=10)
    with pytest.raises(ValueError, match="fit='pad': allowed are 'crop', 'stretch'"):
        ImageFolder(tmp_path, size=10, fit="pad")
    with pytest.raises(ValueError, match="size=0"):
        ImageFolder(tmp_path, size=0)
