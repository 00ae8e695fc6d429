"""One run: carries out the coordinator's requests, records, saves and resumes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from dbjax import mesh as mesh_lib
from dbjax.optim.status import Status
from dbjax.runtime.emulated import Emulated
from dbjax.runtime.lanes import cores
from dbjax.runtime.threads import Threads
from dbjax.sandblaster import saving, vectors
from dbjax.sandblaster.arguments import Arguments
from dbjax.sandblaster.coordinator import Coordinator, CoordinatorState, Request
from dbjax.sandblaster.emulated import EmulatedReplicas
from dbjax.sandblaster.live import LiveReplicas
from dbjax.sandblaster.messages import Dots, Evaluate, Evaluated, Reached
from dbjax.sandblaster.portions import PortionsInfo
from dbjax.sandblaster.problem import PortionData, Problem, make_problem
from dbjax.sandblaster.remote import Processes
from dbjax.sandblaster.run import Run, RunInfo
from dbjax.sandblaster.threaded import ThreadCrew
from dbjax.server.layout import Layout
from dbjax.server.placement import Placement
from dbjax.trace import Trace
from dbjax.typing import LossFn, Params


class Replicas(Protocol):
    """Whoever evaluates portions, by a clock of its own."""

    def at_work(self) -> AbstractContextManager[None]:
        """Be there, and gone on leaving."""
        ...

    def now(self) -> float:
        """Give the seconds since the run began."""
        ...

    def asked(self) -> None:
        """The coordinator has asked every shard for scalars."""
        ...

    def evaluate(self, request: Evaluate) -> Evaluated:
        """Evaluate portions."""
        ...

    def columns(self) -> dict[str, Any]:
        """Give the Trace's columns."""
        ...

    def info(self) -> PortionsInfo:
        """Give what was done beyond computing each portion once."""
        ...

    def seconds_per_iteration(self, iterations: int) -> dict[str, float]:
        """Give what this and other strategies take, where that can be known."""
        ...

    def save(self) -> dict[str, Any]:
        """Give what `restore` needs, JSON-able; nothing is in flight."""
        ...

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        ...


class Running:
    """A run from its arguments to its result.

    Args:
      loss_fn: see `minimize`, as are all that follow.
      params: where to begin.
      data: the portions.
      arguments: checked.
      rng: whether the loss takes a key.
      has_aux: whether it returns more than a value.
      processes: starts replicas and shards, where they are processes.

    Raises:
      TypeError, ValueError: what is wrong with the parameters, the loss or the data.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        params: Params,
        data: PortionData,
        arguments: Arguments,
        *,
        rng: bool = False,
        has_aux: bool = False,
        processes: Processes | None = None,
    ) -> None:
        a = self.a = arguments
        placement = None
        if a.partitioned and a.mesh is not None:
            placement = Placement.of(params, a.shards, a.mesh, a.rules, a.split)
            layout = placement.layout
        else:
            layout = Layout.of(params, a.shards, a.split)
        self.layout = layout
        # Our own copy, of its own dtype: NumPy memory may change under us.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), params)
        options = {"rng": rng, "has_aux": has_aux, "seed": a.seed}
        mesh = a.mesh if placement is None else None
        if mesh is not None:
            params = mesh_lib.shard_params(params, mesh, a.rules)
        self.problem = make_problem(
            *(loss_fn, params, data),
            **{"mesh": mesh, "rules": a.rules, "placement": placement, **options},
        )
        portions = len(self.problem.examples)
        a.batches.check(portions)
        self.coordinator = Coordinator(
            a.method,
            a.batches,
            portions,
            iterations=a.iterations,
            tolerance=a.tolerance,
            value_rtol=max(float(jnp.finfo(d).eps) for d in layout.dtypes) ** 0.75,
        )
        constants = a.method.constants(params)
        if processes is not None:
            crew = processes.crew(a.replicas, loss_fn, self.problem, options, layout)
            self.vectors = processes.host_vectors(layout)
            self.replicas = LiveReplicas(self.problem, self.vectors, a, crew)
        else:
            self.vectors = _vectors_here(layout, placement, mesh, params)
            self.replicas = _replicas_here(a, self.problem, self.vectors, layout)
        for name, vector in (constants | {"x": params}).items():
            self.vectors.put(name, vector)
        self.rows: list[dict[str, Any]] = []  # of the Trace, one an iteration
        self.resumed_at = 0

    def to_the_end(self) -> Run:
        """Run, or go on from a checkpoint, until the coordinator has ended.

        Returns:
          The run.
        """
        state, requests = self._restore() or self.coordinator.begin()
        with self.replicas.at_work():
            while True:
                reply: Any = None
                for done, request in enumerate(requests, 1):
                    if isinstance(request, Reached):
                        self._reached(state, requests[done:])
                    else:
                        reply = self._carry_out(request)
                if state.status != Status.RUNNING:
                    break
                state, requests = self.coordinator.advance(state, reply)
        return self._home(state)

    def _carry_out(self, request: Any) -> Any:
        if isinstance(request, Evaluate):
            return self.replicas.evaluate(request)
        if isinstance(request, Dots):
            self.replicas.asked()
            return self.vectors.dots(request.pairs)
        return self.vectors.tell(request)

    def _reached(self, state: CoordinatorState, rest: Sequence[Request]) -> None:
        """Record an iteration; evaluate and save when it is time."""
        a, iteration = self.a, state.iterations
        self.rows.append(
            {
                "step": iteration,
                "time": self.replicas.now(),
                "value": state.batch,
                "gradient_norm": state.size**0.5,
                "step_size": state.step,
                "evaluations": state.evaluations,
                "portions": state.portions,
            }
        )
        if iteration % a.eval_every == 0:
            self._evaluate()
        due = iteration and iteration % a.checkpoint_every == 0
        if a.checkpoint_dir is not None and due and iteration > self.resumed_at:
            saving.save(self, state, rest)

    def _evaluate(self) -> None:
        """Let the user's function see the newest parameters."""
        row = self.rows[-1]
        if self.a.eval_fn is not None:
            params = self._whole()
            scalars = self.a.eval_fn(params, row["step"], row["time"])
            row |= {name: float(value) for name, value in scalars.items()}

    def _whole(self) -> Params:
        """The newest parameters, for a user's functions.

        On CPU they are on one device: programs on several, of which a user might launch
        many without waiting, could hang there.
        """
        params, places = self.vectors.get("x"), self.problem.places
        if not places or places[0].devices.flat[0].platform != "cpu":
            return params
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, places[0].devices.flat[0]), params
        )

    def _restore(self) -> tuple[CoordinatorState, Sequence[Request]] | None:
        return None if self.a.checkpoint_dir is None else saving.restore(self)

    def _home(self, state: CoordinatorState) -> Run:
        """Put the result together."""
        if self.rows and self.rows[-1]["step"] % self.a.eval_every:
            self._evaluate()
        replicas, method = self.replicas, state.method
        placement = self.problem.placement
        header = {
            **self.a.describe(),
            "portions": len(self.problem.examples),
            "runtime": type(self.a.runtime).__name__,
            "status": str(state.status),
            **_describe_machine(self.layout),
            **(placement.describe() if placement else {}),
        }
        trace = Trace.from_columns(header, self.rows, **replicas.columns())
        counts = ("skipped", "damped", "restarts")
        info = RunInfo(
            gradient_norm=state.size**0.5,
            portions_evaluated=state.portions,
            examples=sum(self.problem.examples),
            portions=replicas.info(),
            method={n: int(getattr(method, n)) for n in counts if hasattr(method, n)},
            seconds_per_iteration=replicas.seconds_per_iteration(state.iterations),
            resumed_at=self.resumed_at,
        )
        return Run(
            params=self._whole() if placement else self.vectors.get("x"),
            value=state.batch,
            status=state.status,
            iterations=state.iterations,
            evaluations=state.evaluations,
            trace=trace,
            info=info,
            method_state=method,
        )


def _vectors_here(
    layout: Layout, placement: Placement | None, mesh: Any, params: Params
) -> vectors.Vectors:
    if placement is not None:
        return vectors.on_partitions(placement)
    return vectors.on_shards(layout) if mesh is None else vectors.on_mesh(params)


def _replicas_here(
    a: Arguments, problem: Problem, there: vectors.Vectors, layout: Layout
) -> Replicas:
    if isinstance(a.runtime, Emulated):
        return EmulatedReplicas(problem, there, a, a.runtime, sum(layout.nbytes))
    assert isinstance(a.runtime, Threads)
    crew = ThreadCrew(problem, there, a.replicas, a.runtime, layout.nbytes)
    return LiveReplicas(problem, there, a, crew)


def _describe_machine(layout: Layout) -> dict[str, Any]:
    """What the Trace's header says of the problem and the machine."""
    names = zip(layout.names, layout.shapes, layout.dtypes, strict=True)
    return {
        "shapes": {n: [list(shape), str(dtype)] for n, shape, dtype in names},
        "shard_sizes": list(layout.sizes),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "threads": cores(),
    }
