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
_AT_MINIMUM = ("converged", "small step")
_OWN_OBJECTIVE = ("OWLQN", "BoxLBFGS")  # they add something to the loss, or keep off
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
    """What is minimised, over iterations, passes over the data, and the run's time.

    Where a method has converged, its distance from the minimum is shown instead.
    """
    picture, panels = plt.subplots(1, 3, figsize=(12.5, 4.6), sharey=True)
    left, middle, right = panels
    losses, gap = _losses(traces)
    examples = next(t.header["examples"] for t in traces.values() if plots.is_batch(t))
    for (name, trace), colour in zip(traces.items(), COLOURS * 9, strict=False):
        step = np.array([row["step"] for row in trace.evaluations], float)
        if not plots.is_batch(trace):
            step[:] = np.nan  # a minibatch is no iteration
        iterations = np.where(step >= 0, step, np.nan)  # below 0 is the warm start
        passes = plots.examples_seen(trace, trace.evaluations) / examples
        time = np.array([row["time"] for row in trace.evaluations])
        label = f"{plots.short(name)}, {plots.replicas(trace)}"
        known = np.isfinite(losses[name])
        loss = losses[name][known]
        for panel, x in zip(panels, (iterations, passes, time), strict=True):
            panel.plot(x[known], loss, color=colour, label=label)
            panel.plot(x[known][-1:], loss[-1:], "o", color=colour)
    what = "training loss above its minimum" if gap else "training loss"
    left.set(yscale="log", ylabel=what, xlabel="iterations", title="over iterations")
    middle.set(xscale="log", xlabel="passes over all training examples")
    middle.set(title="over evaluations of the batch")
    right.set(xscale="log", xlabel=f"{plots.clock_of(*traces.values())} (s)")
    right.set(title="over time")
    left.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    for axis in (left.yaxis, middle.xaxis, right.xaxis):
        plots.tick_logarithmic(axis)
    _headline(picture, f"{title}: {_verdict(traces, losses, gap)}")
    handles, labels = right.get_legend_handles_labels()
    where = "outside lower center"
    picture.legend(handles, labels, loc=where, ncols=min(len(traces), 4))
    return picture


def _losses(traces: Mapping[str, Trace]) -> tuple[dict[str, np.ndarray], bool]:
    """Give what each method minimises, `[evaluations]`, NaN where a log has no place.

    Returns:
      By name; and whether it is the distance from the lowest value found, because a
      method has converged. Methods with a penalty of their own have their own lowest.
    """
    losses, groups = {}, {}
    gap = any(trace.header.get("status") in _AT_MINIMUM for trace in traces.values())
    for name, trace in traces.items():
        whole = trace.header.get("batches") == "FullBatch()"  # then a value is exact
        key = "value" if whole else "train_loss"
        # A row without scores is of an iteration that was not evaluated.
        found = [row.get(key, row.get("train_loss")) for row in trace.evaluations]
        losses[name] = np.array(found, float)
        method = trace.header.get("method", "").partition("(")[0]
        groups[name] = method if method in _OWN_OBJECTIVE else ""
    if gap:
        lowest: dict[str, float] = {}
        for name, loss in losses.items():
            known = lowest.get(groups[name], math.inf)
            lowest[groups[name]] = min(known, _least(loss))
        losses = {name: loss - lowest[groups[name]] for name, loss in losses.items()}
    return {name: np.where(v > 0, v, np.nan) for name, v in losses.items()}, gap


def _verdict(
    traces: Mapping[str, Trace], losses: Mapping[str, np.ndarray], gap: bool
) -> str:
    """Say who is first at a loss that all have reached, and who gets lowest."""
    least = {name: _least(loss) for name, loss in losses.items()}
    reached = max(least.values())
    if len(traces) < 2 or not math.isfinite(reached):
        return "what is minimised"
    target = float(f"{1.05 * reached:.2g}")
    times = {}
    for name, loss in losses.items():
        there = np.flatnonzero(loss <= target)[0]
        times[name] = traces[name].evaluations[there]["time"]
    first = min(times, key=lambda name: times[name])
    lowest = min(least, key=lambda name: least[name])
    if gap:  # all who converge are lowest, but for rounding
        return f"{plots.short(first)} is first within {target:g} of the minimum"
    text = f"{plots.short(first)} is first at a training loss of {target:g}"
    return text if lowest == first else f"{text}, {plots.short(lowest)} gets lowest"


def _least(values: np.ndarray) -> float:
    return float(min(values[np.isfinite(values)], default=math.inf))


def _headline(picture: figure.Figure, text: str) -> None:
    """Put a title over all panels, at the left as theirs."""
    picture.suptitle(text, x=0.01, ha="left", fontsize=14)


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
    _headline(
        picture,
        f"Static splitting takes {ratio:.1f}x as long as portions with backups",
    )
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
