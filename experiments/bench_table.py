"""What the benchmarks share: a figure is a row, rows are a table, sections a script."""

import argparse
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import rich.console
import rich.table


class Row(NamedTuple):
    """A figure.

    Attributes:
      section: where it belongs.
      what: what was run.
      value: with its unit.
      baseline: what it is compared with.
      ratio: over the baseline.
      limit: of the ratio, as text.
      notes: whatever else was seen.
    """

    section: str
    what: str
    value: str
    baseline: str = ""
    ratio: float | None = None
    limit: str = ""
    notes: str = ""

    @property
    def cells(self) -> list[str]:
        """As text."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        head = self.section, self.what, self.value, self.baseline
        return [*head, ratio, self.limit, self.notes]


Options: TypeAlias = argparse.Namespace
Section: TypeAlias = Callable[[Options], list[Row]]


def show(rows: list[Row], console: rich.console.Console) -> None:
    """Print the rows as a table."""
    table = rich.table.Table(*(name.capitalize() for name in Row._fields))
    for row in rows:
        table.add_row(*row.cells)
    console.print(table)


def write(rows: list[Row], out: pathlib.Path, about: Mapping[str, Any]) -> None:
    """Leave the rows as `out.json` and `out.md`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"jax": jax.__version__, "cores": os.cpu_count()}
    content = machine | dict(about) | {"rows": [row._asdict() for row in rows]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["| " + " | ".join(Row._fields) + " |", "|---" * len(Row._fields) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row.cells) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def list_of(known: Any) -> Callable[[str], list[str]]:
    """Parse names with commas between; one that is not known is an error."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is not among {', '.join(known)}"
                )
        return names

    return parse


def make_parser(
    description: str, sections: Mapping[str, Section], rounds: int = 7
) -> argparse.ArgumentParser:
    """Make the parser with the flags that every benchmark has; scripts add theirs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", type=list_of(sections), default=list(sections))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--quick", action="store_true", help="short runs, to try it out"
    )
    parser.add_argument("--out", type=pathlib.Path, help="for OUT.json and OUT.md")
    return parser


def run(
    sections: Mapping[str, Section],
    options: Options,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Run the sections asked for, show each and keep what there is so far."""
    console, rows = rich.console.Console(width=150), []
    for name in options.only:
        with console.status(name):
            mine = sections[name](options)
        show(mine, console)
        rows += mine
        if options.out:
            write(rows, options.out, about or {})
