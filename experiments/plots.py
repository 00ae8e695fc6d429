"""The figures of a run, drawn from its Traces: curves, staleness, replica timeline.

Colours are Okabe and Ito's, which differ for colour-blind readers too; scales of
colour are viridis. Titles say what is to be seen, and legends stand where no curve can
run into them. All is sized to be read at half the width of a README.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib import axes, collections, figure, ticker  # noqa: E402
from matplotlib import axis as axis_lib  # noqa: E402

from dbjax import trace as trace_lib  # noqa: E402
from dbjax.trace import Trace, history  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#bdbdbd"
MOST_REPLICAS = 40  # rows in a timeline that can still be told apart
STYLE = {
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
        if trace.header["replicas"] > 1 and not is_batch(trace):
            figures[f"{name}_staleness"] = staleness(trace, name)
            figures[f"{name}_timeline"] = timeline(trace, name)
    return save(figures, workdir)


def save(
    figures: Mapping[str, figure.Figure], workdir: pathlib.Path
) -> list[pathlib.Path]:
    """Save each as `<name>.png`; give the files."""
    files = []
    for name, picture in figures.items():
        files.append(workdir / f"{name}.png")
        picture.savefig(files[-1])
        plt.close(picture)
    return files


def is_batch(trace: Trace) -> bool:
    """Say whether the Trace is a batch method's: its steps are iterations."""
    return trace.header.get("algorithm") == "sandblaster"


def short(name: str) -> str:
    """Give a method's name as there is room for it."""
    return name.removeprefix("sandblaster_")


def examples_seen(trace: Trace, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Give the training examples seen by each of the Trace's evaluations, `[rows]`."""
    size = trace.header.get("batch_size", 1)
    return np.array([row.get("examples", row["step"] * size) for row in rows], float)


def evaluated(trace: Trace) -> list[dict[str, Any]]:
    """Give the evaluations with scores; a batch method records every iteration."""
    return [row for row in trace.evaluations if "test_accuracy" in row]


@matplotlib.rc_context(STYLE)
def curves(traces: Mapping[str, Trace], title: str) -> figure.Figure:
    """Test accuracy over the run's own time, and test loss over the data seen."""
    picture, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    mixed = any(map(is_batch, traces.values()))
    for (name, trace), colour in zip(traces.items(), COLOURS * 9, strict=False):
        rows = evaluated(trace)
        step, time, accuracy, loss = (
            np.array([row[key] for row in rows], float)
            for key in ("step", "time", "test_accuracy", "test_loss")
        )
        begun = time > 0  # a logarithmic axis has no place for the start
        label = f"{short(name)}, {replicas(trace)}"
        seen = examples_seen(trace, rows) if mixed else step
        left.plot(time[begun], 100 * accuracy[begun], color=colour, label=label)
        left.plot(time[-1], 100 * accuracy[-1], "o", color=colour)
        right.plot(seen, loss, color=colour)
        right.plot(seen[-1], loss[-1], "o", color=colour)
    clock = clock_of(*traces.values())
    left.set(xscale="log", xlabel=f"{clock} (s)", ylabel="test accuracy (%)")
    left.set_title(title + _mark_lead(left, traces))
    unit = "training examples" if mixed else "minibatches"
    right.set(xlabel=f"{unit}, all replicas together", ylabel="test loss (nats)")
    right.set(yscale="log", title="Test loss over the data seen")
    right.xaxis.set_major_locator(ticker.MaxNLocator(5))
    right.xaxis.set_major_formatter(plain())
    tick_logarithmic(left.xaxis)
    tick_logarithmic(right.yaxis)
    picture.legend(loc="outside lower center", ncols=min(len(traces), 4))
    return picture


def time_to(trace: Trace, accuracy: float) -> float:
    """Say when the test accuracy first was `accuracy`; infinity if it never was."""
    for row in evaluated(trace):
        if row["test_accuracy"] >= accuracy:
            return row["time"]
    return math.inf


def _mark_lead(panel: axes.Axes, traces: Mapping[str, Trace]) -> str:
    """Draw an arrow between two methods' times to one accuracy; say what it means.

    That accuracy is the best of the weaker method less three percentage points: both
    still climb fast there, so that chance hardly moves the times.
    """
    if len(traces) != 2:
        return ": test accuracy over time"
    best = [max(row["test_accuracy"] for row in evaluated(t)) for t in traces.values()]
    target = min(best) - 0.03
    times = {name: time_to(trace, target) for name, trace in traces.items()}
    first = min(times, key=lambda name: times[name])
    early, late = times[first], max(times.values())
    if not 0 < 1.2 * early < late:
        return ": test accuracy over time"
    arrow = {"arrowstyle": "<->", "color": "black", "shrinkA": 0, "shrinkB": 0}
    ends = {"xy": (early, 100 * target), "xytext": (late, 100 * target)}
    panel.annotate("", **ends, arrowprops=arrow)
    lead = late / early
    many = f"{lead:.0f}" if lead >= 3 else f"{lead:.1f}"
    return f": {short(first)} is at {100 * target:.0f} % {many}x sooner"


def tick_logarithmic(axis: axis_lib.Axis) -> None:
    """Put a few plain numbers on a logarithmic axis, whatever it spans."""
    low, high = sorted(axis.get_view_interval())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        marks = [digit * 10.0**decade for decade in decades for digit in digits]
        marks = [mark for mark in marks if low <= mark <= high]
        if len(marks) >= 3:
            break
    else:  # less than about a factor of three: as good as linear
        marks = [float(mark) for mark in ticker.MaxNLocator(4).tick_values(low, high)]
        marks = [mark for mark in marks if low <= mark <= high]
    every = 1 + max(0, len(marks) - 1) // 7
    axis.set_major_locator(ticker.FixedLocator(marks[::every]))
    axis.set_major_formatter(plain())
    axis.set_minor_formatter(ticker.NullFormatter())


@matplotlib.rc_context(STYLE)
def staleness(trace: Trace, name: str) -> figure.Figure:
    """How many updates by others each push had missed, as a histogram."""
    stale = trace.staleness()
    stale = stale[stale >= 0]
    mean, largest = stale.mean(), int(stale.max())
    top = int(1.25 * np.quantile(stale, 0.99)) + 1
    if largest < 1.5 * top:  # all of it, unless a slow replica makes a long tail
        top = largest + 1
    # A bin holds whole numbers only, so that no bin is higher by counting more.
    width = max(1, -(-top // 60))
    edges = np.arange(0, top + width, width) - 0.5
    picture, panel = plt.subplots(figsize=(6.4, 4))
    weights = np.full(len(stale), 100 / len(stale))
    panel.hist(stale, edges.tolist(), weights=weights, color=COLOURS[5], rwidth=0.9)
    others = trace.header["replicas"] - 1
    panel.axvline(mean, color=COLOURS[1], linewidth=4, label=f"mean {mean:.1f}")
    panel.axvline(
        others,
        color="black",
        linestyle="--",
        linewidth=1.5,
        label=f"replicas - 1 = {others}",
    )
    beyond = ""
    if largest > edges[-1]:
        share = 100 * np.mean(stale > edges[-1])
        beyond = f"; {share:.2g} % miss more, up to {largest:,}"
    panel.set(xlabel=f"staleness (updates missed){beyond}", xlim=(edges[0], edges[-1]))
    panel.set(ylabel="share of pushes (%)")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    panel.set_title(f"{name}: a push misses {mean:.1f} updates on average")
    picture.legend(loc="outside lower center", ncols=2)
    return picture


@matplotlib.rc_context(STYLE)
def timeline(trace: Trace, name: str, turns: float = 8.0) -> figure.Figure:
    """What each replica did in `turns` usual turns, once all of them are at work.

    A bar is a minibatch, coloured by the staleness of the push that carried its
    gradient; a thin grey line is time on the network or at a shard.
    """
    count = int(trace.header["replicas"])
    shown = min(count, MOST_REPLICAS)
    begin, window, unit = _window(trace, turns)
    seen = (trace.start < begin + window) & (trace.time > begin)
    early = trace.take(seen & (trace.replica < shown) & (trace.replica >= 0))
    picture, panel = plt.subplots(figsize=(10.5, max(3, 1.6 + 0.17 * shown)))
    messages = np.isin(early.kind, (trace_lib.FETCH, trace_lib.PUSH))
    panel.add_collection(
        bars_of(early.take(messages), 0.25, unit, facecolor=GREY, linewidth=0)
    )
    work = early.take(early.kind == trace_lib.COMPUTE)
    carried = _carried(trace, work)
    bars = bars_of(work, 0.8, unit, cmap="viridis", array=carried)
    # A scale about what is usual; a slow replica would make all others look the same.
    known = carried[np.isfinite(carried)]
    bars.set_clim(0, max(1.0, 2 * float(np.median(known)) if len(known) else 1.0))
    panel.add_collection(bars)
    failed = early.take(early.kind == trace_lib.FAIL)
    failures = {"color": COLOURS[1], "markersize": 9, "markeredgewidth": 3}
    panel.plot(failed.time * unit, failed.replica, "x", **failures, label="failure")
    panel.set(
        xlim=(begin * unit, (begin + window) * unit),
        ylim=(shown - 0.4, -0.6),
        xlabel=f"{clock_of(trace)} ({'s' if unit == 1 else 'ms'}); bars are "
        "minibatches, grey is on the way or at a shard",
        ylabel="replica",
    )
    panel.xaxis.set_major_formatter(plain())
    panel.yaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    panel.grid(False)
    who = replicas(trace) + (f" ({shown} shown)" if shown < count else "")
    busy = 100 * float(trace.utilisation().mean())
    panel.set_title(f"{name}, {who}: computing {busy:.0f} % of the time")
    if len(failed):
        picture.legend(loc="outside upper right")
    look = {"pad": 0.01, "extend": "max", "extendfrac": 8 / (60 + 12 * shown)}
    scale = picture.colorbar(bars, **look)
    scale.set_label("updates its push missed", fontsize=10)
    scale.locator = ticker.MaxNLocator(4, integer=True)
    scale.update_ticks()
    return picture


def _window(trace: Trace, turns: float) -> tuple[float, float, float]:
    """Choose what a timeline shows: begin and length, in seconds, and a unit.

    It begins when the last replica to do so begins its second minibatch: before that,
    threads still start and compile, and warm starts are alone.
    """
    work = trace.take(trace.kind == trace_lib.COMPUTE)
    order = np.lexsort((work.start, work.replica))
    replica, start = work.replica[order], work.start[order]
    again = replica[1:] == replica[:-1]
    second = again & np.r_[True, ~again[:-1]]
    begin = float(start[1:][second].max(initial=start.min()))
    gaps = np.diff(start)[again]
    turn = np.median(gaps) if len(gaps) else (work.time - work.start).mean()
    length = min(turns * float(turn), float(trace.time.max()) - begin)
    length = length if length > 0 else 1.0
    return begin, length, 1.0 if begin + length >= 1 else 1000.0


def bars_of(
    rows: Trace, height: float, unit: float, **look: Any
) -> collections.PolyCollection:
    """Give one bar from `start` to `time` for each row, in its replica's line."""
    low, high = rows.replica - height / 2, rows.replica + height / 2
    x = unit * np.stack([rows.start, rows.start, rows.time, rows.time], -1)
    y = np.stack([low, high, high, low], -1)
    look = {"edgecolor": "white", "linewidth": 0.6, **look}
    return collections.PolyCollection(list(np.stack([x, y], -1)), **look)


def _carried(trace: Trace, work: Trace) -> np.ndarray:
    """Give for each COMPUTE row the staleness of its replica's next push, `[rows]`.

    That is the mean over shards; NaN where no push came (it failed).
    """
    rows = np.flatnonzero((trace.kind == trace_lib.PUSH) & (trace.base >= 0))
    pushes, stale = trace.take(rows), history.staleness(trace, rows)
    result = np.full(len(work), np.nan)
    for replica in np.unique(work.replica):
        mine = np.flatnonzero(work.replica == replica)
        sent = pushes.take(pushes.replica == replica)
        ids, push = np.unique(sent.id, return_inverse=True)
        if not len(ids):
            continue
        missed = stale[pushes.replica == replica]
        mean = np.bincount(push, weights=missed) / np.bincount(push)
        arrived = np.full(len(ids), -np.inf)
        np.maximum.at(arrived, push, sent.time)
        following = np.searchsorted(arrived, work.time[mine])
        known = following < len(ids)
        result[mine[known]] = mean[following[known]]
    return result


def replicas(trace: Trace) -> str:
    """Say how many there are."""
    count = trace.header["replicas"]
    return "1 replica" if count == 1 else f"{count} replicas"


def clock_of(*traces: Trace) -> str:
    """Name the clock that the Traces' times are of."""
    runtimes = {trace.header.get("runtime", "") for trace in traces}
    names = {"Emulated": "emulated time", "Threads": "time"}
    return names.get("".join(runtimes), "time of the run")


def plain() -> ticker.Formatter:
    """Give a formatter of numbers as one writes them."""
    return ticker.StrMethodFormatter("{x:,g}")
