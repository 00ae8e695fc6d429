"""The figures of a run, drawn from its Traces: curves, staleness, replica timeline.

Colours are Okabe and Ito's, which differ for colour-blind readers too; scales of
colour are cividis. All is sized to be read at half the width of a README.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib import axes, collections, figure, ticker  # noqa: E402

from dbjax import trace as trace_lib  # noqa: E402
from dbjax.trace import Trace  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREY = "#999999"
_MOST_REPLICAS = 40  # rows in a timeline that can still be told apart
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "savefig.dpi": 130,
}


def draw(
    traces: Mapping[str, Trace], workdir: pathlib.Path, *, title: str
) -> list[pathlib.Path]:
    """Draw everything there is to see and save it as PNG.

    Args:
      traces: the Trace of each method, by name.
      workdir: where the figures go.
      title: what was trained.

    Returns:
      The files: `accuracy.png`, and for each method with several replicas
      `<method>_staleness.png` and `<method>_timeline.png`.
    """
    figures = {"accuracy": curves(traces, title)}
    for name, trace in traces.items():
        if trace.header["replicas"] > 1:
            figures[f"{name}_staleness"] = staleness(trace, name)
            figures[f"{name}_timeline"] = timeline(trace, name)
    files = []
    for name, picture in figures.items():
        files.append(workdir / f"{name}.png")
        picture.savefig(files[-1])
        plt.close(picture)
    return files


@matplotlib.rc_context(_STYLE)
def curves(traces: Mapping[str, Trace], title: str) -> figure.Figure:
    """Test accuracy over the run's own time, and test loss over minibatches."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4))
    for (name, trace), colour in zip(traces.items(), COLOURS * 9, strict=False):
        rows = trace.evaluations
        step, time, accuracy, loss = (
            np.array([row[key] for row in rows], float)
            for key in ("step", "time", "test_accuracy", "test_loss")
        )
        label = f"{name}, {_replicas(trace)}"
        begun = time > 0  # a logarithmic axis has no place for the start
        left.plot(time[begun], 100 * accuracy[begun], color=colour, label=label)
        left.plot(time[-1], 100 * accuracy[-1], "o", color=colour)
        right.plot(step, loss, color=colour, label=label)
    plain = ticker.StrMethodFormatter("{x:,g}")
    left.set_xscale("log")
    left.xaxis.set_major_formatter(plain)
    left.set(xlabel="time of the run (s)", ylabel="test accuracy (%)")
    left.set_title(title + _mark_lead(left, traces))
    left.legend(loc="lower right")
    right.set_yscale("log")
    right.set(xlabel="minibatches, all replicas together", ylabel="test loss (nats)")
    right.set_title("the same, over the data seen")
    right.xaxis.set_major_formatter(plain)
    right.xaxis.set_major_locator(ticker.MaxNLocator(5))
    right.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(plain)
    right.yaxis.set_minor_formatter(ticker.NullFormatter())
    right.legend(loc="upper right")
    return picture


def time_to(trace: Trace, accuracy: float) -> float:
    """Say when the test accuracy first was `accuracy`; infinity if it never was."""
    for row in trace.evaluations:
        if row["test_accuracy"] >= accuracy:
            return row["time"]
    return math.inf


def _mark_lead(panel: axes.Axes, traces: Mapping[str, Trace]) -> str:
    """Draw an arrow between two methods' times to one accuracy; say what it means.

    That accuracy is the best of the weaker method less three percentage points: both
    still climb fast there, so that chance hardly moves the times.
    """
    if len(traces) != 2:
        return ""
    best = [max(row["test_accuracy"] for row in t.evaluations) for t in traces.values()]
    target = min(best) - 0.03
    times = [time_to(trace, target) for trace in traces.values()]
    early, late = min(times), max(times)
    if not 0 < 1.5 * early < late:
        return ""
    arrow = {"arrowstyle": "<->", "color": "black", "shrinkA": 0, "shrinkB": 0}
    ends = {"xy": (early, 100 * target), "xytext": (late, 100 * target)}
    panel.annotate("", **ends, arrowprops=arrow)
    return f": {100 * target:.0f} % is reached {late / early:.0f}x sooner"


@matplotlib.rc_context(_STYLE)
def staleness(trace: Trace, name: str) -> figure.Figure:
    """How many updates by others each push had missed, as a histogram."""
    stale = trace.staleness()
    stale = stale[stale >= 0]
    mean, top = stale.mean(), int(np.quantile(stale, 0.999)) + 1
    # A bin holds whole numbers only, so that no bin is higher by counting more.
    width = max(1, -(-top // 60))
    edges = np.arange(0, top + width, width) - 0.5
    picture, panel = plt.subplots(figsize=(6.4, 4))
    weights = np.full(len(stale), 100 / len(stale))
    panel.hist(stale, edges.tolist(), weights=weights, color=COLOURS[0], rwidth=0.9)
    others = trace.header["replicas"] - 1
    panel.axvline(mean, color=COLOURS[1], linewidth=5, label=f"mean {mean:.1f}")
    panel.axvline(
        others,
        color="black",
        linestyle="--",
        label=f"replicas - 1 = {others}",
    )
    panel.set(xlabel="staleness (updates missed)", ylabel="share of pushes (%)")
    panel.set_title(f"{name}, {_replicas(trace)}: staleness of {len(stale):,} updates")
    panel.legend(loc="upper right")
    return picture


@matplotlib.rc_context(_STYLE)
def timeline(trace: Trace, name: str, steps: float = 10.0) -> figure.Figure:
    """What each replica did in the first `steps` mean step times.

    A bar is a minibatch, coloured by the staleness of the push that carried its
    gradient; grey is time on the network or at a shard.
    """
    computed = trace.kind == trace_lib.COMPUTE
    window = steps * float((trace.time - trace.start)[computed].mean())
    early = trace.take(
        (trace.start < trace.start.min() + window) & (trace.replica < _MOST_REPLICAS)
    )
    shown = min(int(trace.header["replicas"]), _MOST_REPLICAS)
    picture, panel = plt.subplots(figsize=(10.5, 1.6 + 0.17 * shown))
    messages = np.isin(early.kind, (trace_lib.FETCH, trace_lib.PUSH))
    panel.add_collection(
        _bars(early.take(messages), height=0.3, color=_GREY, linewidth=0)
    )
    work = early.take(early.kind == trace_lib.COMPUTE)
    carried = _carried(trace, work)
    bars = _bars(work, height=0.8, cmap="cividis", array=carried)
    # A scale about what is usual; a slow replica would make all others look the same.
    bars.set_clim(0, max(1.0, 2 * float(np.nanmedian(carried))))
    panel.add_collection(bars)
    failed = early.take(early.kind == trace_lib.FAIL)
    panel.plot(failed.time, failed.replica, "x", color=COLOURS[1], label="failure")
    begin = float(trace.start.min())
    panel.set(
        xlim=(begin, begin + window),
        ylim=(shown - 0.4, -0.6),
        xlabel="time of the run (s)",
        ylabel="replica",
    )
    panel.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    panel.grid(False)
    panel.set_title(f"{name}, {_replicas(trace)}: minibatch by minibatch")
    if len(failed):
        panel.legend(loc="upper right", facecolor="white", frameon=True)
    picture.colorbar(bars, label="staleness of its push", pad=0.01, extend="max")
    return picture


def _bars(rows: Trace, height: float, **look: Any) -> collections.PolyCollection:
    """Give one bar from `start` to `time` for each row, in its replica's line."""
    low, high = rows.replica - height / 2, rows.replica + height / 2
    x = np.stack([rows.start, rows.start, rows.time, rows.time], -1)
    y = np.stack([low, high, high, low], -1)
    look = {"edgecolor": "white", "linewidth": 0.6, **look}
    return collections.PolyCollection(list(np.stack([x, y], -1)), **look)


def _carried(trace: Trace, work: Trace) -> np.ndarray:
    """Give for each COMPUTE row the staleness of its replica's next push, `[rows]`.

    That is the mean over shards; NaN where no push came (it failed).
    """
    pushes = trace.take((trace.kind == trace_lib.PUSH) & (trace.base >= 0))
    result = np.full(len(work), np.nan)
    for replica in np.unique(work.replica):
        mine = np.flatnonzero(work.replica == replica)
        sent = pushes.take(pushes.replica == replica)
        ids, push = np.unique(sent.id, return_inverse=True)
        if not len(ids):
            continue
        missed = sent.version - 1 - sent.base
        mean = np.bincount(push, weights=missed) / np.bincount(push)
        arrived = np.full(len(ids), -np.inf)
        np.maximum.at(arrived, push, sent.time)
        following = np.searchsorted(arrived, work.time[mine])
        known = following < len(ids)
        result[mine[known]] = mean[following[known]]
    return result


def _replicas(trace: Trace) -> str:
    count = trace.header["replicas"]
    return "1 replica" if count == 1 else f"{count} replicas"
