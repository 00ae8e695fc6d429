"""Each algorithm as its paper tells it, in plain numpy loops; the library must agree.

Here parameters are one flat vector, a shard is a slice of it, and nothing is fast.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dbjax import trace as kinds
from dbjax.trace import Trace

# rule(w, dw) -> the next w; a new rule for each shard, as it may remember.
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]


def sgd(eta: float) -> Rule:
    """The basic server (section 4.1): w' = w - eta dw."""
    return lambda w, dw: w - eta * dw


class Adagrad:
    """Section 4.1: eta_K = gamma / sqrt(sum of the squares up to K), and 0/0 = 0."""

    def __init__(self, gamma: float):
        self.gamma = gamma
        self.received = []

    def __call__(self, w: np.ndarray, dw: np.ndarray) -> np.ndarray:
        self.received.append(dw)
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

    def compute(self, gradient: np.ndarray, local_rule: Rule | None) -> None:
        self.accrued.append(gradient)
        if local_rule is not None:
            self.parameters = local_rule(self.parameters, gradient)

    def push(self, id: int, count: int) -> np.ndarray:
        """The raw sum of the oldest `count` gradients; the same for every shard."""
        if id not in self.sent:
            assert 0 < count <= len(self.accrued)
            self.sent[id] = sum(self.accrued[1:count], start=self.accrued[0])
            self.accrued = self.accrued[count:]
        return self.sent[id]


def downpour(
    trace: Trace,
    gradient: Callable[[np.ndarray, int, int], np.ndarray],
    start: np.ndarray,
    shards: Sequence[slice],
    server_rule: Callable[[], Rule],
    local_rule: Rule | None = None,
) -> list[list[np.ndarray]]:
    """Downpour SGD, played from the rows of a Trace.

    Args:
        trace: who fetched which version, computed and pushed, in a causal order.
        gradient: `gradient(parameters, replica, batch)`, flat `[n]` to flat `[n]`.
        start: flat parameters `[n]`.
        shards: the slices of the vector, one per shard.
        server_rule: makes the rule of one shard.
        local_rule: the replica's own step between fetches, if it takes one. (One that
            remembers is not shared rightly: use `sgd`.)

    Returns:
        All versions of each shard; `join` puts the newest ones together.
    """
    versions = [[start[cut]] for cut in shards]
    rules = [server_rule() for _ in shards]
    replicas: dict[int, Replica] = {}
    for row in range(len(trace)):
        r, s = int(trace.replica[row]), int(trace.shard[row])
        replica = replicas.setdefault(r, Replica(len(start), start.dtype))
        match int(trace.kind[row]):
            case kinds.FETCH:
                replica.parameters = replica.parameters.copy()
                replica.parameters[shards[s]] = versions[s][trace.version[row]]
            case kinds.COMPUTE:
                g = gradient(replica.parameters, r, int(trace.batch[row]))
                replica.compute(g, local_rule)
            case kinds.PUSH:
                w = versions[s][-1]
                dw = replica.push(int(trace.id[row]), int(trace.count[row]))
                taken = trace.status[row] == kinds.TAKEN
                versions[s].append(rules[s](w, dw[shards[s]]) if taken else w)
                assert len(versions[s]) - 1 == trace.version[row]
            case kinds.FAIL:
                assert s < 0, "a shard's failure is not in the textbook"
                assert len(replica.accrued) == trace.count[row]
                replica.accrued = []
                replica.parameters = np.full_like(start, np.nan)
    return versions


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
