import io
import json

import pytest
import rich.console

from experiments import metrics


def writer(folder, method="sgd", file=None):
    console = rich.console.Console(file=file or io.StringIO())
    return metrics.Writer(folder, method, steps=40, batch_size=8, console=console)


def scores(value):
    return {"test_accuracy": value, "test_loss": 1.0}


def steps(folder):
    rows = metrics.read(folder / "metrics.jsonl")
    return [(row["method"], row["step"], row["test_accuracy"]) for row in rows]


def test_each_evaluation_is_one_line_and_on_disk_at_once(tmp_path):
    with writer(tmp_path) as out:
        out.write(0, 0.0, scores(0.1))
        assert steps(tmp_path) == [("sgd", 0, 0.1)]
        out.write(20, 2.5, scores(0.5))
    row = metrics.read(tmp_path / "metrics.jsonl")[-1]
    assert row.pop("wall") >= 0
    expected = {"method": "sgd", "step": 20, "time": 2.5, "examples": 160}
    assert row == {**expected, **scores(0.5)}


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    for method in ("sgd", "downpour"):
        with writer(tmp_path, method) as out:
            for step in (0, 10, 20, 30):
                out.write(step, step, scores(0.1))
    with writer(tmp_path) as out:
        out.write(20, 20.0, scores(0.2))
        out.write(30, 30.0, scores(0.2))
    mine = [row for row in steps(tmp_path) if row[0] == "sgd"]
    assert [row[1:] for row in mine] == [(0, 0.1), (10, 0.1), (20, 0.2), (30, 0.2)]
    assert len(steps(tmp_path)) == 8


def test_what_only_the_run_knows_is_added_at_the_end(tmp_path):
    console = rich.console.Console(file=io.StringIO())
    options = {"steps": 4, "batch_size": None, "console": console}
    with metrics.Writer(tmp_path, "sandblaster_lbfgs", **options) as out:
        for step in (-8, 0, 1):  # a warm start counts down to 0
            out.write(step, 1.0, scores(0.1))
        assert "examples" not in metrics.read(tmp_path / "metrics.jsonl")[-1]
        out.complete([{"step": 1, "examples": 80, "value": 0.5, "test_loss": 7.0}])
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [-8, 0, 1]
    assert rows[-1]["examples"] == 80 and rows[-1]["value"] == 0.5
    assert rows[-1]["test_loss"] == 1.0  # what was measured stays


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    with writer(tmp_path) as out:
        out.write(0, 0.0, scores(0.1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"method": "sgd", "st')
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1
    with writer(tmp_path) as out:
        out.write(10, 1.0, scores(0.2))
    assert [row[1] for row in steps(tmp_path)] == [0, 10]


def test_what_is_not_finite_is_still_json(tmp_path):
    with writer(tmp_path) as out:
        out.write(0, 0.0, {"test_accuracy": 0.1, "test_loss": float("nan")})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert row["test_loss"] is None


def test_tensorboard_events_go_to_the_methods_folder(tmp_path):
    pytest.importorskip("tensorboardX")
    with writer(tmp_path) as out:
        out.write(0, 0.0, scores(0.1))
    assert len(list((tmp_path / "sgd").glob("events.out.tfevents.*"))) == 1


def test_a_tenth_at_a_time_where_there_is_no_terminal(tmp_path):
    file = io.StringIO()
    with writer(tmp_path, file=file) as out:
        for step in range(41):
            out.write(step, step, scores(0.1))
    lines = file.getvalue().splitlines()
    assert len(lines) == 11 and lines[-1] == "sgd 40 of 40: test accuracy 10.0%"
