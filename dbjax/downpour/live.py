"""A live run on threads: drives the crew, evaluates, saves, brings home the Trace."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dbjax import checkpoint
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.hands import ReplicaHands
from dbjax.downpour.problem import Problem, digest
from dbjax.downpour.program import make_program
from dbjax.downpour.provenance import (
    check_same,
    describe_machine,
    describe_run,
    restore_streams,
    stream_state,
)
from dbjax.downpour.run import Run, make_info
from dbjax.runtime.base import RejectedTooOften
from dbjax.runtime.live_shard import Snapshot
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.threads import Crew, ReplicaError, Threads
from dbjax.server.shard import ShardState
from dbjax.trace import COMPUTE, PUSH, Trace


class Live:
    """One run on threads, resumed where `arguments.checkpoint_dir` holds a checkpoint.

    Args:
      problem: what is trained.
      arguments: checked.
      runtime: the `Threads` settings.

    Raises:
      ValueError: the checkpoint is of another run.
    """

    def __init__(
        self, problem: Problem, arguments: Arguments, runtime: Threads
    ) -> None:
        self.problem, self.a, self.runtime = problem, arguments, runtime
        a, where = arguments, arguments.checkpoint_dir
        self.recorder = Recorder()
        self.evaluations: list[dict[str, Any]] = []
        self.batches, self.ids = [0] * a.replicas, [0] * a.replicas
        self.resumed_at = self.saved_at = 0
        self.local: dict[int, Any] = {}
        self.hands: dict[int, ReplicaHands] = {}
        self.states = [problem.shard.init(p) for p in problem.split(problem.params)]
        self.description: dict[str, Any] = {}
        if where is not None:
            self.description = describe_run(a, problem, "threads")
            if saved := checkpoint.latest(where):
                check_same(saved.note, self.description, where)
                self._restore(saved)
        # The shards' from here on, who write over them: nobody keeps a copy.
        self.problem = problem = dataclasses.replace(problem, params=None)
        # Tickets that a failed replica took with it are given out again.
        computed = self._computed()
        first = max(computed, default=-1) + 1
        self.crew = Crew(
            make_program(a, first, again=sorted(set(range(first)) - computed)),
            self._make_hands,
            problem.shard,
            self.states,
            problem.layout.nbytes,
            runtime,
            digest,
            self.recorder,
            self.batches,
            self.ids,
        )

    def run(self) -> Run:
        """Run to the end, or to the first error.

        Returns:
          The run.

        Raises:
          ReplicaError: a replica's thread failed; names replica and step.
          RejectedTooOften: training has come apart.
        """
        crew, a = self.crew, self.a
        marks = {}
        if a.eval_fn is not None and a.eval_every:
            marks["eval"] = a.eval_every
        if a.checkpoint_dir is not None and a.checkpoint_every:
            marks["checkpoint"] = a.checkpoint_every
        left, failed = 0, None
        try:
            with crew.running(marks):
                while left < a.replicas:
                    name, what = crew.next_event()
                    if name == "left":
                        left += 1
                    elif name == "error":
                        failed = failed or what
                    elif name == "eval":
                        self._evaluate(what)
                    elif name == "checkpoint" and what > self.saved_at:
                        with crew.quiet():
                            self._save()
            if failed is None and a.eval_fn is not None:
                self._evaluate(crew.snapshot(self._finished))
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
        self._save()
        trace = self._trace()
        parts = tuple(shard.state.params for shard in crew.shards)
        params = self.problem.last(parts)
        states = tuple(shard.state.optimizer_state for shard in crew.shards)
        versions = max(shard.most_versions for shard in crew.shards)
        peak = versions + 2 * a.replicas * (1 + (a.shards > 1))
        info = make_info(trace, "live", peak, self.resumed_at)
        return Run(params, states, trace, info)

    def _make_hands(self, replica: int) -> ReplicaHands:
        hands = self.hands[replica] = ReplicaHands(self.problem, replica)
        hands.local_state = self.local.get(replica)
        return hands

    def _computed(self) -> set[int]:
        """The steps whose minibatches are done."""
        kind, step = COLUMNS.index("kind"), COLUMNS.index("step")
        return {row[step] for row in self.recorder.rows if row[kind] == COMPUTE}

    @property
    def _finished(self) -> int:
        return self.crew.program.tickets.finished

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

    def _trace(self) -> Trace:
        """The rows that were recorded, with the digests in their places."""
        recorder = self.recorder
        header = {**self.a.describe(), "runtime": "Threads"}
        header |= describe_machine(self.problem)
        trace = Trace.from_columns(header, self.evaluations, **recorder.columns())
        digests = np.zeros(len(trace), np.uint64)
        last = [
            (shard.index, shard.state.version, digest(shard.state.params))
            for shard in self.crew.shards
        ]
        pushes = np.flatnonzero(trace.kind == PUSH)
        named = zip(trace.shard[pushes], trace.version[pushes], pushes, strict=True)
        row_of = {(int(shard), int(version)): row for shard, version, row in named}
        for shard, version, value in [*recorder.digests, *last]:
            if (shard, version) in row_of:
                digests[row_of[shard, version]] = value
        return dataclasses.replace(trace, digest=digests)

    def _save(self) -> None:
        """Save if there is something new; nothing must be in flight."""
        a = self.a
        computed = len(self._computed())
        if a.checkpoint_dir is None or computed <= self.saved_at:
            return
        leaves: dict[str, np.ndarray] = {}
        for s, shard in enumerate(self.crew.shards):
            whole = (shard.state.params, shard.state.optimizer_state)
            for i, leaf in enumerate(jax.tree.leaves(whole)):
                leaves[f"shard{s}/{i}"] = np.asarray(leaf)
        for replica, hands in self.hands.items():
            for i, leaf in enumerate(jax.tree.leaves(hands.local_state)):
                leaves[f"local{replica}/{i}"] = np.asarray(leaf)
        local = [r for r, one in self.hands.items() if one.local_state is not None]
        rows = Trace.from_columns(a.describe(), **self.recorder.columns())
        leaves |= {f"trace/{name}": column for name, column in rows.columns().items()}
        note = {
            **self.description,
            "versions": [shard.state.version for shard in self.crew.shards],
            "batches": self.batches,
            "ids": self.ids,
            "evaluations": self.evaluations,
            "digests": self.recorder.digests,
            "time": self.recorder.now(),
            "local": local,
            "streams": stream_state(self.problem, self.batches),
        }
        checkpoint.save(a.checkpoint_dir, computed, leaves, note)
        self.saved_at = computed

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
            template = (state.params, state.optimizer_state)
            params, optimizer_state = unpack(f"shard{s}", template)
            version = int(note["versions"][s])
            self.states[s] = ShardState(params, optimizer_state, version)
        self.batches[:], self.ids[:] = note["batches"], note["ids"]
        restore_streams(problem, note["streams"])
        self.evaluations = note["evaluations"]
        self.recorder = Recorder(float(note["time"]))
        self.recorder.digests = [tuple(one) for one in note["digests"]]
        columns = [saved.leaves[f"trace/{name}"].tolist() for name in COLUMNS]
        self.recorder.rows = list(zip(*columns, strict=True))
        self.resumed_at = self.saved_at = len(self._computed())
