"""The rules of the battery: what a rule file holds, the baselines, and their settings.

A rule file is plain Python:

    import optax

    def rule(learning_rate, lam):           # any optax transformation
        return optax.chain(..., optax.sgd(learning_rate))

    provide = ("stale_params",)             # optional: what the update asks for
    search = {"lam": [0.04, 0.4]}           # optional: further hyperparameters
    def shown(state, params, lam): ...      # optional: the parameters to judge it by

`rule` is called with traced numbers, as by `dbjax.sweep`: all settings are one program.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import optax

import dbjax
from dbjax.optim import adagrad, delay_aware
from dbjax.server.shard import check_provide

Setting: TypeAlias = dict[str, Any]

RATES = (3e-4, 3.0)  # the ends of everybody's grid of learning rates
FEWEST_RATES = 6  # whatever else a rule searches over


class BadRule(Exception):
    """A rule that cannot be judged.

    Args:
      kind: in a few words.
      message: what it did.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule.

    Attributes:
      name: on the page.
      optimizer_fn: `optimizer_fn(learning_rate=..., **others)`.
      search: hyperparameters beside the learning rate, and the values to try.
      provide: what its update asks for.
      source: text that changes when the rule does.
      shown: `shown(state, params, **others)` gives the parameters to judge it by; by
        default they are those that replicas see.
    """

    name: str
    optimizer_fn: Callable[..., optax.GradientTransformation]
    search: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    provide: tuple[str, ...] = ()
    source: str = ""
    shown: Callable[..., Any] | None = None


def load(file: pathlib.Path) -> Rule:
    """Import a rule file anew, whatever was imported before.

    Args:
      file: plain Python.

    Returns:
      The rule, named as the file.

    Raises:
      BadRule: there is no such file, it does not run, or is not a rule.
    """
    try:
        source = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRule("no rule", f"{file} cannot be read: {error}") from error
    # A name of its own: dataclasses and pickle look modules up.
    name = f"battery_rule_{sum(n.startswith('battery_rule_') for n in sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise BadRule("no rule", f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadRule("raises", f"importing {file.name}: {said(error)}") from error
    made = getattr(module, "rule", None)
    if not callable(made):
        raise BadRule(
            "no rule",
            f"{file.name} has no function rule(learning_rate, ...)"
            + ("" if made is None else f": rule is {made!r}"),
        )
    search, provide = getattr(module, "search", {}), getattr(module, "provide", ())
    _check_search(search)
    _check_call(made, search)
    try:
        check_provide(provide)
    except ValueError as error:
        raise BadRule("wrong provide", str(error)) from error
    shown = getattr(module, "shown", None)
    return Rule(file.stem, made, dict(search), tuple(provide), source, shown)


def said(error: BaseException) -> str:
    """Say an error in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else repr(error)


def _check_search(search: Any) -> None:
    if not isinstance(search, Mapping):
        raise BadRule(
            "wrong search", f"search must be a dict of name to values, got {search!r}"
        )
    for name, values in search.items():
        if name == "learning_rate":
            raise BadRule(
                "wrong search", "the grid of learning rates is the battery's own"
            )
        numbers = isinstance(values, Sequence) and len(values)
        if not numbers or not all(
            isinstance(x, int | float) and math.isfinite(x) for x in values
        ):
            raise BadRule(
                "wrong search",
                f"search[{name!r}] must hold one or more finite numbers, "
                f"got {values!r}",
            )


def _check_call(made: Callable[..., Any], search: Mapping[str, Any]) -> None:
    try:
        inspect.signature(made).bind(learning_rate=0.1, **dict.fromkeys(search, 0))
    except TypeError as error:
        names = ", ".join(["learning_rate", *search])
        raise BadRule(
            "no rule", f"rule cannot be called with {names}: {error}"
        ) from error


def settings(
    search: Mapping[str, Sequence[Any]], budget: int, seed: int = 0
) -> tuple[list[Setting], str]:
    """Give as many settings for every rule.

    The learning rates are evenly spaced on a logarithmic scale, the finer the fewer
    other values there are; a grid that is still too large is sampled.

    Args:
      search: other hyperparameters and their values.
      budget: how many settings.
      seed: of the sampling.

    Returns:
      The settings, and what there is to say of them.

    >>> found, note = settings({"lam": [0.0, 1.0]}, 6)
    >>> len(found), note
    (6, '6 of the 12 settings of its grid, sampled')
    """
    if budget < 1:
        raise ValueError(f"budget={budget}: allowed are numbers from 1")
    others = list(itertools.product(*search.values()))
    fewest = min(FEWEST_RATES, budget)
    count = max(fewest, -(-budget // len(others)))
    rates = [float(f"{x:.3g}") for x in np.geomspace(*RATES, count + 2 * (count == 1))]
    rates = rates[1:2] if count == 1 else rates
    grid = [
        {"learning_rate": rate} | dict(zip(search, other, strict=True))
        for rate in rates
        for other in others
    ]
    if len(grid) == budget:
        return grid, f"{count} learning rates"
    # Evenly over the rates, which matter most: each is tried about as often.
    chance = np.random.default_rng(seed)
    place = np.arange(len(grid)) // len(others)
    turn = np.concatenate([chance.permutation(len(others)) for _ in rates])
    order = np.lexsort((chance.permutation(len(rates))[place], turn))
    kept = np.sort(order[:budget])
    note = f"{budget} of the {len(grid)} settings of its grid, sampled"
    return [grid[i] for i in kept], note


def _momentum(learning_rate: Any, momentum: Any) -> Any:
    return optax.sgd(learning_rate, momentum)


def _staleness_aware(learning_rate: Any) -> Any:
    return optax.chain(delay_aware.scale_by_staleness(), optax.sgd(learning_rate))


def _delay_compensated(learning_rate: Any, lam: Any) -> Any:
    return optax.chain(
        delay_aware.compensate_delay(lam, decay=0.95), optax.sgd(learning_rate)
    )


def _gap_aware(learning_rate: Any) -> Any:
    return optax.chain(
        delay_aware.scale_by_gap(learning_rate), optax.sgd(learning_rate)
    )


def _adadelay(learning_rate: Any, c: Any) -> Any:
    return delay_aware.adadelay(1 / learning_rate, c)


def _predicted(learning_rate: Any, delay: Any) -> Any:
    return delay_aware.predict_params(optax.sgd(learning_rate, 0.9), delay)


def _predicted_from(state: Any, params: Any, delay: Any) -> Any:
    return delay_aware.without_prediction(state, params, delay)


_SOURCE = "".join(
    pathlib.Path(str(module.__file__)).read_text()
    for module in (sys.modules[__name__], delay_aware, sys.modules[adagrad.__module__])
)

BASELINES = (
    Rule("sgd", optax.sgd, source=_SOURCE),
    Rule("momentum", _momentum, {"momentum": [0.5, 0.9]}, source=_SOURCE),
    Rule(
        "adagrad",
        lambda learning_rate: dbjax.adagrad(learning_rate),
        source=_SOURCE,
    ),
    Rule(
        "staleness-aware", _staleness_aware, provide=("staleness",), source=_SOURCE
    ),
    Rule(
        "delay-compensated", _delay_compensated, {"lam": [0.2, 2.0]},
        ("stale_params",), _SOURCE,
    ),
    Rule("gap-aware", _gap_aware, provide=("stale_params",), source=_SOURCE),
    Rule("adadelay", _adadelay, {"c": [0.1, 1.0]}, ("staleness",), _SOURCE),
    Rule(
        "predicted", _predicted, {"delay": [4.0, 16.0]}, source=_SOURCE,
        shown=_predicted_from,
    ),
)  # fmt: skip
