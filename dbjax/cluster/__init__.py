"""The machines a run is emulated on: speeds, links, shard service and failures.

A `Cluster` says how long things take; it moves no message and knows no protocol. All
chance in it is drawn by key (seed, purpose, replica, step, shard), so clusters and
protocols compare pairwise and no draw depends on who asked first.

The machines that one replica is partitioned over have a model of their own in
`partitions`, and the work that layers make for them is in `layers`.
"""

from dbjax.cluster.distributions import (
    Constant,
    Distribution,
    Empirical,
    Exponential,
    Gamma,
    LogNormal,
    Pareto,
)
from dbjax.cluster.draws import Purpose, uniform
from dbjax.cluster.model import Cluster
from dbjax.cluster.troubles import Failures, Slow, Slowness

__all__ = [
    "Cluster",
    "Constant",
    "Distribution",
    "Empirical",
    "Exponential",
    "Failures",
    "Gamma",
    "LogNormal",
    "Pareto",
    "Purpose",
    "Slow",
    "Slowness",
    "uniform",
]
