"""Anything else through `from_iterators`: here a pipeline of grain's."""

import json

import numpy as np
import optax
import pytest

import dbjax

grain = pytest.importorskip("grain.python")


class Points:
    """A source as grain has them: one record at a time."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = np.float32(i / 24)
        return {"x": x, "y": 3 * x}


def pipeline(replica, replicas):
    """Each replica has a part of the records, shuffled anew in each epoch."""
    records = grain.MapDataset.source(Points())[replica::replicas]
    batches = records.shuffle(seed=7).repeat().batch(4)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.to_iter_dataset(options))


def data(replicas=3):
    made = dbjax.from_iterators(pipeline)
    made.start(replicas)
    return made


def test_replicas_have_parts_of_their_own():
    served = data()
    parts = [
        np.concatenate([served.batch(replica, step)["x"] for step in range(2)])
        for replica in range(3)
    ]
    every = np.sort(np.concatenate(parts))
    np.testing.assert_array_equal(every, np.arange(24, dtype=np.float32) / 24)


def test_its_state_is_honoured():
    served, other = data(), data()
    for step in range(5):
        served.batch(1, step)
    state = json.loads(json.dumps(served.get_state()))
    other.set_state(state)
    for step in range(5, 9):
        want = served.batch(1, step)
        np.testing.assert_array_equal(other.batch(1, step)["x"], want["x"])


def test_a_run_on_it_goes_on_from_a_checkpoint(tmp_path):
    def loss(params, batch):
        return ((params["w"] * batch["x"] - batch["y"]) ** 2).mean()

    def run(eval_fn, folder):
        return dbjax.downpour.train(
            loss, {"w": np.zeros((), np.float32)}, dbjax.from_iterators(pipeline),
            optimizer=optax.sgd(0.3), replicas=3, steps=60, eval_fn=eval_fn,
            eval_every=10, checkpoint_dir=folder, checkpoint_every=10,
        )  # fmt: skip

    class Stop(Exception):
        pass

    def stop(params, step, time):
        if step >= 40:
            raise Stop
        return {}

    want = run(lambda *_: {}, tmp_path / "whole")
    with pytest.raises(Stop):
        run(stop, tmp_path / "parts")
    got = run(lambda *_: {}, tmp_path / "parts")
    assert got.params["w"] == want.params["w"]
    assert abs(float(got.params["w"]) - 3) < 0.5
