"""A coordinator and its vectors, without replicas: every request is seen."""

import jax
import numpy as np

from dbjax.optim.status import Status
from dbjax.sandblaster import vectors
from dbjax.sandblaster.coordinator import Coordinator
from dbjax.sandblaster.messages import Dots, Evaluate, Evaluated, Reached


class Portions:
    """Strongly convex losses of different curvature, in float64 numpy.

    Portion `p` has `1 + p % 3` examples and the loss of `a_p (M x - c_p)^2`, with a
    quartic term beside it; `M` lets coefficients depend on one another.
    """

    def __init__(self, portions=12, size=6, seed=0, noise=1.0, mixed=0.0):
        random = np.random.default_rng(seed)
        self.size, self.count = size, portions
        self.curvature = random.uniform(0.5, 3.0, (portions, size))
        self.centre = 1 + noise * random.standard_normal((portions, size))
        self.mix = np.eye(size)
        if mixed:
            self.mix += mixed * random.standard_normal((size, size))
        self.examples = 1 + np.arange(portions) % 3
        self.start = random.standard_normal(size)

    def one(self, p, x):
        r = self.mix @ x - self.centre[p]
        value = np.sum(self.curvature[p] * r**2) / 2 + np.sum(r**4) / 20
        return value, self.mix.T @ (self.curvature[p] * r + r**3 / 5)

    def of(self, portions, x):
        """Mean value and gradient of some portions."""
        n = self.examples[list(portions)]
        values, gradients = zip(*(self.one(p, x) for p in portions), strict=True)
        return n @ np.array(values) / n.sum(), n @ np.array(gradients) / n.sum()

    def loss(self, x):
        return self.of(range(self.count), x)


class Driven:
    """Carries a run's requests out, and keeps them.

    Attributes:
      requests: all of them, in order.
      path: `x` at each `Reached`.
      state: the coordinator's, at the end.
    """

    def __init__(self, portions, method, batches, *, between=None, **settings):
        self.portions, self.requests, self.path = portions, [], []
        settings = {"iterations": 8, "tolerance": 0.0, "value_rtol": 2e-15} | settings
        self.coordinator = Coordinator(method, batches, portions.count, **settings)
        self.vectors = vectors.in_process()
        self.looks = []  # called after each round of inner products
        self.between = between or (lambda state: state)

    def run(self):
        with jax.enable_x64(True):
            params = jax.numpy.array(self.portions.start)
            for name, vector in self.coordinator.method.constants(params).items():
                self.vectors.put(name, vector)
            self.vectors.put("x", params)
            state, requests = self.coordinator.begin()
            while True:
                state = self.between(state)
                for request in requests:
                    self.requests.append(request)
                    reply = self.carry_out(request)
                if state.status != Status.RUNNING:
                    break
                state, requests = self.coordinator.advance(state, reply)
        self.state = state
        return self

    def get(self, name):
        return np.array(self.vectors.get(name))

    def carry_out(self, request):
        if isinstance(request, Reached):
            self.path.append(self.get("x"))
            return None
        if isinstance(request, Evaluate):
            return self.evaluate(request)
        if isinstance(request, Dots):
            for look in self.looks:
                look(self)
            return self.vectors.dots(request.pairs)
        return self.vectors.tell(request)

    def evaluate(self, request):
        x, listed = self.get(request.at), []
        for into, group in request.groups:
            listed += group
            self.vectors.put(into, self.portions.of(group, x)[1])
        assert len(set(listed)) == len(listed) > 0, "no portion stands twice"
        answers = [self.portions.one(p, x) for p in listed]
        values = tuple(float(value) for value, _ in answers)
        squares = tuple(float(g @ g) for _, g in answers)
        examples = tuple(int(n) for n in self.portions.examples[listed])
        return Evaluated(examples, values, squares)
