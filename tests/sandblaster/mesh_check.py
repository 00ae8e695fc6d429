"""Run by `vectors_test` with four devices: vectors spread over a mesh of 2 x 2."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dbjax.sandblaster import vector_shard, vectors


def main():
    assert jax.device_count() == 4
    Auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("data", "model"), (Auto, Auto))
    # Cut along one axis, along both, along both in one dimension, and not at all.
    specs = {
        "a": PartitionSpec("model"),
        "b": PartitionSpec("data", "model"),
        "c": PartitionSpec(("data", "model")),
        "d": PartitionSpec(),
        "e": PartitionSpec(None, "data"),
    }
    rng = np.random.default_rng(0)
    shapes = {"a": (6,), "b": (4, 8), "c": (12,), "d": (3,), "e": (5, 2)}
    names = ("x", "y", "z")
    dense = {
        name: {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        for name in names
    }
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {k: jax.device_put(dense["x"][k], shardings[k]) for k in shapes}

    ours = vectors.on_mesh(params)
    for name in names:
        ours.put(name, dense[name])
    ours.combine("x", {"x": 0.5, "y": -2.0})
    dense["x"] = {k: 0.5 * dense["x"][k] - 2 * dense["y"][k] for k in shapes}
    ours.copy("copy", "x")
    ours.elementwise("zero", "zero", "x")
    ours.elementwise("sign", "sign", "y")
    for name in ("x", "copy", "zero", "sign"):
        for key, leaf in ours.get(name).items():
            assert leaf.sharding.is_equivalent_to(shardings[key], leaf.ndim), (
                name,
                key,
            )

    pairs = [
        ("x", "x"),
        ("x", "y"),
        ("z", "x"),
        ("z", "z"),
        ("copy", "y"),
        ("zero", "x"),
    ]
    dense["copy"], dense["zero"] = dense["x"], {k: 0 * v for k, v in dense["x"].items()}
    expected = [
        sum(float(np.sum(dense[p][k].astype(float) * dense[q][k])) for k in shapes)
        for p, q in pairs
    ]
    error = np.abs(ours.dots(pairs) - expected).max()

    dots = vector_shard.make_kernels(vectors.mesh_dots(list(shardings.values()))).dots
    lowered = dots.lower((params, ours.get("y")), ((0, 0), (0, 1), (1, 1)))
    program = lowered.compile().as_text()
    count = program.count(" all-reduce(") + program.count(" all-reduce-start(")
    assert "all-gather" not in program
    print("all-reduces", count, "error", "small" if error < 1e-4 else error)


if __name__ == "__main__":
    main()
