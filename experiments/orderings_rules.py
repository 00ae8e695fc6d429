"""Studies of published orderings of optimizers: replays of simulated Traces."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

import dbjax
from dbjax import optim
from experiments.orderings_task import (
    Size,
    Study,
    best,
    digits,
    ends,
    regression,
    reported,
)

CLUSTER = dbjax.Cluster(step_time=dbjax.Exponential(1.0))


def simulated(
    counts: Sequence[int], steps: int, seed: int, draws: int = 1
) -> list[dbjax.Trace]:
    """Give a Trace, or some, for each number of replicas."""
    return [
        dbjax.simulate(CLUSTER, replicas=n, steps=steps, seed=100 * seed + draw)
        for n in counts
        for draw in range(draws)
    ]


def name_of(replicas: int) -> str:
    """Name so many replicas."""
    return f"{replicas} replica" + "s" * (replicas > 1)


def momentum(size: Size) -> Study:
    """What a momentum of 0.9 costs or brings, by number of replicas, rates tuned."""
    counts = (1, 4, 16, 32)
    found = ends(
        digits(),
        functools.partial(simulated, counts, size.steps),
        lambda learning_rate, momentum: optax.sgd(learning_rate, momentum),
        {"learning_rate": np.array(size.rates), "momentum": np.array([0.0, 0.9])},
        size.all_seeds,
    )
    values = {
        name_of(n): np.divide(
            reported(one[:, 1], size), reported(one[:, 0], size)
        ).tolist()
        for n, one in zip(counts, found, strict=True)
    }
    source = "Mitliagkas and others 2016"
    claims = [(name_of(n), name_of(1), source) for n in counts[1:]]
    return Study("held-out loss with momentum 0.9 over that without", values, claims)


def best_momentum(size: Size, draws: int = 3) -> Study:
    """The momentum that is best, the rate being the best for it; each seed's own."""
    counts = (1, 2, 4, 8, 16, 32)
    momenta = np.array([-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 0.9])
    values = {"no momentum": [0.0] * len(size.seeds)}
    for n in counts:
        found = ends(
            regression(),
            # More updates for more replicas, as each has missed more of them.
            lambda seed, n=n: simulated(
                [n], round(size.steps * n**0.5 / 16), seed, draws
            ),
            # The rate is that of an update in the long run.
            lambda rate, momentum: optax.sgd(rate * (1 - momentum), momentum),
            {"rate": 0.04 * 2 ** (np.arange(15) / 2), "momentum": momenta},
            size.seeds,
        )
        # Over the draws, as with one it is a matter of luck; then the best rate.
        reached = np.log(np.minimum(found, 1e3)).mean(0).min(0)  # [momenta, seeds]
        values[name_of(n)] = momenta[reached.argmin(0)].tolist()
    source = "Mitliagkas and others 2016"
    claims = [
        *((name_of(1), name_of(n), source) for n in (4, 32)),
        ("no momentum", name_of(32), source),
    ]
    return Study("best momentum, least squares", values, claims, logarithmic=False)


def rules(size: Size, replicas: int = 24) -> Study:
    """Delay-aware rules, each one's rate tuned, and at the rate that is best alone."""
    counts, chain = (1, replicas), optax.chain
    rate = {"rate": np.array(size.rates)}
    stale, old = ("staleness",), ("stale_params",)
    made: dict[str, tuple[Callable[..., Any], tuple[str, ...], Mapping[str, Any]]] = {
        "SGD": (optax.sgd, (), {"learning_rate": rate["rate"]}),
        "rate / staleness": (
            lambda rate: chain(optim.scale_by_staleness(), optax.sgd(rate)),
            stale, rate,
        ),
        "DC-ASGD-c": (
            lambda rate, lam: chain(optim.compensate_delay(lam), optax.sgd(rate)),
            old, rate | {"lam": np.array([0.5, 4.0, 32.0, 256.0])},
        ),
        "DC-ASGD-a": (
            lambda rate, lam: chain(optim.compensate_delay(lam, 0.95), optax.sgd(rate)),
            old, rate | {"lam": np.array([0.1, 0.5, 2.0])},
        ),
        "gap-aware": (
            lambda rate: chain(optim.scale_by_gap(rate), optax.sgd(rate)), old, rate,
        ),
    }  # fmt: skip
    values: dict[str, list[float]] = {}
    alone: tuple[Any, ...] = ()
    traces = functools.partial(simulated, counts, size.steps)
    for name, (make, provide, settings) in made.items():
        one, many = ends(digits(), traces, make, settings, size.all_seeds, provide)
        if name == "SGD":
            alone = best(one, size)
            values["SGD, one replica"] = reported(one, size)
        values[name] = reported(many, size)
        if len(settings) == 1:
            values[f"{name}, alone's rate"] = reported(many, size, alone)
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


def prediction(size: Size, delay: int = 8) -> Study:
    """Momentum 0.9 where every gradient is equally stale, with parameters predicted."""
    rate = {"rate": np.array(size.rates)}

    def run(rule: Callable[[Any], Any], delay: int) -> np.ndarray:
        trace = dbjax.Trace.from_delays(np.minimum(np.arange(size.steps), delay))
        return ends(digits(), lambda seed: [trace], rule, rate, size.all_seeds)[0]

    def heavy(rate: Any) -> optax.GradientTransformation:
        return optax.sgd(rate, 0.9)

    def ahead(rate: Any) -> optax.GradientTransformation:
        return optim.predict_params(heavy(rate), delay)

    fresh = run(heavy, 0)
    values = {"fresh": reported(fresh, size)}
    for name, rule in (("stale", heavy), ("predicted", ahead)):
        found = run(rule, delay)
        values[name] = reported(found, size)
        values[f"{name}, fresh one's rate"] = reported(found, size, best(fresh, size))
    chen = "Chen and others 2022"
    claims = [
        ("stale", "fresh", chen),
        ("stale", "predicted", chen),
        ("stale, fresh one's rate", "predicted, fresh one's rate", chen),
    ]
    return Study(f"held-out loss, momentum 0.9, staleness {delay}", values, claims)


STUDIES = (momentum, best_momentum, rules, prediction)
