"""Phase diagrams as small multiples, and what asynchrony costs, as pictures."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import axes, colors, figure, lines, patches, ticker
from matplotlib import pyplot as plt

from experiments import plots
from experiments.phase_costs import Cost, Load

if TYPE_CHECKING:
    from experiments.phases import Diagram

COLUMNS = 3
FAILED = "#d9d9d9"
# Curves on a picture of colours: at the start, and where the loss was sharpest.
LIMITS: tuple[dict[str, Any], ...] = (
    {"color": "#D55E00", "linestyle": "-"},
    {"color": "#D55E00", "linestyle": "--"},
)
LOOKS: tuple[dict[str, Any], ...] = tuple(
    {"color": colour, "marker": marker, "markersize": 6}
    for colour, marker in zip(plots.COLOURS, "os^Dvp", strict=True)
)


@matplotlib.rc_context(plots.STYLE)
def draw(diagrams: Sequence["Diagram"], what: str) -> figure.Figure:
    """Draw a panel for each rule: what the Traces differ in, learning rate, loss.

    Args:
      diagrams: of the same Traces' values and rates.
      what: names the values.

    Returns:
      The picture.
    """
    columns = min(COLUMNS, len(diagrams))
    rows = -(-len(diagrams) // columns)
    picture, panels = plt.subplots(
        rows, columns, figsize=(1.2 + 3.5 * columns, 1.4 + 2.9 * rows),
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    good = np.concatenate([d.loss[~d.failed] for d in diagrams])
    low, high = (float(good.min()), float(good.max())) if len(good) else (0.1, 1.0)
    scale = colors.LogNorm(low, max(high, 1.01 * low))
    mesh: Any = None
    for panel, diagram in zip(panels.flat, diagrams, strict=False):
        mesh = _panel(panel, diagram, scale)
    for panel in panels.flat[len(diagrams) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel(what)
    for panel in panels[:, 0]:
        panel.set_ylabel("learning rate")
    bar = picture.colorbar(mesh, ax=panels, pad=0.01, aspect=14 * rows)
    bar.set_label("training loss at the end (nats)")
    plots.tick_logarithmic(bar.ax.yaxis)
    picture.legend(
        handles=_handles(diagrams), loc="outside lower center", ncols=columns
    )
    return picture


def _panel(panel: axes.Axes, diagram: "Diagram", scale: colors.Normalize) -> Any:
    """Draw one rule: cells at equal distances, as 0 has no logarithm."""
    place = np.arange(len(diagram.values))
    logs = np.log(diagram.rates)
    middle = (logs[1:] + logs[:-1]) / 2
    ends = [2 * logs[0] - middle[0], *middle, 2 * logs[-1] - middle[-1]]
    edges = np.exp(ends)
    shown = np.ma.array(diagram.loss.T, mask=diagram.failed.T)
    panel.set_facecolor(FAILED)
    mesh = panel.pcolormesh(
        np.arange(len(place) + 1) - 0.5, edges, shown, norm=scale, cmap="viridis_r"
    )
    # The best rate of each column that has one.
    best = np.where(diagram.failed, np.inf, diagram.loss)
    there = np.isfinite(best.min(axis=1))
    panel.plot(
        place[there], diagram.rates[best.argmin(axis=1)][there], "o", color="white",
        markersize=4.5, markeredgecolor="black", markeredgewidth=0.7,
    )  # fmt: skip
    if diagram.limits is not None:
        for limit, look in zip(diagram.limits, LIMITS, strict=True):
            panel.plot(place, limit, **look, scaley=False)
    panel.set_yscale("log")
    panel.set(xlim=(-0.5, len(place) - 0.5), ylim=(edges[0], edges[-1]))
    panel.set_title(diagram.rule)
    panel.grid(False)
    panel.set_xticks(place, [f"{value:g}" for value in diagram.values])
    plots.tick_logarithmic(panel.yaxis)
    return mesh


def _handles(diagrams: Sequence["Diagram"]) -> list[Any]:
    edge = {"edgecolor": "#8c8c8c", "linewidth": 0.6}
    handles: list[Any] = [
        patches.Patch(facecolor=FAILED, label="no better than the start", **edge),
        lines.Line2D(
            [], [], marker="o", color="white", markeredgecolor="black",
            label="best rate", linestyle="",
        ),
    ]  # fmt: skip
    if any(diagram.limits is not None for diagram in diagrams):
        names = "limit, curvature at the start", "limit, largest curvature later"
        handles += [
            lines.Line2D([], [], **look, label=name)
            for look, name in zip(LIMITS, names, strict=True)
        ]
    return handles


@matplotlib.rc_context(plots.STYLE)
def draw_costs(costs: Sequence[Cost], target: float) -> figure.Figure:
    """Draw wall time and replica-seconds to the target, by number of replicas."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4))
    for index, (rule, look) in enumerate(zip(_rules(costs), LOOKS, strict=False)):
        mine = [each for each in costs if each.rule == rule]
        there = [each for each in mine if math.isfinite(each.wall_seconds)]
        x = [each.replicas for each in there]
        left.plot(x, [each.wall_seconds for each in there], label=rule, **look)
        right.plot(x, [each.replica_seconds for each in there], **look)
        never = [each.replicas for each in mine if math.isinf(each.wall_seconds)]
        top = {"color": look["color"], "linestyle": "", "marker": "x"}
        for panel in (left, right):
            high = panel.get_xaxis_transform()
            # Those of several rules one below the other.
            place = [0.97 - 0.04 * index] * len(never)
            panel.plot(never, place, transform=high, **top)
    first = [each.wall_seconds for each in costs if each.replicas == 1]
    if first and math.isfinite(min(first)):
        ideal = np.array(sorted({each.replicas for each in costs}))
        look = {"color": plots.GREY, "linestyle": "--", "linewidth": 1.5}
        left.plot(ideal, min(first) / ideal, label="ideal", **look)
    left.set(ylabel="emulated wall time (s)", title=f"Time to a loss of {target:g}")
    right.set(ylabel="replica-seconds", title="What is paid for that")
    counts = sorted({each.replicas for each in costs})
    reached = any(math.isfinite(each.wall_seconds) for each in costs)
    for panel in (left, right):
        panel.set(xscale="log", xlabel="replicas")
        panel.set_xticks(counts, [f"{count:,}" for count in counts])
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        if reached:
            panel.set_yscale("log")
            panel.margins(y=0.2)
            plots.tick_logarithmic(panel.yaxis)
        else:
            middle = {"transform": panel.transAxes, "ha": "center", "va": "center"}
            panel.text(0.5, 0.5, "nobody reached it", **middle)
            panel.yaxis.set_major_locator(ticker.NullLocator())
        panel.set_xlim(0.8 * counts[0], 1.25 * counts[-1])
    if any(math.isinf(each.wall_seconds) for each in costs):
        left.plot([], [], "x", color="black", label="not reached")
    picture.legend(loc="outside lower center", ncols=4)
    return picture


def _rules(costs: Sequence[Cost]) -> list[str]:
    return list(dict.fromkeys(each.rule for each in costs))


@matplotlib.rc_context(plots.STYLE)
def draw_saturation(loads: Sequence[Load]) -> figure.Figure:
    """Draw updates a second and how busy replicas are, by number of replicas."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4))
    for shards, look in zip(
        dict.fromkeys(each.shards for each in loads), LOOKS, strict=False
    ):
        mine = [each for each in loads if each.shards == shards]
        x = [each.replicas for each in mine]
        service = 1_000 / mine[0].most_updates_per_second
        name = f"{shards} shard{'s' * (shards > 1)}, {service:g} ms a push"
        left.plot(x, [each.updates_per_second for each in mine], label=name, **look)
        right.plot(x, [100 * each.utilisation for each in mine], **look)
        limit = {"color": look["color"], "linestyle": ":", "linewidth": 1.5}
        left.axhline(mine[0].most_updates_per_second, **limit)
    left.plot([], [], color="black", linestyle=":", linewidth=1.5, label="1 / service")
    left.set(ylabel="updates a second", title="Updates, until the shards are full")
    right.set(ylabel="time spent computing (%)", title="What replicas do meanwhile")
    right.set_ylim(0, 103)
    left.set_yscale("log")
    plots.tick_logarithmic(left.yaxis)
    for panel in (left, right):
        panel.set(xscale="log", xlabel="replicas, each a second a minibatch")
        plots.tick_logarithmic(panel.xaxis)
    picture.legend(loc="outside lower center", ncols=3)
    return picture
