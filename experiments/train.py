"""`train_and_evaluate(config, workdir)`: every method, into one workdir.

Beside `main.py`, which only reads flags, this is the entry for tests and notebooks.
The workdir holds `config.json`, `metrics.jsonl`, PNG figures, and for each method a
folder with TensorBoard events, checkpoints, `trace.npz` and, once it has finished,
`result.json`. A second call goes on where the first one stopped.
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_collections
import rich.box
import rich.console
import rich.table

from dbjax import checkpoint
from dbjax.trace import Trace
from experiments import (
    meshes,
    metrics,
    plots,
    plots_sandblaster,
    registry,
    workloads,
)
from experiments.methods import METHODS, Plan, Session


class Outcome(NamedTuple):
    """What a finished method leaves.

    Attributes:
      trace: what happened, with the evaluations.
      result: the end: step, time, scores, `wall` seconds, and the run's info.
    """

    trace: Trace
    result: dict[str, Any]


def train_and_evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    *,
    console: rich.console.Console | None = None,
) -> dict[str, Outcome]:
    """Train with every method of the config, or go on where an earlier call stopped.

    Args:
      config: as the files in `configs/` give it.
      workdir: where everything is written; made if it is not there.
      console: where to show progress and results; the terminal, if not given.

    Returns:
      The outcome of each method, by name, in the config's order.

    Raises:
      registry.ConfigError: if the config asks for what does not exist, or the workdir
        was written by another config. Nothing was run then.
    """
    workdir = pathlib.Path(workdir)
    console = console or rich.console.Console()
    workload, plans = prepare(config)
    claim(workdir, config)
    console.print(workload.describe(), highlight=False, soft_wrap=True)
    if mesh := meshes.make(config):
        console.print(meshes.describe(mesh), highlight=False, soft_wrap=True)
    outcomes: dict[str, Outcome] = {}
    figures: list[pathlib.Path] = []
    try:
        for name in config.methods:
            outcome = _load(workdir / name)
            if outcome is not None:
                console.print(f"{name}: finished by an earlier call")
            outcomes[name] = outcome or _run(
                name, plans[name], config, workload, workdir, console
            )
    finally:
        # Also after an error: what the methods before it found is worth a picture.
        if outcomes:
            traces = {name: outcome.trace for name, outcome in outcomes.items()}
            figures = plots.draw(traces, workdir, title=workload.name)
            figures += plots_sandblaster.draw(traces, workdir, title=workload.name)
    for name in outcomes:
        if (costs := workdir / name / "partitions.txt").exists():
            console.print(f"{name}, {costs.read_text()}", highlight=False)
    console.print(report(outcomes))
    console.print(f"Figures in {workdir}: {', '.join(file.name for file in figures)}")
    return outcomes


def prepare(
    config: ml_collections.ConfigDict,
) -> tuple[workloads.Workload, dict[str, Plan]]:
    """Check the config as far as can be without training.

    Args:
      config: as the files in `configs/` give it.

    Returns:
      The workload, and the plan of each method.

    Raises:
      registry.ConfigError: if the config asks for what does not exist, or gives an
        argument that the library refuses.
    """
    for name in config.methods:
        registry.choose("methods", name, METHODS)
    if not config.methods or len(set(config.methods)) < len(config.methods):
        raise registry.ConfigError(
            f"methods is {tuple(config.methods)}; it must name one or more of "
            f"{', '.join(METHODS)}, each once."
        )
    for key in ("steps", "eval_every", "checkpoint_every"):
        if key in config and config[key] < 1:  # batch methods have their own
            raise registry.ConfigError(f"{key} is {config[key]}; it must be 1 or more.")
    with _refusals("workload"):
        workload = workloads.make(config.workload, config.seed)
    plans: dict[str, Plan] = {}
    for name in config.methods:
        with _refusals(name):
            plans[name] = METHODS[name].plan(config, workload)
    return workload, plans


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Write the config into the workdir, or check that the same one wrote it before.

    Args:
      workdir: the run's folder.
      config: the config of this run.

    Raises:
      registry.ConfigError: if something was trained there with another config.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, text = workdir / "config.json", json.dumps(config.to_dict(), indent=2)
    folders = ("checkpoints", "warmstart")
    checkpoints = any(any(workdir.glob(f"*/{folder}/*")) for folder in folders)
    trained = checkpoints or metrics.read(workdir / "metrics.jsonl")
    if path.exists() and trained:
        mine = registry.flatten(json.loads(text))  # tuples as JSON has them
        theirs = registry.flatten(_read_json(path))
        for key in [*mine, *theirs]:
            if key not in mine or key not in theirs or mine[key] != theirs[key]:
                raise registry.ConfigError(
                    f"{workdir} was written by another config: {key} is "
                    f"{_show(theirs, key)} there and {_show(mine, key)} here. Give "
                    "another --workdir, or the config that wrote this one."
                )
    metrics.replace(path, text + "\n")


def report(outcomes: Mapping[str, Outcome]) -> rich.table.Table:
    """Put the results side by side: test accuracy and loss at the end, and times.

    Args:
      outcomes: by method.

    Returns:
      A table to print.
    """
    table = rich.table.Table(
        box=rich.box.SIMPLE, title="on the test data, at the end of the run"
    )
    table.add_column("method", no_wrap=True)
    columns = ("replicas", "accuracy", "loss", "clock", "staleness", "wall")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    notes = []
    for name, (trace, result) in outcomes.items():
        batch = plots.is_batch(trace)
        if batch:
            notes.append(
                f"{plots.short(name)}: {result['status']} after "
                f"{result['iterations']:,} iterations, {result['evaluations']:,} "
                f"evaluations, at {result['value']:.4g}"
            )
        if since := result["info"].get("resumed_at"):
            notes.append(
                f"wall: {name} since step {since:,}, where it was taken up again"
            )
        stale = trace.staleness()
        table.add_row(
            plots.short(name),
            str(trace.header["replicas"]),
            f"{result['test_accuracy']:.1%}",
            f"{result['test_loss']:.3f}",
            f"{result['time']:,.1f} s",
            "-" if batch else f"{stale[stale >= 0].mean():.1f}",
            f"{result['wall']:.1f} s",
        )
    table.caption = "\n".join(notes) or None
    return table


def _run(
    name: str,
    plan: Plan,
    config: ml_collections.ConfigDict,
    workload: workloads.Workload,
    workdir: pathlib.Path,
    console: rich.console.Console,
) -> Outcome:
    """Run one method to its end and write its folder."""
    folder = workdir / name
    folder.mkdir(exist_ok=True)
    begin = time.perf_counter()
    with metrics.Writer(
        workdir,
        name,
        steps=plan.steps,
        batch_size=plan.batch_size,
        console=console,
    ) as writer:

        def evaluate(params: Any, step: int, seconds: float) -> dict[str, float]:
            scalars = workload.evaluate(params)
            writer.write(step, seconds, scalars)
            return scalars

        session = Session(evaluate, folder / "checkpoints", writer.watch)
        if found := checkpoint.steps(session.checkpoints):
            console.print(f"{name}: goes on from its checkpoint of step {found[-1]:,}")
        with _refusals(name, unless=lambda: writer.rows_written > 0):
            run = METHODS[name].run(config, workload, session)
        writer.complete(run.trace.evaluations)
    ended = ("status", "iterations", "evaluations", "value")  # of a batch method
    result = {
        "step": run.trace.evaluations[-1]["step"],
        "time": _seconds(run.trace),
        **{name: getattr(run, name) for name in ended if hasattr(run, name)},
        **workload.evaluate(run.params),
        "wall": time.perf_counter() - begin,
        "info": _plain(run.info),
    }
    run.trace.save(folder / "trace.npz")
    if text := meshes.report(config, workload, run.trace):
        metrics.replace(folder / "partitions.txt", text + "\n")
    # Last, as it is what says that the method has finished.
    metrics.replace(folder / "result.json", json.dumps(result, indent=2) + "\n")
    return Outcome(run.trace, result)


def _seconds(trace: Trace) -> float:
    """Say how long the run took by its own clock, with its warm start."""
    if plots.is_batch(trace):
        return trace.evaluations[-1]["time"]
    return trace.duration()


def _load(folder: pathlib.Path) -> Outcome | None:
    """Read the outcome of a method that finished in an earlier call."""
    path, table = folder / "result.json", folder / "trace.npz"
    if not path.exists():
        return None
    try:
        trace = Trace.load(table)
    except (OSError, ValueError) as error:
        raise registry.ConfigError(
            f"{table} cannot be read ({error}); remove {path}, and the next call makes "
            "both again from the last checkpoint."
        ) from error
    return Outcome(trace, _read_json(path))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise registry.ConfigError(
            f"{path} is damaged ({error}); remove it or give another --workdir."
        ) from error


@contextlib.contextmanager
def _refusals(part: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what the library or a cluster refuses into a `ConfigError` naming the part.

    Not if `unless()`: then training had begun, and it is not about the config.
    """
    try:
        yield
    except registry.ConfigError:
        raise
    except (ValueError, ConnectionError) as error:
        if unless():
            raise
        raise registry.ConfigError(f"{part}: {error}") from error


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"


def _plain(info: Any) -> dict[str, Any]:
    """Give the run's info as JSON would hold it."""
    return json.loads(json.dumps(info._asdict(), default=_number))


def _number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
