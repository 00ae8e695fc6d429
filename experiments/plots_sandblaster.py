"""The figures of batch methods: progress, who computed which portion, and balance.

They have the look of `plots`, and its colours. `draw` leaves out what no Trace shows.
"""

import math
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib import figure, ticker

from dbjax import trace as trace_lib
from dbjax.trace import Trace
from experiments import plots
from experiments.plots import COLOURS, GREY, plt

_BLUE, _ORANGE = COLOURS[5], COLOURS[1]
_STRATEGIES = {  # how a batch comes to the replicas: words and colour
    "static": ("static: each computes 1/N", GREY),
    "portions": ("portions", COLOURS[5]),
    "backups": ("portions with backups", COLOURS[0]),
}


def draw(
    traces: Mapping[str, Trace], workdir: pathlib.Path, *, title: str
) -> list[pathlib.Path]:
    """Draw what there is to see of batch methods and save it as PNG.

    Args:
      traces: the Trace of each method, by name; minibatch methods for comparison.
      workdir: where the figures go.
      title: what was trained.

    Returns:
      The files: `sandblaster.png`, `sandblaster_balance.png` if time is emulated, and
      for each batch method with several replicas `<method>_portions.png`; none if
      there is no batch method.
    """
    batch = {name: trace for name, trace in traces.items() if plots.is_batch(trace)}
    if not batch:
        return []
    figures = {"sandblaster": progress(traces, title)}
    if all(trace.header["seconds_per_iteration"] for trace in batch.values()):
        figures["sandblaster_balance"] = balance(batch)
    for name, trace in batch.items():
        if trace.header["replicas"] > 1:
            figures[f"{name}_portions"] = portions(trace, name)
    return plots.save(figures, workdir)


@plots.matplotlib.rc_context(plots.STYLE)
def progress(traces: Mapping[str, Trace], title: str) -> figure.Figure:
    """Training loss over iterations, passes over the data and the run's own time."""
    picture, panels = plt.subplots(1, 3, figsize=(12.5, 4.4), sharey=True)
    examples = next(t.header["examples"] for t in traces.values() if plots.is_batch(t))
    for (name, trace), colour in zip(traces.items(), COLOURS * 9, strict=False):
        step, time, loss = (
            np.array([row.get(key, np.nan) for row in trace.evaluations], float)
            for key in ("step", "time", "train_loss")
        )
        iterations = np.where(step >= 0, step, np.nan)  # below 0 is the warm start
        if not plots.is_batch(trace):
            iterations = np.full(len(step), np.nan)
        passes = plots.examples_seen(trace) / examples
        label = f"{plots.short(name)}, {plots.replicas(trace)}"
        for panel, x in zip(panels, (iterations, passes, time), strict=True):
            panel.plot(x, loss, color=colour, label=label)
            panel.plot(x[-1], loss[-1], "o", color=colour)
    left, middle, right = panels
    # What comes in the first instant of a run would squeeze all the rest.
    left.set(yscale="log", ylabel="training loss", xlabel="iterations")
    middle.set(xscale="log", xlabel="passes over the training examples")
    right.set(xscale="log", xlabel=f"{plots.clock_of(*traces.values())} (s)")
    lowest = _lowest(traces)
    who = min(lowest, key=lambda name: lowest[name])
    left.set_title(f"{title}: {plots.short(who)} gets lowest")
    middle.set_title("Training loss over the data seen")
    right.set_title(_verdict(traces, max(lowest.values())))
    left.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    for axis in (left.yaxis, middle.xaxis, right.xaxis):
        plots.tick_logarithmic(axis)
    handles, labels = right.get_legend_handles_labels()
    picture.legend(
        handles, labels, loc="outside lower center", ncols=min(len(traces), 4)
    )
    return picture


def _lowest(traces: Mapping[str, Trace]) -> dict[str, float]:
    """Give the lowest training loss of each; infinity if none is a number."""
    return {
        name: min(
            (row["train_loss"] for row in trace.evaluations if _finite(row)),
            default=math.inf,
        )
        for name, trace in traces.items()
    }


def _verdict(traces: Mapping[str, Trace], reached: float) -> str:
    """Say who is first at a loss that all have reached, rounded up a little."""
    if len(traces) < 2 or not math.isfinite(reached):
        return "Training loss over time"
    target = float(f"{1.05 * reached:.2g}")
    times = {name: _time_to(trace, target) for name, trace in traces.items()}
    first = min(times, key=lambda name: times[name])
    return f"{plots.short(first)} is first at {target:g}"


def _finite(row: Mapping[str, float]) -> bool:
    return math.isfinite(row.get("train_loss", math.nan))


def _time_to(trace: Trace, loss: float) -> float:
    for row in trace.evaluations:
        if row.get("train_loss", math.inf) <= loss:
            return row["time"]
    return math.inf


@plots.matplotlib.rc_context(plots.STYLE)
def portions(trace: Trace, name: str, iterations: int = 2) -> figure.Figure:
    """Which replica computed what, in iterations from the middle of the run.

    A bar is a portion: blue where it counts, orange where it counts and is a backup
    copy, grey where another copy was first.
    """
    work = trace.take(trace.kind == trace_lib.COMPUTE)
    counts = _counting(work)
    kinds = {
        "counts": (counts & (work.count == 0), _BLUE),
        "counts, and is a backup copy": (counts & (work.count > 0), _ORANGE),
        "dropped, as another copy was first": (~counts, GREY),
    }
    count = int(trace.header["replicas"])
    shown = min(count, plots.MOST_REPLICAS)
    picture, panel = plt.subplots(figsize=(10.5, max(3, 1.8 + 0.17 * shown)))
    ends = _middle(trace, iterations)
    begin, end = ends[0], ends[-1]
    unit = 1.0 if end >= 1 else 1000.0
    seen = (work.start < end) & (work.time > begin) & (work.replica < shown)
    for label, (which, colour) in kinds.items():
        look = {"facecolor": colour, "label": label}
        panel.add_collection(plots.bars_of(work.take(seen & which), 0.8, unit, **look))
    for moment in ends[1:-1]:
        panel.axvline(unit * moment, color="black", linewidth=1.5)
    clock = plots.clock_of(trace)
    panel.set(
        xlim=(unit * begin, unit * end),
        ylim=(shown - 0.4, -0.6),
        xlabel=f"{clock} ({'s' if unit == 1 else 'ms'}); bars are portions, at a "
        "line a step is taken",
        ylabel="replica",
    )
    panel.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    panel.xaxis.set_major_formatter(plots.plain())
    panel.grid(False)
    who = plots.replicas(trace) + (f" ({shown} shown)" if shown < count else "")
    panel.set_title(
        f"{plots.short(name)}, {who}: {100 * np.mean(~counts):.2g} % of what was "
        "computed was dropped"
    )
    picture.legend(loc="outside lower center", ncols=3)
    return picture


@plots.matplotlib.rc_context(plots.STYLE)
def balance(traces: Mapping[str, Trace]) -> figure.Figure:
    """Emulated seconds of an iteration, by how the batch comes to the replicas."""
    picture, panel = plt.subplots(figsize=(7.4, 1.9 + 0.75 * len(traces)))
    height, ratio = 0.8 / len(_STRATEGIES), 0.0
    for row, trace in enumerate(traces.values()):
        seconds = trace.header["seconds_per_iteration"]
        if "static" in seconds and "backups" in seconds:
            ratio = max(ratio, seconds["static"] / seconds["backups"])
        for i, (strategy, (label, colour)) in enumerate(_STRATEGIES.items()):
            if strategy in seconds:  # what can never be done has no bar
                y = row + (i - 1) * height
                legend = label if row == 0 else None
                panel.barh(
                    y, seconds[strategy], 0.9 * height, color=colour, label=legend
                )
        ideal, ends = (
            trace.header["ideal_seconds_per_iteration"],
            (row - 0.45, row + 0.45),
        )
        legend = "ideal" if row == 0 else None
        panel.plot([ideal, ideal], ends, "--", color="black", label=legend)
    panel.set_yticks(range(len(traces)), [plots.short(name) for name in traces])
    panel.set(ylim=(len(traces) - 0.4, -0.6), xlabel="emulated seconds per iteration")
    panel.grid(axis="y", visible=False)
    panel.set_title(f"Static splitting takes up to {ratio:.1f}x as long")
    picture.legend(loc="outside lower center", ncols=2)
    return picture


def _middle(trace: Trace, iterations: int) -> list[float]:
    """Give the times at which some iterations in the middle began, and the end."""
    times = [row["time"] for row in trace.evaluations if row["step"] >= 0]
    first = max(0, (len(times) - 1 - iterations) // 2)
    times = times[first : first + iterations + 1]
    return times if len(times) > 1 else [float(trace.start.min()), times[0]]


def _counting(work: Trace) -> np.ndarray:
    """Say of each portion computed whether it counts, `[rows]` bool.

    An emulated run has noted it. Threads have not: there it is the first of its copies.
    """
    if (work.status == trace_lib.DROPPED).any():
        return work.status == trace_lib.TAKEN
    order = np.lexsort((work.time, work.step))
    counts = np.zeros(len(work), bool)
    counts[order[np.unique(work.step[order], return_index=True)[1]]] = True
    return counts
