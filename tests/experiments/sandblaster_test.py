import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from dbjax import checkpoint
from experiments import dry_run, metrics, plots, plots_sandblaster, registry, train
from experiments.methods import METHODS, Session, kinds
from tests.experiments.train_and_evaluate_test import SANDBLASTER, rows, run

PLAIN_CODE = True


def small(*methods, **options):
    """Tumours with few iterations, on two replicas."""
    return ConfigDict(
        {
            "methods": [f"sandblaster_{name}" for name in methods or ("lbfgs",)],
            "seed": 0,
            "runtime": "emulated",
            "workload": {"name": "breast_cancer", "batch_size": 4},
            "sandblaster": {**SANDBLASTER, **options},
            "cluster": {"step_time": 0.1, "spread": 0.3, "latency": 0.01},
        }
    ).lock()


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("warmed")
    return workdir, *run(small(warmstart_steps=20), workdir)


def test_the_clock_and_the_evaluations_begin_with_the_warm_start(warmed):
    workdir, outcomes, _ = warmed
    trace, result = outcomes["sandblaster_lbfgs"]
    steps = [row["step"] for row in trace.evaluations]
    assert steps == list(range(5))  # of the warm start there is only its end
    assert trace.evaluations[0]["time"] > 20 * 0.05
    assert trace.start.min() > 20 * 0.05
    assert trace.evaluations[0]["value"] < 0.5 < np.log(2)  # which a cold one has
    assert result["time"] == trace.evaluations[-1]["time"]
    examples = [row["examples"] for row in trace.evaluations]
    assert examples[0] == 20 * 4 + 400 and examples == sorted(examples)
    for row, mine in zip(trace.evaluations, rows(workdir), strict=True):
        assert mine == {**row, "method": "sandblaster_lbfgs"}


def test_a_run_that_broke_resumes_to_the_same_rows(warmed, tmp_path, monkeypatch):
    real, broken = metrics.Writer.write, []

    def write(self, step, *rest):
        if step == 3 and not broken:
            broken.append(step)
            raise OSError("no space left")
        real(self, step, *rest)

    monkeypatch.setattr(metrics.Writer, "write", write)
    for module in (plots, plots_sandblaster):
        monkeypatch.setattr(module, "draw", lambda *_, **__: [])
    with pytest.raises(OSError, match="no space left"):
        run(small(warmstart_steps=20), tmp_path)
    outcomes, said = run(small(warmstart_steps=20), tmp_path)
    assert "goes on from its checkpoint of step 2" in said
    assert rows(tmp_path) == rows(warmed[0])
    trace = outcomes["sandblaster_lbfgs"].trace
    assert trace.diff(warmed[1]["sandblaster_lbfgs"].trace) is None


def test_the_report_says_why_it_ended(warmed):
    workdir, _, said = warmed
    assert "lbfgs: limit after 4 iterations" in said
    result = json.loads((workdir / "sandblaster_lbfgs/result.json").read_text())
    assert result["status"] == "limit" and result["step"] == 4
    assert result["info"]["seconds_per_iteration"]["static"] > 0


@pytest.mark.parametrize(
    ("name", "batches"),
    [*((name, "full") for name in kinds.KINDS)]
    + [("lbfgs", "multi"), ("lbfgs", "progressive")],
)
def test_a_plan_knows_how_many_vectors_a_checkpoint_holds(tmp_path, name, batches):
    config = small(name, batches=batches, iterations=2, replicas=1)
    workload, plans = train.prepare(config)
    ((name, plan),) = plans.items()
    session = Session(lambda *_: {}, tmp_path / "checkpoints")
    METHODS[name].run(config, workload, session)
    saved = checkpoint.latest(session.checkpoints)
    assert saved is not None
    # A vector that is first needed later is not there yet.
    assert plan.saved - 2 <= len(saved.note["vectors"]) <= plan.saved


def test_on_threads_too(tmp_path):
    config = small(batches="multi", eval_every=3)
    config.runtime = "threads"
    outcomes, _ = run(config, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [0, 3, 4]
    assert outcomes["sandblaster_lbfgs"].result["iterations"] == 4
    assert not (tmp_path / "sandblaster_balance.png").exists()
    assert (tmp_path / "sandblaster_lbfgs_portions.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batches": "progresive"}, "did you mean 'progressive'"),
        ({"strategy": "backup"}, "did you mean 'backups'"),
        ({"memorysize": 3}, "did you mean 'memory_size'"),
        ({"iterations": 0}, "sandblaster.iterations is 0"),
        ({"tolerance": -1.0}, "sandblaster.tolerance is -1.0"),
        ({"shards": 1000}, "sandblaster.shards is 1000"),
        ({"replicas": 0}, "replicas"),
        ({"portion_size": 0}, "portion_size"),
        ({"memory_size": 0}, "memory_size"),
        ({"batches": "multi", "batch_portions": 99}, "there are only 20"),
        ({"warmstart_steps": 1, "warmstart_optimizer": "sdg"}, "did you mean 'sgd'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(tmp_path, options, words):
    with pytest.raises(registry.ConfigError, match=words):
        run(small(**options), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_stream_without_end_is_refused(tmp_path):
    config = small()
    config.workload.name = "digits"
    with pytest.raises(registry.ConfigError, match="workload.train_on='fixed'"):
        run(config, tmp_path)


def test_methods_are_named_by_what_they_are():
    assert {f"sandblaster_{name}" for name in kinds.KINDS} < set(METHODS)


def test_a_dry_run_says_what_is_needed():
    need = dry_run.show(small(memory_size=5))["sandblaster_lbfgs"]
    assert need.checkpoint == 4 * 31 * (2 * 5 + 7)
    assert need.memory > need.checkpoint
    # 20 portions of 0.5 s on two replicas, five times and a bit.
    assert need.clock is not None and 20 < need.clock < 40


def test_progress_has_three_panels_that_share_an_axis(warmed):
    traces = {name: outcome.trace for name, outcome in warmed[1].items()}
    panels = plots_sandblaster.progress(traces, "toy").axes
    assert [panel.get_xlabel().split()[0] for panel in panels] == [
        "iterations",
        "passes",
        "emulated",
    ]
    assert panels[0].get_shared_y_axes().joined(panels[0], panels[2])
    assert panels[0].get_yscale() == "log"


def test_portions_are_counted_once_in_the_picture(warmed):
    trace = warmed[1]["sandblaster_lbfgs"].trace
    work = trace.take(trace.kind == 1)
    counts = plots_sandblaster._counting(work)
    tickets, times = np.unique(work.step[counts], return_counts=True)
    assert (times == 1).all()
    assert len(tickets) == trace.evaluations[-1]["portions"]
    plots.plt.close(plots_sandblaster.portions(trace, "sandblaster_lbfgs"))
