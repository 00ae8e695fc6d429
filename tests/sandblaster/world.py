"""Coordinator, replicas and shards in one unreliable world, driven by a seeded die.

Links keep the order of their messages, and nothing else: anything may be slow, any
replica may die at any time, be wrongly suspected, or come back. The shards are the real
ones; the gradient of portion `p` is the unit vector `p`, so that a gradient of ones is
the proof that every portion counts exactly once.
"""

import json
import random

import numpy as np

from dbjax.sandblaster import messages as m
from dbjax.sandblaster import vector_shard
from dbjax.sandblaster.portions import Portions

KERNELS = vector_shard.KERNELS._replace(add=lambda v, g: v + g)  # on numpy, exactly


class Replica:
    """What a replica holds, all of which a death takes."""

    def __init__(self, number, portions):
        self.number, self.portions = number, portions
        self.life, self.work, self.finished = 0, None, None
        self.sum, self.held = np.zeros(portions), []

    def obey(self, order):
        """Carry out an order; give the sum to push, if any."""
        assert order.replica == self.number
        if isinstance(order, m.Compute):
            assert self.work is None and self.finished is None
            self.work = order
        elif isinstance(order, m.Keep):
            assert self.finished == order.portion
            self.sum = self.sum + unit(order.portion, self.portions)
            self.held.append(order.portion)
            self.finished = None
        elif isinstance(order, m.Drop):
            assert self.finished == order.portion
            self.finished = None
        elif isinstance(order, m.Push):
            assert tuple(self.held) == order.portions
            gradients, self.sum, self.held = self.sum, np.zeros(self.portions), []
            return gradients
        return None


def unit(portion, portions):
    return (np.arange(portions) == portion).astype(float)


class World:
    def __init__(self, seed, desk, chaos=0.0, slow=(), save=False):
        self.die, self.desk, self.chaos, self.slow = (
            random.Random(seed),
            desk,
            chaos,
            slow,
        )
        self.save = save
        self.replicas = [Replica(r, desk.portions) for r in range(desk.replicas)]
        self.away = set()  # replicas that are dead
        self.shards = [vector_shard.VectorsState() for _ in range(desk.shards)]
        self.to_desk = [[m.Joined(r)] for r in range(desk.replicas)]
        self.to_replica = [[] for _ in range(desk.replicas)]
        self.to_shard = {}  # (replica, shard) -> messages on their way
        self.fences = {}  # replica -> what the shards have answered so far
        self.waits = {}  # (replica, life, id) -> shards that have not added that push
        self.done = None
        self.deaths = 0

    def evaluate(self, patience=10_000):
        """Let one evaluation happen; give each shard's gradient `[S, P]`."""
        desk = self.desk
        zero = m.Put("gradient", np.zeros(desk.portions))
        self.shards = [vector_shard.handle(s, zero)[0] for s in self.shards]
        self.done = None
        self.give(self.desk.begin())
        for step in range(patience):
            if self.done is not None:
                break
            self.act(self.chaos if step < 500 else 0.0)
        assert self.done == self.desk.evaluation, "it never ends"
        return np.array([shard.vectors["gradient"] for shard in self.shards])

    def act(self, chaos):
        """One thing happens, whatever it is."""
        if self.die.random() < chaos:
            self.trouble()
        if self.die.random() < 0.3 and self.save:
            self.desk = Portions.restore(json.loads(json.dumps(self.desk.save())))
        actions = [(self.compute, r) for r in self.replicas if r.work is not None]
        actions += [(self.hear, r) for r, queue in enumerate(self.to_desk) if queue]
        actions += [(self.obey, r) for r, queue in enumerate(self.to_replica) if queue]
        actions += [(self.arrive, key) for key, queue in self.to_shard.items() if queue]
        actions += [(self.fence, r) for r in self.fences]
        actions += [(self.come_back, r) for r in sorted(self.away)]
        action, what = self.die.choice(actions)
        number = getattr(what, "number", what)
        if action == self.compute and number in self.slow and self.die.random() < 0.98:
            return
        if action == self.come_back and self.die.random() < 0.8:
            return
        action(what)

    def trouble(self):
        replica = self.die.randrange(self.desk.replicas)
        if replica in self.away:
            return
        self.suspect(replica)  # rightly or not
        if self.die.random() < 0.7:
            self.deaths += 1
            self.away.add(replica)
            self.replicas[replica] = Replica(replica, self.desk.portions)
            self.to_replica[replica].clear()
            queue = self.to_desk[replica]  # its own messages are still on their way
            queue[:] = [each for each in queue if not isinstance(each, m.Joined)]

    def suspect(self, replica):
        if self.desk.life(replica):
            self.fences.setdefault(replica, {})

    def come_back(self, replica):
        self.away.remove(replica)
        self.to_desk[replica].append(m.Joined(replica))

    def compute(self, replica):
        order, replica.work = replica.work, None
        replica.finished = order.portion
        message = m.Finished(replica.number, order.life, order.task, order.portion)
        repeated = [message] * self.die.choice([1, 1, 2])
        self.to_desk[replica.number].extend(repeated)

    def hear(self, replica):
        """The coordinator hears a replica's next message."""
        message = self.to_desk[replica][0]
        if isinstance(message, m.Joined) and (
            replica in self.fences or self.desk._is[replica] != 0
        ):
            self.suspect(replica)  # its former life has to be over first
            return
        self.to_desk[replica].pop(0)
        orders = self.desk.handle(message)
        if isinstance(message, m.Joined) and replica not in self.away:
            self.replicas[replica].life = self.desk.life(replica)
        self.give(orders)

    def give(self, orders):
        for order in orders:
            if isinstance(order, m.Done):
                assert self.done is None
                self.done = order.evaluation
            elif order.life == self.replicas[order.replica].life:
                self.to_replica[order.replica].append(order)

    def obey(self, number):
        order, replica = self.to_replica[number].pop(0), self.replicas[number]
        if isinstance(order, m.Forget):
            if replica.life == order.life:
                self.replicas[number] = Replica(number, self.desk.portions)
                self.to_replica[number].clear()
                self.to_desk[number].append(m.Joined(number))
            return
        gradients = replica.obey(order)
        if gradients is not None:
            shards = range(self.desk.shards) if order.shards is None else order.shards
            self.waits[number, replica.life, order.id] = set(shards)
            for shard in shards:
                add = m.Add("gradient", gradients, number, replica.life, order.id)
                queue = self.to_shard.setdefault((number, shard), [])
                queue.extend([add] * self.die.choice([1, 1, 2]))

    def arrive(self, key):
        """A shard handles the next push from a replica, which may be dead by now."""
        number, shard = key
        add = self.to_shard[key].pop(0)
        self.shards[shard], reply = vector_shard.handle(
            self.shards[shard], add, KERNELS
        )
        waits = self.waits[number, add.life, add.id]
        if reply.taken and shard in waits:
            waits.remove(shard)
            if not waits and number not in self.away:
                self.to_desk[number].append(m.Pushed(number, add.life, add.id))

    def fence(self, replica):
        """One more shard fences a replica; after the last one it is declared dead."""
        replies = self.fences[replica]
        open_ = [s for s in range(self.desk.shards) if s not in replies]
        shard, life = self.die.choice(open_), self.desk.life(replica)
        message = m.Fence(replica, life)
        self.shards[shard], reply = vector_shard.handle(self.shards[shard], message)
        again = vector_shard.handle(self.shards[shard], message)[1]
        assert again == reply
        replies[shard] = reply.landed
        if len(replies) == self.desk.shards:
            del self.fences[replica]
            landed = tuple(replies[s] for s in range(self.desk.shards))
            self.give(self.desk.handle(m.Died(replica, life, landed)))
            self.give([m.Forget(replica, life)])
