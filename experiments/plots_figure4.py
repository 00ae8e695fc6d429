"""Figure 4 as a picture: accuracy over hours, the paper's curves and ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes, figure, lines
from matplotlib import pyplot as plt

from experiments import plots
from experiments.figure_cluster import HOURS
from experiments.figure_curves import Result
from experiments.figure_study import TARGET, Calibrated, Method, Paper

LOOKS: dict[str, dict[str, Any]] = {  # as in all figures: a method has one colour
    "SGD [1]": {"color": "black"},
    "GPU [1]": {"color": "#8c8c8c", "linestyle": (0, (1, 1))},
    "Downpour [20]": {"color": plots.COLOURS[5]},
    "Downpour [20], Adagrad": {"color": plots.COLOURS[0]},
    "Downpour [200], Adagrad": {"color": plots.COLOURS[1]},
    "L-BFGS [2000]": {"color": plots.COLOURS[2]},
}


@matplotlib.rc_context(plots.STYLE)
def draw(
    paper: Paper,
    results: Mapping[Method, Sequence[Result]],
    found: Calibrated,
    best: float,
) -> figure.Figure:
    """Draw training above test, the paper's on the left and ours on the right.

    The axes of accuracy are in proportion: SGD[1]'s ends, and the targets, are level.

    Args:
      paper: its curves.
      results: ours, a result for each seed.
      found: the target.
      best: the best accuracy that is possible, or NaN.

    Returns:
      The picture.
    """
    picture, panels = plt.subplots(2, 2, figsize=(11, 8.6), sharex=True)
    scale = 100 * found.target / TARGET  # of our percent to theirs
    for row, split in enumerate(("training", "test")):
        left, right = panels[row]
        for name, points in getattr(paper, split).items():
            left.plot(*points.T, linewidth=1.6, **LOOKS[name])
        for method, each in results.items():
            _band(right, each, split, LOOKS[method.name])
        top = 26.0
        for panel, title, unit in (
            (left, f"The paper, {split}", 1.0),
            (right, f"Ours, {split}", scale),
        ):
            panel.axhline(TARGET * unit, **_THIN)
            panel.set(xlim=(0, HOURS), ylim=(0, top * unit), title=title)
        if 100 * best < top * scale:  # it may be unknown
            right.axhline(100 * best, color="black", linestyle="--", linewidth=1.2)
            end = HOURS - 1, 100 * best, f"best possible, {100 * best:.1f} %"
            right.text(*end, va="bottom", ha="right", fontsize=10)
        left.set_ylabel("frame accuracy (%)")
        text = f"{100 * found.target:.1f} %"
        right.text(1, TARGET * scale, text, va="bottom", fontsize=10)
        left.text(1, TARGET, "16 %", va="bottom", fontsize=10)
    for panel in panels[1]:
        panel.set_xlabel("hours; ours emulated, warm start included")
    count = len(next(iter(results.values())))
    picture.legend(handles=_handles(count), loc="outside lower center", ncols=3)
    return picture


_THIN: dict[str, Any] = {"color": "#595959", "linewidth": 1.0, "zorder": 1}


def _band(
    panel: axes.Axes, each: Sequence[Result], split: str, look: dict[str, Any]
) -> None:
    """Draw the mean over seeds, and from the lowest to the highest."""
    end = min(float(result.hours[-1]) for result in each)
    begin = max(float(result.hours[0]) for result in each)
    x = np.linspace(begin, end, 400)
    lines_ = np.array([np.interp(x, r.hours, getattr(r, split)) for r in each])
    low, high = 100 * lines_.min(0), 100 * lines_.max(0)
    panel.fill_between(x, low, high, color=look["color"], alpha=0.25, linewidth=0)
    panel.plot(x, 100 * lines_.mean(0), linewidth=1.8, **look)


def _handles(seeds: int) -> list[Any]:
    handles: list[Any] = [
        lines.Line2D([], [], label=name, **look) for name, look in LOOKS.items()
    ]
    band = matplotlib.patches.Patch(
        color=plots.GREY, label=f"lowest to highest of {seeds} seeds"
    )
    return [*handles, band, lines.Line2D([], [], label="the target", **_THIN)]
