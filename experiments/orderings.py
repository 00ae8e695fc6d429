"""Are the orderings that others have published found here, too?

  python -m experiments.orderings --out=runs/orderings
  python -m experiments.orderings --smoke --only=momentum

Handwritten digits, and a network of one hidden layer. Each study has its rates tuned
for each method, with a seed that is not among those reported, and compares methods seed
by seed: "as published" if the 95 % interval of the mean difference (Student's, of
logarithms where what is compared is a loss or a time) lies on the side that its paper
says, "the other way round" if on the other, "no difference seen" if it holds 0. It
leaves `orderings.csv`, `orderings.md` and `orderings.png`.
"""

import argparse
import csv
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import scipy.stats
from sklearn.datasets import load_digits

import dbjax
from dbjax import downpour, optim
from experiments import plots, plots_orderings
from experiments.bench_table import list_of

TEST = 400


class Size(NamedTuple):
    """How much is done.

    Attributes:
      steps: minibatches of a run.
      seeds: reported; seed 0 tunes.
      rates: to choose from.
    """

    steps: int = 1_600
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    rates: tuple[float, ...] = tuple(2.0 ** np.arange(-8, 2))


SMOKE = Size(200, (1, 2), (0.03, 0.125, 0.5))


class Study(NamedTuple):
    """What a study found.

    Attributes:
      measure: what `values` are; less is better, unless `claims` say otherwise.
      values: by method, one for each seed; infinite where it was never reached.
      claims: `(more, less, source)`, that the first one's values are the larger.
      logarithmic: whether ratios are compared, not differences.
    """

    measure: str
    values: Mapping[str, Sequence[float]]
    claims: Sequence[tuple[str, str, str]]
    logarithmic: bool = True


class Task(NamedTuple):
    """What is trained, and how it is judged."""

    loss: Callable[..., jax.Array]
    init: Callable[[int], Any]
    data: Any
    held_out: Callable[[Any], Any]


@functools.cache
def task() -> Task:
    """Digits, 32 hidden units."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = np.asarray(images / 16, np.float32)[order], labels[order]
    model = dbjax.models.dense((64, 32, 10), activation=jnp.tanh, gain=1.0)
    data = dbjax.from_arrays({"x": x[TEST:], "label": y[TEST:]}, batch_size=32)
    rest = {"x": jnp.asarray(x[:TEST]), "label": jnp.asarray(y[:TEST])}
    return Task(
        model.loss,
        lambda seed: model.init(jax.random.key(seed)),
        data,
        jax.jit(lambda params: model.loss(params, rest)),
    )


def ends(
    traces: Sequence[dbjax.Trace],
    make: Callable[..., Any],
    settings: Mapping[str, Any] | np.ndarray,
    seeds: Sequence[int],
    provide: tuple[str, ...] = (),
) -> np.ndarray:
    """Held-out losses at the end, `[traces, *settings, seeds]`; lost ones infinite."""
    problem = task()
    grid = dbjax.sweep(
        list(traces), problem.loss, problem.init, problem.data, make, settings,
        seeds=seeds, provide=provide,
        metrics_fn=lambda params: {"loss": problem.held_out(params)},
    )  # fmt: skip
    return np.where(grid.diverged, np.inf, grid.metrics["loss"])


# Studies of optimizers, on Traces.


def momentum(size: Size) -> Study:
    """What a momentum of 0.9 costs or brings, by number of replicas, rates tuned."""
    counts = (1, 4, 16)
    cluster = dbjax.Cluster(step_time=dbjax.Exponential(1.0))
    traces = [dbjax.simulate(cluster, replicas=n, steps=size.steps) for n in counts]
    found = ends(
        traces,
        lambda learning_rate, momentum: optax.sgd(learning_rate, momentum),
        {"learning_rate": np.array(size.rates), "momentum": np.array([0.0, 0.9])},
        (0, *size.seeds),
    )
    best = found[..., 0].argmin(axis=1)  # [replicas, momenta]
    values = {}
    for i, n in enumerate(counts):
        plain, heavy = (found[i, best[i, m], m, 1:] for m in (0, 1))
        values[f"{n} replica" + "s" * (n > 1)] = (heavy / plain).tolist()
    claims = [("16 replicas", "1 replica", "Mitliagkas and others 2016")]
    return Study("held-out loss with momentum 0.9 over that without", values, claims)


def rules(size: Size, replicas: int = 24) -> Study:
    """Delay-aware rules, each one's rate tuned, and at the rate that is best alone."""
    cluster = dbjax.Cluster(step_time=dbjax.Exponential(1.0))
    traces = [
        dbjax.simulate(cluster, replicas=n, steps=size.steps) for n in (1, replicas)
    ]
    chain, rates = optax.chain, np.array(size.rates)
    stale, old = ("staleness",), ("stale_params",)
    makers: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
        "SGD": (optax.sgd, ()),
        "rate / staleness": (
            lambda rate: chain(optim.scale_by_staleness(), optax.sgd(rate)), stale,
        ),
        "DC-ASGD-c": (
            lambda rate: chain(optim.compensate_delay(0.5), optax.sgd(rate)), old,
        ),
        "DC-ASGD-a": (
            lambda rate: chain(
                optim.compensate_delay(2.0, decay=0.95), optax.sgd(rate)
            ), old,
        ),
        "gap-aware": (
            lambda rate: chain(optim.scale_by_gap(rate), optax.sgd(rate)), old,
        ),
    }  # fmt: skip
    values: dict[str, list[float]] = {}
    alone = 0
    for name, (make, provide) in makers.items():
        found = ends(traces, make, rates, (0, *size.seeds), provide)
        if name == "SGD":
            alone = int(found[0, :, 0].argmin())
            values["SGD, one replica"] = found[0, alone, 1:].tolist()
        values[name] = found[1, found[1, :, 0].argmin(), 1:].tolist()
        if name in ("SGD", "rate / staleness", "gap-aware"):
            values[f"{name}, alone's rate"] = found[1, alone, 1:].tolist()
    zheng, zhang = "Zheng and others 2017", "Zhang and others 2015"
    barkai = "Barkai and others 2019"
    claims = [
        ("SGD", "SGD, one replica", zheng),
        ("SGD", "DC-ASGD-c", zheng),
        ("DC-ASGD-c", "DC-ASGD-a", zheng),
        ("SGD, alone's rate", "rate / staleness, alone's rate", zhang),
        ("SGD, alone's rate", "gap-aware, alone's rate", barkai),
        ("rate / staleness", "gap-aware", barkai),
    ]
    return Study(f"held-out loss, {replicas} replicas", values, claims)


# Studies of protocols and of replicas that train by themselves.


def run_to(
    size: Size,
    seed: int,
    cluster: dbjax.Cluster,
    settings: Mapping[str, Any],
    target: float | None,
) -> float:
    """Train; the seconds to a held-out loss, or that at the end if there is none."""
    problem = task()
    try:
        run = downpour.train(
            problem.loss, problem.init(seed), problem.data, steps=size.steps,
            eval_fn=lambda params, step, time: {"loss": problem.held_out(params)},
            eval_every=25 if target else size.steps,
            runtime=dbjax.Emulated(cluster, seed=seed), **settings,
        )  # fmt: skip
    except RuntimeError:  # it has come apart
        return math.inf
    rows = run.trace.evaluations
    if target is None:
        end = float(rows[-1]["loss"])
        return end if math.isfinite(end) else math.inf
    return next((row["time"] for row in rows if row["loss"] <= target), math.inf)


def tuned(
    size: Size,
    cluster: dbjax.Cluster,
    make: Callable[[float], Mapping[str, Any]],
    target: float | None = None,
) -> list[float]:
    """What the best of the rates, for seed 0, leads to with the other seeds."""
    found = [run_to(size, 0, cluster, make(rate), target) for rate in size.rates]
    best = make(size.rates[int(np.argmin(found))])
    return [run_to(size, seed, cluster, best, target) for seed in size.seeds]


def protocols(size: Size) -> Study:
    """Seconds to a target where some machines are much slower than others."""
    speeds = (1.0,) * 12 + (0.1,) * 4
    cluster = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 0.5), speeds=speeds)
    size = size._replace(rates=size.rates[::2])
    made = {
        "synchronous": dbjax.synchronous(),
        "4 backups": dbjax.synchronous(backups=4),
        "ssp(4)": dbjax.ssp(4),
        "asynchronous": dbjax.asynchronous(),
        "threshold 16": dbjax.delay_threshold(16),
    }

    def make(protocol: Any, rate: float) -> dict[str, Any]:
        return {"protocol": protocol, "optimizer": optax.sgd(rate), "replicas": 16}

    values = {
        name: tuned(size, cluster, functools.partial(make, one), target=0.4)
        for name, one in made.items()
    }
    claims = [
        ("synchronous", "4 backups", "Chen and others 2016"),
        ("asynchronous", "4 backups", "Chen and others 2016"),
        ("synchronous", "ssp(4)", "Ho and others 2013"),
        ("asynchronous", "ssp(4)", "Ho and others 2013"),
        ("asynchronous", "threshold 16", "Maranjyan and others 2025"),
    ]
    return Study("seconds to a held-out loss of 0.4", values, claims)


def alone(size: Size, replicas: int = 8, seldom: int = 16) -> Study:
    """Replicas that train by themselves, each method's own rate tuned."""
    cluster = dbjax.Cluster(speeds=(1.0,) * 4 + (0.25,) * 4)
    size = size._replace(rates=size.rates[2::2])

    def push_seldom(rate: float) -> dict[str, Any]:
        local = optax.sgd(rate)
        return {
            "replicas": replicas, "n_push": seldom, "n_fetch": seldom,
            "optimizer": local, "local_optimizer": local,
        }  # fmt: skip

    def naive(rate: float) -> dict[str, Any]:
        every = downpour.async_diloco(optax.sgd(rate), replicas=replicas, every=seldom)
        outer = optax.sgd(0.7 / replicas, momentum=0.9, nesterov=True)
        return every | {"optimizer": outer}

    def diloco(every: int, rate: float) -> dict[str, Any]:
        return downpour.diloco(optax.sgd(rate), replicas=replicas, every=every)

    steps = downpour.proportional_steps((1.0,) * 4 + (0.25,) * 4, seldom)
    methods: dict[str, Callable[[float], Mapping[str, Any]]] = {
        "Downpour": push_seldom,
        "EASGD": lambda rate: downpour.easgd(
            optax.sgd(rate), replicas=replicas, every=seldom
        ),
        "averaging": lambda rate: downpour.parameter_averaging(
            optax.sgd(rate), replicas=replicas, every=seldom
        ),
        "DiLoCo, H 1": functools.partial(diloco, 1),
        f"DiLoCo, H {seldom}": functools.partial(diloco, seldom),
        "async DiLoCo, naive": naive,
        "async DiLoCo": lambda rate: downpour.async_diloco(
            optax.sgd(rate), replicas=replicas, every=steps
        ),
    }
    values = {name: tuned(size, cluster, make) for name, make in methods.items()}
    claims = [
        ("Downpour", "EASGD", "Zhang and others 2015"),
        ("averaging", f"DiLoCo, H {seldom}", "Douillard and others 2023"),
        (f"DiLoCo, H {seldom}", "DiLoCo, H 1", "Douillard and others 2023"),
        ("async DiLoCo, naive", f"DiLoCo, H {seldom}", "Liu and others 2024"),
        ("async DiLoCo, naive", "async DiLoCo", "Liu and others 2024"),
    ]
    return Study(f"held-out loss, {replicas} replicas, H {seldom}", values, claims)


STUDIES = {f.__name__: f for f in (momentum, rules, protocols, alone)}


# What came out.


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
    found: dict[str, Study] = {}
    for name in options.only:
        with console.status(name):
            found[name] = STUDIES[name](size)
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
