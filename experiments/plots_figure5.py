"""Figure 5 as a picture: hours to the target over machines and over cores."""

import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import axes, figure, lines
from matplotlib import pyplot as plt

from experiments import plots
from experiments.figure_study import DATA, Calibrated, Method

if TYPE_CHECKING:
    from experiments.figure5 import Point

LOOKS: dict[str, dict[str, Any]] = {
    "downpour": {"color": plots.COLOURS[5], "marker": "s"},
    "adagrad": {"color": plots.COLOURS[1], "marker": "o"},
    "lbfgs": {"color": plots.COLOURS[2], "marker": "^"},
    "sgd": {"color": "#8c8c8c", "linestyle": (0, (1, 1))},
}
_NAMES = {
    "downpour": "Downpour",
    "adagrad": "Downpour, Adagrad",
    "lbfgs": "L-BFGS",
    "sgd": "GPU",
}


def read(path: pathlib.Path = DATA / "figure5.json") -> dict[str, np.ndarray]:
    """Read the paper's points by kind, `[points, 3]`: machines, cores, hours."""
    content = json.loads(path.read_text())
    return {kind: np.array(content[name], float) for kind, name in _NAMES.items()}


@matplotlib.rc_context(plots.STYLE)
def draw(
    paper: Mapping[str, np.ndarray],
    points: Mapping[Method, "Point"],
    reach: float,
    found: Calibrated,
) -> figure.Figure:
    """Draw the paper above ours, machines on the left and cores on the right.

    Args:
      paper: its points.
      points: ours.
      reach: hours within which the target has to be reached.
      found: the target.

    Returns:
      The picture.
    """
    picture, panels = plt.subplots(2, 2, figsize=(11, 8.2), sharex="col", sharey=True)
    ours = {kind: _ours(points, kind) for kind in LOOKS}
    titles = "The paper: hours to 16 %", f"Ours: hours to {100 * found.target:.1f} %"
    for row, (curves, title) in enumerate(zip((paper, ours), titles, strict=True)):
        for column, unit in enumerate(("machines", "utilised cores")):
            panel = panels[row, column]
            for kind, look in LOOKS.items():
                table = curves[kind]
                _curve(panel, table[:, column], table[:, 2:], look, kind, reach)
            panel.set(xscale="log", ylim=(0, 1.08 * reach))
            panel.set_title(title if column == 0 else "")
            if row:
                panel.set_xlabel(unit)
        panels[row, 0].set_ylabel("hours, warm start included")
    for panel in panels.flat:
        plots.tick_logarithmic(panel.xaxis)
    handles: list[Any] = [
        lines.Line2D([], [], **look, label=_NAMES[kind]) for kind, look in LOOKS.items()
    ]
    never = lines.Line2D(
        [], [], color="black", marker="x", linestyle="", label=f"not in {reach:.0f} h"
    )
    picture.legend(handles=[*handles, never], loc="outside lower center", ncols=5)
    return picture


def _ours(points: Mapping[Method, "Point"], kind: str) -> np.ndarray:
    """Rows of machines, cores, median, lowest and highest of a kind."""
    rows = [
        (p.machines, p.cores, p.times.middle, p.times.hours.min(), p.times.hours.max())
        for method, p in points.items()
        if method.kind == kind
    ]
    return np.array(rows, float).reshape(-1, 5)


def _curve(
    panel: axes.Axes,
    x: np.ndarray,
    hours: np.ndarray,
    look: Mapping[str, Any],
    kind: str,
    reach: float,
) -> None:
    """Draw points and, of ours, from the first seed to the last."""
    middle = hours[:, 0]
    there = np.isfinite(middle) & (middle <= reach)
    if kind == "sgd":
        if len(middle) and there.all():
            panel.axhline(float(middle[0]), **look)
        elif len(middle):
            when = f"{middle[0]:.0f} h" if np.isfinite(middle[0]) else "never"
            where = {"transform": panel.transAxes, "ha": "right", "va": "top"}
            panel.text(0.99, 0.97, f"GPU: {when}", fontsize=10, **where)
        return
    panel.plot(x[there], middle[there], **look)
    # Those of several methods lie beside one another.
    top = reach - 2.5 * list(LOOKS).index(kind)
    panel.plot(x[~there], np.full((~there).sum(), top), "x", color=look["color"])
    if hours.shape[1] == 3:
        low, high = (np.minimum(edge, reach) for edge in hours.T[1:])
        panel.vlines(x, low, high, color=look["color"], linewidth=1.2)
