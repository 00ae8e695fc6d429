"""A live run on threads: drives the crew, evaluates, saves, brings home the Trace."""

from typing import Any

import jax
import numpy as np

from dbjax import checkpoint
from dbjax.downpour.arguments import Arguments
from dbjax.downpour.hands import ReplicaHands
from dbjax.downpour.problem import Problem, digest
from dbjax.downpour.program import make_program
from dbjax.downpour.provenance import check_same, describe_machine, describe_problem
from dbjax.downpour.run import Run, make_info
from dbjax.runtime.base import RejectedTooOften
from dbjax.runtime.live_shard import Snapshot
from dbjax.runtime.recorder import COLUMNS, Recorder
from dbjax.runtime.threads import Crew, ReplicaError, Threads
from dbjax.server.shard import ShardState
from dbjax.trace import COMPUTE, PUSH, SCHEMA, Trace


class Live:
    """A run on threads: drives the crew, evaluates, saves, brings home the Trace."""

    def __init__(
        self, problem: Problem, arguments: Arguments, runtime: Threads
    ) -> None:
        self.problem, self.a, self.runtime = problem, arguments, runtime
        a = arguments
        self.recorder = Recorder()
        self.evaluations: list[dict[str, Any]] = []
        self.batches, self.ids = [0] * a.replicas, [0] * a.replicas
        self.resumed_at = 0
        self.local: dict[int, Any] = {}
        self.hands: dict[int, ReplicaHands] = {}
        parts = problem.split(jax.tree.map(jax.numpy.copy, problem.params))
        self.states = [problem.shard.init(part) for part in parts]
        if a.checkpoint_dir is not None and (
            saved := checkpoint.latest(a.checkpoint_dir)
        ):
            check_same(saved.note, a, problem, "threads", "")
            self._restore(saved)
        # Tickets that a failed replica took with it are given out again.
        computed = self._computed()
        first = max(computed, default=-1) + 1
        program = make_program(
            a.replicas, a.shards, a.steps, a.n_fetch, a.n_push, a.overlap,
            a.warmstart_steps, a.protocol, first, sorted(set(range(first)) - computed),
        )  # fmt: skip
        self.crew = Crew(
            program, self._make_hands, problem.shard, self.states,
            problem.layout.nbytes, runtime, digest, self.recorder, self.batches,
            self.ids,
        )  # fmt: skip

    def run(self) -> Run:
        """Run to the end, or to the first error."""
        crew, a = self.crew, self.a
        marks = {
            "eval": (a.eval_every or 0) if a.eval_fn is not None else 0,
            "checkpoint": (a.checkpoint_every or 0)
            if a.checkpoint_dir is not None
            else 0,
        }
        left, failed = 0, None
        try:
            with crew.running(marks):
                while left < a.replicas:
                    name, what = crew.events.get()
                    if name == "left":
                        left += 1
                    elif name == "error":
                        failed = failed or what
                    elif name == "eval":
                        self._evaluate(what)
                    elif name == "checkpoint":
                        what.release()
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
        params = self.problem.merge(tuple(shard.state.params for shard in crew.shards))
        states = tuple(shard.state.optimizer_state for shard in crew.shards)
        versions = max(shard.most_versions for shard in crew.shards)
        peak = versions + 2 * a.replicas * (1 + (a.shards > 1))
        return Run(
            params, states, trace, make_info(trace, "live", peak, self.resumed_at)
        )

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
            parts = tuple(state.params for state in snapshot.states)
            params = self.problem.merge(parts)
            if len(parts) == 1:
                params = jax.tree.map(jax.numpy.copy, params)
            scalars = self.a.eval_fn(params, snapshot.step, snapshot.time)
            self.evaluations.append(
                {"step": snapshot.step, "time": snapshot.time}
                | {name: float(value) for name, value in scalars.items()}
            )
        snapshot.release()

    def _trace(self) -> Trace:
        a, recorder = self.a, self.recorder
        columns = recorder.columns()
        header = {
            "schema": SCHEMA, "replicas": a.replicas, "shards": a.shards,
            "steps": a.steps, "n_fetch": a.n_fetch, "n_push": a.n_push,
            "overlap": a.overlap, "warmstart_steps": a.warmstart_steps,
            "protocol": a.protocol.name, "runtime": "Threads",
        } | describe_machine(self.problem)  # fmt: skip
        trace = Trace.from_columns(header, tuple(self.evaluations), **columns)
        digests = np.zeros(len(trace), np.uint64)
        last = [
            (shard.index, shard.state.version, digest(shard.state.params))
            for shard in self.crew.shards
        ]
        pushes = np.flatnonzero(trace.kind == PUSH)
        names = zip(
            trace.shard[pushes].tolist(), trace.version[pushes].tolist(), strict=True
        )
        row_of = dict(zip(names, pushes.tolist(), strict=True))
        for shard, version, value in [*recorder.digests, *last]:
            if (shard, version) in row_of:
                digests[row_of[shard, version]] = value
        return Trace.from_columns(
            header, tuple(self.evaluations), **trace.columns() | {"digest": digests}
        )

    def _save(self) -> None:
        """Save; nothing is in flight."""
        a = self.a
        computed = len(self._computed())
        if a.checkpoint_dir is None or computed <= self.resumed_at:
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
        header = {"schema": SCHEMA, "replicas": a.replicas, "shards": a.shards}
        columns = Trace.from_columns(header, **self.recorder.columns())
        for name, column in columns.columns().items():
            leaves[f"trace/{name}"] = column
        note = {
            "kind": "threads", "arguments": a.describe(), "fingerprint": "",
            "versions": [shard.state.version for shard in self.crew.shards],
            "batches": self.batches, "ids": self.ids, "evaluations": self.evaluations,
            "digests": self.recorder.digests, "time": self.recorder.now(),
            "local": local, "problem": describe_problem(self.problem),
        }  # fmt: skip
        checkpoint.save(a.checkpoint_dir, computed, leaves, note)

    def _restore(self, saved: checkpoint.Saved) -> None:
        note, problem = saved.note, self.problem

        def unpack(name: str, template: Any) -> Any:
            leaves, treedef = jax.tree.flatten(template)
            places = range(len(leaves))
            return treedef.unflatten(
                [jax.numpy.array(saved.leaves[f"{name}/{i}"]) for i in places]
            )

        if problem.local_optimizer is not None:
            template = problem.local_optimizer.init(problem.params)
            self.local = {r: unpack(f"local{r}", template) for r in note["local"]}
        for s, state in enumerate(self.states):
            template = (state.params, state.optimizer_state)
            params, optimizer_state = unpack(f"shard{s}", template)
            version = int(note["versions"][s])
            self.states[s] = ShardState(params, optimizer_state, version)
        self.batches[:], self.ids[:] = note["batches"], note["ids"]
        self.evaluations = note["evaluations"]
        self.recorder = Recorder(float(note["time"]))
        self.recorder.digests = [tuple(one) for one in note["digests"]]
        columns = [saved.leaves[f"trace/{name}"].tolist() for name in COLUMNS]
        self.recorder.rows = list(zip(*columns, strict=True))
        self.resumed_at = len(self._computed())
