"""What each method is where its paper says that it is nothing new, in one table."""

import itertools

import jax
import numpy as np
import optax
import pytest

import dbjax
from dbjax import downpour
from dbjax.optim import LocalRule, softsync
from tests import problems
from tests.optim.delay_aware_test import RULES
from tests.problems import SGD, train

UNEVEN = dbjax.Emulated(
    dbjax.Cluster(step_time=dbjax.Gamma(1.0, 2.0), slow=dbjax.Slow(0.3, 4.0)), seed=3
)
BARRIER, ONE = dbjax.synchronous(), {"replicas": 1}
HALF, TRIPLE = optax.sgd(0.025), optax.sgd(0.15)

# method -> its settings, those of what it is then, whether to the last bit
TABLE = {
    # Nothing is stale with one replica.
    **{
        f"{name}, one replica": (
            ONE | {"optimizer": rule, "provide": provide},
            ONE | {"optimizer": plain},
            False,
        )
        for name, (rule, provide, plain) in RULES.items()
    },
    "compensation with lambda 0": (
        {"optimizer": RULES["DC-ASGD-c, 0"][0], "provide": ("stale_params",)},
        {"optimizer": RULES["DC-ASGD-c, 0"][2]},
        True,
    ),
    "ssp, bound 0": ({"protocol": dbjax.ssp(0)}, {"protocol": BARRIER}, True),
    "ssp, no bound": ({"protocol": dbjax.ssp(np.inf)}, {}, True),
    "ssp, one replica": (ONE | {"protocol": dbjax.ssp(1)}, ONE, True),
    "threshold, none": ({"protocol": dbjax.delay_threshold(np.inf)}, {}, True),
    "threshold, never met": ({"protocol": dbjax.delay_threshold(36)}, {}, True),
    "threshold, one replica": (
        ONE | {"protocol": dbjax.delay_threshold(1)}, ONE, True,
    ),
    "backups, none": (
        {"protocol": dbjax.synchronous(backups=0)}, {"protocol": BARRIER}, True,
    ),
    "backups, one replica": (
        ONE | {"protocol": dbjax.synchronous(backups=1)}, ONE, True,
    ),
    "barrier, one replica": (ONE | {"protocol": BARRIER}, ONE, True),
    "barrier of several minibatches, one replica": (
        ONE | {"protocol": dbjax.synchronous(every=3)}, ONE, True,
    ),
    "softsync, one push": (
        {"optimizer": softsync(problems.MOMENTUM, 1)},
        {"optimizer": problems.MOMENTUM},
        True,
    ),
    "softsync of all replicas is hardsync": (
        {"optimizer": softsync(TRIPLE, 3), "protocol": BARRIER},
        {"optimizer": SGD, "protocol": BARRIER},
        False,
    ),
    "averaging, one replica": (
        downpour.parameter_averaging(SGD, replicas=1, every=4),
        ONE | {"optimizer": SGD},
        False,
    ),
    "averaging after each minibatch": (
        downpour.parameter_averaging(TRIPLE, replicas=3, every=1),
        {"optimizer": SGD, "protocol": BARRIER},
        False,
    ),
    "DiLoCo without an outer rule": (
        downpour.diloco(SGD, replicas=3, every=4, learning_rate=1.0, momentum=0.0),
        downpour.parameter_averaging(SGD, replicas=3, every=4),
        False,
    ),
    "asynchronous DiLoCo, one replica, no outer rule": (
        downpour.async_diloco(
            SGD, replicas=1, every=4, learning_rate=1.0, momentum=0.0
        ),
        ONE | {"optimizer": SGD},
        False,
    ),
    "a local rule that pushes gradients": (
        {"local_optimizer": LocalRule(HALF), "n_fetch": 3, "n_push": 2},
        {"local_optimizer": HALF, "n_fetch": 3, "n_push": 2},
        True,
    ),
    "delayed gradients, delay 0": (
        {"optimizer": dbjax.delay_gradients(SGD, 0)}, {"optimizer": SGD}, True,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    problems.compile_once(monkeypatch)


@pytest.mark.parametrize(
    ("name", "shards"), list(zip(TABLE, itertools.cycle([1, 3]), strict=False))
)
def test_a_method_is_the_plain_one_where_its_paper_says_so(name, shards):
    method, plain, to_the_bit = TABLE[name]
    got, want = (
        train(UNEVEN, shards=shards, steps=36, **keywords).params
        for keywords in (method, plain)
    )
    if to_the_bit:
        problems.assert_same_bits(got, want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want
    )
