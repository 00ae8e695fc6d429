import gzip
import pickle
import struct

import numpy as np
import pytest

from dbjax.data import from_source
from dbjax.data.files import SplicedFrames, Utterance, read_kaldi
from tests import data_files

kaldiio = pytest.importorskip("kaldiio")


def same(got, made):
    assert [one.name for one in got] == list(made)
    for one in got:
        frames, states = made[one.name]
        np.testing.assert_array_equal(one.frames, frames)
        np.testing.assert_array_equal(one.states, states)
        assert one.frames.dtype == np.float32 and one.states.dtype == np.int32


@pytest.mark.parametrize("features", ["feats.ark", "feats.scp"])
def test_archives_and_scripts_made_by_hand(tmp_path, features):
    made = data_files.write_kaldi(tmp_path)
    same(read_kaldi(tmp_path / features, tmp_path / "ali.ark"), made)


def test_doubles_text_and_gzip(tmp_path):
    made = data_files.utterances()
    doubles = {n: data_files.kaldi_matrix(f.astype("f8")) for n, (f, _) in made.items()}
    data_files.write_ark(tmp_path / "feats.ark", doubles)
    lines = [f"{n} {' '.join(map(str, s))} \n" for n, (_, s) in made.items()]
    (tmp_path / "ali.gz").write_bytes(gzip.compress("".join(lines).encode()))
    same(read_kaldi(tmp_path / "feats.ark", tmp_path / "ali.gz"), made)
    text = "".join(
        f"{n}  [\n" + "\n".join("  " + " ".join(map(repr, map(float, row))) for row in f)
        + " ]\n"
        for n, (f, _) in made.items()
    )  # fmt: skip
    (tmp_path / "feats.txt").write_text(text)
    same(read_kaldi(tmp_path / "feats.txt", tmp_path / "ali.gz"), made)


@pytest.mark.parametrize("method", [None, 2, 3, 5])
@pytest.mark.parametrize("features", ["feats.ark", "feats.scp"])
def test_archives_that_kaldiio_writes(tmp_path, method, features):
    made = data_files.utterances()
    kaldiio.save_ark(
        str(tmp_path / "feats.ark"),
        {name: frames for name, (frames, _) in made.items()},
        scp=str(tmp_path / "feats.scp"),
        compression_method=method,
    )
    states = {name: s.astype(np.int32) for name, (_, s) in made.items()}
    kaldiio.save_ark(str(tmp_path / "ali.ark"), states, scp=str(tmp_path / "ali.scp"))
    got = read_kaldi(tmp_path / features, tmp_path / "ali.scp")
    if method is None:
        return same(got, made)
    for one in got:  # compressed: 8 or 16 bits a number
        np.testing.assert_allclose(one.frames, made[one.name][0], atol=0.1)
        np.testing.assert_array_equal(one.states, made[one.name][1])


def test_paths_in_a_script_may_be_beside_it(tmp_path):
    made = data_files.utterances()
    values = {name: data_files.kaldi_matrix(f) for name, (f, _) in made.items()}
    offsets = data_files.write_ark(tmp_path / "raw.ark", values)
    data_files.write_scp(tmp_path / "feats.scp", "raw.ark", offsets)
    integers = {name: data_files.kaldi_integers(s) for name, (_, s) in made.items()}
    data_files.write_ark(tmp_path / "ali.ark", integers)
    same(read_kaldi(tmp_path / "feats.scp", tmp_path / "ali.ark"), made)


def test_what_was_not_aligned_is_left_out(tmp_path):
    made = data_files.write_kaldi(tmp_path)
    first = dict(list(made.items())[:2])
    values = {name: data_files.kaldi_integers(s) for name, (_, s) in first.items()}
    data_files.write_ark(tmp_path / "ali.ark", values)
    same(read_kaldi(tmp_path / "feats.ark", tmp_path / "ali.ark"), first)


MATRIX = data_files.kaldi_matrix(np.ones((3, 2), np.float32))
OTHER = data_files.kaldi_matrix(np.ones((3, 4), np.float32))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it has no utterance"),
        (b"a " + MATRIX[:-1], "'a' is cut off, or not Kaldi's"),
        (b"a " + MATRIX[:8], "'a' is cut off"),
        (b"a " + MATRIX + b"b " + MATRIX[:12], "'b' is cut off"),
        (b"a " + MATRIX + b"b", "where the name of an utterance and .* it has 'b'"),
        (b"a ", "'a' is cut off, or not Kaldi's: it begins with b''"),
        (b"a PKL" + pickle.dumps(1), "'a' .*begins with b'PKL"),
        (b"a \0BXX " + MATRIX[5:], "'a' .*Unexpected format"),
        (b"\x89PNG\r\n\x1a\n", "is not an archive"),
        (b"a " + MATRIX + b"a " + MATRIX, "'a' is there twice"),
        (b"a " + MATRIX + b"b " + OTHER, "'b' has 4 coefficients .* before it have 2"),
        (b"a " + data_files.kaldi_integers([1]), r"'a' holds \[1\] of int32; features"),
        (b"a " + data_files.kaldi_matrix(np.ones((2, 2), "f4")), "2 frames in.* 3 stat"),
        (b"z " + MATRIX, "no utterance is both in .*feats.ark and in .*which has a"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_files_name(tmp_path, content, words):
    (tmp_path / "feats.ark").write_bytes(content)
    integers = {name: data_files.kaldi_integers([0, 1, 1]) for name in "ab"}
    data_files.write_ark(tmp_path / "ali.ark", integers)
    with pytest.raises(ValueError, match=words) as caught:
        read_kaldi(tmp_path / "feats.ark", tmp_path / "ali.ark")
    assert "feats.ark" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (data_files.kaldi_integers([0, -1, 1]), r"holds \[3\] of int32; an alignment"),
        (data_files.kaldi_integers([]), r"holds \[0\]"),
        (data_files.kaldi_integers([0, 1, 1])[:-2], "cut off"),
        (MATRIX, r"holds \[3, 2\] of float32; an alignment is a vector"),
        (b"\0BFV " + struct.pack("<bi", 4, 3) + np.full(3, 0.5, "f4").tobytes(), "from 0"),
    ],
)  # fmt: skip
def test_alignments_are_integers(tmp_path, value, words):
    data_files.write_ark(tmp_path / "feats.ark", {"a": MATRIX})
    data_files.write_ark(tmp_path / "ali.ark", {"a": value})
    with pytest.raises(ValueError, match=f"ali.ark: utterance 'a' .*{words}"):
        read_kaldi(tmp_path / "feats.ark", tmp_path / "ali.ark")


@pytest.mark.parametrize(
    "line", ["a touch {0}/ran |", "a", "a {0}/feats.ark", "a {0}/feats.ark:2[0:1]"]
)
def test_a_script_holds_paths_and_offsets_and_runs_nothing(tmp_path, line):
    data_files.write_kaldi(tmp_path)
    (tmp_path / "feats.scp").write_text(f"\n{line.format(tmp_path)}\n")
    with pytest.raises(ValueError, match="feats.scp, line 2: .*allowed is a name and"):
        read_kaldi(tmp_path / "feats.scp", tmp_path / "ali.ark")
    assert not (tmp_path / "ran").exists()


def test_a_missing_archive_is_named(tmp_path):
    data_files.write_kaldi(tmp_path)
    (tmp_path / "feats.ark").unlink()
    with pytest.raises(FileNotFoundError, match="no file feats.ark in .*ali.ark"):
        read_kaldi(tmp_path / "feats.scp", tmp_path / "ali.ark")


def spliced(window, made):
    """The plain way, a utterance and a frame at a time."""
    rows = []
    for frames, states in made.values():
        padded = np.pad(frames, ((window // 2,) * 2, (0, 0)), mode="edge")
        for t, state in enumerate(states):
            rows.append((padded[t : t + window].ravel(), state))
    frames, states = zip(*rows, strict=True)
    return np.stack(frames), np.array(states)


@pytest.mark.parametrize("window", [1, 3, 11])
def test_frames_are_spliced_within_their_utterance(window):
    made = data_files.utterances()
    source = SplicedFrames([Utterance(n, *v) for n, v in made.items()], window=window)
    frames, states = spliced(window, made)
    assert len(source) == len(frames)
    rows = np.random.default_rng(0).permutation(len(source))
    batch = source[rows]
    np.testing.assert_array_equal(batch["frames"], frames[rows])
    np.testing.assert_array_equal(batch["state"], states[rows])
    assert batch["state"].dtype == np.int32


def test_standardized_frames_have_mean_0_and_deviation_1():
    made = data_files.utterances()
    source = SplicedFrames([Utterance(n, *v) for n, v in made.items()], window=1)
    source.frames[:, 0] = 4
    source.standardize(source.frames.mean(0), source.frames.std(0))
    np.testing.assert_allclose(source.frames.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(source.frames.std(0), [0, 1, 1, 1, 1], atol=1e-6)


def test_spliced_frames_are_a_source(tmp_path):
    made = data_files.write_kaldi(tmp_path)
    read = read_kaldi(tmp_path / "feats.scp", tmp_path / "ali.ark")
    source = SplicedFrames(read, window=5)
    data = from_source(source, batch_size=6, seed=1)
    batch = data.batch(2, 30)
    assert batch["frames"].shape == (6, 25) and batch["state"].shape == (6,)
    again = pickle.loads(pickle.dumps(data)).batch(2, 30)
    np.testing.assert_array_equal(again["frames"], batch["frames"])
    assert data.num_examples == sum(len(states) for _, states in made.values())


def test_utterances_that_do_not_fit_each_other_are_named():
    good = Utterance("a", np.ones((2, 2), np.float32), np.ones(2, np.int32))
    odd = Utterance("b", np.ones((2, 3), np.float32), np.ones(2, np.int32))
    with pytest.raises(ValueError, match="'b' has frames of 3 coefficients, but 'a'"):
        SplicedFrames([good, odd])
    with pytest.raises(ValueError, match="window=4: allowed are odd"):
        SplicedFrames([good], window=4)
    with pytest.raises(ValueError, match="no utterances"):
        SplicedFrames([])
