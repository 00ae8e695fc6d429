"""Endless training streams: each batch is a pure function of (seed, replica, step).

No state to save, nothing to replay: whoever asks for a batch again gets the same bits,
in whatever order and in whatever process. The library takes anything with a `batch`.

Letters: `K` batches asked for at once, `B` examples in a batch.
"""

import math
from typing import NamedTuple

import numpy as np

_SOURCE, _TRAIN, _HELD_OUT = range(3)


def _generator(
    seed: int, purpose: int, replica: int = 0, step: int = 0
) -> np.random.Generator:
    """Give the generator of one batch: Philox keyed, not advanced, so never shared."""
    if seed < 0 or replica < 0 or step < 0:
        raise ValueError(
            f"seed {seed}, replica {replica}, step {step}: all must be 0 or more."
        )
    key = np.array([seed, (purpose << 32) | replica], np.uint64)
    counter = np.array([0, 0, 0, step], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class _Draws(NamedTuple):
    """What chance decides about one batch of images.

    Attributes:
      index: `[B]` which image.
      matrix: `[B, 2]` the rotation and zoom: (cos, sin) / zoom.
      shift: `[B, 2]` in pixels.
      noise: `[B, H * W]`.
    """

    index: np.ndarray
    matrix: np.ndarray
    shift: np.ndarray
    noise: np.ndarray


class AugmentedImages:
    """Small grey images, each seen a little shifted, turned, zoomed and noisy.

    A batch draws images with replacement, maps every output pixel back into its image
    by a random similarity, and reads there bilinearly; outside the image all is black.
    The mean image is taken off: many replicas at once tolerate only a well-conditioned
    problem (with it on, 20 replicas of Adagrad stay a percentage point or two below).

    Args:
      images: `[N, H, W]`, scaled to [0, 1].
      labels: `[N]` integers.
      batch_size: `B`.
      seed: the stream's seed.
      shift: largest shift along each axis, in pixels.
      rotation: largest angle, in degrees.
      zoom: largest relative change of size.
      noise: standard deviation of the noise added to each pixel.

    Attributes:
      mean: `[H * W]`, what to take off test images too.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        shift: float = 0.75,
        rotation: float = 12.0,
        zoom: float = 0.12,
        noise: float = 0.1,
    ):
        """Keep the images with a black rim."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more.")
        self.batch_size, self.seed = batch_size, seed
        self._shift, self._angle = shift, math.radians(rotation)
        self._zoom, self._noise = zoom, noise
        self._height, self._width = images.shape[1:]
        images = np.asarray(images, np.float32)
        self.mean = images.mean(0).ravel()
        # A black rim of two pixels: whatever falls outside is read from it.
        rim = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        self._pixels, self._labels = rim.ravel(), np.asarray(labels, np.int32)

    def batch(self, replica: int, step: int) -> dict[str, np.ndarray]:
        """Give one minibatch: `image` `[B, H * W]` and `label` `[B]`."""
        return self._render(self._draw(replica, step))

    def batches(self, replicas: np.ndarray, steps: np.ndarray) -> dict[str, np.ndarray]:
        """Give `K` minibatches at once: `image` `[K, B, H * W]`, `label` `[K, B]`."""
        pairs = zip(replicas, steps, strict=True)
        draws = [self._draw(int(replica), int(step)) for replica, step in pairs]
        fields = zip(*draws, strict=True)
        return self._render(_Draws(*map(np.stack, fields)))

    def _draw(self, replica: int, step: int) -> _Draws:
        chance = _generator(self.seed, _TRAIN, replica, step)
        size, pixels = self.batch_size, self._height * self._width
        index = chance.integers(len(self._labels), size=size)
        angle, zoom, down, right = chance.uniform(-1, 1, (4, size))
        turn = np.exp(1j * self._angle * angle) / (1 + self._zoom * zoom)
        noise = self._noise * chance.standard_normal((size, pixels), np.float32)
        return _Draws(
            index,
            np.stack([turn.real, turn.imag], -1).astype(np.float32),
            (self._shift * np.stack([down, right], -1)).astype(np.float32),
            noise,
        )

    def _render(self, draws: _Draws) -> dict[str, np.ndarray]:
        """Read the drawn images; elementwise only, so `K` does not change the bits."""
        height, width, row = self._height, self._width, self._width + 4
        middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
        y, x = np.indices((height, width), np.float32).reshape(2, -1)
        y, x = y - middle_y, x - middle_x
        cos, sin = draws.matrix[..., 0, None], draws.matrix[..., 1, None]
        down, right = draws.shift[..., 0, None], draws.shift[..., 1, None]
        # Where each output pixel comes from, in the padded image.
        y, x = cos * y - sin * x + down, sin * y + cos * x + right
        y = np.clip(y + (middle_y + 2), 0, height + 2.999)
        x = np.clip(x + (middle_x + 2), 0, width + 2.999)
        top, left = y.astype(np.int32), x.astype(np.int32)
        fy, fx = y - top.astype(y.dtype), x - left.astype(x.dtype)
        corner = draws.index[..., None] * (height + 4) * row + top * row + left
        upper = self._between(corner, fx)
        lower = self._between(corner + row, fx)
        image = upper + fy * (lower - upper) - self.mean + draws.noise
        return {"image": image, "label": self._labels[draws.index]}

    def _between(self, corner: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """Interpolate between a pixel and its right neighbour."""
        here = self._pixels[corner]
        return here + fraction * (self._pixels[corner + 1] - here)


class MarkovFrames:
    """Speech-like frames from a hidden Markov source, labelled by the central state.

    Each state sounds like a smooth log-spectrum (a few random cepstral coefficients).
    From a state the source stays or moves to one of `branching` successors; these form
    permutations of the states, so all states are equally frequent. A batch holds `B`
    independent clips of `window` consecutive frames, flattened, as in Dean et al. 2012.

    Args:
      batch_size: `B`.
      states: number of hidden states, which are the classes.
      seed: seeds the source itself and its stream.
      window: frames in a clip.
      features: log-energies in a frame.
      stay: probability of remaining in a state for the next frame.
      branching: successors of each state.
      noise: standard deviation of what is added to each log-energy; means have 1.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        states: int = 64,
        seed: int = 0,
        window: int = 11,
        features: int = 40,
        stay: float = 0.75,
        branching: int = 4,
        noise: float = 2.0,
    ):
        """Draw the source: its spectra and its transitions."""
        if batch_size < 1 or states < 2:
            raise ValueError(
                f"batch_size is {batch_size} and states is {states}; a stream needs "
                "1 or more examples in a batch and 2 or more states."
            )
        self.batch_size, self.states, self.seed = batch_size, states, seed
        self.window, self.features = window, features
        self._stay, self._noise = stay, noise
        source = _generator(seed, _SOURCE)
        self._successors = np.stack(
            [source.permutation(states) for _ in range(branching)], axis=1
        )
        cepstra = source.standard_normal((states, 12))
        order, place = np.arange(1, 13)[:, None], np.arange(features) + 0.5
        spectra = cepstra @ (np.cos(np.pi * order * place / features) / np.sqrt(order))
        self._means = (spectra / spectra.std()).astype(np.float32)

    def batch(self, replica: int, step: int) -> dict[str, np.ndarray]:
        """Give one minibatch: `frames` `[B, window * features]` and `state` `[B]`."""
        chance = _generator(self.seed, _TRAIN, replica, step)
        return self._clips(chance, self.batch_size)

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """Give `count` clips that no replica ever trains on."""
        return self._clips(_generator(self.seed, _HELD_OUT), count)

    def _clips(self, chance: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        states = np.empty((count, self.window), np.int64)
        states[:, 0] = chance.integers(self.states, size=count)
        stays = chance.random((count, self.window)) < self._stay
        moves = chance.integers(self._successors.shape[1], size=(count, self.window))
        for t in range(1, self.window):
            before = states[:, t - 1]
            after = self._successors[before, moves[:, t]]
            states[:, t] = np.where(stays[:, t], before, after)
        shape = count, self.window, self.features
        frames = chance.standard_normal(shape, dtype=np.float32)
        frames *= np.float32(self._noise)
        frames += self._means[states]
        return {
            "frames": frames.reshape(count, -1),
            "state": states[:, self.window // 2].astype(np.int32),
        }


class PaintedShapes:
    """Colour images of one thing each: its outline and its paint say what it is.

    A class has an outline, a circle with `lobes` waves, and two colours, in stripes of
    some direction and width. An image shows one at any place near its middle, in any
    size of a range, with the stripes anywhere, on a ground of any colour, and noise on
    all of it. So no pixel says anything of the class by itself.

    Args:
      batch_size: `B`.
      classes: how many there are.
      seed: seeds the classes and their stream.
      size: of the images, in pixels on a side.
      shift: how far a thing may be from the middle along each axis; half a side is 1.
      noise: standard deviation of what is added; colours are from -1 to 1.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        classes: int = 64,
        seed: int = 0,
        size: int = 100,
        shift: float = 0.15,
        noise: float = 0.5,
    ):
        """Draw the classes."""
        if batch_size < 1 or classes < 2 or size < 2:
            raise ValueError(
                f"batch_size is {batch_size}, classes is {classes} and size is {size}; "
                "a stream needs 1 or more examples in a batch, 2 or more classes and "
                "2 or more pixels on a side."
            )
        self.batch_size, self.classes, self.seed = batch_size, classes, seed
        self.size, self._shift, self._noise = size, shift, np.float32(noise)
        source = _generator(seed, _SOURCE)
        self._lobes = source.integers(2, 6, classes).astype(np.float32)
        self._depth = source.uniform(0.1, 0.4, classes).astype(np.float32)
        self._turn = source.uniform(0, 2 * np.pi, classes).astype(np.float32)
        angle = source.uniform(0, np.pi, classes)
        frequency = source.uniform(np.pi, 3 * np.pi, classes)  # over half a side
        stripes = frequency * np.exp(1j * angle)
        self._stripes = np.stack([stripes.imag, stripes.real]).astype(np.float32)
        self._colours = source.uniform(-1, 1, (2, classes, 3)).astype(np.float32)

    def batch(self, replica: int, step: int) -> dict[str, np.ndarray]:
        """Give one minibatch: `image` `[B, size, size, 3]` and `label` `[B]`."""
        chance = _generator(self.seed, _TRAIN, replica, step)
        return self._paint(chance, self.batch_size)

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """Give `count` images that no replica ever trains on."""
        return self._paint(_generator(self.seed, _HELD_OUT), count)

    def _paint(self, chance: np.random.Generator, count: int) -> dict[str, np.ndarray]:
        label = chance.integers(self.classes, size=count)
        down, right = self._draw(chance, count, -self._shift, self._shift, 2)
        radius, phase = (
            self._draw(chance, count, low, high)[0]
            for low, high in ((0.6, 0.85), (0, 2 * np.pi))
        )
        ground = chance.uniform(-1, 1, (count, 1, 1, 3)).astype(np.float32)

        def of_class(values: np.ndarray) -> np.ndarray:
            return values[label][:, None, None]

        y, x = np.indices((self.size,) * 2, np.float32) * (2 / (self.size - 1)) - 1
        y, x = y - down, x - right
        waves = np.cos(of_class(self._lobes) * np.arctan2(y, x) + of_class(self._turn))
        outline = radius * (1 + of_class(self._depth) * waves)
        # 1 inside, 0 outside, and a pixel wide between.
        inside = np.clip((outline - np.hypot(y, x)) * (self.size / 2) + 0.5, 0, 1)
        fy, fx = map(of_class, self._stripes)
        stripe = 0.5 + 0.5 * np.sin(fy * y + fx * x + phase)
        one, other = (colours[label][:, None, None] for colours in self._colours)
        paint = one + stripe[..., None] * (other - one)
        image = ground + inside[..., None] * (paint - ground)
        noise = chance.standard_normal(image.shape, dtype=np.float32)
        image += self._noise * noise
        return {"image": image, "label": label.astype(np.int32)}

    @staticmethod
    def _draw(
        chance: np.random.Generator, count: int, low: float, high: float, many: int = 1
    ) -> np.ndarray:
        """Draw uniform numbers `[many, count, 1, 1]`."""
        return chance.uniform(low, high, (many, count, 1, 1)).astype(np.float32)
