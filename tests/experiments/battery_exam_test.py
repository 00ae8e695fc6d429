"""The battery's exam: good rules pass, and every kind of bad one is named."""

import functools

import pytest

from experiments import battery_rules
from experiments.battery_exam import examine
from experiments.battery_rules import BASELINES, BadRule

HEAD = "import jax, jax.numpy as jnp, numpy as np, optax\n"
STATELESS = """
def rule(learning_rate):
    def update(g, state, params=None):
        {body}
        return g, state
    return optax.GradientTransformation(lambda p: optax.EmptyState(), update)
"""
BAD = {
    "no function": ("no rule", "has no function rule", "x = 1"),
    "no callable": ("no rule", "rule is 3", "rule = 3"),
    "no transformation": ("no rule", "must give an optax", "rule = lambda learning_rate: 3"),
    "no learning rate": ("no rule", "cannot be called", "def rule(lr): return optax.sgd(lr)"),
    "unknown search": (
        "no rule", "cannot be called with learning_rate, lam",
        "search = {'lam': [1.0]}\ndef rule(learning_rate): return optax.sgd(learning_rate)",
    ),
    "empty search": ("wrong search", "one or more finite", "search = {'a': []}\nrule = optax.sgd"),
    "search of rates": (
        "wrong search", "battery's own", "search = {'learning_rate': [1]}\nrule = optax.sgd",
    ),
    "unknown provide": ("wrong provide", "colour", "provide = ('colour',)\nrule = optax.sgd"),
    "broken import": ("raises", "importing rule.py: ZeroDivisionError", "1 / 0"),
    "raises": ("raises", "RuntimeError: no", STATELESS.format(body="raise RuntimeError('no')")),
    "raises when traced": (
        "raises", "[Tt]racer",
        STATELESS.format(body="g = {k: v * float(v.sum()) for k, v in g.items()}"),
    ),
    "shapes": (
        "changes shapes or dtypes", r"updates\['scalar'\] must be float32\[\], got float32\[1\]",
        STATELESS.format(body="g = jax.tree.map(lambda x: x[None] if not x.ndim else x, g)"),
    ),
    "dtypes": (
        "changes shapes or dtypes", "got float16",
        STATELESS.format(body="g = jax.tree.map(lambda x: x.astype('float16'), g)"),
    ),
    "structure": (
        "changes updates", "must keep the structure", STATELESS.format(body="g = list(g.values())"),
    ),
    "state": (
        "changes shapes or dtypes", r"state must be int32\[\], got float32\[\]",
        """
def rule(learning_rate):
    update = lambda g, state, params=None: (g, state + jnp.float32(1))
    return optax.GradientTransformation(lambda p: jnp.int32(0), update)
""",
    ),
    "not finite": (
        "not finite", "NaN or infinity",
        STATELESS.format(body="g = jax.tree.map(lambda x: x / jnp.abs(x), g)"),
    ),
    "hidden count": (
        "hidden state", "called twice",
        "calls = []\n" + STATELESS.format(
            body="calls.append(0); g = jax.tree.map(lambda x: x / len(calls), g)"
        ),
    ),
    "hidden sign": (  # back where it was after each two calls
        "hidden state", "called twice",
        "signs = [1, -1]\n" + STATELESS.format(
            body="signs.reverse(); g = jax.tree.map(lambda x: x * signs[0], g)"
        ),
    ),
    "hidden where it is made": (
        "hidden state", "called twice",
        """
made = []
def rule(learning_rate):
    made.append(0)
    return optax.sgd(learning_rate / len(made))
""",
    ),
    "hidden gradient": (
        "hidden state", "called twice",
        "last = {}\n" + STATELESS.format(
            body="last['g'], g = g, jax.tree.map(lambda x, y: x + y, g, last.get('g', g))"
        ),
    ),
    "hidden trace": (
        "hidden state", "traced twice",
        "traces = []\n" + STATELESS.format(
            body="""if isinstance(g['scalar'], jax.core.Tracer):
            traces.append(0)
            g = jax.tree.map(lambda x: x * len(traces), g)"""
        ),
    ),
    "kept tracer": (
        "hidden state", "one trace was kept for another",
        "last = []\n" + STATELESS.format(
            body="""if isinstance(g['scalar'], jax.core.Tracer):
            last.append(g)
            g = jax.tree.map(lambda x, y: x + y, g, last[0])"""
        ),
    ),
    "chance": (
        "not deterministic", "two fresh copies",
        STATELESS.format(body="g = jax.tree.map(lambda x: x * np.random.default_rng().random(), g)"),
    ),
    "seeded chance": (
        "hidden state", "called twice",
        "chance = np.random.default_rng(0)\n"
        + STATELESS.format(body="g = jax.tree.map(lambda x: x * chance.random(), g)"),
    ),
    "chance when traced": (
        "not deterministic", "traced twice",
        STATELESS.format(
            body="""if isinstance(g['scalar'], jax.core.Tracer):
            g = jax.tree.map(lambda x: x * np.random.default_rng().random(), g)"""
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_rule_is_named(name, tmp_path):
    kind, message, text = BAD[name]
    file = tmp_path / "rule.py"
    file.write_text(HEAD + text)
    with pytest.raises(BadRule, match=message) as caught:
        examine(functools.partial(battery_rules.load, file))
    assert caught.value.kind == kind


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadRule, match="cannot be read"):
        battery_rules.load(tmp_path / "absent.py")


def test_a_run_whose_repetition_differs_is_named(tmp_path, monkeypatch):
    # Chance that shows in a whole run only: no short question finds it.
    file = tmp_path / "rule.py"
    file.write_text(HEAD + "rule = optax.sgd")
    from experiments import battery_exam

    ends = iter((b"one", b"other"))
    monkeypatch.setattr(battery_exam, "_tiny_run", lambda *_: next(ends))
    with pytest.raises(BadRule, match="not deterministic: a run and its repetition"):
        examine(functools.partial(battery_rules.load, file))


GOOD = {
    "one number in the state": """
def rule(learning_rate, power):
    def update(g, state, params=None):
        rate = learning_rate / (1 + state) ** power
        return jax.tree.map(lambda x: -rate * x, g), state + 1
    return optax.GradientTransformation(lambda p: 0, update)
search = {"power": [0.25, 0.5]}
""",
    "clipped as a whole": """
def rule(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(learning_rate))
""",
    "noise with a key in its state": """
def rule(learning_rate):
    return optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(learning_rate))
""",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_rule_passes(name, tmp_path):
    file = tmp_path / "rule.py"
    file.write_text(HEAD + GOOD[name])
    rule = examine(functools.partial(battery_rules.load, file))
    assert rule.name == "rule" and rule.source.endswith(GOOD[name])


@pytest.mark.parametrize("rule", BASELINES[4::3], ids=lambda rule: rule.name)
def test_baselines_pass(rule):
    assert examine(lambda: rule) is rule
