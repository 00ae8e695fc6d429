import gzip
import json
import pickle
import zipfile

import numpy as np
import pytest

import dbjax
from dbjax import trace as trace_lib
from dbjax.trace import COMPUTE, FAIL, FETCH, PUSH, RESTART, Trace, groups
from tests import problems, textbook
from tests.restored import random_restored


def two_shards() -> Trace:
    """Two replicas, two shards, three pushes; replica 1 is behind, and loses one."""
    rows = [
        # kind, time, start, replica, shard, step, batch, version, base, count, id
        (FETCH, 0.1, 0.0, 0, 0, 0, -1, 0, -1, 0, -1),
        (FETCH, 0.1, 0.0, 0, 1, 0, -1, 0, -1, 0, -1),
        (FETCH, 0.1, 0.0, 1, 0, 1, -1, 0, -1, 0, -1),
        (FETCH, 0.1, 0.0, 1, 1, 1, -1, 0, -1, 0, -1),
        (COMPUTE, 1.1, 0.1, 0, -1, 0, 0, -1, -1, 0, -1),
        (COMPUTE, 1.6, 0.1, 1, -1, 1, 0, -1, -1, 0, -1),
        (PUSH, 1.8, 1.7, 1, 1, 1, -1, 1, 0, 1, 0),
        (PUSH, 1.9, 1.8, 0, 0, 0, -1, 1, 0, 1, 0),
        (PUSH, 1.9, 1.8, 0, 1, 0, -1, 2, 0, 1, 0),
        (PUSH, 2.0, 1.9, 1, 0, 1, -1, 2, 0, 1, 0),
        (FETCH, 2.1, 2.0, 0, 0, 2, -1, 2, -1, 0, -1),
        (FETCH, 2.1, 2.0, 0, 1, 2, -1, 1, -1, 0, -1),
        (COMPUTE, 3.1, 2.1, 0, -1, 2, 1, -1, -1, 0, -1),
        (PUSH, 3.3, 3.2, 0, 0, 2, -1, 3, 2, 1, 1),
        (FAIL, 4.1, 4.1, 1, -1, -1, -1, -1, -1, 3, -1),
    ]
    names = "kind time start replica shard step batch version base count id".split()
    columns = dict(zip(names, np.array(rows).T, strict=True))
    return Trace.from_columns(
        {"replicas": 2, "shards": 2, "batch_size": 16, "seed": 7},
        [{"step": 2, "time": 2.0, "loss": 0.5}],
        **columns,
        bytes=40,
    )


def random_delays(seed: int, steps: int = 200, most: int = 9) -> np.ndarray:
    draws = np.random.default_rng(seed).integers(0, most + 1, steps)
    return np.minimum(draws, np.arange(steps))


def test_missing_columns_hold_none():
    trace = Trace.from_columns({"replicas": 1, "shards": 1}, kind=[COMPUTE], time=[2])
    assert len(trace) == 1
    assert trace.header["schema"] == trace_lib.SCHEMA
    assert (trace.shard[0], trace.version[0], trace.digest[0]) == (-1, -1, 0)
    assert trace.start[0] == 2
    assert trace.time.dtype == np.float64 and trace.digest.dtype == np.uint64


@pytest.mark.parametrize(
    "columns, words",
    [
        ({}, "'kind' must be given"),
        ({"kind": [0, 1], "replica": [0]}, "'kind' has 2 rows"),
        ({"kind": [0], "worker": [0]}, "no column 'worker'"),
        ({"kind": [0], "step": [0.5]}, "'step', row 0: 0.5 does not fit int64"),
        ({"kind": [300]}, "'kind', row 0: 300 does not fit uint8"),
        ({"kind": [0], "digest": [-1]}, "does not fit uint64"),
        ({"kind": ["PUSH"]}, "must be numbers"),
    ],
)
def test_bad_columns(columns, words):
    with pytest.raises(ValueError, match=words):
        Trace.from_columns({"replicas": 1, "shards": 1}, **columns)


@pytest.mark.parametrize("header", [{"shards": 1}, {"replicas": 0, "shards": 1}])
def test_bad_header(header):
    with pytest.raises(ValueError, match=r"header\['replicas'\]"):
        Trace.from_columns(header, kind=[COMPUTE])


def test_take():
    trace = two_shards()
    assert trace.take(trace.kind == PUSH).version.tolist() == [1, 1, 2, 2, 3]
    assert len(trace.take(slice(0, 4))) == len(trace.take([3, 2, 1, 0])) == 4


def test_statistics():
    trace = two_shards()
    trace.validate()
    assert trace.staleness().tolist() == [[1, 0], [0, 1], [0, -1]]
    assert trace.minibatches_per_replica().tolist() == [2, 1]
    assert trace.samples_per_replica().tolist() == [32, 16]
    np.testing.assert_allclose(trace.utilisation(), np.array([2.0, 1.5]) / 4.1)
    assert trace.throughput() == pytest.approx(3 / 4.1)
    lost = {"gradients": 3, "updates": 0, "not_finite": 0, "dropped": 0}
    assert trace.lost() == lost
    summary = json.loads(json.dumps(trace.summary()))
    assert (summary["pushes"], summary["staleness_max"]) == (3, 1)


def test_a_refused_push_counts_once():
    trace = two_shards()
    status = np.zeros(len(trace), int)
    status[[6, 9]] = trace_lib.NOT_FINITE  # the push of replica 1, on both shards
    status[8] = trace_lib.DROPPED
    trace = Trace.from_columns(trace.header, **(trace.columns() | {"status": status}))
    lost = {"gradients": 3, "updates": 0, "not_finite": 1, "dropped": 1}
    assert trace.lost() == lost


def test_staleness_does_not_mind_sparse_ids():
    trace = two_shards()
    sparse = np.where(trace.id >= 0, trace.id * 10**12 + 5, -1)
    other = Trace.from_columns(trace.header, **(trace.columns() | {"id": sparse}))
    np.testing.assert_array_equal(other.staleness(), trace.staleness())


def test_an_empty_trace_has_statistics():
    trace = Trace.from_columns({"replicas": 2, "shards": 3}, kind=np.zeros(0, int))
    trace.validate()
    assert trace.staleness().shape == (0, 3)
    assert trace.throughput() == trace.duration() == 0
    assert trace.utilisation().tolist() == [0, 0]
    assert trace.summary()["pushes"] == 0


@pytest.mark.parametrize(
    "row, column, value, words",
    [
        (0, "kind", 9, r"row 0 \(kind 9, .*kind is 9"),
        (5, "replica", 2, "replica is 2; it must be from 0 to 1"),
        (6, "shard", -1, "shard is -1"),
        (8, "version", 3, r"row 8 \(PUSH, replica 0, shard 1\): version is 3.* 2 is"),
        (10, "version", 3, "fetches version 3 before a push has made it"),
        (13, "base", 3, "base is 3; it must be from 0 to 2"),
        (13, "base", -1, "base is -1"),
        (13, "id", 0, "id 0 is not above"),
        (13, "count", 2, "pushed 3 gradients and computed 2"),
        (4, "batch", 5, r"row 12 .*minibatch 1 goes back"),
        (3, "time", np.nan, "time is nan; it must be finite"),
    ],
)
def test_validate_names_the_first_row(row, column, value, words):
    columns = two_shards().columns()
    columns[column] = columns[column].copy()
    columns[column][row] = value
    trace = Trace.from_columns(two_shards().header, **columns)
    with pytest.raises(ValueError, match=words):
        trace.validate()


def restored() -> Trace:
    """One shard and two replicas: version 2 is lost, which replica 1 has seen."""
    rows = [
        # kind, replica, shard, step, batch, version, base, count, id, incarnation
        (FETCH, 0, 0, 0, -1, 0, -1, 0, -1, 0),
        (COMPUTE, 0, -1, 0, 0, -1, -1, 0, -1, 0),
        (PUSH, 0, 0, 0, -1, 1, 0, 1, 0, 0),
        (FETCH, 0, 0, 1, -1, 1, -1, 0, -1, 0),
        (COMPUTE, 0, -1, 1, 1, -1, -1, 0, -1, 0),
        (PUSH, 0, 0, 1, -1, 2, 1, 1, 1, 0),
        (FAIL, -1, 0, -1, -1, 1, -1, 1, -1, 1),
        (RESTART, -1, 0, -1, -1, 1, -1, 0, -1, 1),
        (FETCH, 1, 0, 2, -1, 2, -1, 0, -1, 0),  # it was on its way
        (COMPUTE, 1, -1, 2, 0, -1, -1, 0, -1, 0),
        (PUSH, 0, 0, 1, -1, 2, 1, 1, 1, 1),  # what was lost, once more
        (FETCH, 0, 0, 3, -1, 1, -1, 0, -1, 1),
        (PUSH, 1, 0, 2, -1, 3, 2, 1, 0, 1),
        (COMPUTE, 0, -1, 3, 2, -1, -1, 0, -1, 0),
        (PUSH, 0, 0, 3, -1, 4, 1, 1, 2, 1),
    ]
    names = "kind replica shard step batch version base count id incarnation".split()
    columns = dict(zip(names, np.array(rows).T, strict=True))
    time = np.arange(float(len(rows)))
    return Trace.from_columns({"replicas": 2, "shards": 1}, **columns, time=time)


def test_a_restored_shard_counts_on():
    trace = restored()
    trace.validate()
    # The push that the shard handled twice counts as it was handled last.
    assert trace.staleness()[:, 0].tolist() == [0, 0, 1, 2]
    lost = {"gradients": 0, "updates": 1, "not_finite": 0, "dropped": 0}
    assert trace.lost() == lost


@pytest.mark.parametrize(
    "row, column, value, words",
    [
        (7, "incarnation", 2, r"row 7 \(RESTART, shard 0\): incarnation is 2; by its "),
        (7, "version", 3, "version is 3; it must be from 0 to 2, the newest"),
        (7, "version", -1, "version is -1; it must be from 0 to 2"),
        (8, "version", 3, "fetches version 3 before a push has made it"),
        (8, "incarnation", 2, "incarnation is 2; by its RESTART rows .* incarnation 1"),
        (5, "incarnation", 1, "incarnation is 1; by its RESTART rows .* incarnation 0"),
        (14, "incarnation", 0, "incarnation is 0; by its RESTART rows"),
        (10, "version", 3, r"version is 3; .* 2 is the next"),
        (11, "version", 0, "fetches version 0 of an incarnation that began from"),
        (12, "base", 1, "base is 1; its oldest gradient was computed on version 2"),
        (12, "step", 7, "the replica had fetched nothing"),
        (14, "id", 1, "row 14 .*: id 1 is not above"),
        (14, "count", 2, "pushed 4 gradients and computed 3"),
    ],
)
def test_validate_knows_restored_shards(row, column, value, words):
    columns = restored().columns()
    columns[column] = columns[column].copy()
    columns[column][row] = value
    trace = Trace.from_columns(restored().header, **columns)
    with pytest.raises(ValueError, match=words):
        trace.validate()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shards", [1, 3])
def test_histories_of_restored_shards(seed, shards):
    """Staleness is what the shard has handled and the replica has not seen."""
    trace = random_restored(seed, shards=shards, n_push=1 + seed % 3)
    trace.validate()
    seen, computed, handled = {}, {}, {}
    lives = [[[]] for _ in range(shards)]
    for row in range(len(trace)):
        r, s = int(trace.replica[row]), int(trace.shard[row])
        match trace.kind[row]:
            case trace_lib.FETCH:
                line = lives[s][trace.incarnation[row]]
                seen[r, s] = set(line[: trace.version[row]])
            case trace_lib.COMPUTE:
                held = [seen[r, s] for s in range(shards)]
                computed.setdefault(r, []).append((trace.step[row], held))
            case trace_lib.PUSH:
                end = [step for step, _ in computed[r]].index(trace.step[row]) + 1
                held = computed[r][end - trace.count[row]][1]
                push = handled.setdefault((r, int(trace.id[row])), [-1] * shards)
                push[s] = len(set(lives[s][-1]) - held[s])
                lives[s][-1].append(row)
            case trace_lib.RESTART if s >= 0:
                lives[s].append(lives[s][-1][: trace.version[row]])
    assert trace.staleness().tolist() == list(handled.values())
    assert trace.lost()["updates"] > 0


@pytest.mark.parametrize("seed", range(10))
def test_events_of_restored_shards_in_any_order(seed):
    trace = random_restored(seed, shards=2, n_push=1 + seed % 2)
    shuffled = trace.take(np.random.default_rng(seed).permutation(len(trace)))
    found = Trace.from_events(trace.header, **shuffled.columns())
    assert sorted(found.staleness().tolist()) == sorted(trace.staleness().tolist())
    for shard in range(2):
        of_shard = np.isin(trace.kind, (PUSH, FAIL, RESTART)) & (trace.shard == shard)
        again = np.isin(found.kind, (PUSH, FAIL, RESTART)) & (found.shard == shard)
        assert trace.take(of_shard).diff(found.take(again)) is None


def test_perfetto_of_restored_shards(tmp_path):
    restored().to_perfetto(tmp_path / "run.json")
    events = read_events(tmp_path / "run.json")
    handled = [e for e in events if e["name"].startswith("push of")]
    assert [e["args"]["staleness"] for e in handled] == [0, 0, 0, 1, 2]
    assert {"fail", "restart"} <= {e["name"] for e in events if e["ph"] == "i"}


@pytest.mark.parametrize("seed", range(40))
def test_from_delays_has_these_delays(seed):
    delays = random_delays(seed, steps=1 + 7 * seed, most=1 + seed % 12)
    trace = Trace.from_delays(delays)
    trace.validate()
    np.testing.assert_array_equal(trace.staleness()[:, 0], delays)
    steps = np.arange(len(delays))
    in_flight = [
        np.count_nonzero((steps - delays <= now) & (now <= steps)) for now in steps
    ]
    assert trace.header["replicas"] == max(in_flight)
    for replica in range(trace.header["replicas"]):
        own = trace.take(trace.replica == replica)
        turns = len(own) // 3
        assert own.kind.tolist() == [FETCH, COMPUTE, PUSH] * turns
        assert own.batch[1::3].tolist() == own.id[2::3].tolist() == list(range(turns))
        np.testing.assert_array_equal(own.version[::3], own.base[2::3])
        # What the replica holds when it computes is what it fetched, nothing newer.
        assert np.all(np.diff(own.time) >= 0)


def test_no_delay_is_one_replica_and_a_constant_one_goes_round():
    assert Trace.from_delays(np.zeros(5, int)).header["replicas"] == 1
    trace = Trace.from_delays(np.minimum(3, np.arange(12)))
    pushes = trace.take(trace.kind == PUSH)
    assert pushes.replica.tolist() == [0, 1, 2, 3] * 3


@pytest.mark.parametrize(
    "delays, words",
    [
        ([0, 2], r"delays\[1\] is 2; it must be from 0 to 1"),
        ([0, -1], r"delays\[1\] is -1"),
        ([0.0], "int array"),
        ([], "at least one step"),
        ([0, None], "int array .* not object"),
        ([[[0]]], r"shape \(1, 1, 1\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[0, 0], [1, 2]], r"delays\[1, 1\] is 2; it must be from 0 to 1"),
        ([[0, 0], [-1, 0]], r"delays\[1, 0\] is -1"),
    ],
)
def test_impossible_delays(delays, words):
    with pytest.raises(ValueError, match=words):
        Trace.from_delays(delays)


@pytest.mark.parametrize("seed", range(12))
def test_shards_may_have_delays_of_their_own(seed):
    rng, steps, shards = np.random.default_rng(seed), 1 + 5 * seed, 1 + seed % 4
    most = np.minimum(np.arange(steps)[:, None], rng.integers(0, 9, shards))
    delays = rng.integers(0, most + 1)
    trace = Trace.from_delays(delays)
    trace.validate()
    np.testing.assert_array_equal(trace.staleness(), delays)
    now, began = np.arange(steps), np.arange(steps) - delays.max(axis=1)
    in_flight = [np.count_nonzero((began <= t) & (t <= now)) for t in now]
    assert trace.header["replicas"] == max(in_flight)
    turn = [FETCH] * shards + [COMPUTE] + [PUSH] * shards
    for replica in range(trace.header["replicas"]):
        own = trace.take(trace.replica == replica)
        assert own.kind.tolist() == turn * (len(own) // len(turn))
        assert (np.diff(own.time) >= 0).all() and (own.start <= own.time).all()
    # A gradient is one minibatch, whatever the shards.
    assert trace.step[trace.kind == COMPUTE].tolist() == list(range(steps))
    # Shards that are alike are as many times one shard.
    alike = Trace.from_delays(np.repeat(delays[:, :1], 3, axis=1))
    for shard in range(3):
        own = alike.take((alike.shard == shard) | (alike.kind == COMPUTE)).columns()
        own["shard"] = np.where(own["shard"] < 0, -1, 0)
        one = Trace.from_delays(delays[:, 0])
        assert one.diff(Trace.from_columns(one.header, **own)) is None


@pytest.mark.parametrize("skew", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("seed", range(10))
def test_events_in_any_order_find_a_causal_one(seed, skew):
    rng = np.random.default_rng(seed)
    trace = Trace.from_delays(random_delays(seed, 60))
    # The shard's clock may be behind: names decide, not times.
    time = np.where(trace.kind == PUSH, trace.time - skew, trace.time)
    events = Trace.from_columns(trace.header, **(trace.columns() | {"time": time}))
    shuffled = events.take(rng.permutation(len(events)))
    found = Trace.from_events(trace.header, **shuffled.columns())
    for replica in range(trace.header["replicas"]):
        own = events.take(events.replica == replica)
        assert own.diff(found.take(found.replica == replica)) is None


@pytest.mark.parametrize("seed", range(10))
def test_events_of_two_shards_in_any_order(seed):
    trace = two_shards()
    shuffled = trace.take(np.random.default_rng(seed).permutation(len(trace)))
    found = Trace.from_events(trace.header, trace.evaluations, **shuffled.columns())
    for shard in range(2):  # what a shard saw, it sees in the same order
        own = trace.take((trace.kind == PUSH) & (trace.shard == shard))
        again = found.take((found.kind == PUSH) & (found.shard == shard))
        assert own.diff(again) is None


def test_events_that_wait_for_one_another():
    columns = Trace.from_delays([0, 0]).columns()
    version = columns["version"].copy()
    version[[0, 3]] = 1, 0  # the first fetch sees the push that comes of it
    with pytest.raises(ValueError, match="no causal order: row 0"):
        Trace.from_events(
            {"replicas": 1, "shards": 1}, **columns | {"version": version}
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("row", "column", "value", "words"),
    [
        (8, "version", 4, "PUSH.*: version is 4; .* and 3 is the next"),
        (8, "base", 3, "PUSH.*: base is 3; it must be from 0 to 2"),
        (5, "base", -1, "PUSH.*: base is -1; it must be from 0 to 1"),
        (6, "version", 7, "FETCH.*: it fetches version 7 before a push has made it"),
        (5, "count", 3, "PUSH.*: the replica has pushed 4 gradients and computed 2"),
        (5, "time", np.nan, "PUSH.*: time is nan; it must be finite"),
        (5, "start", np.inf, "PUSH.*: start is inf; it must be finite"),
        (4, "replica", -1, "COMPUTE.*: replica is -1; it must be from 0 to 0"),
        (5, "step", np.nan, "column 'step', row .*: nan does not fit int64"),
    ],
)
def test_events_that_cannot_be_are_named_by_where_they_were_given(
    row, column, value, words, seed
):
    trace = Trace.from_delays([0, 0, 0])
    values = trace.columns()[column].astype(float)
    values[row] = value
    order = np.random.default_rng(seed).permutation(len(trace))
    columns = {n: v[order] for n, v in (trace.columns() | {column: values}).items()}
    with pytest.raises(ValueError, match=words) as caught:
        Trace.from_events(trace.header, **columns)
    assert f"row {order.tolist().index(row)}" in str(caught.value)


def test_events_with_a_hole():
    columns = Trace.from_delays([0, 0, 0]).take([0, 1, 2, 6, 7, 8]).columns()
    with pytest.raises(ValueError, match="version"):
        Trace.from_events({"replicas": 1, "shards": 1}, **columns)


@pytest.mark.parametrize("rows", [0, 1, 15])
def test_round_trip(tmp_path, rows):
    trace = two_shards().take(slice(0, rows))
    trace.save(tmp_path / "a.trace")
    loaded = Trace.load(tmp_path / "a.trace")
    assert trace.diff(loaded) is None
    assert loaded.evaluations == trace.evaluations
    for name, values in trace.columns().items():
        assert getattr(loaded, name).dtype == values.dtype
    with np.load(tmp_path / "a.trace", allow_pickle=False) as archive:
        assert set(archive) == {"header", "evaluations", *trace.columns()}
    trace.save(tmp_path / "b.trace")
    assert (tmp_path / "a.trace").read_bytes() == (tmp_path / "b.trace").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.trace", "b.trace"]


def test_a_header_that_is_not_json_leaves_the_old_file(tmp_path):
    trace = two_shards()
    trace.save(tmp_path / "trace.npz")
    wrong = Trace(**trace.columns(), header=trace.header | {"loss": len})
    with pytest.raises(ValueError, match="JSON-able"):
        wrong.save(tmp_path / "trace.npz")
    assert trace.diff(Trace.load(tmp_path / "trace.npz")) is None


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    trace, path = two_shards(), tmp_path / "trace.npz"
    trace.save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            loaded = Trace.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert trace.diff(loaded) is None, place


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "trace.npz"
    two_shards().save(path)
    good = path.read_bytes()
    for length in [*range(0, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:length])
        words = "truncated" if length > 1 else "not a Trace"
        with pytest.raises(ValueError, match=words):
            Trace.load(path)


def save_parts(path, **changes):
    trace = two_shards()
    header = trace.header | changes.pop("header", {})
    parts = trace.columns() | {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "evaluations": np.frombuffer(b"[]", np.uint8),
    }
    parts |= changes
    np.savez(path, **{name: part for name, part in parts.items() if part is not None})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"header": {"schema": 2}}, "newer than 1"),
        ({"header": {"shards": 0}}, r"header\['shards'\] is 0"),
        ({"step": None}, r"wrong columns: missing \['step'\]"),
        ({"colour": np.zeros(15)}, r"unknown \['colour'\]"),
        ({"step": np.zeros(15, np.int32)}, "'step' must be a numpy array of int64"),
        ({"step": np.zeros(14, np.int64)}, r"wrong columns.*'step' has shape \(14,\)"),
        ({"step": np.array([len] * 15)}, "no valid array 'step'"),
        (
            {"evaluations": np.frombuffer(b"[", np.uint8)},
            "evaluations that is not JSON",
        ),
        ({"evaluations": np.frombuffer(b"[1]", np.uint8)}, "evaluations"),
    ],
)
def test_files_that_do_not_hold_a_trace(tmp_path, changes, words):
    save_parts(tmp_path / "trace.npz", **changes)
    with pytest.raises(ValueError, match=words):
        Trace.load(tmp_path / "trace.npz")


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "trace.npz"
    path.write_bytes(pickle.dumps({"kind": [0]}))
    with pytest.raises(ValueError, match="is a pickle"):
        Trace.load(path)
    path.write_text("kind,time\n")
    with pytest.raises(ValueError, match="not a Trace"):
        Trace.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="no header"):
        Trace.load(path)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none.npz")


def test_diff_names_the_first_row_and_column():
    trace = two_shards()
    assert trace.diff(two_shards()) is None
    columns = {name: values.copy() for name, values in trace.columns().items()}
    columns["version"][9] = 5
    columns["time"][11] = np.nan
    other = Trace(**columns, header=trace.header, evaluations=trace.evaluations)
    words = "row 9 (PUSH, replica 1, shard 0), column 'version': 2 against 5"
    assert trace.diff(other) == words
    assert other.diff(other) is None  # not a number is what it is
    shorter = trace.take(slice(0, 14))
    words = "15 rows against 14, of which row 14 (FAIL, replica 1) is the first"
    assert trace.diff(shorter) == words
    seeded = Trace(**trace.columns(), header=trace.header | {"seed": 8})
    assert trace.diff(seeded) == (
        "header['seed']: 7 against 8; "
        'evaluations[0]: {"loss": 0.5, "step": 2, "time": 2.0} against nothing'
    )


def read_events(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return json.load(file)["traceEvents"]


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_perfetto(tmp_path, name):
    trace, path = two_shards(), tmp_path / name
    trace.to_perfetto(path)
    events = read_events(path)
    names = {e["args"]["name"] for e in events if e["name"].endswith("_name")}
    assert {"replicas", "shards", "replica 1", "shard 1", "evaluations"} <= names
    threads = {(e["pid"], e["tid"]) for e in events if "tid" in e}
    assert len(threads) == len({thread for _, thread in threads}) == 4
    slices = [event for event in events if event["ph"] == "X"]
    computes = [event for event in slices if event["name"] == "compute"]
    assert len(computes) == 3
    assert computes[0]["ts"] == 1e5 and computes[0]["dur"] == 1e6
    assert computes[0]["args"] == {"step": 0, "batch": 0}
    fetches = [event for event in slices if event["name"] == "fetch"]
    assert [f["args"]["versions"] for f in fetches if f["tid"] == 10] == [
        {"0": 0, "1": 0},
        {"0": 2, "1": 1},
    ]
    assert sum(event["name"] == "push" for event in slices) == 3
    handled = [event for event in slices if event["name"].startswith("push of")]
    assert [event["args"]["version"] for event in handled] == [1, 1, 2, 2, 3]
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {"staleness of shard 0", "staleness of shard 1", "loss"}
    assert [e["args"]["count"] for e in events if e["name"] == "fail"] == [3]


@pytest.mark.parametrize("overlap", [False, True])
def test_perfetto_slices_of_a_track_never_overlap(tmp_path, overlap):
    made = Trace.from_delays(random_delays(3))
    trace = Trace(**made.columns(), header=made.header | {"overlap": overlap})
    trace.to_perfetto(tmp_path / "run.json", seconds=1e-3)
    ends, count = {}, 0
    for event in read_events(tmp_path / "run.json"):
        assert event["ph"] in "MXC" and event["pid"] in (1, 2)
        if event["ph"] == "X":
            track = event["pid"], event["tid"]
            assert event["ts"] >= ends.get(track, 0) and event["dur"] >= 0
            ends[track] = event["ts"] + event["dur"]
            count += 1
    assert count == 4 * 200
    with pytest.raises(ValueError, match="seconds must be positive"):
        trace.to_perfetto(tmp_path / "run.json", seconds=0)


def test_keys_too_wide_for_one_integer_stay_apart():
    """Ids may be anything that an int64 holds."""
    ids = np.array([0, 4, 0, 2**62, 0])
    others = np.array([0, 0, 2**62, 5, 0])
    combined = groups.combine((ids, others, ids))
    assert len(set(combined.tolist())) == 4
    assert combined[0] == combined[4]


# from a CSV of pushes


def _write(tmp_path, *lines):
    file = tmp_path / "pushes.csv"
    file.write_text("\n".join(["time,replica,staleness", *lines]))
    return file


@pytest.mark.parametrize("seed", range(5))
def test_pushes_of_a_run_give_its_staleness_and_replay_to_its_parameters(
    tmp_path, seed
):
    run = dbjax.downpour.train(
        problems.loss_fn,
        problems.PARAMS,
        problems.DATA,
        optimizer=problems.SGD,
        replicas=5,
        steps=40,
        runtime=dbjax.Emulated(
            dbjax.Cluster(step_time=dbjax.Gamma(1.0, 1.0)), seed=seed
        ),
    )
    pushes = run.trace.take(run.trace.kind == PUSH)
    rows = zip(pushes.time, pushes.replica, run.trace.staleness()[:, 0], strict=True)
    file = _write(tmp_path, *(f"{float(t)!r},{r},{s}" for t, r, s in rows))
    trace = Trace.from_csv(file)
    trace.validate()
    np.testing.assert_array_equal(trace.staleness(), run.trace.staleness())
    np.testing.assert_array_equal(trace.time[trace.kind == PUSH], pushes.time)
    again = dbjax.replay(
        trace, problems.loss_fn, problems.PARAMS, problems.DATA, optimizer=problems.SGD
    )
    np.testing.assert_array_equal(again.params["w"], run.params["w"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1.0,0,"], "line 2: staleness is ''; allowed is an integer"),
        (["1.0,0"], "line 2 has 2 values: allowed are 3"),
        (["1.0,0,0,4"], "line 2 has 4 values: allowed are 3"),
        (["1.0,0,0", "x,0,0"], "line 3: time is 'x'; allowed is a number"),
        (["1.0,0.5,0"], "line 2: replica is '0.5'; allowed is an integer"),
        (["1.0,0,99999999999999999999"], "line 2: staleness is '9+'; .* of 64 bits"),
        (["1.0,0,0", "", "2.0,0,0"], "line 3 is empty: allowed is one push a line"),
        (["-1.0,0,0"], "line 2: time is -1.0; allowed is 0.0 and more"),
        (["2.0,0,0", "1.0,0,0"], "line 3: time is 1.0; allowed is 2.0 and more"),
        (["1.0,0,0", "inf,0,0"], "line 3: time is inf; allowed is 1.0 and more"),
        (["nan,0,0"], "line 2: time is nan"),
        (["1.0,-1,0"], "line 2: replica is -1; allowed is 0 to 2147483647"),
        (["1.0,0,-1"], "line 2: staleness is -1; allowed is 0 to 0"),
        (["1.0,0,0", "2.0,1,2"], "line 3: staleness is 2; allowed is 0 to 1"),
        (
            ["1.0,0,0", "2.0,1,0", "3.0,0,2"],
            "line 4: staleness is 2; allowed is 0 to 1, the pushes since the replica's",
        ),
        ([], "there is no push in it"),
    ],
)
def test_a_csv_that_cannot_be_is_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as caught:
        Trace.from_csv(_write(tmp_path, *lines))
    assert "pushes.csv" in str(caught.value)


def test_a_push_that_a_csv_leaves_out_is_noticed_where_versions_are_there(tmp_path):
    file = tmp_path / "pushes.csv"
    first, *lines = "time,replica,staleness,version", "1,0,0,1", "2,0,0,2", "3,0,0,3"
    file.write_text("\n".join([first, *lines, "", ""]))
    assert len(Trace.from_csv(file).staleness()) == 3
    for kept, words in (
        ([0, 2], "pushes.csv, line 3: version is 3; allowed is 2"),
        ([1, 2], "pushes.csv, line 2: version is 2; allowed is 1"),
        ([0, 1, 1], "pushes.csv, line 4: version is 2; allowed is 3"),
    ):
        file.write_text("\n".join([first, *(lines[k] for k in kept)]))
        with pytest.raises(ValueError, match=words):
            Trace.from_csv(file)


def test_columns_of_a_csv_are_found_by_name(tmp_path):
    file = tmp_path / "pushes.csv"
    file.write_text("host,staleness, time,replica\na,0,1.0,1\nb,0,2.5,0\n")
    trace = Trace.from_csv(file)
    assert trace.replica[trace.kind == PUSH].tolist() == [1, 0]
    file.write_text("time,replica\n1.0,0\n")
    with pytest.raises(ValueError, match="names no staleness"):
        Trace.from_csv(file)
    file.write_text("time,time,replica,staleness\n1.0,1.0,0,0\n")
    with pytest.raises(ValueError, match="names time twice"):
        Trace.from_csv(file)
    file.write_text("")
    with pytest.raises(ValueError, match="names no time and no replica"):
        Trace.from_csv(file)


# what would have been


def _run(seed, **keywords):
    cluster = dbjax.Cluster(step_time=dbjax.Gamma(1.0, 1.0), latency=0.1)
    return dbjax.downpour.train(
        *_PROBLEM,
        optimizer=problems.ADAGRAD,
        **{"replicas": 4, "steps": 40, "shards": 2} | keywords,
        runtime=dbjax.Emulated(cluster, seed=seed),
    )


_PROBLEM = problems.loss_fn, problems.PARAMS, problems.DATA


def _in_order(trace):
    """Replica and minibatch of each push, as shard 0 handled them."""
    batches = {
        (r, s): b
        for k, r, s, b in zip(
            trace.kind, trace.replica, trace.step, trace.batch, strict=True
        )
        if k == COMPUTE
    }
    pushes = trace.take((trace.kind == PUSH) & (trace.shard == 0))
    return [
        (r, batches[r, s]) for r, s in zip(pushes.replica, pushes.step, strict=True)
    ]


def _plainly(order):
    """Adagrad, one minibatch after the other."""
    rule, flat = textbook.Adagrad(0.05), problems.flat(problems.PARAMS)
    for replica, batch in order:
        flat = rule(flat, problems.gradient(flat, replica, batch))
    return flat


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shards", [1, 3])
def test_without_staleness_it_is_the_plain_loop(seed, shards):
    run = _run(seed, shards=shards)
    trace = run.trace.without_staleness()
    trace.validate()
    assert run.trace.staleness().max() > 0 and not trace.staleness().any()
    assert _in_order(trace) == _in_order(run.trace)
    for exact in (True, False):
        again = dbjax.replay(trace, *_PROBLEM, optimizer=problems.ADAGRAD, exact=exact)
        np.testing.assert_allclose(
            problems.flat(again.params), _plainly(_in_order(run.trace)), rtol=3e-4
        )


def test_without_staleness_everybody_fetches_every_time():
    trace = _run(0, n_fetch=3, warmstart_steps=5).trace.without_staleness()
    trace.validate()
    asked = {"n_fetch": 1, "warmstart_steps": 0, "shards": 2, "steps": 40}
    assert asked.items() <= trace.header.items()
    assert (trace.kind == FETCH).sum() == (trace.kind == PUSH).sum() == 80


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gone", [(0,), (2,), (1, 3)])
def test_without_a_replica_the_others_do_what_they_did(seed, gone):
    run = _run(seed)
    trace = run.trace.without_replicas(*gone)
    trace.validate()
    assert not np.isin(trace.replica, gone).any()
    kept = [(r, b) for r, b in _in_order(run.trace) if r not in gone]
    assert _in_order(trace) == kept and trace.header["steps"] == len(kept)
    # Staleness: those pushes between fetch and push that are not theirs.
    theirs = np.isin(run.trace.replica, gone) & (run.trace.kind == PUSH)
    for shard in range(2):
        old = run.trace.take((run.trace.kind == PUSH) & (run.trace.shard == shard))
        lost = run.trace.version[theirs & (run.trace.shard == shard)]
        want = [
            v - 1 - b - np.sum((lost > b) & (lost < v))
            for v, b, r in zip(old.version, old.base, old.replica, strict=True)
            if r not in gone
        ]
        new = trace.take((trace.kind == PUSH) & (trace.shard == shard))
        assert (new.version - 1 - new.base).tolist() == want
    again = dbjax.replay(trace, *_PROBLEM, optimizer=problems.ADAGRAD)
    compiled = dbjax.replay(trace, *_PROBLEM, optimizer=problems.ADAGRAD, exact=False)
    np.testing.assert_allclose(
        problems.flat(again.params), problems.flat(compiled.params), rtol=3e-4
    )


def test_a_replica_alone_is_never_stale():
    trace = _run(0).trace.without_replicas(0, 1, 3)
    assert not trace.staleness().any()
    again = dbjax.replay(trace, *_PROBLEM, optimizer=problems.ADAGRAD)
    np.testing.assert_allclose(
        problems.flat(again.params), _plainly(_in_order(trace)), rtol=3e-4
    )


def test_nobody_left_out_is_the_same_run():
    run = _run(1)
    again = dbjax.replay(
        run.trace.without_replicas(), *_PROBLEM, optimizer=problems.ADAGRAD
    )
    np.testing.assert_array_equal(again.params["w"], run.params["w"])


def test_what_would_have_been_cannot_always_be_said():
    trace = _run(0).trace
    with pytest.raises(ValueError, match="replica 4 is not among the 4"):
        trace.without_replicas(4)
    with pytest.raises(ValueError, match="nobody pushes"):
        trace.without_replicas(0, 1, 2, 3)
    with pytest.raises(ValueError, match="push 0 of the Trace sums several"):
        _run(0, n_push=3).trace.without_staleness()
    with pytest.raises(ValueError, match="somebody died"):
        restored = random_restored(0)
        restored.without_replicas(0)
