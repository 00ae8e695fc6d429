"""What the battery leaves: one page that needs nothing else, and every cell as CSV.

A cell's row ends with what its rule came to on that workload and cluster: the reported
seeds' mean loss and median time to the target, with their intervals of 95 %.
"""

import base64
import csv
import html
import io
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from experiments import plots
from experiments.battery_cells import LAST
from experiments.battery_rules import RATES, Rule
from experiments.battery_study import Battery, Comparison, Interval, Judged, compare
from experiments.battery_workloads import Workload
from experiments.figure_curves import HOLD

plt = plots.plt

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; }
.sub { color: #666; margin-top: .2rem; }
table { border-collapse: collapse; font-size: .88rem; margin: 1rem 0; }
caption { text-align: left; color: #666; padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid #e6e6e6; vertical-align: top; }
th { color: #666; font-weight: 600; } td.n { font-variant-numeric: tabular-nums; }
tr.mine td { font-weight: 600; background: #eef5fb; }
.better { color: #007a55; } .worse, .bad { color: #b03a00; }
.note { color: #666; font-size: .85rem; }
.alarm { border-left: 4px solid #D55E00; background: #fdf1ea; padding: .6rem 1rem; }
img { max-width: 100%; } code { background: #f5f5f5; padding: 0 .2rem; }
.wide { overflow-x: auto; }
"""
_DASHES = ("solid", "dashed", "dotted")
_OF_ALL_SEEDS = (
    "mean_loss", "mean_loss_low", "mean_loss_high",
    "median_seconds", "median_seconds_low", "median_seconds_high",
)  # fmt: skip


class Page(NamedTuple):
    """What there is to tell.

    Attributes:
      name: of the rule.
      rule: None if it could not be examined to the end.
      bad: what is bad about it then.
      battery: what was run.
      judged: what came out, of the rule and of the baselines.
    """

    name: str
    rule: Rule | None
    bad: str
    battery: Battery
    judged: Sequence[Judged]

    @property
    def is_bad(self) -> bool:
        """Whether anything is bad about the rule."""
        return bool(self.bad) or any(one.error for one in self.of_rule())

    @property
    def complaints(self) -> list[str]:
        """What is bad about rules, baselines included, a line each."""
        lines = [f"{self.name}: {self.bad}"] if self.bad else []
        return lines + [
            f"{one.rule.name} on {one.workload.name}, {one.cluster.name}: {one.error}"
            for one in self.judged
            if one.error
        ]

    def of_rule(self) -> list[Judged]:
        """What concerns the user's rule."""
        return [one for one in self.judged if one.rule is self.rule]

    def at(self, workload: str, cluster: str) -> list[Judged]:
        """All rules on a workload and a cluster."""
        return [
            one
            for one in self.judged
            if (one.workload.name, one.cluster.name) == (workload, cluster)
        ]

    def pairs(self) -> Iterator[tuple[Judged | None, Judged]]:
        """The rule and the best baseline, on every workload and cluster."""
        for workload in self.battery.workloads:
            for cluster in self.battery.clusters:
                here = self.at(workload.name, cluster.name)
                mine = next((one for one in here if one.rule is self.rule), None)
                others = [one for one in here if one.rule is not self.rule]
                order = sorted(others, key=lambda one: (bool(one.error), _rank(one)))
                yield mine, order[0]


def _rank(one: Judged) -> float:
    return one.loss.middle if math.isfinite(one.loss.middle) else math.inf


def interval(value: Interval) -> str:
    """Say a number and its interval.

    >>> interval(Interval(0.5, 0.49, 0.51))
    '0.500 ± 0.010'
    """
    if math.isnan(value.middle):
        return "-"
    if math.isinf(value.middle):
        return "diverged"
    reach = value.high - value.middle
    if math.isinf(reach):
        return f"{value.middle:.3f}"
    return f"{value.middle:.3f} ± {reach:.3f}"


def time_of(one: Judged) -> str:
    """Say when a rule reached the target, and how often it did not."""
    if not one.runs:
        return "-"
    there, count = int(np.isfinite(one.times).sum()), len(one.runs)
    marked = "" if there == count else f", {there} of {count} runs reach it"
    if not there:
        return f"never, 0 of {count} runs"
    middle, low, high = (f"{x:.0f}" if math.isfinite(x) else "never" for x in one.time)
    return f"{middle} [{low}, {high}]{marked}"


def write(page: Page, out: pathlib.Path) -> None:
    """Write `index.html` and `cells.csv`."""
    (out / "index.html").write_text(render(page))
    with (out / "cells.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ("rule", "workload", "cluster", "stage", "seed", "setting", "chosen",
             "held_out_loss", "held_out_accuracy", "target", "seconds_to_target",
             "seconds", "pushes", "rejected_not_finite", "mean_staleness", "status",
             *_OF_ALL_SEEDS)
        )  # fmt: skip
        rows.writerows(_csv_rows(page))


def _csv_rows(page: Page) -> Iterator[tuple[object, ...]]:
    if page.rule is None:
        for workload in page.battery.workloads:
            for cluster in page.battery.clusters:
                where = page.name, workload.name, cluster.name
                unknown = [""] * len(_OF_ALL_SEEDS)
                yield *where, *[""] * 12, f"bad: {page.bad}", *unknown
    for one in page.judged:
        intervals = [f"{end:.6g}" for each in (one.loss, one.time) for end in each]
        for run in (*one.trials, *one.runs):
            cell, curve = run.cell, run.curve
            status = run.error and f"bad: raises: {run.error}"
            status = status or ("diverged" if run.diverged else "finished")
            yield (
                cell.rule.name, cell.workload, cell.cluster, cell.stage, cell.seed,
                json.dumps(cell.setting), int(cell.setting == one.setting),
                f"{run.end:.6g}", f"{run.accuracy:.6g}", one.workload.target,
                f"{run.time_to(one.workload.target):.6g}",
                *(
                    ("", "", "", "") if curve is None else
                    (f"{curve.duration:.6g}", curve.pushes, curve.not_finite,
                     f"{curve.staleness:.4g}")
                ), status, *intervals,
            )  # fmt: skip


def render(page: Page) -> str:
    """Give the page, its pictures inside."""
    title = f"{html.escape(page.name)} under staleness"
    body = [
        f"<h1>{title}</h1>",
        f"<p class='sub'>{html.escape(_scale(page))}</p>",
        *_alarms(page),
        "<h2>Beside the best baseline</h2>",
        _verdicts(page),
        *(
            part
            for workload in page.battery.workloads
            for part in _chapter(page, workload)
        ),
        "<h2>How it was done</h2>",
        *_method(page),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _scale(page: Page) -> str:
    size = page.battery.size
    return (
        f"{size.steps:,} minibatches on {size.replicas} replicas, {size.budget} "
        f"settings tried by each rule, {size.seeds} seeds with the best of them; "
        "intervals of 95 %."
    )


def _alarms(page: Page) -> Iterator[str]:
    if page.complaints:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in page.complaints)
        what = "This rule is bad" if page.is_bad else "A baseline failed"
        yield f"<div class='alarm'><strong>{what}.</strong><ul>{lines}</ul></div>"


def _table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    caption: str = "",
) -> str:
    """A table; cells are HTML already."""
    top = "".join(f"<th>{name}</th>" for name in head)
    lines = "".join(
        f"<tr class='{kind}'>"
        + "".join(f"<td class='n'>{c}</td>" for c in cells)
        + "</tr>"
        for kind, cells in rows
    )
    return (
        f"<div class='wide'><table><caption>{caption}</caption><thead><tr>{top}</tr>"
        f"</thead><tbody>{lines}</tbody></table></div>"
    )


def _verdicts(page: Page) -> str:
    rows = []
    for mine, best in page.pairs():
        where = [best.workload.name, best.cluster.name]
        beside = [html.escape(best.rule.name), interval(best.loss)]
        if mine is None:
            bad = "<span class='bad'>bad</span>"
            rows.append(("", [*where, "-", "-", *beside, "-", bad]))
            continue
        found = compare(mine, best)
        rows.append(
            ("", [*where, interval(mine.loss), time_of(mine), *beside,
                  _difference(found), _verdict(found.verdict)])
        )  # fmt: skip
    return _table(
        ("workload", "cluster", "held-out loss", "seconds to target", "best baseline",
         "its loss", "difference", "the rule is"),
        rows,
        "Less is better. Differences are seed by seed: equal seeds share first "
        "parameters, minibatches and the order of all events.",
    )  # fmt: skip


def _difference(found: Comparison) -> str:
    middle, low, high = found.difference
    if not math.isfinite(middle):
        return "-"
    if not math.isfinite(low):
        return f"{middle:+.3f}"
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def _verdict(words: str) -> str:
    return f"<span class='{words.split()[0]}'>{words}</span>"


def _chapter(page: Page, workload: Workload) -> Iterator[str]:
    yield f"<h2>{workload.name}</h2>"
    yield (
        f"<p>{html.escape(workload.about)}; minibatches of {workload.batch}. Target: a "
        f"held-out loss of {workload.target:g}.</p>"
    )
    yield _picture(page, workload)
    for cluster in page.battery.clusters:
        here = page.at(workload.name, cluster.name)
        here.sort(key=lambda one: (bool(one.error), _rank(one)))
        staleness = [r.curve.staleness for one in here for r in one.runs if r.curve]
        tau = f"; mean staleness {np.mean(staleness):.1f}" if staleness else ""
        rows = [("mine" if one.rule is page.rule else "", _row(one)) for one in here]
        yield _table(
            ("rule", "held-out loss", "accuracy", "seconds to target", "setting",
             "rejected", "remarks"),
            rows,
            f"{cluster.name}: {html.escape(cluster.about)}{tau}",
        )  # fmt: skip


def _row(one: Judged) -> list[str]:
    setting = ", ".join(f"{k} {v:g}" for k, v in (one.setting or {}).items())
    remarks = [part for part in (one.error, one.edge) if part]
    if one.error:
        remarks[0] = f"<span class='bad'>bad: {html.escape(one.error)}</span>"
    if one.diverged and one.diverged < len(one.runs):
        rest = one.ends[np.isfinite(one.ends)]
        remarks.append(f"the other runs end at {rest.mean():.3f}")
    if one.worse:
        remarks.append(
            f"{one.worse} of {len(one.runs)} runs end above where they began"
        )
    return [
        html.escape(one.rule.name),
        interval(one.loss),
        interval(one.accuracy),
        time_of(one),
        html.escape(setting) or "-",
        f"{one.rejected:,}",
        "; ".join(remarks) or "",
    ]


def _picture(page: Page, workload: Workload) -> str:
    """Held-out loss over simulated time, a panel a cluster."""
    clusters = page.battery.clusters
    with plt.rc_context(plots.STYLE):
        figure, panels = plt.subplots(
            1, len(clusters), figsize=(3.6 * len(clusters) + 1.6, 3.4),
            sharey=True, squeeze=False,
        )  # fmt: skip
        for panel, cluster in zip(panels[0], clusters, strict=True):
            here = page.at(workload.name, cluster.name)
            for place, one in enumerate(one for one in here if one.runs):
                _draw(panel, one, one.rule is page.rule, place)
            panel.axhline(workload.target, color=plots.GREY, linewidth=1, zorder=0)
            panel.set(title=cluster.name, xlabel="simulated seconds", yscale="log")
        start = [
            run.curve.losses[0] for one in page.judged for run in one.runs
            if run.curve and one.workload is workload
        ]  # fmt: skip
        if start:  # what comes apart leaves the picture, not the tables
            panels[0][0].set_ylim(top=1.3 * float(np.mean(start)))
        panels[0][0].set_ylabel("held-out loss")
        plots.tick_logarithmic(panels[0][0].yaxis)
        handles, labels = panels[0][-1].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right center", fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
        plt.close(figure)
    text = base64.b64encode(file.getvalue()).decode()
    about = f"Held-out loss on {workload.name} over simulated time, by rule and cluster"
    return f"<img alt='{about}' src='data:image/png;base64,{text}'>"


def _draw(panel: "plots.axes.Axes", one: Judged, mine: bool, place: int) -> None:
    curves = [run.curve for run in one.runs if run.curve and not run.curve.diverged]
    if not curves:
        return
    # Runs of different seeds end at different times: the shortest one's are shown.
    seconds = np.linspace(0, min(c.seconds[-1] for c in curves), 60)
    losses = np.array([np.interp(seconds, c.seconds, c.losses) for c in curves])
    rest = [colour for colour in plots.COLOURS if colour != plots.COLOURS[1]]
    colour = plots.COLOURS[1] if mine else rest[place % len(rest)]
    dashes = "solid" if mine else _DASHES[place // len(rest) % 3]
    panel.plot(
        seconds, losses.mean(0), color=colour, linestyle=dashes,
        linewidth=2.8 if mine else 1.3, zorder=3 if mine else 2, label=one.rule.name,
    )  # fmt: skip
    if mine:
        panel.fill_between(
            seconds, losses.min(0), losses.max(0), color=colour, alpha=0.2, linewidth=0
        )


def _method(page: Page) -> Iterator[str]:
    notes = dict.fromkeys((one.rule.name, one.note) for one in page.judged)
    grids = "; ".join(f"{name}: {note}" for name, note in notes)
    low, high = RATES
    lines = [
        "Each run is a compiled replay of a Trace: the cluster is simulated first, "
        "with a seed, and its order of pushes and fetches is then followed by every "
        "rule. There is one shard, and each gradient is pushed by itself.",
        f"Learning rates from {low:g} to {high:g}. Each rule is tuned on each workload "
        "and cluster on a seed that is not reported, by the mean held-out loss of the "
        f"last {LAST} evaluations. Settings: {grids}.",
        "The losses are means with Student's intervals; differences likewise. The time "
        f"to the target is when the held-out loss stays below it for {HOLD} "
        "evaluations, as the median (of two, the later) and a bootstrap interval; a "
        "run that never gets there counts as later than all others. No run is left "
        "out: where one diverges, the mean has no value.",
        "The best baseline is picked by the reported runs, which is a little to its "
        "advantage; with so many comparisons one in twenty seems to differ by chance.",
        "Rejected: pushes that were not applied because a gradient was not finite. The "
        "coloured band is the range of the rule's runs.",
        *(
            f"Cluster {one.name}: {one.about}; a step takes a second on average."
            for one in page.battery.clusters
        ),
    ]
    yield "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
