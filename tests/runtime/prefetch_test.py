import gc
import pickle
import threading

import numpy as np
import pytest

import dbjax
from dbjax.runtime.prefetch import prefetch


class Numbers:
    """Says which batch it is, and remembers what was asked, by which thread."""

    def __init__(self, gate=None):
        self.asked, self.gate = [], gate

    def __reduce__(self):
        return Numbers, ()

    def batch(self, replica, step):
        self.asked.append((replica, step, threading.current_thread().name))
        if self.gate is not None and "prefetch" in self.asked[-1][2]:
            assert self.gate.wait(30)
        if step == 13:
            raise ValueError(f"replica {replica} has a damaged file")
        return np.array([replica, step])

    def ahead(self):
        return sorted((r, s) for r, s, name in list(self.asked) if "prefetch" in name)


def settle(data):
    """Wait until what has begun is there."""
    for mine in list(data._coming.values()):
        for future in list(mine.values()):
            future.exception()


@pytest.mark.parametrize("threads", [1, 3])
def test_it_serves_what_the_data_serves(threads):
    data = prefetch(Numbers(), ahead=3, threads=threads)
    asked = [(0, 0), (0, 1), (4, 0), (0, 2), (0, 2), (0, 9), (4, 1), (0, 10), (0, 3)]
    for replica, step in asked:
        assert data.batch(np.int64(replica), step).tolist() == [replica, step]


def test_what_follows_is_made_before_it_is_asked_for():
    plain = Numbers()
    data = prefetch(plain, ahead=2)
    data.batch(0, 0)
    settle(data)
    assert plain.ahead() == [(0, 1), (0, 2)]
    data.batch(0, 1)
    settle(data)
    assert plain.ahead() == [(0, 1), (0, 2), (0, 3)]
    assert len(plain.asked) == 4  # nothing is made twice


def test_a_jump_forgets_what_lies_behind_or_too_far_ahead():
    data = prefetch(Numbers(), ahead=2)
    for step in (0, 7, 3):
        data.batch(0, step)
        assert sorted(data._coming[0]) == [step + 1, step + 2]


def test_what_waits_is_bounded_over_all_replicas():
    plain = Numbers()
    data = prefetch(plain, ahead=2, most=5)
    for replica in range(6):
        data.batch(replica, 0)
    settle(data)
    assert plain.ahead() == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    assert data.batch(5, 1).tolist() == [5, 1]


def test_an_error_comes_to_who_asks():
    data = prefetch(Numbers(), ahead=2)
    assert data.batch(2, 11).tolist() == [2, 11]
    assert data.batch(2, 12).tolist() == [2, 12]
    with pytest.raises(ValueError, match="replica 2 has a damaged file"):
        data.batch(2, 13)
    assert data.batch(2, 14).tolist() == [2, 14]


def test_it_pickles_without_what_is_to_come():
    gate = threading.Event()
    data = prefetch(Numbers(gate), ahead=4, threads=3, most=7)
    data.batch(0, 0)
    again = pickle.loads(pickle.dumps(data))
    gate.set()
    assert (again.ahead, again.threads, again.most) == (4, 3, 7)
    assert again._coming == {}
    assert again.batch(0, 1).tolist() == [0, 1]


def threads_of_it():
    return [t for t in threading.enumerate() if t.name.startswith("dbjax-prefetch")]


def test_threads_end_when_nobody_holds_the_data_or_it_is_closed():
    for end in (lambda data: data.close(), lambda data: None):
        data = prefetch(Numbers())
        data.batch(0, 0)
        mine = threads_of_it()
        assert mine
        end(data)
        if not data.close.alive:
            assert data.batch(0, 5).tolist() == [0, 5]
        del data
        gc.collect()
        for thread in mine:
            thread.join(30)
            assert not thread.is_alive()


def test_many_threads_may_ask():
    data, seen = prefetch(Numbers(), ahead=2, threads=2, most=4), {}

    def serve(replica):
        seen[replica] = [data.batch(replica, step).tolist() for step in range(12)]

    threads = [threading.Thread(target=serve, args=(r,)) for r in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {r: [[r, s] for s in range(12)] for r in range(4)}


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="data is a IteratorData: allowed is what"):
        prefetch(dbjax.from_iterators(lambda replica, replicas: iter(())))
    with pytest.raises(TypeError, match="data is a list"):
        prefetch([])
    for name in ("ahead", "threads", "most"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            prefetch(Numbers(), **{name: 0})


class Lines:
    """A source of points on a line, for the runs below."""

    def __len__(self):
        return 64

    def __getitem__(self, rows):
        x = (np.asarray(rows) / 64).astype(np.float32)
        return {"x": x, "y": 3 * x}


def test_a_run_is_the_same_with_and_without_and_after_a_resume(tmp_path):
    import optax

    def loss(params, batch):
        return ((params["w"] * batch["x"] - batch["y"]) ** 2).mean()

    def run(data, steps=40, **options):
        return dbjax.downpour.train(
            loss, {"w": np.zeros((), np.float32)}, data, optimizer=optax.sgd(0.1),
            replicas=3, steps=steps, **options,
        )  # fmt: skip

    plain = dbjax.data.from_source(Lines(), batch_size=4)
    want = run(plain)
    got = run(prefetch(plain, ahead=3))
    assert got.trace.diff(want.trace) is None
    assert got.params["w"] == want.params["w"]
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 10}

    class Stop(Exception):
        pass

    def stop(params, step, time):
        if step >= 25:
            raise Stop
        return {}

    with pytest.raises(Stop):
        run(prefetch(plain), eval_fn=stop, eval_every=5, **options)
    went_on = run(prefetch(plain), eval_fn=lambda *_: {}, eval_every=5, **options)
    assert went_on.params["w"] == want.params["w"]
