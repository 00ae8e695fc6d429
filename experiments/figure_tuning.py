"""A search for hyperparameters with as many trials for everyone, on a grid.

From a start it goes to the best neighbour as long as there is one, one trial after
another; then it looks around the next best. What was tried is kept, and an optimum that
was not bracketed is flagged: the best may lie beyond.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Setting: TypeAlias = Mapping[str, Any]
Place: TypeAlias = tuple[int, ...]
Score: TypeAlias = tuple[float, ...]
"""What is compared, in order; less is better."""


class Trial(NamedTuple):
    """A setting that was tried, and what came of it."""

    setting: dict[str, Any]
    score: Score


class Tuned(NamedTuple):
    """What a search found.

    Attributes:
      best: setting.
      trials: all that were tried, in order.
      edges: of the best: "rate at the end of its grid", "rate not bracketed"; none if
        it is good.
    """

    best: dict[str, Any]
    trials: list[Trial]
    edges: list[str]


def search(
    score: Callable[[Setting, Score | None], Score],
    axes: Mapping[str, Sequence[Any]],
    start: Setting,
    trials: int,
    limits: Sequence[str] = (),
) -> Tuned:
    """Search a grid.

    Args:
      score: `score(setting, best)`, where `best` is the best score so far: a trial may
        end as soon as it is worse.
      axes: name to values, in order. Along the first the search goes first.
      start: a setting on the grid.
      trials: how many settings to try, or all if there are fewer.
      limits: names of axes whose first value is as low as can be: no flag for it.

    Returns:
      What was found.

    Raises:
      ValueError: the start is not on the grid, or no trials are allowed.

    >>> found = search(lambda s, _: (abs(s["x"] - 3),), {"x": range(9)}, {"x": 1}, 5)
    >>> found.best, [trial.setting["x"] for trial in found.trials], found.edges
    ({'x': 3}, [1, 2, 3, 4, 5], [])
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    seen: dict[Place, Score] = {}
    place = tuple(_index(name, values, start) for name, values in axes.items())

    def setting_at(place: Place) -> dict[str, Any]:
        return {name: axes[name][i] for name, i in zip(axes, place, strict=True)}

    todo: Place | None = place
    while todo is not None and len(seen) < trials:
        seen[todo] = score(setting_at(todo), min(seen.values(), default=None))
        todo = _next(seen, axes)
    best = min(seen, key=lambda place: seen[place])
    made = [Trial(setting_at(place), value) for place, value in seen.items()]
    return Tuned(setting_at(best), made, _edges(best, seen, axes, limits))


def _index(name: str, values: Sequence[Any], start: Setting) -> int:
    try:
        return list(values).index(start[name])
    except ValueError:
        raise ValueError(
            f"the search starts with {name}={start[name]!r}, which is none of "
            f"{list(values)}"
        ) from None


def _next(seen: Mapping[Place, Score], axes: Mapping[str, Sequence[Any]]) -> Any:
    """A neighbour of the best place that has one, not tried yet."""
    for place in sorted(seen, key=lambda place: seen[place]):
        for neighbour in _neighbours(place, axes):
            if neighbour not in seen:
                return neighbour
    return None


def _neighbours(place: Place, axes: Mapping[str, Sequence[Any]]) -> Iterator[Place]:
    for axis, values in enumerate(axes.values()):
        for index in (place[axis] + 1, place[axis] - 1):
            if 0 <= index < len(values):
                yield (*place[:axis], index, *place[axis + 1 :])


def _edges(
    best: Place,
    seen: Mapping[Place, Score],
    axes: Mapping[str, Sequence[Any]],
    limits: Sequence[str],
) -> list[str]:
    edges = []
    for axis, (name, values) in enumerate(axes.items()):
        beside = [best[axis] + 1]
        beside += [best[axis] - 1] if best[axis] or name not in limits else []
        if not all(0 <= index < len(values) for index in beside):
            edges.append(f"{name} at the end of its grid")
        elif any((*best[:axis], i, *best[axis + 1 :]) not in seen for i in beside):
            edges.append(f"{name} not bracketed")
    return edges
