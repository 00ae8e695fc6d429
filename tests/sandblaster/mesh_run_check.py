"""Run by `mesh_run_test` with eight devices: `minimize` on a mesh and without one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import dbjax
from dbjax.sandblaster import running, vector_shard
from tests.problems import flat

INPUTS, UNITS = 16, 24
random = np.random.default_rng(0)
X = random.standard_normal((80, INPUTS)).astype(np.float32)
Y = np.tanh(X @ random.standard_normal((INPUTS, 8))).astype(np.float32)
PARAMS = {
    "b": np.zeros(UNITS, np.float32),
    "odd": np.zeros(3, np.float32),
    "v": 0.3 * random.standard_normal((UNITS, 8)).astype(np.float32),
    "w": 0.3 * random.standard_normal((INPUTS, UNITS)).astype(np.float32),
}
# 80 examples in portions of 32, 32 and 16: all devices share each of them; in portions
# of 30, no portion can be shared.
METHODS = {
    "lbfgs": dbjax.LBFGS(memory_size=4),
    "owlqn": dbjax.OWLQN(1e-3, memory_size=4),
}
RULES = [("w", P(None, "model")), ("v", P("model")), ("b", P("model"))]


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"])
    out = hidden @ params["v"] + params["odd"].sum()
    return jnp.mean((out - batch["y"]) ** 2)


def minimize(portion_size=32, **keywords):
    data = dbjax.from_arrays({"x": X, "y": Y}, batch_size=8, portion_size=portion_size)
    keywords = {"iterations": 4, "tolerance": 0} | keywords
    return dbjax.sandblaster.minimize(loss, PARAMS, data, **keywords)


def close(run, single):
    assert run.evaluations == single.evaluations, (run.evaluations, single.evaluations)
    np.testing.assert_allclose(run.value, single.value, 1e-4)
    np.testing.assert_allclose(flat(run.params), flat(single.params), 1e-2, 1e-3)


def shares(held, whole):
    """The share of all bytes that each device holds."""
    own = {device: 0 for device in jax.devices()}
    for leaf in jax.tree.leaves(held):
        for shard in leaf.addressable_shards:
            own[shard.device] += shard.data.nbytes
    return np.array(list(own.values())) / whole


def main():
    assert jax.device_count() == 8
    meshes = {
        "even": (dbjax.make_mesh(data=8), None),
        "rules": (dbjax.make_mesh(data=2, model=4), RULES),
    }
    seen = {}
    init = running.Running.__init__

    def keep(self, *args, **keywords):
        init(self, *args, **keywords)
        seen["run"] = self

    running.Running.__init__ = keep
    for method in METHODS:
        single = minimize(method=METHODS[method])
        for mesh, rules in meshes.values():
            run = minimize(method=METHODS[method], mesh=mesh, rules=rules, replicas=2)
            close(run, single)
            vectors = seen["run"].vectors
            # Each device holds its part of every vector, the history's included. What
            # eight do not divide, three numbers here, is whole on every one.
            whole = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
            parts = 8 if rules is None else 4
            held = [vectors.get(name) for name in vectors.names()]
            assert len(held) >= 6
            for vector in held:
                most = (whole - 12) / parts / whole + 12 / whole
                np.testing.assert_allclose(shares(vector, whole), most)
            for name, leaf in run.params.items():
                assert len(leaf.sharding.device_set) == 8, name
    print("methods", len(METHODS))

    single = minimize(portion_size=30)
    close(minimize(portion_size=30, mesh=meshes["even"][0]), single)
    print("short portions agree")

    rule = dbjax.MultiBatch(2)
    single = minimize(portion_size=16, batches=rule)
    close(minimize(portion_size=16, batches=rule, mesh=meshes["even"][0]), single)
    print("samples agree")

    # One all-reduce for all products of a round, and none for a combination.
    run = seen["run"]
    x = run.vectors.get("x")
    kernels = vector_shard.make_kernels(
        running.vectors.mesh_dots([leaf.sharding for leaf in jax.tree.leaves(x)])
    )
    names = [run.vectors.get(name) for name in run.vectors.names()]
    pairs = tuple((i, 0) for i in range(len(names)))
    counts = []
    for lowered in (
        kernels.dots.lower(tuple(names), pairs),
        kernels.combine.lower(tuple(names), np.ones(len(names)), None),
    ):
        text = lowered.compile().as_text()
        assert "all-gather" not in text and "all-to-all" not in text
        counts.append(text.count(" all-reduce(") + text.count(" all-reduce-start("))
    print("all-reduces", *counts)


if __name__ == "__main__":
    main()
