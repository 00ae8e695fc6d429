"""Whether a rule can be judged at all: it is tried on a small tree, and on a tiny run.

Two copies of it, imported anew, are asked the same twice, eagerly and traced. A rule
is a function: from equal arguments it gives equal bits, in the shapes and dtypes that
it was given, and finite ones from finite gradients.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dbjax.typing import Params
from experiments import battery_clusters, battery_runs, battery_workloads
from experiments.battery_rules import BadRule, Rule, Setting, said, settings

_STEPS, _REPLICAS = 40, 4
_KEPT_TRACER = (
    "an array of one trace was kept for another; what a rule remembers belongs into "
    "its state"
)


class Question(NamedTuple):
    """What an update is given."""

    params: Params
    gradients: tuple[Params, ...]
    extras: dict[str, Any]


def examine(fresh: Callable[[], Rule]) -> Rule:
    """Try a rule.

    Args:
      fresh: gives the rule, imported anew.

    Returns:
      The rule.

    Raises:
      BadRule: what it does that a rule must not.
    """
    first, second = fresh(), fresh()
    (setting,), _ = settings({k: v[:1] for k, v in first.search.items()}, 1)
    question = _question(first)
    try:
        answers = [_answer(rule, setting, question) for rule in (first, second)]
        again = [_answer(rule, setting, question) for rule in (first, second)]
        _check_kept(first, setting, question)
        _compare(answers, again, "called twice with equal arguments")
        traced = [_trace(rule, setting, question) for rule in (first, second)]
        traced_again = [_trace(rule, setting, question) for rule in (first, second)]
        _compare(traced, traced_again, "traced twice with equal arguments")
        ends = [_tiny_run(rule, setting) for rule in (first, second)]
    except BadRule:
        raise
    except jax.errors.UnexpectedTracerError as error:
        raise BadRule("hidden state", _KEPT_TRACER) from error
    except Exception as error:
        raise BadRule("raises", said(error)) from error
    if ends[0] != ends[1]:
        raise BadRule(
            "not deterministic", "a run and its repetition end with different bits"
        )
    return first


def _question(rule: Rule) -> Question:
    chance = np.random.default_rng(0)

    def draw() -> Params:
        shapes = {"matrix": (3, 4), "scalar": (), "vector": (5,)}
        return {
            name: jnp.asarray(chance.standard_normal(shape), jnp.float32)
            for name, shape in shapes.items()
        }

    gradients = draw(), draw()
    rest = jax.tree.map(jnp.zeros_like, gradients[0])  # a parameter nobody used
    extras = {"staleness": jnp.int32(3), "stale_params": draw()}
    return Question(
        draw(), (*gradients, rest), {name: extras[name] for name in rule.provide}
    )


def _make(rule: Rule, setting: Setting) -> optax.GradientTransformationExtraArgs:
    made = rule.optimizer_fn(**setting)
    if not (callable(getattr(made, "init", None)) and hasattr(made, "update")):
        raise BadRule(
            "no rule",
            f"rule(...) must give an optax.GradientTransformation, got {made!r}",
        )
    return optax.with_extra_args_support(made)


def _answer(rule: Rule, setting: Setting, question: Question) -> bytes:
    """A few updates, and each of them once more: bits."""
    optimizer, params = _make(rule, setting), question.params
    state, seen = optimizer.init(params), []
    for gradients in question.gradients:
        once, _ = optimizer.update(gradients, state, params, **question.extras)
        updates, state = optimizer.update(gradients, state, params, **question.extras)
        _check_shapes("updates", params, updates)
        _check_finite(updates)
        seen += [_bits(once), _bits(updates), _bits(state)]
        if seen[-3] != seen[-2]:
            # Whether it is chance or memory, the copies will say.
            seen.append(b"differs")
        params = optax.apply_updates(params, updates)
    return b"".join(seen)


def _compare(first: list[bytes], again: list[bytes], how: str) -> None:
    if first[0] != first[1]:
        raise BadRule(
            "not deterministic", f"two fresh copies, {how}, give different bits"
        )
    if first != again or b"differs" in first[0]:
        raise BadRule(
            "hidden state",
            f"{how}, it gives different results; what a rule remembers belongs into "
            "its state",
        )


def _check_kept(rule: Rule, setting: Setting, question: Question) -> None:
    """Raise unless the state keeps its structure, shapes and dtypes."""
    optimizer = _make(rule, setting)

    def both() -> Any:
        state = optimizer.init(question.params)
        _, new = optimizer.update(
            question.gradients[0], state, question.params, **question.extras
        )
        return state, new

    _check_shapes("state", *jax.eval_shape(both))


def _check_shapes(what: str, expected: Any, got: Any) -> None:
    structures = jax.tree.structure(expected), jax.tree.structure(got)
    if structures[0] != structures[1]:
        raise BadRule(
            f"changes {what}",
            f"the {what} must keep the structure {structures[0]}, got {structures[1]}",
        )
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, old), new in zip(leaves, jax.tree.leaves(got), strict=True):
        kinds = [(np.shape(x), jnp.result_type(x).name) for x in (old, new)]
        if kinds[0] != kinds[1]:
            (shape, dtype), (new_shape, new_dtype) = kinds
            raise BadRule(
                "changes shapes or dtypes",
                f"{what}{jax.tree_util.keystr(path)} must be {dtype}{list(shape)}, "
                f"got {new_dtype}{list(new_shape)}",
            )


def _check_finite(updates: Params) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        if not bool(jnp.isfinite(leaf).all()):
            raise BadRule(
                "not finite",
                f"updates{jax.tree_util.keystr(path)} holds NaN or infinity, from "
                "finite gradients, some of them 0",
            )


def _bits(tree: Any) -> bytes:
    def plain(leaf: Any) -> np.ndarray:
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return b"|".join(plain(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def _trace(rule: Rule, setting: Setting, question: Question) -> bytes:
    """What an update is traced to, constants included."""

    def update(setting: Setting, state: Any, question: Question) -> Any:
        return _make(rule, setting).update(
            question.gradients[0], state, question.params, **question.extras
        )

    traced = {name: jnp.asarray(value) for name, value in setting.items()}
    state = _make(rule, setting).init(question.params)
    jaxpr = jax.make_jaxpr(update)(traced, state, question)
    if any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts):
        raise BadRule("hidden state", _KEPT_TRACER)
    text = re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))  # where functions lie
    return text.encode() + _bits(jaxpr.consts)


@functools.lru_cache
def _tiny() -> tuple[battery_workloads.Workload, battery_runs.Schedule]:
    workload = battery_workloads.logistic(training=256)
    machines = battery_clusters.clusters(_STEPS // _REPLICAS)["equal"]
    trace = battery_clusters.record(machines, _REPLICAS, _STEPS, seed=0)
    return workload, battery_runs.lay_out(workload, trace, 0, points=2)


def _tiny_run(rule: Rule, setting: Setting) -> tuple[str, bytes]:
    workload, schedule = _tiny()
    program = battery_runs.make_program(workload, rule, setting)
    curve, params = battery_runs.run_to_params(program, schedule, setting)
    return repr(curve), _bits(params)
