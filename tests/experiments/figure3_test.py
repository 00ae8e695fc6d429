"""Figure 3: the paper's points, the fit to them, and what the script leaves behind."""

import csv

import pytest

from dbjax.cluster import layers, partitions
from dbjax.cluster.layers import Full
from dbjax.models.dense import speech
from dbjax.models.vision import vision
from experiments import figure3, figure3_fit, measure_machine, plots, plots_figure3
from experiments.figure3_fit import ASSUMED
from experiments.measure_machine import Measured


@pytest.fixture(scope="module")
def paper():
    return figure3_fit.read()


@pytest.fixture(scope="module")
def found(paper):
    return figure3_fit.fit(paper)


MEASURED = Measured(
    machine=partitions.Machine(1e11, 3e9, 2e-5, pace=partitions.power_tail(0.1)),
    steps={1: 0.2, 2: 0.11},
    sent=8192.0,
    widths=(32, 128, 128),
    batch=16,
)


def test_networks_have_the_sizes_they_are_named_after(paper):
    def weights(name):
        # Forward and backward on one machine: 2 and 4 operations, 2 for the first layer.
        work = paper.networks[name](1)
        return sum(w.flops for w in work[: len(work) // 2]) / 2 / figure3_fit.BATCH

    sizes = {"speech 42M": 42e6, "images 80M": 80e6, "images 330M": 330e6, "images 1.7B": 1.7e9}  # fmt: skip
    assert set(paper.networks) == set(sizes)
    for name, size in sizes.items():
        assert weights(name) == pytest.approx(size, rel=0.05)
        kind, preset = name.split()
        model = vision(preset) if kind == "images" else speech()
        # The model's biases, one for each position and map, are left out.
        assert 0.99 < weights(name) / model.num_parameters < 1


def test_one_machine_explains_all_curves_but_for_the_break_of_speech(paper, found):
    errors = {name: figure3_fit.error(paper, name, found.machine) for name in paper.networks}  # fmt: skip
    assert all(one.median < 0.2 for one in errors.values())
    assert errors["speech 42M"].machines == 16
    assert 0.5 < errors["speech 42M"].worst < 0.8
    assert max(one.worst for n, one in errors.items() if n != "speech 42M") < 0.45
    # Without waiting for the slowest it does not.
    steady = partitions.Machine(2e9, found.machine.bandwidth, found.machine.latency, cores=20)  # fmt: skip
    assert figure3_fit.error(paper, "images 1.7B", steady).median > 1


def test_speed_ups_depend_on_ratios_only(paper, found):
    points = [point for point in paper.points if point.machines < 40]
    doubled = partitions.Machine(4e9, 2e8, 5e-5, cores=20)
    one = partitions.fit_machine(points, paper.networks, ASSUMED)
    two = partitions.fit_machine(points, paper.networks, doubled)
    assert two.bandwidth == pytest.approx(2 * one.bandwidth, rel=1e-2)
    assert two.latency == pytest.approx(one.latency / 2, rel=1e-2)


def test_the_model_sends_what_the_compiled_program_sends():
    measured = measure_machine.measure(batch=16, **figure3.SMOKE)
    assert measured.layers == [Full(32, 128), Full(128, 128)]
    sent = sum(work.bytes for work in layers.phases(measured.layers, 2, batch=16))
    assert measured.sent == sent > 0
    assert measured.machine.flops > 1e7
    assert all(seconds > 0 for seconds in measured.steps.values())


def test_figure_and_numbers_are_written(paper, found, tmp_path):
    figure3.write(paper, found, MEASURED, tmp_path / "figure3.csv")
    text = (tmp_path / "figure3.csv").read_text()
    notes = [line for line in text.splitlines() if line.startswith("#")]
    for words in ("Assumed, as the paper does not state it", "Measured here"):
        assert any(words in note for note in notes)
    rows = list(csv.DictReader(text.splitlines()[len(notes) :]))
    assert len(rows) == 8 + 3 * 9
    assert all(row["measured"] for row in rows)
    picture = plots_figure3.draw(paper, found, MEASURED)
    left, right = picture.axes
    assert left.get_xlabel() == right.get_xlabel() == "machines"
    assert "speed-up" in left.get_ylabel()
    names = [text.get_text() for text in picture.legends[0].get_texts()]
    assert [*paper.networks] == names[:4]
    assert len(plots_figure3.draw(paper, found, None).axes) == 1
    plots.plt.close("all")


def test_the_script_says_what_it_cannot_explain(tmp_path, capsys):
    figure3.main(["--no-measure", f"--out={tmp_path / 'new'}"])
    assert (tmp_path / "new" / "figure3.png").stat().st_size > 30_000
    assert (tmp_path / "new" / "figure3.csv").exists()
    said = " ".join(capsys.readouterr().out.split())
    for words in ("left out", "0.95 at 16", "at 81 machines", "lognormal", "one pace"):
        assert words in said


def test_the_check_puts_predicted_beside_measured_times():
    said = " ".join(figure3.check(MEASURED))
    assert "(measured 200 ms)" in said and "(measured 1.82)" in said
    assert "8,192 bytes by the model, 8,192 by" in said
