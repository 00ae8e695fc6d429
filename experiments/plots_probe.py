"""What `dbjax.probe` saw, as a picture: a point for each push."""

from typing import Any

import matplotlib
from matplotlib import colors, figure, ticker
from matplotlib import pyplot as plt

from dbjax.downpour.probe import Probes
from experiments import plots

PANELS = {
    "relative_distance": "How far parameters had moved",
    "cosine": "How well the gradient still fits",
    "eta_lambda": "How near to the limit",
}
LABELS = {
    "relative_distance": "distance / norm of the parameters",
    "cosine": "cosine, stale and fresh gradient",
    "eta_lambda": "rate x curvature",
}


@matplotlib.rc_context(plots.STYLE)
def draw(seen: Probes) -> figure.Figure:
    """Draw a panel for each thing that was measured.

    Args:
      seen: of one run or more of the probes.

    Returns:
      The picture; the limit of stability is that of SGD with each push's staleness.
    """
    names = [name for name in PANELS if name in seen.values]
    picture, panels = plt.subplots(
        1, len(names), figsize=(1 + 3.7 * len(names), 3.6), squeeze=False
    )
    late = seen.staleness.max(axis=1)
    scale = colors.Normalize(0, max(1, int(late.max(initial=1))))
    look: dict[str, Any] = {"c": late, "s": 12, "norm": scale}
    points: Any = None
    for panel, name in zip(panels[0], names, strict=True):
        points = panel.scatter(seen.step, seen.values[name], **look)
        panel.set(title=PANELS[name], xlabel="step", ylabel=LABELS[name])
        if name == "eta_lambda":
            limit = seen.values["eta_lambda_limit"]
            panel.plot(
                seen.step, limit, "_", color=plots.COLOURS[1], label="limit"
            )  # fmt: skip
            panel.set_yscale("log")
            plots.tick_logarithmic(panel.yaxis)
            panel.legend(loc="upper right")
    whole = ticker.MaxNLocator(6, integer=True)
    picture.colorbar(
        points, ax=panels, label="staleness (updates)", pad=0.01, ticks=whole
    )  # fmt: skip
    return picture
