"""Published orderings as a picture: what each seed of each method led to."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib import figure
from matplotlib import pyplot as plt

from experiments import plots

if TYPE_CHECKING:
    from experiments.orderings_task import Study


@matplotlib.rc_context(plots.STYLE)
def draw(found: Mapping[str, "Study"]) -> figure.Figure:
    """Draw every seed of every method.

    Args:
      found: studies by name.

    Returns:
      The picture, a panel for each study.
    """
    lines = [max(3, len(study.values)) for study in found.values()]
    rows, columns = -(-len(found) // 2), min(2, len(found))
    heights = [max(lines[i : i + columns]) for i in range(0, len(found), columns)]
    picture, panels = plt.subplots(
        rows, columns, figsize=(7 * columns, 0.9 * rows + 0.3 * sum(heights)),
        squeeze=False, height_ratios=heights,
    )  # fmt: skip
    for empty in panels.flat[len(found) :]:
        empty.remove()
    for panel, (name, study) in zip(panels.flat, found.items(), strict=False):
        for row, values in enumerate(study.values.values()):
            reached = [value for value in values if math.isfinite(value)]
            colour = plots.COLOURS[row % len(plots.COLOURS)]
            panel.plot(reached, [row] * len(reached), "o", color=colour, alpha=0.6)
            if reached:
                middle = np.exp(np.mean(np.log(reached))) if study.logarithmic else (
                    np.mean(reached)
                )  # fmt: skip
                panel.plot(middle, row, "|", color="black", markersize=14)
            if lost := len(values) - len(reached):
                where = panel.get_yaxis_transform()
                panel.text(
                    1.01, row, f"{lost} never", transform=where, va="center"
                )  # fmt: skip
        panel.set_yticks(range(len(study.values)), list(study.values))
        panel.invert_yaxis()
        panel.set(title=name, xlabel=study.measure)
        if study.logarithmic:
            panel.set_xscale("log")
            plots.tick_logarithmic(panel.xaxis)
    return picture
