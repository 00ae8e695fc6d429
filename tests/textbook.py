"""Each algorithm as its paper tells it, in plain numpy loops; the library must agree.

Here parameters are one flat vector, a shard is a slice of it, and nothing is fast.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np

from dbjax import trace as kinds
from dbjax.trace import Trace

# rule(w, dw) -> the next w; a new rule for each shard, as it may remember. One that is
# aware of delays is rule(w, dw, w the gradient was computed on, updates since then).
Rule = Callable[..., np.ndarray]


def sgd(eta: float) -> Rule:
    """The basic server (section 4.1): w' = w - eta dw."""
    return lambda w, dw: w - eta * dw


class Compensated:
    """A rule that remembers, and is aware of delays; it is in no paper."""

    def __init__(self, eta: float):
        self.eta, self.momentum = eta, 0.0

    def __call__(self, w, dw, old, missed):
        step = self.eta * (dw + 0.1 * (w - old)) / (1 + missed)
        self.momentum = step + 0.9 * self.momentum
        return w - self.momentum


class Adagrad:
    """Section 4.1: eta_K = gamma / sqrt(sum of the squares up to K), and 0/0 = 0."""

    def __init__(self, gamma: float):
        self.gamma = gamma
        self.received = []

    def __call__(self, w: np.ndarray, dw: np.ndarray) -> np.ndarray:
        self.received = [*self.received, dw]
        total = sum(each * each for each in self.received)
        moves = total > 0
        eta = self.gamma / np.sqrt(np.where(moves, total, 1.0))
        return w - np.where(moves, eta * dw, 0.0)


def delayed(
    gradient: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    delays: Sequence[int],
    rule: Rule,
    *,
    rest: bool = False,
) -> list[np.ndarray]:
    """w[t+1] = rule(w[t], gradient(w[t - delay])); gives w[0], w[1], ...

    What lies before the start is w[0] (`rest=False`) or no update at all.
    """
    w = [start]
    for t, delay in enumerate(delays):
        if rest and delay > t:
            w.append(w[t])
        else:
            w.append(rule(w[t], gradient(w[t - min(delay, t)])))
    return w


def client(minibatches: int, n_fetch: int = 1, n_push: int = 1) -> list[str]:
    """What one replica does, in order: the loop of section 4.2.

    A push comes after every `n_push` gradients and after the last partial window,
    where the paper's pseudocode pushes after the first gradient already.
    """
    order, accrued = [], 0
    for step in range(minibatches):
        if step % n_fetch == 0:
            order.append("fetch")
        order.append("compute")
        accrued += 1
        if accrued == n_push:
            order.append(f"push {accrued}")
            accrued = 0
    if accrued:
        order.append(f"push {accrued}")
    return order


class Replica:
    """The client's state: parameters, and the gradients since the last push."""

    def __init__(self, size: int, dtype: np.dtype):
        self.parameters = np.full(size, np.nan, dtype)  # until the first fetch lands
        self.accrued: list[np.ndarray] = []
        self.sent: dict[int, np.ndarray] = {}
        self.fetched: dict[int, tuple] = {}  # by shard: a state, and its pushes
        self.held: list[dict[int, tuple]] = []  # when it computed what is accrued
        self.base: dict[int, dict[int, tuple]] = {}  # by push: its oldest gradient's

    def compute(self, gradient: np.ndarray, local_rule: Rule | None) -> None:
        self.accrued.append(gradient)
        self.held.append(dict(self.fetched))
        if local_rule is not None:
            self.parameters = local_rule(self.parameters, gradient)

    def push(self, id: int, count: int) -> np.ndarray:
        """The raw sum of the oldest `count` gradients; the same for every shard."""
        if id not in self.sent:
            assert 0 < count <= len(self.accrued)
            self.sent[id] = sum(self.accrued[1:count], start=self.accrued[0])
            self.accrued, self.base[id] = self.accrued[count:], self.held[0]
            self.held = self.held[count:]
        return self.sent[id]


def downpour(
    trace: Trace,
    gradient: Callable[[np.ndarray, int, int], np.ndarray],
    start: np.ndarray,
    shards: Sequence[slice],
    server_rule: Callable[[], Rule],
    local_rule: Rule | None = None,
    aware: bool = False,
) -> list[list[np.ndarray]]:
    """Downpour SGD, played from the rows of a Trace.

    A shard that is restored goes back to what it was, its rule as well. What it has
    lost is still there for those who had fetched it.

    Args:
        trace: who fetched which version, computed and pushed, in a causal order.
        gradient: `gradient(parameters, replica, batch)`, flat `[n]` to flat `[n]`.
        start: flat parameters `[n]`.
        shards: the slices of the vector, one per shard.
        server_rule: makes the rule of one shard.
        local_rule: the replica's own step between fetches, if it takes one. (One that
            remembers is not shared rightly: use `sgd`.)
        aware: whether the server's rule is told about delays.

    Returns:
        All versions of each shard that it has not lost; `join` puts the newest ones
        together.
    """
    # By shard and incarnation: versions, the rule at each, and the pushes they are of.
    lives = [[([start[cut]], [server_rule()], [])] for cut in shards]
    replicas: dict[int, Replica] = {}
    for row in range(len(trace)):
        r, s = int(trace.replica[row]), int(trace.shard[row])
        replica = replicas.setdefault(r, Replica(len(start), start.dtype))
        match int(trace.kind[row]):
            case kinds.FETCH:
                replica.parameters = replica.parameters.copy()
                version = int(trace.version[row])
                versions, _, pushes = lives[s][trace.incarnation[row]]
                replica.parameters[shards[s]] = versions[version]
                replica.fetched[s] = versions[version], pushes[:version]
            case kinds.COMPUTE:
                g = gradient(replica.parameters, r, int(trace.batch[row]))
                replica.compute(g, local_rule)
            case kinds.PUSH:
                versions, rules, pushes = lives[s][-1]
                w, rule = versions[-1], copy.copy(rules[-1])
                dw = replica.push(int(trace.id[row]), int(trace.count[row]))
                old, seen = replica.base[int(trace.id[row])][s]
                told = (old, len(set(pushes) - set(seen))) if aware else ()
                taken = trace.status[row] == kinds.TAKEN
                versions.append(rule(w, dw[shards[s]], *told) if taken else w)
                rules.append(rule)
                pushes.append(row)
                assert len(pushes) == trace.version[row]
            case kinds.FAIL if s < 0:
                lost = len(replica.accrued)
                assert lost == trace.count[row]
                replica.accrued, replica.held = [], []
                replica.parameters = np.full_like(start, np.nan)
            case kinds.RESTART if s >= 0:
                version = int(trace.version[row])
                versions, rules, pushes = lives[s][-1]
                lives[s].append(
                    (versions[: version + 1], rules[: version + 1], pushes[:version])
                )
    return [life[-1][0] for life in lives]


def join(versions: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """The newest parameters of all shards, as one flat vector."""
    return np.concatenate([shard[-1] for shard in versions])


def inverse_hessian(
    s: Sequence[np.ndarray], y: Sequence[np.ndarray], gamma: float, size: int
) -> np.ndarray:
    """BFGS as a dense matrix, from gamma I (Nocedal and Wright, equation 6.17)."""
    h = gamma * np.eye(size)
    for s_k, y_k in zip(s, y, strict=True):
        rho = 1 / (s_k @ y_k)
        v = np.eye(size) - rho * np.outer(y_k, s_k)
        h = v.T @ h @ v + rho * np.outer(s_k, s_k)
    return h


def two_loop(
    s: Sequence[np.ndarray], y: Sequence[np.ndarray], gamma: float, g: np.ndarray
) -> np.ndarray:
    """The same matrix times `g`, without the matrix (algorithm 7.4); oldest first."""
    alphas = []
    for s_k, y_k in zip(reversed(s), reversed(y), strict=True):
        alphas.append(s_k @ g / (s_k @ y_k))
        g = g - alphas[-1] * y_k
    g = gamma * g
    for s_k, y_k, alpha in zip(s, y, reversed(alphas), strict=True):
        g = g + s_k * (alpha - y_k @ g / (s_k @ y_k))
    return g


# Batch methods. `loss(x)` gives value and gradient; `search(phi, value, slope, step)`
# a step, where `phi(t)` gives value and slope at step `t`.


def lbfgs_path(loss, x, search, memory: int, iterations: int) -> list[np.ndarray]:
    """L-BFGS with a dense matrix (Nocedal and Wright, algorithm 7.5)."""
    path, s, y = [x], [], []
    value, g = loss(x)
    for _ in range(iterations):
        scale = s[-1] @ y[-1] / (y[-1] @ y[-1]) if s else min(1, 1 / np.sqrt(g @ g))
        d = -inverse_hessian(s[-memory:], y[-memory:], scale, len(x)) @ g
        t = search(_along(loss, x, d), value, d @ g, 1.0)
        before, x = (x, g), x + t * d
        value, g = loss(x)
        s.append(x - before[0])
        y.append(g - before[1])
        path.append(x)
    return path


def conjugate_gradient_path(loss, x, search, iterations: int) -> list[np.ndarray]:
    """Hager and Zhang (2005), equations 1.3 and 1.5 to 1.7, eta = 0.01."""
    path = [x]
    value, g = loss(x)
    d, first = -g, min(1, 1 / np.sqrt(g @ g))
    for _ in range(iterations):
        slope = d @ g
        t = search(_along(loss, x, d), value, slope, first)
        before, x = g, x + t * d
        value, g = loss(x)
        y = g - before
        beta = (y - 2 * d * (y @ y) / (d @ y)) @ g / (d @ y)
        eta = -1 / (np.linalg.norm(d) * min(0.01, np.linalg.norm(g)))
        d = -g + max(beta, eta) * d
        first = t * slope / (d @ g)  # the value is taken to change as it did before
        path.append(x)
    return path


def barzilai_borwein_path(loss, x, search, iterations: int) -> list[np.ndarray]:
    """Down the gradient, at first as far as s s / s y says."""
    path = [x]
    value, g = loss(x)
    first = min(1, 1 / np.sqrt(g @ g))
    for _ in range(iterations):
        t = search(_along(loss, x, -g), value, -g @ g, first)
        s, before, x = -t * g, g, x - t * g
        value, g = loss(x)
        first = s @ s / (s @ (g - before))
        path.append(x)
    return path


def owlqn_path(loss, x, search, l1, memory: int, iterations: int) -> list[np.ndarray]:
    """Andrew and Gao (2007), algorithm 1; `l1` [n] are the weights."""
    path, s, y = [x], [], []

    def whole(x):
        value, g = loss(x)
        return value + l1 @ np.abs(x), g

    value, g = whole(x)
    for _ in range(iterations):
        v = _pseudo_gradient(x, g, l1)
        scale = s[-1] @ y[-1] / (y[-1] @ y[-1]) if s else min(1, 1 / np.sqrt(v @ v))
        h = inverse_hessian(s[-memory:], y[-memory:], scale, len(x))
        penalised, d = l1 > 0, -h @ v
        d[penalised & (d * v >= 0)] = 0
        orthant = np.where(x != 0, np.sign(x), -np.sign(v))

        def point(t, x=x, d=d, orthant=orthant, penalised=penalised):
            there = x + t * d
            there[penalised & (np.sign(there) != orthant)] = 0
            return there

        def phi(t, x=x, point=point):
            value, g = whole(point(t))
            return value, (point(t) - x) @ _pseudo_gradient(point(t), g, l1) / t

        t = search(phi, value, -v @ h @ v, 1.0)
        before, x = (x, g), point(t)
        value, g = whole(x)
        s.append(x - before[0])
        y.append(g - before[1])
        path.append(x)
    return path


def _pseudo_gradient(x, g, l1):
    """Equation 4: one-sided derivatives where x is 0."""
    right, left = g + l1, g - l1
    at_zero = np.where(left > 0, left, np.where(right < 0, right, 0.0))
    return np.where(x == 0, at_zero, g + l1 * np.sign(x))


def _along(loss, x, d):
    def phi(t):
        value, g = loss(x + t * d)
        return value, d @ g

    return phi


# Replicas that train by themselves. `gradient(w, replica, minibatch)`.


def averaged(gradient, w, eta: float, replicas: int, every: int, rounds: int):
    """Parameter averaging: all set out from w, and w is the mean of where they get."""
    for turn in range(rounds):
        ends = []
        for replica in range(replicas):
            x = w
            for step in range(turn * every, (turn + 1) * every):
                x = x - eta * gradient(x, replica, step)
            ends.append(x)
        w = sum(ends) / replicas
    return w


def diloco(gradient, w, eta, replicas, every, rounds, rate, momentum):
    """DiLoCo, algorithm 1: with SGD inside, and Nesterov's momentum outside."""
    m = 0 * w
    for turn in range(rounds):
        outer = 0 * w
        for replica in range(replicas):
            x = w
            for step in range(turn * every, (turn + 1) * every):
                x = x - eta * gradient(x, replica, step)
            outer = outer + (w - x) / replicas
        m = momentum * m + outer
        w = w - rate * (outer + momentum * m)
    return w


def delayed_nesterov(pushes, rate: float, momentum: float, every: int):
    """Updates for one push after the other; momentum moves with every so many."""
    m, updates, gathered = 0 * pushes[0], [], []
    for g in pushes:
        gathered.append(g)
        update = -rate * g / every
        if len(gathered) == every:
            m, gathered = momentum * m + sum(gathered) / every, []
            update = update - rate * momentum * m
        updates.append(update)
    return updates


def easgd(gradient, start, eta: float, alpha: float, turns, every: int):
    """Asynchronous EASGD, algorithm 1: turns are replicas, in the order they come.

    Each takes `every` steps by itself, and then it and the centre draw each other.
    """
    centre, x, step = start, {}, {}
    for replica in turns:
        here, first = x.get(replica, start), step.get(replica, 0)
        for minibatch in range(first, first + every):
            here = here - eta * gradient(here, replica, minibatch)
        e = alpha * (here - centre)
        x[replica], centre = here - e, centre + e
        step[replica] = first + every
    return centre
