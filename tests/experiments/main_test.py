import sys

import pytest
from absl import flags

from experiments import main

# ml_collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning")

CONFIG = "--config=configs/digits_downpour.py"


@pytest.fixture(autouse=True)
def clean_flags():
    """Flags are the process's own: each test leaves them as it found them."""
    before = set(flags.FLAGS)
    yield
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)  # overrides define a flag each


def parse(monkeypatch, *words):
    argv = ["main.py", CONFIG, *words]
    monkeypatch.setattr(sys, "argv", argv)  # config flags look for overrides there
    return main.parse(argv)


def test_an_override_reaches_the_config(monkeypatch):
    parse(monkeypatch, "--config.downpour.replicas=50", "--config.methods=sgd")
    config = main._CONFIG.value
    assert config.downpour.replicas == 50 and config.methods == ("sgd",)
    assert config.is_locked


@pytest.mark.parametrize(
    "words",
    [
        ["--config=configs/digit_downpour.py"],
        ["--config=configs/digit_downpour.py", "--config.steps=3"],
        ["--config", "configs/digit_downpour.py", "--config.steps=3"],
    ],
)
def test_a_file_that_is_not_there_names_the_nearest(monkeypatch, words):
    argv = ["main.py", *words, "--workdir=nowhere"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="did you mean 'configs/digits_downpour.py'"):
        main.main(main.parse(argv))


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--config.downpour.replicaz=50", "'downpour.replicas'"),
        ("--config.downpuor.n_push=2", "'downpour.n_push'"),
        ("--config.step=2", "'steps'"),
    ],
)
def test_an_unknown_key_names_the_nearest(monkeypatch, word, nearest):
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, word)
    message = str(left.value)
    assert word[9:].split("=")[0] in message and nearest in message
