"""A live run: drives a crew, evaluates, saves, brings home the Trace."""

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from dbjax import checkpoint
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.crews import Beginning, LocalCrew, RayCrew, ray_crew
from dbjax.downpour.problem import Problem, digest
from dbjax.downpour.program import make_program
from dbjax.downpour.provenance import (
    check_same,
    describe_machine,
    describe_run,
)
from dbjax.downpour.run import Run, make_info
from dbjax.runtime.base import RejectedTooOften
from dbjax.runtime.live_shard import Snapshot
from dbjax.runtime.ray import Ray
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.threads import ReplicaError, Threads
from dbjax.runtime.transport import Gone
from dbjax.server.shard import ShardState
from dbjax.trace import COMPUTE, PUSH, Trace


class Live:
    """One run on threads or Ray, resumed where there is a checkpoint of it.

    Args:
      problem: what is trained.
      arguments: checked.
      runtime: `Threads` or `Ray`.
      split: as for `train`.

    Raises:
      ValueError: the checkpoint is of another run.
    """

    def __init__(
        self, problem: Problem, arguments: Arguments, runtime: Threads | Ray, split: str
    ) -> None:
        self.problem, self.a, self.runtime = problem, arguments, runtime
        a, where = arguments, arguments.checkpoint_dir
        self.recorder = Recorder()
        self.evaluations: list[dict[str, Any]] = []
        self.batches, self.ids = [0] * a.replicas, [0] * a.replicas
        self.resumed_at = self.saved_at = 0
        self.local: dict[int, Any] = {}
        self.streams: Any = None
        self.states = [ShardState(part, None) for part in problem.split(problem.params)]
        self.description: dict[str, Any] = {}
        self.split = split
        if where is not None:
            kind = type(runtime).__name__.lower()
            self.description = describe_run(a, problem, kind)
            if saved := checkpoint.latest(where):
                check_same(saved.note, self.description, where)
                self._restore(saved)
        # Tickets that a failed replica took with it are given out again.
        computed = self._computed()
        first = max(computed, default=-1) + 1
        again = sorted(set(range(first)) - computed)
        self.program = make_program(a, first, again)

    def run(self) -> Run:
        """Run to the end, or to the first error.

        Returns:
          The run.

        Raises:
          ReplicaError: a replica failed; names replica and step.
          RejectedTooOften: training has come apart.
        """
        with self._gather() as self.crew:
            return self._run(self.crew)

    def _gather(self) -> contextlib.AbstractContextManager[LocalCrew | RayCrew]:
        """Give the crew that carries this run out."""
        begin = Beginning(
            self.states, self.recorder, self.batches, self.ids, self.local, self.streams
        )
        self.states = []  # the crew's
        problem, program, runtime = self.problem, self.program, self.runtime
        # The shards' from here on, who write over them: nobody keeps a copy.
        self.problem = dataclasses.replace(problem, params=None)
        if isinstance(runtime, Ray):
            return ray_crew(problem, self.a, program, begin, runtime, self.split)
        crew = LocalCrew(self.problem, program, begin, runtime)
        return contextlib.nullcontext(crew)

    def _run(self, crew: LocalCrew | RayCrew) -> Run:
        a = self.a
        marks = {}
        if a.eval_fn is not None and a.eval_every:
            marks["eval"] = a.eval_every
        if a.checkpoint_dir is not None and a.checkpoint_every:
            marks["checkpoint"] = a.checkpoint_every
        over, failed = False, None
        try:
            with crew.running(marks):
                while not over:
                    name, what = crew.next_event()
                    if name == "over":
                        over = True
                    elif name == "error":
                        failed = failed or what
                    elif name == "eval":
                        self._evaluate(what)
                    elif name == "checkpoint" and what > self.saved_at:
                        with crew.quiet():
                            self._save()
            if failed is None and a.eval_fn is not None:
                self._evaluate(crew.snapshot(self.program.tickets.finished))
        except BaseException:
            # The crew has stopped: replicas have pushed what they had, and left; unless
            # a second Ctrl-C did not wait for that.
            if not crew.alive:
                self._save()
            raise
        if failed is not None:
            self._save()
            replica, step, error = failed
            if isinstance(error, Exception) and not isinstance(error, RejectedTooOften):
                raise ReplicaError(
                    f"replica {replica} failed at step {step}: {error!r}"
                ) from error
            raise error
        states = self._save()
        trace = self._trace(states)
        params = self.problem.last(tuple(state.params for state in states))
        optimizer_states = tuple(state.optimizer_state for state in states)
        info = make_info(trace, "live", crew.peak_copies(), self.resumed_at)
        return Run(params, optimizer_states, trace, info)

    def _computed(self) -> set[int]:
        """The steps whose minibatches are done."""
        kind, step = COLUMNS.index("kind"), COLUMNS.index("step")
        return {row[step] for row in self.recorder.rows if row[kind] == COMPUTE}

    def _evaluate(self, snapshot: Snapshot) -> None:
        assert self.a.eval_fn is not None
        done = self.evaluations and self.evaluations[-1]["step"] >= snapshot.step
        if not done:
            # Copies: the shards' own are recycled one day.
            params = self.problem.whole(tuple(one.params for one in snapshot.states))
            scalars = self.a.eval_fn(params, snapshot.step, snapshot.time)
            self.evaluations.append(
                {"step": snapshot.step, "time": snapshot.time}
                | {name: float(value) for name, value in scalars.items()}
            )
        snapshot.release()

    def _trace(self, states: list[ShardState]) -> Trace:
        """The rows that were recorded, with the digests in their places."""
        recorder = self.recorder
        header = {**self.a.describe(), "runtime": type(self.runtime).__name__}
        header |= describe_machine(self.problem) | self.crew.describe()
        trace = Trace.from_columns(header, self.evaluations, **recorder.columns())
        digests = np.zeros(len(trace), np.uint64)
        last = [
            (shard, state.version, digest(state.params))
            for shard, state in enumerate(states)
        ]
        pushes = np.flatnonzero(trace.kind == PUSH)
        named = zip(trace.shard[pushes], trace.version[pushes], pushes, strict=True)
        row_of = {(int(shard), int(version)): row for shard, version, row in named}
        for shard, version, value in [*recorder.digests, *last]:
            if (shard, version) in row_of:
                digests[row_of[shard, version]] = value
        return dataclasses.replace(trace, digest=digests)

    def _save(self) -> list[ShardState]:
        """Save if there is something new; nothing must be in flight.

        Returns:
          The shards' states.
        """
        a, states = self.a, self.crew.collect()
        computed = len(self._computed())
        if a.checkpoint_dir is None or computed <= self.saved_at:
            return states
        leaves: dict[str, np.ndarray] = {}
        for s, state in enumerate(states):
            whole = (state.params, state.optimizer_state)
            for i, leaf in enumerate(jax.tree.leaves(whole)):
                leaves[f"shard{s}/{i}"] = np.asarray(leaf)
        try:
            local, streams = self.crew.replica_states()
        except Gone:  # a replica died just now: the next checkpoint will do
            return states
        for replica, arrays in local.items():
            for i, leaf in enumerate(arrays):
                leaves[f"local{replica}/{i}"] = np.asarray(leaf)
        rows = Trace.from_columns(a.describe(), **self.recorder.columns())
        leaves |= {f"trace/{name}": column for name, column in rows.columns().items()}
        note = {
            **self.description,
            "versions": [state.version for state in states],
            "incarnations": [state.incarnation for state in states],
            "batches": self.batches,
            "ids": self.ids,
            "evaluations": self.evaluations,
            "digests": self.recorder.digests,
            "time": self.recorder.now(),
            "local": sorted(local),
            "streams": streams,
        }
        checkpoint.save(a.checkpoint_dir, computed, leaves, note)
        self.saved_at = computed
        return states

    def _restore(self, saved: checkpoint.Saved) -> None:
        """Go back to where `_save` was called."""
        note, problem = saved.note, self.problem

        def unpack(name: str, template: Any) -> Any:
            leaves, treedef = jax.tree.flatten(template)
            places = range(len(leaves))
            arrays = [saved.leaves[f"{name}/{i}"] for i in places]
            return treedef.unflatten(map(problem.like, leaves, arrays))

        if problem.local_init is not None:
            template = problem.call(0, problem.local_init, problem.params)
            self.local = {r: unpack(f"local{r}", template) for r in note["local"]}
        for s, state in enumerate(self.states):
            template = problem.shard.init(state.params)[:2]
            params, optimizer_state = unpack(f"shard{s}", template)
            version, incarnation = note["versions"][s], note["incarnations"][s]
            self.states[s] = ShardState(params, optimizer_state, version, incarnation)
        self.batches[:], self.ids[:] = note["batches"], note["ids"]
        self.streams = note["streams"]
        self.evaluations = note["evaluations"]
        self.recorder = Recorder(float(note["time"]))
        self.recorder.digests = [tuple(one) for one in note["digests"]]
        columns = [saved.leaves[f"trace/{name}"].tolist() for name in COLUMNS]
        self.recorder.rows = list(zip(*columns, strict=True))
        self.resumed_at = self.saved_at = len(self._computed())
