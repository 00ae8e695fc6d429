"""Speech, frame by frame: each with its neighbours, spliced when it is asked for.

A frame is kept once, though a window of 11 shows it 11 times. Letters: `T` frames of
all utterances, `F` coefficients in a frame, `B` frames asked for.
"""

from collections.abc import Sequence

import numpy as np

from dbjax.data.files.kaldi import Utterance


class SplicedFrames:
    """Windows of consecutive frames, each labelled with its central frame's state.

    Beyond its ends an utterance's first and last frames are repeated, as Kaldi does; a
    window never reaches into another utterance. A source for `from_source`.

    Args:
        utterances: one or more, of frames with the same number of coefficients.
        window: frames that are seen at once, odd.

    Attributes:
        frames: `[T, F]` float32, all utterances one after another.
        states: `[T]` int32.
        window: as given.

    Raises:
        ValueError: there is no utterance, the window is not odd, or utterances do not
          fit each other.

    Examples:
        >>> speech = Utterance("a", np.arange(4.0)[:, None], np.array([7, 7, 8, 8]))
        >>> source = SplicedFrames([speech], window=3)
        >>> batch = source[np.array([0, 2])]
        >>> batch["frames"].tolist(), batch["state"].tolist()
        ([[0.0, 0.0, 1.0], [1.0, 2.0, 3.0]], [7, 8])
    """

    def __init__(self, utterances: Sequence[Utterance], *, window: int = 11):
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window={window}: allowed are odd numbers from 1")
        if not utterances:
            raise ValueError("no utterances: allowed are one or more")
        width = utterances[0].frames.shape[1]
        for name, frames, _ in utterances:
            if frames.shape[1] != width:
                raise ValueError(
                    f"utterance {name!r} has frames of {frames.shape[1]} coefficients, "
                    f"but {utterances[0].name!r} of {width}: allowed is one width"
                )
        self.window = window
        self.frames = np.concatenate([one.frames for one in utterances])
        self.frames = self.frames.astype(np.float32, copy=False)
        self.states = np.concatenate([one.states for one in utterances], dtype=np.int32)
        self._ends = np.cumsum([len(one.frames) for one in utterances])

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Splice: `frames` `[B, window * F]` float32 and `state` `[B]` int32."""
        rows = np.asarray(rows)
        # Which utterance a frame is in; those before it end where it begins, or sooner.
        which = np.searchsorted(self._ends, rows, side="right")
        first = np.where(which > 0, self._ends[which - 1], 0)
        around = np.arange(self.window) - self.window // 2
        windows = rows[:, None] + around
        windows = np.clip(windows, first[:, None], self._ends[which][:, None] - 1)
        frames = self.frames[windows].reshape(len(rows), -1)
        return {"frames": frames, "state": self.states[rows]}

    def standardize(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        """Bring each coefficient to mean 0 and deviation 1, in place.

        Args:
            mean: `[F]`, of the training data.
            deviation: `[F]`, likewise; where it is 0 nothing is divided.
        """
        self.frames -= np.asarray(mean, np.float32)
        self.frames /= np.where(deviation > 0, deviation, 1).astype(np.float32)
