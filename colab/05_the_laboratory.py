# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 The laboratory
#
# What does a late gradient do to an optimizer, and what can a rule do about it? From a
# delay in a training loop of your own to a page on which your rule is judged beside
# those that others have published.
#
# To run it in [Colab](https://colab.research.google.com), choose "File", "Upload
# notebook". The whole takes a minute or two on two CPU cores.

# %% tags=["parameters"]
SOURCE = ".."  # where to install dbjax from: a checkout, or git+https://... of one
STEPS = 600
RATES = 9
BATTERY = "--smoke --only=digits --clusters=equal,slow_tail"

# %%
import importlib.util

if importlib.util.find_spec("dbjax") is None:
    print("installing dbjax from", SOURCE)
    # %pip install --quiet {SOURCE} matplotlib scikit-learn

# %%
import csv
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import dbjax

plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True})

# %% [markdown]
# ## A delay in a loop of your own
#
# Two lines of an ordinary optax loop change: the optimizer is wrapped, and the
# gradient is taken at parameters of some updates ago. Nothing is distributed.

# %%
images, labels = load_digits(return_X_y=True)
images = np.float32(images / 16)
data = dbjax.from_arrays({"x": images, "label": labels}, batch_size=32)
model = dbjax.models.dense((64, 32, 10), activation=jnp.tanh, gain=1.0)
start = model.init(jax.random.key(0))
everything = {"x": jnp.asarray(images), "label": jnp.asarray(labels)}


def train(optimizer, delay):
    tx = dbjax.stale(optimizer, delay)  # instead of the optimizer itself

    @jax.jit
    def step(params, state, batch):
        old = dbjax.stale_params(state, params)  # instead of params
        gradient = jax.grad(model.loss)(old, batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, tx.init(start)
    for index in range(STEPS):
        params, state = step(params, state, data.batch(0, index))
    return float(model.loss(params, everything))


for delay in (0, 8, 16):
    loss = train(optax.sgd(0.05, momentum=0.9), delay)
    print(f"delay {delay:2}: training loss {loss:.3f}")

# %% [markdown]
# Delays may also be an array, one for each step (`dbjax.schedules` has cyclic ones,
# bursts and worse), a tree with one for each parameter, as in a pipeline, or the Trace
# of a real run.
#
# ## A rule against it
#
# A rule is an ordinary optax transformation that takes what it asks for: `staleness`,
# how many updates its gradient has missed, or `stale_params`, where it was taken. The
# file below is one, and all that you have to write.

# %%
RULE = '''
import jax
import optax

provide = ("stale_params",)
search = {"lam": [0.04, 0.4]}


def rule(learning_rate, lam):
    """DC-ASGD (Zheng and others 2017): correct a gradient for how far w has moved."""

    def update(updates, state, params=None, *, stale_params, **extra):
        corrected = jax.tree.map(
            lambda g, w, old: g + lam * g * g * (w - old), updates, params, stale_params
        )
        return corrected, state

    correct = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    return optax.chain(correct, optax.sgd(learning_rate))
'''
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "my_rule.py").write_text(RULE)
my_rule: dict = {}
exec(RULE, my_rule)

for rate in (0.1, 0.2):
    for name, rule in {
        "SGD": optax.sgd(rate),
        "my rule": my_rule["rule"](rate, 0.4),
        "rate / staleness": optax.chain(
            dbjax.optim.scale_by_staleness(), optax.sgd(rate)
        ),
    }.items():
        print(f"rate {rate}, delay 16, {name:16} {train(rule, 16):.3f}")

# %% [markdown]
# ## What asynchrony did, push by push
#
# `probe` replays a Trace and measures at its pushes: how far the parameters had moved
# since the gradient was taken, and how well it agrees with the gradient of the same
# minibatch where it arrived.

# %%
trace = dbjax.simulate(dbjax.Cluster.slow_tail(), replicas=16, steps=STEPS)
problem = model.loss, start, data
seen = dbjax.probe(trace, *problem, optimizer=optax.sgd(0.1), every=4)
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=False)
for panel, name in zip(panels, ("relative_distance", "cosine"), strict=True):
    points = panel.scatter(seen.step, seen.values[name], 9, seen.staleness[:, 0])
    panel.set(xlabel="step", ylabel=name.replace("_", " "))
figure.colorbar(points, label="staleness (updates missed)")
plt.show()

# %% [markdown]
# What would have been is one call each: `trace.without_staleness()`,
# `trace.without_replicas(7)`, another optimizer in `replay`.

# %%
held = {
    "as it was": trace,
    "nobody stale": trace.without_staleness(),
    "without replica 7": trace.without_replicas(7),
}
for name, one in held.items():
    run = dbjax.replay(one, *problem, optimizer=optax.sgd(0.1), exact=False)
    print(f"{name:18} {float(model.loss(run.params, everything)):.3f}")

# %% [markdown]
# ## Where a rule works
#
# Learning rate against staleness in one compiled call for each rule; white is where
# training came apart.

# %%
rates, delays = np.logspace(-2.5, 0, RATES), np.array([0, 2, 4, 8, 16, 32])
traces = [
    dbjax.Trace.from_delays(np.minimum(np.arange(STEPS), delay)) for delay in delays
]
makers = {
    "SGD": (optax.sgd, ()),
    "my rule": (lambda rate: my_rule["rule"](rate, 0.4), my_rule["provide"]),
}
figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for panel, (name, (make, provide)) in zip(panels, makers.items(), strict=True):
    grid = dbjax.sweep(
        traces, *problem, make, rates, provide=provide,
        metrics_fn=lambda params: {"loss": model.loss(params, everything)},
    )  # fmt: skip
    loss = np.where(grid.diverged, np.nan, grid.metrics["loss"])
    shown = panel.pcolormesh(
        range(len(delays)), rates, np.log10(loss.T), vmin=-2, vmax=1, shading="nearest"
    )
    panel.set(title=name, xlabel="staleness", yscale="log")
    panel.set_xticks(range(len(delays)), delays)
panels[0].set_ylabel("learning rate")
figure.colorbar(shown, ax=panels, label="log10 of the training loss")
plt.show()

# %% [markdown]
# ## The battery
#
# Is it better than what is known? The battery tunes the rule and the published ones
# with the same budget, on four problems and four kinds of cluster, over several seeds,
# and writes a page. It refuses a rule that changes shapes, keeps state of its own, or
# is not the same twice. Here it is at its smallest; without `--smoke` it takes longer
# than a coffee. It can be stopped, and goes on where it was.

# %%
home = pathlib.Path(SOURCE)
if not (home / "experiments/battery.py").exists():
    print("the battery is in a checkout of dbjax: set SOURCE to one")
else:
    command = [sys.executable, "-m", "experiments.battery", *BATTERY.split()]
    command += [f"--rule={folder / 'my_rule.py'}", f"--out={folder / 'page'}"]
    command += [f"--cache={folder / 'cells'}"]
    subprocess.run(command, cwd=home, check=True, capture_output=True)
    with (folder / "page/cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    print(f"{len(rows)} cells; the page: {folder / 'page/index.html'}")

# %% [markdown]
# The page says with which setting each rule did best, how sure the difference to the
# best of the others is, and how long each took to a target, with those that never got
# there. A rule that is worth publishing is better there than by chance.
#
# Methods that change the order (`dbjax.ssp`, `synchronous(backups=)`,
# `delay_threshold`) or what replicas do by themselves (`dbjax.downpour.easgd`,
# `diloco`, `parameter_averaging`) are arguments of `dbjax.downpour.train`.
