"""Studies of published orderings of protocols, and of replicas by themselves."""

import functools
from collections.abc import Callable
from typing import Any

import optax

import dbjax
from dbjax import downpour, optim
from dbjax.optim import LocalRule
from experiments.orderings_task import Settings, Size, Study, sgd, tuned

EVEN = dbjax.Cluster(step_time=dbjax.LogNormal(1.0, 0.3))


def protocols(size: Size) -> Study:
    """Seconds to a target where some machines are much slower than others."""
    speeds = (1.0,) * 12 + (0.1,) * 4
    cluster = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 0.5), speeds=speeds)
    made = {
        "synchronous": dbjax.synchronous(),
        "4 backups": dbjax.synchronous(backups=4),
        "ssp(4)": dbjax.ssp(4),
        "asynchronous": dbjax.asynchronous(),
        "threshold 16": dbjax.delay_threshold(16),
    }

    def make(protocol: Any, rate: float) -> Settings:
        return {"protocol": protocol, "optimizer": sgd(rate), "replicas": 16}

    values = {
        name: tuned(
            size, cluster, functools.partial(make, one), [size.rates], target=0.4
        )
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


def rounds(size: Size) -> Study:
    """What more gradients are worth that are taken at the same parameters."""
    cluster = dbjax.Cluster(step_time=1.0)

    def make(replicas: int, rate: float) -> Settings:
        return {
            "protocol": dbjax.synchronous(), "replicas": replicas,
            "optimizer": optim.softsync(sgd(rate), replicas),
        }  # fmt: skip

    values = {
        f"mean of {n}": tuned(
            size, cluster, functools.partial(make, n), [size.rates], 0.4, every=n
        )
        for n in (1, 2, 4, 8, 16)
    }
    return Study("updates to a held-out loss of 0.4", values, [])


def seldom(rate: float, replicas: int, every: int) -> Settings:
    """Downpour that pushes the sum of some minibatches' gradients."""
    return {
        "replicas": replicas, "n_push": every, "n_fetch": every,
        "optimizer": sgd(rate), "local_optimizer": sgd(rate),
    }  # fmt: skip


def agn(rate: float, replicas: int, every: int) -> Settings:
    """AGN: what is pushed is how far a replica moved, over its minibatches."""
    return seldom(rate, replicas, every) | {
        "optimizer": optax.sgd(1 / every),
        "local_optimizer": LocalRule(sgd(rate), push="movement"),
    }


def easgd(rate: float, replicas: int, every: int) -> Settings:
    """Elastic averaging."""
    return downpour.easgd(sgd(rate), replicas=replicas, every=every)


def replicas(size: Size, every: int = 10) -> Study:
    """As many minibatches, shared out among more and more replicas."""
    size = size._replace(steps=2 * size.steps)
    values = {
        f"{name}, {n} replicas": tuned(
            size, EVEN, functools.partial(make, replicas=n, every=every),
            [size.rates[2:]],
        )
        for name, make in (("AGN", agn), ("AEASGD", easgd))
        for n in (4, 32)
    }  # fmt: skip
    hermans = "Hermans 2017"
    claims = [
        ("AGN, 32 replicas", "AGN, 4 replicas", hermans),
        ("AEASGD, 32 replicas", "AEASGD, 4 replicas", hermans),
        ("AGN, 32 replicas", "AEASGD, 32 replicas", hermans),
    ]
    return Study(f"held-out loss, H {every}", values, claims)


def periods(size: Size) -> Study:
    """Who bears to talk seldom."""
    values = {
        f"{name}, H {every}": tuned(
            size, EVEN, functools.partial(make, replicas=4, every=every), [size.rates]
        )
        for name, make in (("Downpour", seldom), ("EASGD", easgd))
        for every in (2, 10, 50)
    }
    zhang = "Zhang and others 2015"
    claims = [(f"Downpour, H {n}", f"EASGD, H {n}", zhang) for n in (2, 10, 50)]
    return Study("held-out loss, 4 replicas", values, claims)


def alone(size: Size, count: int = 8, every: int = 16) -> Study:
    """Replicas that train by themselves, each method's own rates tuned."""
    speeds = (1.0,) * (count // 2) + (0.25,) * (count // 2)
    cluster = dbjax.Cluster(speeds=speeds)
    rates, outer_rates = size.rates[2::2], (0.04, 0.09, 0.18, 0.35, 0.7)

    def diloco(every: int, rate: float, outer: float) -> Settings:
        return downpour.diloco(
            sgd(rate), replicas=count, every=every, learning_rate=outer
        )

    def naive(rate: float, outer: float) -> Settings:
        late = downpour.async_diloco(sgd(rate), replicas=count, every=every)
        return late | {"optimizer": optax.sgd(outer / count, 0.9, nesterov=True)}

    def delayed(rate: float, outer: float) -> Settings:
        steps = downpour.proportional_steps(speeds, every)
        return downpour.async_diloco(
            sgd(rate), replicas=count, every=steps, learning_rate=outer
        )

    def averaging(rate: float) -> Settings:
        return downpour.parameter_averaging(sgd(rate), replicas=count, every=every)

    far = f"DiLoCo, H {every}"
    inner: dict[str, Callable[..., Settings]] = {
        "Downpour": functools.partial(seldom, replicas=count, every=every),
        "EASGD": functools.partial(easgd, replicas=count, every=every),
        "averaging": averaging,
    }
    both: dict[str, Callable[..., Settings]] = {
        "DiLoCo, H 1": functools.partial(diloco, 1),
        far: functools.partial(diloco, every),
        "async DiLoCo, naive": naive,
        "async DiLoCo": delayed,
    }
    values: dict[str, list[float]] = {}
    for name, make in inner.items():
        values[name] = tuned(size, cluster, make, [rates])
    for name, make in both.items():
        values[name] = tuned(size, cluster, make, [rates, outer_rates])
    for name in ("async DiLoCo, naive", "async DiLoCo"):
        published = tuned(size, cluster, both[name], [rates, [0.7]])
        values[f"{name}, outer rate 0.7"] = published
    douillard, liu = "Douillard and others 2023", "Liu and others 2024"
    claims = [
        ("Downpour", "EASGD", "Zhang and others 2015"),
        ("averaging", far, douillard),
        (far, "DiLoCo, H 1", douillard),
        ("async DiLoCo, naive", far, liu),
        ("async DiLoCo, naive", "async DiLoCo", liu),
        ("async DiLoCo, naive, outer rate 0.7", "async DiLoCo, outer rate 0.7", liu),
    ]
    return Study(f"held-out loss, {count} replicas, H {every}", values, claims)


STUDIES = (protocols, rounds, replicas, periods, alone)
