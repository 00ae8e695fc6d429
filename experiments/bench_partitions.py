"""Model partitions: speed against one device, locally connected layers, memory, bytes.

  python -m experiments.bench_partitions --full

What needs devices of its own runs in a process of its own, by turns with what it is
compared to. `--full` trains the network of 1.7 billion parameters as well: it takes 21
GiB of memory and some minutes.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dbjax
from dbjax.models.dense import SPEECH_SIZES, exchanged_bytes
from dbjax.models.locally_connected import Geometry, named_padding
from dbjax.models.vision import PRESETS
from experiments.bench_partition_children import child
from experiments.bench_table import Options, Row, Section, make_parser, run

BATCH = 128


def speech(options: Options) -> list[Row]:
    """Loss and gradient of the speech network, on one and two cores."""
    rounds, turns = (3, 1) if options.quick else (20, options.rounds)
    kinds = {
        "one device on one core": {"devices": 1, "cores": 1},
        "one device on both cores": {"devices": 1, "cores": 2},
        "two partitions on two cores": {"devices": 2, "cores": 2},
    }
    seen: dict[str, list[float]] = {kind: [] for kind in kinds}
    sent = 0.0
    for _ in range(turns):
        for kind, where in kinds.items():
            result, _ = child("speech_gradient", **where, rounds=rounds, batch=BATCH)
            seen[kind].append(statistics.median(result["seconds"]))
            sent = max(sent, result["sent"])
    one, both, parted = seen.values()
    rows = []
    for name, other, limit in (
        ("one device on one core", one, ">= 1.9"),
        ("one device on both cores", both, ">= 1"),
    ):
        ratio = statistics.median(a / b for a, b in zip(other, parted, strict=True))
        rows.append(
            Row("speech", f"two partitions on two cores, batch {BATCH}",
                f"{1e3 * statistics.median(parted):.0f} ms",
                f"{name}, {1e3 * statistics.median(other):.0f} ms", ratio, limit,
                f"loss and gradient; {turns} turns of {rounds}"),
        )  # fmt: skip
    required = exchanged_bytes(SPEECH_SIZES, BATCH, partitions=2)
    rows.append(
        Row("speech", "bytes that a partition sends", f"{sent:,.0f}",
            f"required, {required:,.0f}", sent / required, "<= 1", "2 partitions"),
    )  # fmt: skip
    return rows


def local(options: Options) -> list[Row]:
    """Forward and both gradients of a locally connected layer, against flax's."""
    cases = [
        ("10M", (32, 32), 8, 12, "VALID"),
        ("10M, images", (48, 48), 3, 14, "SAME"),
        ("125M", (40, 40), 28, 28, "VALID"),
    ]
    if options.quick:
        cases = [("small", (12, 12), 4, 4, "VALID")]
    return [_against_flax(options, *case) for case in cases]


def _against_flax(
    options: Options,
    name: str,
    positions: tuple[int, int],
    channels: int,
    maps: int,
    padding: str,
) -> Row:
    k, batch = 10, 16
    zeros = named_padding(padding, k, 1)
    rows, cols = (n + k - 1 - sum(z) for n, z in zip(positions, zeros, strict=True))
    geometry = Geometry((rows, cols), k, 1, zeros)
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32))

    def ours(x: Any, w: Any, dy: Any) -> Any:
        layer = dbjax.models.locally_connected
        y, back = jax.vjp(lambda x, w: layer(x, w, padding=padding), x, w)
        return y, back(dy)

    def flax(x: Any, w: Any, dy: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:  # what flax.linen.ConvLocal calls
            return lax.conv_general_dilated_local(
                x, w, (1, 1), zeros, (k, k),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip

        y, back = jax.vjp(layer, x, w)
        return y, back(dy)

    count = positions[0] * positions[1] * k * k * channels * maps
    theirs = (
        normal(batch, rows, cols, channels),
        normal(*positions, k * k * channels, maps),
        normal(batch, *positions, maps),
    )
    mine = (
        normal(rows, cols, batch, channels),
        normal(*geometry.kernel_shape(channels, maps)),
        normal(*positions, batch, maps),
    )
    a, b = _pairs(options, (jax.jit(ours), mine), (jax.jit(flax), theirs))
    ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
    what = (
        f"{name}: {positions[0]}x{positions[1]} positions, 10x10x{channels} to {maps}"
    )
    return Row(
        "local", f"{what}, {padding}, {count / 1e6:.1f} M weights, batch {batch}",
        f"{1e3 * statistics.median(a):.0f} ms",
        f"flax's ConvLocal, {1e3 * statistics.median(b):.0f} ms", ratio, ">= 6",
        f"forward and both gradients; {len(a)} rounds",
    )  # fmt: skip


def _pairs(
    options: Options, *programs: tuple[Callable[..., Any], tuple[Any, ...]]
) -> tuple[list[float], ...]:
    """Time programs by turns, warm; seconds."""
    for program, args in programs:
        jax.block_until_ready(program(*args))
    seen: tuple[list[float], ...] = tuple([] for _ in programs)
    for _ in range(2 if options.quick else options.rounds):
        for times, (program, args) in zip(seen, programs, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(program(*args))
            times.append(time.perf_counter() - begin)
    return seen


def memory(options: Options) -> list[Row]:
    """Train the vision networks: the most memory, and the time of a step."""
    presets = {"80M": 16, "330M": 16}
    if options.full:
        presets["1.7B"] = 8
    if options.quick:
        presets = {"80M": 4}
    speed = _memory_speed()
    rows = []
    for preset, batch in presets.items():
        steps = 3 if options.quick else 6
        made, peak = child(
            "train_vision", preset=preset, devices=2, batch=batch, steps=steps
        )
        nbytes = 4 * made["parameters"]
        # Weights are read by the forward and the backward pass, their gradients are
        # written, checked and read; sums and weights are read and written.
        traffic = 9 * nbytes
        predicted = 3 * nbytes + made["temporary"]
        what = f"{preset}, 2 partitions, batch {batch}, Adagrad"
        rows += [
            Row("memory", f"{what}: most memory", f"{peak / 2**30:.2f} GiB",
                f"parameters, sums, gradients and temporaries as compiled, "
                f"{predicted / 2**30:.2f} GiB", peak / predicted,
                "<= 22 GiB" if preset == "1.7B" else "",
                f"{made['parameters']:,} parameters; by the kernel, from outside"),
            Row("memory", f"{what}: a step", f"{made['step']:.2f} s",
                f"memory traffic at {speed / 1e9:.1f} GB/s, {traffic / speed:.2f} s",
                traffic / speed / made["step"], "", f"{steps} steps"),
        ]  # fmt: skip
    return rows


def _memory_speed() -> float:
    """Bytes a second that both cores read and write together."""
    a, b = (jnp.full(1 << 27, 1.0) for _ in range(2))
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)
    a, seen = add(a, b), []
    for _ in range(7):
        begin = time.perf_counter()
        a = jax.block_until_ready(add(a, b))
        seen.append(time.perf_counter() - begin)
    return 3 * a.nbytes / statistics.median(seen)


def partitions(options: Options) -> list[Row]:
    """Bytes that two partitions of the vision network send, as compiled."""
    rows = []
    for preset in ("small",) if options.quick else ("small", "80M"):
        batch = 16
        kinds, _ = child("vision_bytes", preset=preset, devices=2, batch=batch)
        sizes = PRESETS[preset]
        features = kinds["all-gather"] + kinds["reduce-scatter"]
        for kind, sent, must in (
            ("borders", kinds["collective-permute"], sizes.halo_bytes(batch, 2)),
            ("features", features, sizes.feature_bytes(batch, 2)),
            ("losses", kinds["all-reduce"], 4 * batch),
        ):
            rows.append(
                Row("bytes", f"{preset}, 2 partitions, batch {batch}, {kind}",
                    f"{sent:,.0f}", f"required, {must:,.0f}", sent / must, "<= 1",
                    "loss and gradient, as compiled"),
            )  # fmt: skip
    return rows


def downpour(options: Options) -> list[Row]:
    """Two replicas of two partitions train the speech network; it replays."""
    steps = 8 if options.quick else 80
    made, _ = child("speech_downpour", replicas=2, devices=2, batch=BATCH, steps=steps)
    own = sum(made["exchanged"][i][i] for i in range(2))
    total = sum(map(sum, made["exchanged"]))
    what = f"speech, 2 replicas x 2 partitions on threads, {steps} minibatches"
    return [
        Row("downpour", f"{what}: test loss", f"{made['after']:.3f}",
            f"before, {made['before']:.3f}", made["after"] / made["before"], "< 1",
            f"staleness {made['staleness']:.2f}; {made['seconds']:.0f} s"),
        Row("downpour", f"{what}: replayed", "same bits" if made["same"] else "DIFFER"),
        Row("downpour", f"{what}: bytes with a partition's own shard", f"{own:,}",
            f"all, {total:,}", own / total, "", "the rest: biases both hold"),
    ]  # fmt: skip


SECTIONS: dict[str, Section] = {
    "speech": speech,
    "local": local,
    "bytes": partitions,
    "memory": memory,
    "downpour": downpour,
}


def main() -> None:
    """Run the sections asked for."""
    parser = make_parser("Model partitions.", SECTIONS, rounds=5)
    parser.add_argument("--full", action="store_true", help="train 1.7 billion, too")
    run(SECTIONS, parser.parse_args())


if __name__ == "__main__":
    main()
