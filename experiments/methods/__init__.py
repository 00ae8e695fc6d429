"""The methods by name; one more is one small file with `plan` and `run`, named here."""

from collections.abc import Mapping

from experiments.methods import downpour, sandblaster, sgd
from experiments.methods.base import Method, Plan, Session

METHODS: Mapping[str, Method] = {
    "sgd": Method(sgd.plan, sgd.run),
    "downpour": Method(downpour.plan, downpour.run),
    **sandblaster.methods(),
}

__all__ = ["METHODS", "Method", "Plan", "Session"]
