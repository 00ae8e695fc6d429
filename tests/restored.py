"""Random Traces of runs whose shards and replicas die and come back."""

import dataclasses

import numpy as np

from dbjax.trace import (
    COMPUTE,
    DROPPED,
    FAIL,
    FETCH,
    JOIN,
    PUSH,
    RESTART,
    TAKEN,
    Trace,
)


@dataclasses.dataclass
class Replica:
    index: int
    batch: int = 0
    id: int = 0
    accrued: int = 0
    fresh: bool = False  # whether parameters were fetched for the next minibatch
    step: int = -1
    served: dict = dataclasses.field(default_factory=dict)  # not landed yet
    held: dict = dataclasses.field(default_factory=dict)  # shard -> (version, life)
    base: dict = dataclasses.field(default_factory=dict)
    unsent: list = dataclasses.field(default_factory=list)  # shards of the push
    sent: dict = dataclasses.field(default_factory=dict)  # shard -> (version, life)


class Run:
    def __init__(self, seed, shards, n_push, replicas):
        self.rng = np.random.default_rng(seed)
        self.shards, self.n_push = shards, n_push
        self.replicas = [Replica(index) for index in range(replicas)]
        self.version, self.life = [0] * shards, [0] * shards
        self.tickets, self.rows = 0, []
        for replica in self.replicas:
            self.row(JOIN, replica.index)

    def row(self, kind, replica, **columns):
        self.rows.append({"kind": kind, "replica": replica} | columns)

    def turn(self, replica):
        """One small thing that a replica does."""
        if replica.unsent:
            at = int(self.rng.integers(len(replica.unsent)))
            self.push(replica, replica.unsent.pop(at))
        elif replica.sent:  # all have answered
            replica.sent, replica.id = {}, replica.id + 1
        elif replica.fresh:
            self.compute(replica)
        elif len(replica.served) < self.shards:
            s = len(replica.served)
            replica.served[s] = self.version[s], self.life[s]
        else:
            for s, (version, life) in replica.served.items():
                self.row(
                    *(FETCH, replica.index), shard=s, version=version, incarnation=life
                )
            replica.held, replica.served, replica.fresh = replica.served, {}, True

    def compute(self, replica):
        if not replica.accrued:
            replica.base = replica.held
        replica.step, self.tickets = self.tickets, self.tickets + 1
        self.row(COMPUTE, replica.index, step=replica.step, batch=replica.batch)
        replica.batch, replica.accrued = replica.batch + 1, replica.accrued + 1
        replica.fresh = bool(self.rng.random() < 0.3)
        if replica.accrued == self.n_push:
            replica.unsent, replica.accrued = list(range(self.shards)), 0

    def push(self, replica, s, status=None):
        if status is None:
            status = DROPPED if self.rng.random() < 0.1 else TAKEN
        self.version[s] += 1
        replica.sent[s] = self.version[s], self.life[s]
        self.row(
            *(PUSH, replica.index), shard=s, step=replica.step, id=replica.id,
            version=self.version[s], base=replica.base[s][0], count=self.n_push,
            status=status, incarnation=self.life[s],
        )  # fmt: skip

    def kill_replica(self, replica):
        """Its push may have reached some shards: the others count it as dropped."""
        self.row(FAIL, replica.index, count=replica.accrued)
        if replica.sent:
            for s in replica.unsent:
                self.push(replica, s, DROPPED)
            replica.id += 1
        # A push that reached nobody is in no row, nor are its gradients any more.
        elif replica.unsent:
            self.rows[-1]["count"] = self.n_push
        begun = Replica(replica.index, replica.batch, replica.id)
        self.replicas[replica.index] = begun
        self.row(RESTART, replica.index)

    def kill_shard(self, s):
        lost = int(self.rng.integers(0, min(self.version[s], 4) + 1))
        self.version[s] -= lost
        self.life[s] += 1
        for kind, count in ((FAIL, lost), (RESTART, 0)):
            self.row(
                *(kind, -1), shard=s, version=self.version[s], count=count,
                incarnation=self.life[s],
            )  # fmt: skip
        for replica in self.replicas:  # which may still wait for the answer
            version, life = replica.sent.get(s, (0, self.life[s]))
            is_lost = life == self.life[s] - 1 and version > self.version[s]
            if is_lost and self.rng.random() < 0.7:
                replica.unsent.append(s)


def random_restored(
    seed, shards=1, n_push=1, replicas=4, turns=400, deaths=0.02
) -> Trace:
    """A run of so many small steps; `deaths`: of a shard, per step."""
    run = Run(seed, shards, n_push, replicas)
    for _ in range(turns):
        draw = run.rng.random()
        if draw < deaths * shards:
            run.kill_shard(int(run.rng.integers(shards)))
        elif draw > 0.98:
            run.kill_replica(run.replicas[int(run.rng.integers(replicas))])
        else:
            run.turn(run.replicas[int(run.rng.integers(replicas))])
    none = {"shard": -1, "step": -1, "batch": -1, "version": -1, "base": -1, "id": -1}
    none |= {"count": 0, "status": 0, "incarnation": 0}
    names = ["kind", "replica", *none]
    columns = {name: [(none | row)[name] for row in run.rows] for name in names}
    time = np.arange(float(len(run.rows)))
    return Trace.from_columns(
        {"replicas": replicas, "shards": shards}, **columns, time=time
    )
