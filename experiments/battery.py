"""The battery: an optimizer rule of one's own, judged beside others under staleness.

  python -m experiments.battery --rule=experiments/rules/compensate.py
  python -m experiments.battery --rule=my_rule.py --smoke

What a rule file holds stands in `battery_rules`, what it is tried on in
`battery_workloads` and `battery_clusters`, and how it is tuned and compared in
`battery_study`. It leaves `index.html` and `cells.csv`. Every run is kept in a file of
its own, so that a call that was stopped goes on where it was; those of the baselines
serve every rule.

The exit status is 1 if the rule is bad: if it raises, changes shapes or dtypes, keeps
hidden state, is not deterministic, or diverges at its best setting.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import rich.console
import rich.progress
import rich.table

from experiments import (
    battery_clusters,
    battery_page,
    battery_rules,
    battery_workloads,
)
from experiments.battery_cells import SMOKE, Size
from experiments.battery_exam import examine
from experiments.battery_rules import BASELINES, BadRule, Rule
from experiments.battery_study import Battery, Judged, compare, judge
from experiments.programs import keep_programs

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge a rule, and say what came out."""
    parser, options = parse(arguments)
    out = options.out or pathlib.Path("runs/battery") / options.rule.stem
    size = size_of(parser, options)
    console = rich.console.Console()
    if not console.is_terminal:
        console.width = 150
    keep_programs(options.cache / "compiled")
    rule, bad = look_at(options.rule)
    if rule and any(rule.name == one.name for one in BASELINES):
        rule = dataclasses.replace(rule, name=f"my-{rule.name}")
    rules = [*([rule] if rule else []), *BASELINES]
    steps_each = size.steps // size.replicas
    make = _chosen(parser, "--only", options.only, battery_workloads.WORKLOADS)
    clusters = battery_clusters.clusters(steps_each)
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("cells")
        battery = Battery(
            size,
            [one() for one in make],
            _chosen(parser, "--clusters", options.clusters, clusters),
            lambda one: out / "cells" if one is rule else options.cache,
            lambda: bar.advance(task),
        )
        bar.update(task, total=battery.cells(len(rules)))
        judged = judge(battery, rules)
    page = battery_page.Page(options.rule.stem, rule, bad, battery, judged)
    out.mkdir(parents=True, exist_ok=True)
    battery_page.write(page, out)
    console.print(report(page))
    for line in page.complaints:
        console.print(
            f"BAD RULE {line}", style="bold red", markup=False, soft_wrap=True
        )
    console.print(f"Wrote {out / 'index.html'} and cells.csv.", soft_wrap=True)
    return 1 if page.is_bad else 0


def parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read what the battery is called with."""
    parser = argparse.ArgumentParser(description="Judge an optimizer rule.")
    parser.add_argument("--rule", type=pathlib.Path, required=True, help="a file")
    parser.add_argument("--out", type=pathlib.Path, help="runs/battery/<rule>")
    parser.add_argument(
        "--cache", type=pathlib.Path, default=pathlib.Path("runs/battery/cells"),
        help="of the baselines' cells",
    )  # fmt: skip
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest size, to try it out"
    )
    parser.add_argument("--only", help="workloads, with commas")
    parser.add_argument("--clusters", help="clusters, with commas")
    parser.add_argument("--seeds", type=int, help="runs that are reported")
    parser.add_argument("--budget", type=int, help="settings that are tried")
    return parser, parser.parse_args(arguments)


def size_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Size:
    """Give the size that is asked for."""
    size = SMOKE if options.smoke else Size()
    for name in ("seeds", "budget"):
        value = getattr(options, name)
        if value is None:
            continue
        if value < 1:
            parser.error(f"--{name}={value}: allowed are numbers from 1")
        size = dataclasses.replace(size, **{name: value})
    return size


def _chosen(
    parser: argparse.ArgumentParser,
    option: str,
    names: str | None,
    known: Mapping[str, T],
) -> list[T]:
    if names is None:
        return list(known.values())
    for name in names.split(","):
        if name not in known:
            parser.error(f"{option}={names}: {name!r} is none of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names.split(","))]


def look_at(file: pathlib.Path) -> tuple[Rule | None, str]:
    """Examine a rule: give it, or say what is bad about it."""
    try:
        return examine(functools.partial(battery_rules.load, file)), ""
    except BadRule as error:
        return None, str(error)


def report(page: battery_page.Page) -> rich.table.Table:
    """Put the rule beside the baselines."""
    table = rich.table.Table(
        "workload", "cluster", "held-out loss", "seconds to target", "best baseline",
        "its loss", "the rule is",
    )  # fmt: skip
    for mine, best in page.pairs():
        shown: Judged = mine or best
        table.add_row(
            shown.workload.name,
            shown.cluster.name,
            battery_page.interval(mine.loss) if mine else "-",
            battery_page.time_of(mine) if mine else "-",
            best.rule.name,
            battery_page.interval(best.loss),
            compare(mine, best).verdict if mine else "bad",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
