"""Figure 3 as a picture: the paper's points, the fitted model, and this machine."""

from typing import Any

import matplotlib
from matplotlib import axes, figure, lines
from matplotlib import pyplot as plt

from dbjax.cluster import partitions
from dbjax.cluster.partitions import Machine, Network
from experiments import plots
from experiments.figure3_fit import ASSUMED, BATCH, Fit, Paper, describe, error
from experiments.measure_machine import Measured

LARGEST = 128
MARKERS = ("o", "s", "^", "D")


@matplotlib.rc_context(plots.STYLE)
def draw(paper: Paper, found: Fit, measured: Measured | None) -> figure.Figure:
    """Draw the paper's points and the model's curves on logarithmic axes."""
    count = 2 if measured else 1
    picture, panels = plt.subplots(1, count, figsize=(5.6 * count, 5.4), squeeze=False)
    left = panels[0, 0]
    for aside, (name, network, colour, marker) in enumerate(_looks(paper)):
        mine = [point for point in paper.points if point.network == name]
        # A little to the side, as some lie on one another.
        x = [point.machines * 1.04 ** (aside - 1.5) for point in mine[1:]]
        y = [point.speed_up for point in mine[1:]]
        _curve(left, network, found.machine, colour)
        _curve(left, network, found.without[name], colour, linestyle=":", linewidth=1.5)
        edge = {"markeredgecolor": "black", "markeredgewidth": 0.8, "zorder": 3}
        left.plot(x, y, marker, color=colour, markersize=7, **edge)
    errors = [error(paper, name, found.machine).median for name in paper.networks]
    low, high = 100 * min(errors), 100 * max(errors)
    left.set_title(f"The paper's curves; model {low:.0f} to {high:.0f} % off (medians)")
    _about(left, "one machine, fitted to all points:", found.machine)
    _axes(left, 24)
    if measured:
        right = panels[0, 1]
        for _, network, colour, _ in _looks(paper):
            _curve(right, network, measured.machine, colour)
        seen = measured.steps[1] / measured.steps[2]
        right.plot(2, seen, "*", color="black", markersize=12)
        text = f"a smaller network, run here:\n{seen:.2f}x on 2 cores"
        right.annotate(text, (2, seen), xytext=(3, 1.05), fontsize=10)
        right.set_title("What machines like this one's cores would do")
        _about(right, "measured here, its spread too:", measured.machine)
        _axes(right, LARGEST)
    picture.legend(handles=_handles(paper), loc="outside lower center", ncols=4)
    return picture


def _looks(paper: Paper) -> list[tuple[str, Network, str, str]]:
    looks = zip(paper.networks.items(), plots.COLOURS, MARKERS, strict=False)
    return [(*item, colour, marker) for item, colour, marker in looks]


def _curve(
    panel: axes.Axes, network: Network, machine: Machine, colour: str, **look: Any
) -> None:
    # Powers of two and squares, as in the paper: others cut grids into thin strips.
    x = [1, 2, 4, 8, 16, 32, 36, 64, 100, 128]
    y = [partitions.speed_up(machine, network, machines) for machines in x]
    panel.plot(x, y, color=colour, **look)


def _about(panel: axes.Axes, how: str, machine: Machine) -> None:
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    rate = f"{cores} of {machine.flops / 1e9:.3g} Gop/s"
    assumed = " (assumed)" if machine.flops == ASSUMED.flops else ""
    send, late, spread = describe(machine).split(", ")
    text = f"{how}\n{rate}{assumed},\n{send}, {late},\n{spread};"
    text += f"\nmini-batches of {BATCH} (assumed)"
    panel.text(0.03, 0.97, text, transform=panel.transAxes, va="top", fontsize=10)


def _axes(panel: axes.Axes, top: float) -> None:
    panel.plot([1, LARGEST], [1, LARGEST], "--", color=plots.GREY, linewidth=1.5)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set(xlabel="machines", ylabel="speed-up over one machine")
    panel.set(xlim=(0.92, 1.18 * LARGEST), ylim=(0.8, 1.1 * top))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(plots.plain())


def _handles(paper: Paper) -> list[lines.Line2D]:
    black: dict[str, Any] = {"color": "black", "markersize": 6}
    of_networks = [
        lines.Line2D([], [], color=colour, marker=marker, label=name)
        for name, _, colour, marker in _looks(paper)
    ]
    return [
        *of_networks,
        lines.Line2D([], [], **black, marker="o", ls="", label="paper, as drawn"),
        lines.Line2D([], [], **black, label="model"),
        lines.Line2D([], [], **black, ls=":", lw=1.5, label="fitted without it"),
        lines.Line2D([], [], color=plots.GREY, lw=1.5, ls="--", label="ideal"),
    ]
