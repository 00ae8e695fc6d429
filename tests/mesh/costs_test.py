"""The costs of a partition, against programs written by hand and programs compiled."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import pytest

from dbjax.mesh import partition_costs
from dbjax.mesh.costs import Costs, Total, collectives_of

HEAD = "HloModule m, is_scheduled=true, num_partitions=8\n"
WHILE = "(f32[8]{0}) while(%x), condition=%cond, body=%body"


def program(entry, rest=""):
    return f"{HEAD}{rest}\nENTRY %main (x: f32[8]) -> f32[8] {{\n  {entry}\n}}\n"


def body(line):
    return f"%body (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"


@pytest.mark.parametrize(
    ("kind", "groups", "devices", "sent"),
    [
        # 64 bytes of result
        ("all-reduce", "replica_groups={{0,1,2,3},{4,5,6,7}}", 4, 96),
        ("all-reduce", "replica_groups=[2,4]<=[8]", 4, 96),
        ("all-reduce", "replica_groups=[4,2]<=[2,4]T(1,0)", 2, 64),
        ("all-reduce", "replica_groups={}", 8, 112),
        ("all-reduce", "replica_groups={{0},{1}}", 1, 0),
        ("all-reduce", "replica_groups=mesh['a'=2,'b'=1,'c'=4] {'c'}", 4, 96),
        ("all-reduce", "replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", 4, 96),
        ("all-gather", "replica_groups=[2,4]<=[8], dimensions={0}", 4, 48),
        ("reduce-scatter", "replica_groups=[2,4]<=[8], dimensions={0}", 4, 192),
        ("all-to-all", "replica_groups=[2,4]<=[8]", 4, 48),
        ("collective-permute", "source_target_pairs={{0,1},{1,2},{3,3}}", 2, 64),
        ("collective-permute", "source_target_pairs={{3,3}}", 0, 0),
    ],
)
def test_bytes_that_a_device_sends_by_kind_and_groups(kind, groups, devices, sent):
    line = f"ROOT %c.1 = f32[4,4]{{1,0:T(8,128)}} {kind}(%x), channel_id=1, {groups}"
    (found,) = collectives_of(program(line))
    assert (found.kind, found.devices, found.result_bytes) == (kind, devices, 64)
    assert found.sent_bytes == sent


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("%a = bf16[10]{0} all-reduce(%x), replica_groups={}", 20),
        ("%a = pred[] all-reduce(%x), replica_groups={}", 1),
        ("%a = f8e4m3fn[6,2]{1,0} all-reduce(%x), replica_groups={}", 12),
        ("%a = s4[3] all-reduce(%x), replica_groups={}", 2),
        ("%a = (f32[], /*index=1*/bf16[2,3]{1,0}) all-reduce(%x, %y), replica_groups={}", 16),
        ("%a = c64[2] all-reduce-start(%x), replica_groups={}", 16),
        ("%a = (f32[1,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%x), replica_groups={}", 64),
        ("%a = ((f32[1], f32[2]), (f32[8], f32[16])) all-gather-start(%x), replica_groups={}", 96),
        ("%a = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}", 16),
    ],
)  # fmt: skip
def test_result_bytes_of_every_way_to_write_a_shape(line, size):
    (found,) = collectives_of(program(line))
    assert found.result_bytes == size


def test_what_is_started_and_awaited_counts_once():
    wrapped = "%w (x: f32[8]) -> f32[1] {\n  ROOT %s = f32[1] reduce-scatter(%x), replica_groups={}\n}"
    entry = """%a = f32[8] all-reduce-start(%x), replica_groups={}
  %b = f32[8] all-reduce-done(%a)
  %c = ((f32[8]), f32[1], u32[]) async-start(%b), calls=%w
  ROOT %d = f32[1] async-done(%c), calls=%w"""
    found = collectives_of(program(entry, wrapped))
    assert [one.kind for one in found] == ["all-reduce", "reduce-scatter"]


LINE = "%r = f32[8] all-reduce(%x), replica_groups={}"
KNOWN = 'backend_config={"known_trip_count":{"n":"7"}}'


@pytest.mark.parametrize(
    ("entry", "times", "why"),
    [
        (f"%w = {WHILE}, {KNOWN}", 7, ""),
        (f"%w = {WHILE}", 1, "unknown length"),
        ("%w = f32[8] call(%x), to_apply=%body", 1, ""),
        ("%w = f32[8] custom-call(%x), called_computations={%cond, %body}", 1, ""),
        ("%w = f32[8] novelty(%x), runs=%body", 1, "no known way"),
        ("%w = f32[8] conditional(%x), branch_computations={%body, %cond}", 1, "branch"),
        ("%w = f32[8] fusion(%x), calls=%cond, metadata={op_name=\" all-reduce(\"}", 1, "no known way"),
    ],
)  # fmt: skip
def test_loops_multiply_and_what_is_not_known_is_said(entry, times, why):
    empty = "%cond (x: f32[8]) -> pred[] {\n  ROOT %p = pred[] parameter(0)\n}\n"
    found = collectives_of(program(entry, body(LINE) + empty))
    assert sum(one.times for one in found) == times
    assert all((why in one.uncertain) and bool(one.uncertain) == bool(why) for one in found)  # fmt: skip


def test_loops_in_loops_multiply_and_conditions_run_once_more():
    inner = f"%inner (x: f32[8]) -> f32[8] {{\n  {LINE}\n}}\n"
    cond = f"%cond (x: f32[8]) -> pred[] {{\n  {LINE}\n}}\n"
    none = "%none (x: f32[8]) -> pred[] {\n  %p = pred[] parameter(0)\n}\n"
    middle = body(f"%v = f32[8] while(%x), condition=%none, body=%inner, {KNOWN}")
    text = program(f"%w = {WHILE}, {KNOWN}", inner + cond + none + middle)
    assert sorted(one.times for one in collectives_of(text)) == [8, 49]


def test_unknown_writing_is_an_error():
    with pytest.raises(ValueError, match="groups written as 'novel"):
        collectives_of(program("%a = f32[8] all-reduce(%x), replica_groups=novel"))
    with pytest.raises(ValueError, match="no program has an entry"):
        collectives_of("nothing")


def test_the_table_adds_up_and_names_what_is_uncertain():
    text = program(f"%w = {WHILE}\n  {LINE}", body(LINE.replace("%r", "%q")) + "%cond (x: f32[8]) -> pred[] {\n}\n")  # fmt: skip
    costs = Costs(8, collectives_of(text), 2048, 32, 32, 0, None)
    assert costs.by_kind() == {"all-reduce": Total(2, 64, 112.0, 896.0)}
    assert costs.total == Total(2, 64, 112.0, 896.0)
    assert "all-reduce q: counted once, in a loop of unknown length" in str(costs)
    assert "2.0 KiB" in str(costs)


def test_on_one_device_nothing_is_sent():
    costs = partition_costs(jax.jit(lambda x: x @ x), jax.ShapeDtypeStruct((8, 8), "f"))
    assert (costs.devices, costs.total, costs.argument_bytes) == (1, Total(), 256)
    assert costs.flops == 2 * 8**3
    with pytest.raises(TypeError, match="takes no arguments"):
        partition_costs(jax.jit(lambda x: x).lower(1.0).compile(), 1.0)


@pytest.mark.multidevice
def test_costs_of_a_partitioned_network_are_those_of_the_textbook():
    script = """
        import json, jax, jax.numpy as jnp
        jax.config.update("jax_num_cpu_devices", 8)
        from jax.sharding import NamedSharding, PartitionSpec as P
        import dbjax
        from dbjax.mesh import partition_costs
        mesh = dbjax.make_mesh(data=2, model=4)
        def struct(shape, *spec):
            return jax.ShapeDtypeStruct(shape, "f", sharding=NamedSharding(mesh, P(*spec)))
        def loss(params, x):
            hidden = jnp.tanh(x @ params[0])
            return jnp.mean((hidden @ params[1]) ** 2)
        params = [struct((64, 128), None, "model"), struct((128, 16), "model")]
        costs = partition_costs(jax.grad(loss), params, struct((32, 64), "data"))
        def laps(x):
            return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "data"), None), x, None, 5)[0]
        ring = lambda x: jax.lax.ppermute(x, "model", [(0, 1), (1, 2), (2, 3)])
        def of(f):
            spec = P("data", "model")
            f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
            return partition_costs(f.lower(struct((2, 4), "data", "model"))).by_kind()
        print(json.dumps([costs.devices, costs.argument_bytes, costs.by_kind(), of(laps), of(ring)]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"NPROC": "64", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    devices, arguments, step, laps, ring = json.loads(done.stdout)
    assert devices == 8
    assert arguments == 4 * (64 * 32 + 32 * 16 + 16 * 64)
    # Activations [16, 16] over four partitions, then both gradients over two halves of
    # the batch; XLA may merge the two.
    outputs, weights = 4 * 16 * 16, 4 * (64 * 32 + 32 * 16)
    assert set(step) == {"all-reduce"}
    assert step["all-reduce"][1] == outputs + weights
    assert step["all-reduce"][2] == 2 * (3 / 4 * outputs + 1 / 2 * weights)
    assert laps == {"all-reduce": [5, 20, 20.0, 160.0]}
    assert ring == {"collective-permute": [1, 4, 4.0, 24.0]}  # 3 senders in 2 rings
