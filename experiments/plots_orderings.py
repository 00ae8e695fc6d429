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
    from experiments.orderings import Study


@matplotlib.rc_context(plots.STYLE)
def draw(found: Mapping[str, "Study"]) -> figure.Figure:
    """Draw every seed of every method.

    Args:
      found: studies by name.

    Returns:
      The picture, a panel for each study.
    """
    rows = [max(3, len(study.values)) for study in found.values()]
    picture, panels = plt.subplots(
        len(found), 1, figsize=(8, 0.9 * len(found) + 0.33 * sum(rows)),
        squeeze=False, height_ratios=rows,
    )  # fmt: skip
    for panel, (name, study) in zip(panels[:, 0], found.items(), strict=True):
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
