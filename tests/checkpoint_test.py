import itertools
import pathlib
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import checkpoint

DTYPES = [
    *("bool", "int8", "int32", "int64", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
]


def assert_same_bits(got, want):
    want = np.asarray(want)
    assert isinstance(got, np.ndarray)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def everything():
    """Leaves of every kind whose bits a careless way would change."""
    rng = np.random.default_rng(0)
    leaves = {
        f"['layer'].{dtype}/x y": rng.integers(0, 2, (3, 4)).astype(jnp.dtype(dtype))
        for dtype in DTYPES
    }
    special = np.array([0x7FC12345, 0x80000000, 1, 0x7F800000], np.uint32)
    return leaves | {
        "nan payload, -0, subnormal, inf": special.view(np.float32),
        "empty": np.zeros((0, 3), np.float16),
        "": np.float32(2.5),
        "count": 7,
        "strided": np.arange(12.0).reshape(3, 4).T[::2],
        "jax": jax.random.normal(jax.random.key(0), (5,), jnp.bfloat16),
    }


def test_leaves_come_back_with_their_names_dtypes_and_bits(tmp_path):
    note = {"protocol": "asynchronous", "rates": [0.1, None], "ok": True, "é": {}}
    checkpoint.save(tmp_path, 12, everything(), note)
    saved = checkpoint.latest(tmp_path)
    assert saved.step == 12
    assert saved.note == note
    assert list(saved.leaves) == list(everything())
    for name, leaf in everything().items():
        assert_same_bits(saved.leaves[name], leaf)


@pytest.mark.parametrize("leaves", [{}, {"empty": np.zeros((2, 0))}])
def test_a_checkpoint_may_hold_a_note_alone(tmp_path, leaves):
    checkpoint.save(str(tmp_path), 0, leaves, {})
    step, got, note = checkpoint.latest(str(tmp_path))
    assert (step, list(got), note) == (0, list(leaves), {})


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(tmp_path, keep):
    assert checkpoint.steps(tmp_path / "new") == []
    for step in (0, 5, 9, 100):
        checkpoint.save(tmp_path / "new", step, {"x": step}, {}, keep=keep)
    assert checkpoint.steps(tmp_path / "new") == [0, 5, 9, 100][-keep:]
    assert checkpoint.latest(tmp_path / "new").leaves["x"] == 100


def test_none_where_nothing_was_saved(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None


def test_the_same_step_is_replaced_and_later_ones_go(tmp_path):
    for step, x in ((1, 1), (2, 2), (3, 3), (2, 4)):
        checkpoint.save(tmp_path, step, {"x": x}, {}, keep=5)
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.latest(tmp_path).leaves["x"] == 4


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: pathlib.Path):
    contents = bytearray(path.read_bytes()) or bytearray(1)
    contents[len(contents) // 2] ^= 16
    path.write_bytes(contents)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, pathlib.Path.unlink])
def test_damage_is_never_loaded(tmp_path, damage):
    """Whichever file is hit: the same bits come back, or the one before and a word."""
    leaves = {"w": np.random.default_rng(1).normal(size=5000), "n": np.int64(3)}
    for step in (1, 2):
        checkpoint.save(tmp_path / "run", step, leaves, {"step": step})
    noticed = 0
    for file in files(tmp_path / "run" / "2"):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", copy)
        damage(copy / file.relative_to(tmp_path / "run"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            saved = checkpoint.latest(copy)
        shutil.rmtree(copy)
        noticed += saved.step == 1
        assert saved.note == {"step": saved.step}
        for name, leaf in leaves.items():
            assert_same_bits(saved.leaves[name], leaf)
        words = [str(w.message) for w in caught if w.category is UserWarning]
        assert any(str(copy / "2") in text for text in words) == (saved.step == 1)
    assert noticed


def test_a_run_goes_on_after_falling_back(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, step, {"x": step}, {})
    (tmp_path / "20" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=f"{tmp_path / '20'} is damaged"):
        assert checkpoint.latest(tmp_path).step == 10
    checkpoint.save(tmp_path, 15, {"x": 15}, {})
    assert checkpoint.steps(tmp_path) == [10, 15]


def test_all_damaged_is_an_error(tmp_path):
    (tmp_path / "4").mkdir()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"all checkpoints in .* steps \[4\]"),
    ):
        checkpoint.latest(tmp_path)


ENDLESS = """
import itertools, sys
import numpy as np
from dbjax import checkpoint

for step in itertools.count():
    checkpoint.save(sys.argv[1], step, {"w": np.full(50_000, step)}, {"step": step})
    print(step, flush=True)
"""


def test_a_killed_process_leaves_whole_checkpoints(tmp_path):
    """Killed while it writes, at whatever point it has come to."""
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parent.parent,
        text=True,
    )
    with child:
        said = [int(line) for line in itertools.islice(child.stdout, 4)]
        child.send_signal(signal.SIGKILL)
    assert said == [0, 1, 2, 3]
    saved = checkpoint.latest(tmp_path)
    assert saved.step >= 3
    assert saved.note == {"step": saved.step}
    assert_same_bits(saved.leaves["w"], np.full(50_000, saved.step))
    (tmp_path / "9.partial").mkdir(exist_ok=True)  # what a kill may leave
    checkpoint.save(tmp_path, saved.step + 1, {}, {})
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "step=-1", {"step": -1}),
        (ValueError, "keep=0", {"keep": 0}),
        (TypeError, "leaf 'x' has dtype <U2", {"leaves": {"x": "no"}}),
        (TypeError, "leaf 'x' has dtype object", {"leaves": {"x": [None]}}),
        (TypeError, "JSON", {"note": {"array": np.zeros(2)}}),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, error, words, change):
    arguments = {"step": 1, "leaves": {}, "note": {}} | change
    with pytest.raises(error, match=words):
        checkpoint.save(tmp_path, **arguments)
    assert checkpoint.steps(tmp_path) == []
