"""Are the orderings that others have published found here, too?

  python -m experiments.orderings --out=runs/orderings
  python -m experiments.orderings --smoke --only=momentum

Handwritten digits, and a network of one hidden layer; least squares for the best
momentum. Each method is tuned with seeds that are not among those reported, and methods
are compared seed by seed: "as published" if the 95 % interval of the mean difference
(Student's, of logarithms where what is compared is a loss or a time) lies on the side
that its paper says, "the other way round" if on the other, "no difference seen" if it
holds 0. It leaves `orderings.csv`, `orderings.md` and `orderings.png`.
"""

import argparse
import csv
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import rich.console
import scipy.stats

from experiments import orderings_rules, orderings_runs, plots, plots_orderings
from experiments.bench_table import list_of
from experiments.orderings_task import SMOKE, Size, Study
from experiments.programs import keep_programs

STUDIES = {f.__name__: f for f in (*orderings_rules.STUDIES, *orderings_runs.STUDIES)}


def verdict(
    more: Sequence[float], less: Sequence[float], logarithmic: bool
) -> tuple[str, float, float]:
    """Compare two methods seed by seed.

    Args:
      more: values of the one that is said to have the larger ones.
      less: the other's.
      logarithmic: whether to compare ratios.

    Returns:
      The verdict, the mean difference, and half of its 95 % interval, as numbers that
      are added, or logarithms that are. NaN where a value is infinite.
    """
    a, b = np.asarray(more, float), np.asarray(less, float)
    if not (np.isfinite(a) & np.isfinite(b)).all():
        lost, other = np.isinf(a).sum(), np.isinf(b).sum()
        if lost == other:
            return "no difference seen", math.nan, math.nan
        # One method's runs fail where the other's do not: as many as would be by
        # chance less often than once in twenty.
        table = [[lost, len(a) - lost], [other, len(b) - other]]
        sure = scipy.stats.fisher_exact(table)[1] < 0.05
        said = "as published" if lost > other else "the other way round"
        return (said if sure else "no difference seen"), math.nan, math.nan
    d = np.log(a) - np.log(b) if logarithmic else a - b
    mean, half = float(d.mean()), 0.0
    if len(d) > 1 and np.ptp(d) > 0:
        t = scipy.stats.t.ppf(0.975, len(d) - 1)
        half = float(t * d.std(ddof=1) / math.sqrt(len(d)))
    if abs(mean) <= half or mean == 0:
        return "no difference seen", mean, half
    return ("as published" if mean > 0 else "the other way round"), mean, half


def table(found: Mapping[str, Study]) -> str:
    """Give a line of markdown for each claim."""
    lines = [
        "| study | measure | published: more | less | by | found | difference |",
        "|---" * 7 + "|",
    ]
    for name, study in found.items():
        for more, less, source in study.claims:
            pair = study.values[more], study.values[less]
            said, mean, half = verdict(*pair, study.logarithmic)
            size = f"{mean:+.2f} ± {half:.2f}"
            if study.logarithmic and math.isfinite(mean):
                low, middle, high = np.exp([mean - half, mean, mean + half])
                size = f"x {middle:.2f} ({low:.2f} to {high:.2f})"
            elif not math.isfinite(mean):
                lost = [int(np.isinf(values).sum()) for values in pair]
                size = f"never: {lost[0]} and {lost[1]} of {len(pair[0])} runs"
            cells = name, study.measure, more, less, source, said, size
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the studies asked for."""
    parser = argparse.ArgumentParser(description="Published orderings, found here?")
    parser.add_argument("--out", type=pathlib.Path, default="runs/orderings")
    parser.add_argument("--only", type=list_of(STUDIES), default=list(STUDIES))
    parser.add_argument("--smoke", action="store_true", help="to try it out")
    options = parser.parse_args(arguments)
    console, size = rich.console.Console(), SMOKE if options.smoke else Size()
    options.out.mkdir(parents=True, exist_ok=True)
    keep_programs(options.out / "compiled")
    found: dict[str, Study] = {}
    for name in options.only:
        with console.status(name):
            found[name] = STUDIES[name](size)
        if found[name].claims:
            console.print(table({name: found[name]}), soft_wrap=True)
        (options.out / "orderings.md").write_text(table(found))
        with (options.out / "orderings.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("study", "measure", "method", "seed", "value"))
            for study, one in found.items():
                for method, values in one.values.items():
                    for seed, value in zip(size.seeds, values, strict=True):
                        writer.writerow((study, one.measure, method, seed, value))
        plots.save({"orderings": plots_orderings.draw(found)}, options.out)
    console.print(f"Wrote {options.out / 'orderings.md'} and .csv, .png.")


if __name__ == "__main__":
    main()
