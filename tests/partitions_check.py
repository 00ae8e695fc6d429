"""Replicas x partitions, in a process that has eight devices; see partitions_test.py."""

import pathlib
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import dbjax
from dbjax.runtime import launch
from dbjax.server.placement import Placement
from dbjax.trace import FETCH, PUSH

random = np.random.default_rng(0)


def normal(*shape):
    return random.standard_normal(shape).astype(np.float32) / 3


X = normal(256, 8)
DATA = dbjax.from_arrays(
    {"x": X, "y": np.sin(3 * X.sum(1))}, batch_size=16, seed=0, portion_size=64
)
PARAMS = {"in": normal(8, 16), "bias": np.zeros(16, np.float32), "out": normal(16, 1)}
PARAMS |= {"scale": np.float32(1)}  # whole on every device
RULES = [("in", P(None, "model")), ("bias", P("model")), ("out", P("model"))]
ADAGRAD = dbjax.adagrad(0.05)


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"])
    guess = params["scale"] * (hidden @ params["out"])[:, 0]
    return jnp.mean((guess - batch["y"]) ** 2)


def evaluate(params, step, time):
    """As users would: many programs, none of them waited for."""
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))
    losses = [loss(params, DATA.batch(0, i)) for i in range(4)]
    return {"loss": sum(map(float, losses)) / 4}


def train(runtime, **keywords):
    keywords = {"replicas": 3, "steps": 40, "optimizer": ADAGRAD} | keywords
    keywords = {"per_shard": True} | keywords  # nothing to find: one compilation less
    return dbjax.downpour.train(loss, PARAMS, DATA, runtime=runtime, **keywords)


def replay(trace, **keywords):
    """`replay`, every digest checked; keywords as `train` had them."""
    names = "optimizer", "local_optimizer", "version_dtype", "mesh", "rules"
    kept = {name: keywords[name] for name in names if name in keywords}
    kept = {"optimizer": ADAGRAD, "per_shard": True} | kept
    return dbjax.replay(trace, loss, PARAMS, DATA, verify=True, **kept)


def farthest(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


MESHES = [
    # Devices of a replica's own, several replicas on the same, one for all; shards that
    # are as many as partitions, more, and fewer.
    (dict(replica=3, model=2), 2),
    (dict(replica=2, model=2), 4),
    (dict(replica=2, model=4), 2),
    (dict(model=2), 1),
    (dict(replica=2, data=2, model=2), 2),
    (dict(replica=4), 1),
]


def check_placement_takes_every_number_there_and_back():
    for axes, shards in [*MESHES, (dict(model=8), 8), (dict(model=4), 8)]:
        placement = Placement.of(PARAMS, shards, dbjax.make_mesh(**axes), RULES[:3])
        for replica in range(3):
            parts = placement.split(PARAMS)
            there = placement.merge(parts, replica)
            mesh = placement.mesh(replica)
            assert there["in"].sharding.mesh == mesh
            for tree in (there, placement.whole(parts)):
                assert farthest(tree, PARAMS) == 0
            back = placement.split(there)
            for a, b in zip(*map(jax.tree.leaves, (parts, back)), strict=True):
                assert a.devices() == b.devices()
                np.testing.assert_array_equal(a, b)
        sizes = np.array(placement.layout.nbytes)
        np.testing.assert_array_equal(placement.owned_bytes.sum(0), sizes)
        partitions = placement.meshes[0].size
        if shards % partitions == 0:  # nobody pushes to another partition's shard
            own = np.repeat(np.eye(partitions, dtype=bool), shards // partitions, 1)
            assert not placement.owned_bytes[~own].any()
            # What others own and everybody needs is the scale alone.
            assert placement.partition_bytes[~own].sum() == 4 * (partitions - 1)


def check_what_is_on_its_device_is_not_copied():
    placement = Placement.of(PARAMS, 2, dbjax.make_mesh(model=2), RULES)
    parts = placement.split(PARAMS)
    merged = placement.merge(parts)
    for part, shard in zip(parts, merged["in"].addressable_shards, strict=True):
        pointers = (
            part["in"].unsafe_buffer_pointer(),
            shard.data.unsafe_buffer_pointer(),
        )
        assert pointers[0] == pointers[1]
    assert placement.split(merged)[1]["in"].unsafe_buffer_pointer() == pointers[1]


def check_downpour_is_the_same_run_and_replays_to_the_same_bits():
    extras = [
        {},
        {"n_push": 2, "n_fetch": 2, "local_optimizer": optax.sgd(0.01, momentum=0.9)},
        {"overlap": True, "optimizer": optax.sgd(0.05)},
        {"protocol": dbjax.synchronous(), "version_dtype": jnp.bfloat16},
    ]
    plain, first = {}, evaluate(jax.tree.map(jnp.array, PARAMS), 0, 0.0)["loss"]
    for case, (axes, shards) in enumerate(MESHES):
        mesh, chosen = dbjax.make_mesh(**axes), case % len(extras)
        rules = RULES if "model" in axes else None
        for runtime in (dbjax.Emulated(), dbjax.Threads(digest_every=3)):
            extra = extras[chosen]
            run = train(
                *(runtime,), **extra, shards=shards, mesh=mesh, rules=rules,
                eval_fn=evaluate, eval_every=10,
            )  # fmt: skip
            again = replay(run.trace, mesh=mesh, rules=rules, **extra)
            assert farthest(run.params, again.params) == 0, (axes, runtime, extra)
            if isinstance(runtime, dbjax.Emulated):
                if chosen not in plain:
                    plain[chosen] = train(runtime, **extra, shards=1)
                assert farthest(run.params, plain[chosen].params) < 1e-5, axes
            losses = [row["loss"] for row in run.trace.evaluations]
            assert len(losses) == 4 and losses[-1] < first, (axes, runtime, losses)


def check_a_function_makes_the_parameters_where_they_belong():
    mesh = dbjax.make_mesh(replica=2, model=2)
    calls = []

    def make():
        calls.append(1)
        return jax.tree.map(jnp.asarray, PARAMS)

    keywords = {"optimizer": ADAGRAD, "steps": 12, "mesh": mesh, "rules": RULES}
    keywords["per_shard"] = True
    run = dbjax.downpour.train(loss, make, DATA, shards=2, **keywords)
    other = dbjax.downpour.train(loss, PARAMS, DATA, shards=2, **keywords)
    assert farthest(run.params, other.params) == 0
    assert len(calls) <= 2  # its shapes, and the parameters


def check_the_trace_says_who_exchanged_what():
    mesh = dbjax.make_mesh(replica=2, model=2)
    run = train(dbjax.Emulated(), shards=2, mesh=mesh, rules=RULES)
    trace, header = run.trace, run.trace.header
    assert header["mesh"] == {"model": 2} and header["meshes"] == 2
    fetches, pushes = (int(np.sum(trace.kind == kind)) // 2 for kind in (FETCH, PUSH))
    half = 4 * sum(np.size(PARAMS[n]) for n in ("in", "bias", "out")) // 2
    (one, shared), (other, two) = trace.partition_bytes()
    assert {one, two} == {half * (fetches + pushes), half * (fetches + pushes) + 4 * (
        fetches + pushes)}  # fmt: skip
    assert {shared, other} == {0, 4 * fetches}  # the scale, which one of them owns
    whole = train(dbjax.Emulated(), shards=2).trace
    assert whole.partition_bytes().tolist() == [
        [int(whole.bytes[whole.shard == s].sum()) for s in range(2)]
    ]


def check_a_checkpoint_goes_on(tmp):
    mesh = dbjax.make_mesh(replica=2, model=2)
    for runtime in (dbjax.Emulated(), dbjax.Threads()):
        keywords = {"shards": 2, "mesh": mesh, "rules": RULES, "checkpoint_every": 10}
        where = f"{tmp}/{type(runtime).__name__}"
        whole = train(runtime, **keywords)

        class Stop(Exception):
            pass

        def stop(params, step, time):
            if step >= 20:
                raise Stop
            return {}

        try:
            train(runtime, **keywords, checkpoint_dir=where, eval_fn=stop, eval_every=5)
            raise AssertionError("it did not stop")
        except Stop:
            pass
        run = train(runtime, **keywords, checkpoint_dir=where)
        assert run.info.resumed_at >= 10
        if isinstance(runtime, dbjax.Emulated):
            assert farthest(run.params, whole.params) == 0
        else:
            again = replay(run.trace, mesh=mesh, rules=RULES)
            assert farthest(run.params, again.params) == 0


def check_sandblaster_is_the_same_run():
    def minimize(**keywords):
        keywords = {"iterations": 4, "eval_fn": evaluate, "eval_every": 2} | keywords
        return dbjax.sandblaster.minimize(loss, PARAMS, DATA, **keywords)

    plain = minimize()
    live, emulated = dbjax.Threads(), dbjax.Emulated()
    for case, (axes, shards) in enumerate((MESHES[0], MESHES[3], MESHES[4])):
        for runtime in [(live, emulated), (live,), (emulated,)][case]:
            alone = "replica" not in axes and isinstance(runtime, dbjax.Emulated)
            run = minimize(
                mesh=dbjax.make_mesh(**axes), rules=RULES, runtime=runtime,
                shards=1 if alone else shards, replicas=3,
            )  # fmt: skip
            assert farthest(run.params, plain.params) < 1e-4, (axes, runtime)
            assert run.evaluations == plain.evaluations
            if not alone:
                assert run.trace.partition_bytes().shape[1] == shards


def check_devices_take_turns():
    """Programs on meshes that overlap never run at the same time; others may."""
    both, left, right = (
        dbjax.make_mesh(jax.devices()[a:b], model=b - a)
        for a, b in ((0, 2), (0, 1), (1, 2))
    )
    inside, most = [], []

    def work(mesh, name):
        for _ in range(50):
            with launch.turn(mesh):
                inside.append(name)
                most.append(tuple(sorted(inside)))
                time.sleep(1e-4)
                inside.remove(name)

    names = {"both": both, "left": left, "right": right}
    threads = [threading.Thread(target=work, args=(m, n)) for n, m in names.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == ("both",) for one in most if "both" in one)
    assert ("left", "right") in most


def check_what_does_not_fit_is_said():
    mesh = dbjax.make_mesh(replica=2, model=4)
    for words, keywords in {
        "multiple or a divisor of a replica's partitions, 4": {"shards": 3},
        "none of ['nothing'] is found": {"rules": [("nothing", P("model"))]},
        "does not fit": {"rules": [("out", P(None, "model"))]},
        "layers of P('layers',) is not found": {"rules": [("in", P("layers"))]},
        "would hold nothing": {"rules": [("in", P())], "shards": 8},
    }.items():
        try:
            train(dbjax.Emulated(), **{"mesh": mesh, "rules": RULES} | keywords)
            raise AssertionError(words)
        except ValueError as error:
            assert words in str(error), (words, str(error))


def check_the_documented_example():
    text = (pathlib.Path(__file__).parents[1] / "docs/partitions.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    names = {"dbjax": dbjax, "jax": jax, "np": np}
    exec(compile(block, "partitions.md", "exec"), names)
    exchanged = names["run"].trace.partition_bytes()
    assert exchanged.shape == (2, 2)
    assert exchanged.diagonal().min() > 100 * (exchanged.sum() - exchanged.trace())


def main():
    import contextlib
    import io
    import sys
    import tempfile

    for name, check in sorted(globals().items()):
        if name.startswith("check_") and (len(sys.argv) < 2 or sys.argv[1] in name):
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                with contextlib.redirect_stdout(io.StringIO()):
                    check(folder) if name == "check_a_checkpoint_goes_on" else check()
            print(name, file=sys.stderr, end=" ")
            print(round(time.perf_counter() - begun, 1), file=sys.stderr)
            print(name)


if __name__ == "__main__":
    main()
