"""Choosing things by name, with an error that helps when the name is wrong."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A config, or a workdir, that cannot be run; the message says what to change."""


def nearest(name: str, allowed: list[str]) -> str:
    """Give the entry of `allowed` that looks most like `name`."""
    return difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)[0]


def choose(argument: str, name: str, entries: Mapping[str, T]) -> T:
    """Look up `name` in `entries`.

    Args:
      argument: the config key that holds the name; the error repeats it.
      name: what the config asks for.
      entries: what there is.

    Returns:
      `entries[name]`.

    Raises:
      ConfigError: if there is no such entry.
    """
    if name in entries:
        return entries[name]
    raise ConfigError(
        f"{argument} is {name!r}, which does not exist; did you mean "
        f"{nearest(str(name), list(entries))!r}? There are: {', '.join(entries)}."
    )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested keys as one each: `{"downpour.replicas": 20}`."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
