import numpy as np
import pytest

from experiments import streams


def images(noise=0.1, **options):
    chance = np.random.default_rng(0)
    pixels = chance.random((5, 8, 8), dtype=np.float32)
    return pixels, streams.AugmentedImages(
        pixels, np.arange(5), 4, noise=noise, **options
    )


STREAMS = {
    "images": lambda seed: images(seed=seed)[1],
    "frames": lambda seed: streams.MarkovFrames(4, states=7, seed=seed),
    "shapes": lambda seed: streams.PaintedShapes(4, classes=7, size=9, seed=seed),
}


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_a_batch_depends_on_seed_replica_and_step_alone(make):
    first = make(3).batch(2, 5)
    stream = make(3)
    for replica, step in [(2, 6), (0, 5), (5, 2)]:
        assert not same(first, stream.batch(replica, step))
    assert same(first, stream.batch(2, 5))
    assert not same(first, make(4).batch(2, 5))
    assert [value.dtype for value in first.values()] == [np.float32, np.int32]


def test_many_images_at_once_are_the_same_bits():
    _, stream = images()
    replicas, steps = np.array([0, 3, 3]), np.array([7, 0, 2])
    together = stream.batches(replicas, steps)
    for k in range(3):
        alone = stream.batch(int(replicas[k]), int(steps[k]))
        assert same(alone, {name: value[k] for name, value in together.items()})


def test_without_augmentation_the_images_come_back():
    pixels, stream = images(noise=0.0, shift=0.0, rotation=0.0, zoom=0.0)
    batch = stream.batch(0, 0)
    expected = pixels.reshape(5, 64)[batch["label"]] - stream.mean
    np.testing.assert_allclose(batch["image"], expected, atol=1e-6)


def test_a_shift_moves_the_image_and_reads_black_outside():
    pixels = np.zeros((1, 8, 8), np.float32)
    pixels[0, 4, 4] = 1.0
    stream = streams.AugmentedImages(
        pixels, np.zeros(1), 64, shift=1.9, rotation=0.0, zoom=0.0, noise=0.0
    )
    image = (stream.batch(0, 0)["image"] + stream.mean).reshape(64, 8, 8)
    np.testing.assert_allclose(image.sum((1, 2)), 1.0, atol=1e-5)  # none is lost
    middle = np.einsum("bhw,h->b", image, np.arange(8.0))
    assert 2.0 <= middle.min() < 3.0 and 5.0 < middle.max() <= 6.0


def test_all_states_of_the_markov_source_are_equally_frequent():
    stream = streams.MarkovFrames(4, states=6, seed=1)
    counts = np.bincount(stream.held_out(6_000)["state"], minlength=6)
    assert abs(counts - 1_000).max() < 5 * np.sqrt(1_000)


def test_held_out_clips_are_not_those_of_replica_0():
    stream = streams.MarkovFrames(4, states=6, seed=1)
    assert not same(stream.held_out(4), stream.batch(0, 0))
    assert stream.held_out(3)["frames"].shape == (3, 440)


def test_a_painted_shape_is_in_the_middle_of_its_ground():
    stream = streams.PaintedShapes(64, classes=3, size=33, noise=0.0)
    batch = stream.batch(0, 0)
    image, label = batch["image"], batch["label"]
    assert image.shape == (64, 33, 33, 3) and set(label) == {0, 1, 2}
    ground = image[:, 0, 0]
    for corner in (image[:, 0, -1], image[:, -1, 0], image[:, -1, -1]):
        np.testing.assert_array_equal(corner, ground)
    assert abs(image).max() <= 1
    assert (abs(image[:, 16, 16] - ground).max(-1) > 1e-3).all()
    # On any ground a class has colours of its own: those on a line between two.
    for name in range(3):
        middle = image[label == name, 16, 16]
        spread = np.linalg.svd(middle - middle.mean(0), compute_uv=False)
        assert spread[1] < 1e-4 * spread[0]


def test_held_out_shapes_are_not_those_of_replica_0():
    stream = streams.PaintedShapes(4, classes=6, size=9)
    assert not same(stream.held_out(4), stream.batch(0, 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: streams.MarkovFrames(0),
        lambda: streams.PaintedShapes(0),
        lambda: streams.PaintedShapes(4, classes=1),
        lambda: streams.MarkovFrames(4, states=1),
        lambda: streams.AugmentedImages(np.zeros((1, 8, 8)), np.zeros(1), 0),
        lambda: streams.MarkovFrames(4).batch(-1, 0),
    ],
)
def test_bad_arguments_are_named(make):
    with pytest.raises(ValueError, match="is 0|(states|classes) is 1|replica -1"):
        make()
