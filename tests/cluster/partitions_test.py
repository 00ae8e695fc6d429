"""The model of partitioned steps, against closed forms and points that it made."""

import dataclasses
import math

import numpy as np
import pytest

from dbjax.cluster.distributions import Constant, Exponential, Gamma, LogNormal, Pareto
from dbjax.cluster.layers import Full, Local, network, phases
from dbjax.cluster.partitions import (
    Machine,
    Point,
    Work,
    fit_machine,
    power_tail,
    slowest,
    speed_up,
    step_time,
)


@pytest.mark.parametrize("machines", [2, 8, 128])
def test_the_slowest_of_exponential_paces_is_a_harmonic_number(machines):
    harmonic = sum(1 / k for k in range(1, machines + 1))
    assert slowest(Exponential(3.0), machines) == pytest.approx(3 * harmonic, rel=1e-6)


@pytest.mark.parametrize("machines", [2, 128])
def test_the_slowest_of_a_power_tail_is_a_beta_function(machines):
    shape = 2.5
    beta = math.gamma(machines) * math.gamma(1 - 1 / shape)
    beta /= math.gamma(machines + 1 - 1 / shape)
    expected = machines * beta * (shape - 1) / shape
    assert slowest(Pareto(1.0, shape), machines) == pytest.approx(expected, rel=1e-5)


def test_the_slowest_of_other_paces_is_what_drawing_them_gives():
    u = np.random.default_rng(0).random((50_000, 16))
    for pace in (LogNormal(1.0, spread=0.5), Gamma(2.0, shape=4.0)):
        seen = pace.quantile(u).max(1).mean()
        assert slowest(pace, 16) == pytest.approx(seen, rel=1e-2)
    assert slowest(Constant(2.0), 16) == 2.0
    assert slowest(LogNormal(2.0, spread=0.5), 1) == 2.0


def test_a_step_adds_up_what_each_phase_takes():
    machine = Machine(
        flops=1e9,
        bandwidth=1e6,
        latency=1e-3,
        pace=Exponential(1.0),
        cores=4,
        grain=1e8,
    )
    work = [Work(8e9, bytes=5e5, messages=3), Work(4e9)]
    waits = 1.5 * (2 + 0.1) + 1.5 * (1 + 0.1)
    assert step_time(machine, work, 2) == pytest.approx(waits + 0.5 + 0.003)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"flops": 0.0}, "flops must be a finite number, above 0"),
        ({"bandwidth": 0.0}, "bandwidth must be"),
        ({"latency": -1.0}, "latency must be"),
        ({"cores": 0}, "cores must be at least 1; got 0"),
        ({"grain": -1.0}, "grain must be"),
    ],
)
def test_a_machine_that_cannot_be_is_an_error(changes, match):
    with pytest.raises(ValueError, match=match):
        Machine(**{"flops": 1.0} | changes)
    with pytest.raises(TypeError, match="pace must be a distribution; got 1.0"):
        Machine(flops=1.0, pace=1.0)


SPEECH = [Full(440, 2560), *[Full(2560, 2560)] * 3, Full(2560, 8192)]
IMAGES = [Local(80, 8, 10, 3), Local(80, 8, 10, 8), Local(40, 8, 10, 8), Full(800, 21000)]  # fmt: skip


def test_a_fit_finds_the_machine_that_made_the_points():
    truth = Machine(flops=1e9, bandwidth=2e6, latency=3e-3, pace=power_tail(0.4))
    networks = {"speech": network(SPEECH, 10), "images": network(IMAGES, 10)}
    points = [
        Point(name, machines, speed_up(truth, net, machines))
        for name, net in networks.items()
        for machines in (1, 2, 4, 16, 64)
    ]
    guess = dataclasses.replace(truth, bandwidth=1e7, latency=1e-3, pace=Constant(1.0))
    found = fit_machine(points, networks, guess)
    assert found.bandwidth == pytest.approx(truth.bandwidth, rel=1e-3)
    assert found.latency == pytest.approx(truth.latency, rel=1e-3)
    assert found.pace.shape == pytest.approx(truth.pace.shape, rel=1e-3)
    with pytest.raises(ValueError, match="at least 4 of more than one machine; got 3"):
        fit_machine(points[:4], networks, guess)


def test_pieces_of_a_network_add_up_to_all_of_it():
    for layers in (SPEECH, IMAGES):
        weights = sum(layer.weights for layer in layers)
        whole = phases(layers, 1, batch=3)
        # Forward 2, backward 4, but for the gradients of the network's input.
        assert sum(work.flops for work in whole) == 3 * (
            6 * weights - 2 * layers[0].weights
        )
        assert all(work.bytes == work.messages == 0 for work in whole)
        four = phases(layers, 4, batch=3)
        assert 4 * sum(work.flops for work in four) == sum(w.flops for w in whole)


def test_layers_cut_by_units_send_all_activations_and_those_by_position_borders():
    assert phases(SPEECH, 4, batch=2)[1][1:] == (2 * 4 * 2560 * 3 / 4, 3)
    assert phases(SPEECH, 4, batch=2)[0][1:] == phases(SPEECH, 4, batch=2)[-1][1:] == (0, 0)  # fmt: skip
    # Two halves 40 x 80, each of which sees 9 rows of the other.
    assert phases(IMAGES, 2, batch=1)[1][1:] == (4 * 9 * 80 * 8, 1)
    # Quarters 40 x 40: 49 x 49 seen, of three neighbours.
    assert phases(IMAGES, 4, batch=1)[1][1:] == (4 * (49**2 - 40**2) * 8, 3)
    # Tiles 10 x 5: on one side there are two within reach.
    bytes_, messages = phases(IMAGES, 128, batch=1)[1][1:]
    assert (bytes_, messages) == (4 * (19 * 14 - 50) * 8, 3 * 3 - 1)
    # Nothing beyond the grid's end is asked for.
    assert phases([IMAGES[0], Local(4, 1, 10, 1)], 4, batch=1)[1].bytes == 4 * (16 - 4)
