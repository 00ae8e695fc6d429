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
# # 01 Downpour from nothing
#
# In Downpour SGD (Dean et al., *Large Scale Distributed Deep Networks*, NIPS 2012)
# replicas of a model train side by side and never wait for one another. Here it is
# first, in sixty plain lines; then dbjax, which gives the same numbers; and then what
# the plain lines cannot show: clusters, staleness, and how far it can be driven.
#
# To run it in [Colab](https://colab.research.google.com), choose "File", "Upload
# notebook". The whole takes about a minute on two CPU cores, and needs no
# accelerator.

# %% tags=["parameters"]
SOURCE = ".."  # where to install dbjax from: a checkout, or git+https://... of one
STEPS = 4_000  # minibatches of all replicas together
REPLICAS = 20
CROWD = 60  # replicas, where there should be many
RATES = 13  # learning rates in the phase diagram

# %%
import importlib.util

if importlib.util.find_spec("dbjax") is None:
    print("installing dbjax from", SOURCE)
    # %pip install --quiet {SOURCE} matplotlib scikit-learn

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import dbjax

plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True})

# %% [markdown]
# ## The problem
#
# Handwritten digits of 8 x 8 pixels, and a network with one hidden layer: 2,410
# parameters. A minibatch is a pure function of the replica and its own step, so that
# whoever asks again gets the same one. dbjax asks no more of data than this method.

# %%
images, labels = load_digits(return_X_y=True)
images = np.float32(images / 16)
train, test = slice(0, 1_400), slice(1_400, None)


class Digits:
    def batch(self, replica, step):
        rows = np.random.default_rng((replica, step)).integers(1_400, size=16)
        return {"image": images[train][rows], "label": labels[train][rows]}


def logits_of(params, image):
    hidden = jnp.tanh(image @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(params, batch):
    logits = logits_of(params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean()


draw = np.random.default_rng(0).normal
params = {
    "w1": np.float32(draw(size=(64, 32)) / 8),
    "b1": np.zeros(32, np.float32),
    "w2": np.float32(draw(size=(32, 10)) / 6),
    "b2": np.zeros(10, np.float32),
}
data = Digits()

# %% [markdown]
# ## Sixty plain lines
#
# The **parameter server** is cut into **shards**. A shard holds a part of the
# parameters. Whatever arrives it applies at once, by its own rule and with its own
# state, and it counts its **version**. There are two rules in the paper, SGD and
# Adagrad:
#
# $$w \leftarrow w - \eta \, \Delta w \qquad\qquad
# w_i \leftarrow w_i - \frac{\gamma}{\sqrt{\sum_{j \le K} \Delta w_{i,j}^2}} \,
# \Delta w_{i,K}$$
#
# Adagrad's sum includes the current gradient, there is no epsilon, and 0/0 is 0. Both
# rules are jitted for one reason: XLA rounds `w - rate * g` once and numpy twice, and
# in the end all bits shall be equal.

# %%
gradient = jax.jit(jax.grad(loss_fn))
flat, unravel = ravel_pytree(params)


@jax.jit
def sgd(w, dw, squares, rate):
    return w - rate * dw, squares


@jax.jit
def adagrad(w, dw, squares, rate):
    squares = squares + dw * dw
    return w - rate * (
        dw / jnp.where(squares == 0, jnp.inf, jnp.sqrt(squares))
    ), squares


class Shard:
    def __init__(self, w, rule, rate):
        self.w, self.rule, self.rate = w, rule, rate
        self.squares, self.version = np.zeros_like(w), 0

    def push(self, dw):
        w, squares = self.rule(self.w, dw, self.squares, self.rate)
        self.w, self.squares = np.asarray(w), np.asarray(squares)
        self.version += 1


# %% [markdown]
# A **replica** runs the client's algorithm of the paper's appendix. It **fetches**
# all shards before every `n_fetch`-th minibatch; it adds up, or **accrues**, raw
# gradients, and **pushes** the sum after every `n_push`-th. In between it may take
# steps of its own at a rate `alpha`. The next fetch overwrites these: the server
# alone owns the learning rate. (The paper's pseudocode also pushes after the very
# first gradient. We do not.)
#
# As a generator it stops where a real one would be computing, so that the others can
# have their turns meanwhile. With machines of equal speed the turns go round.


# %%
def downpour(replicas, shards, rule, rate, n_fetch=1, n_push=1, alpha=0.0):
    parts = np.array_split(np.asarray(flat), shards)
    server = [Shard(part, rule, rate) for part in parts]
    tickets = iter(range(STEPS))  # whoever begins a minibatch takes one
    staleness = []

    def push(accrued, base):
        staleness.append(server[0].version - base)
        for shard, dw in zip(server, np.array_split(accrued, shards), strict=True):
            shard.push(dw)

    def replica(index):
        count = 0
        for step, _ in enumerate(tickets):
            if step % n_fetch == 0:
                w = np.concatenate([shard.w for shard in server])
                version = server[0].version
            yield  # computing takes its time
            g = ravel_pytree(gradient(unravel(w), data.batch(index, step)))[0]
            if count == 0:
                accrued, base = np.zeros_like(w), version
            accrued, count = accrued + np.asarray(g), count + 1
            if alpha:
                w = np.asarray(sgd(w, g, 0, alpha)[0])
            if count == n_push:
                push(accrued, base)
                count = 0
        if count:  # no ticket was left: what has accrued goes out as well
            push(accrued, base)

    running = [replica(index) for index in range(replicas)]
    for turn in range(STEPS + replicas):  # in their first turns they only fetch
        next(running[turn % replicas], None)
    return unravel(np.concatenate([shard.w for shard in server])), staleness


# %%
plain, staleness = downpour(REPLICAS, 3, sgd, 0.03)


@jax.jit
def accuracy(params):
    return jnp.mean(logits_of(params, images[test]).argmax(1) == labels[test])


print(f"{REPLICAS} replicas, accuracy on the test set {accuracy(plain):.1%}")
print("staleness of the pushes:", *staleness[:25], "...")

# %% [markdown]
# That is the whole algorithm. The **staleness** of a push is the number of updates
# that its gradient has not seen, since it was computed on parameters of some time
# ago. Among replicas of equal speed all the others have pushed once meanwhile, so it
# soon is `REPLICAS - 1` for all pushes. Nothing in Downpour corrects for that.
#
# ## The same with dbjax
#
# It takes the same loss, parameters and data, and any optax optimizer. The runtime is
# an emulated cluster whose machines need exactly one second a minibatch. Nothing
# random is left, so the order of events is that of our turns, and the parameters have
# the same bits. (On an accelerator, or with another compiler, sums may be rounded in
# another order; there we ask for five digits.)


# %%
def check_same(ours, theirs):
    ours, theirs = ravel_pytree(ours)[0], ravel_pytree(theirs)[0]
    if jax.default_backend() == "cpu":
        assert np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    print(f"{len(ours):,} parameters, largest difference", np.abs(ours - theirs).max())


equal = dbjax.Cluster(step_time=1.0)
problem = loss_fn, params, data
run = dbjax.downpour.train(
    *problem,
    optimizer=optax.sgd(0.03),
    replicas=REPLICAS,
    shards=3,
    steps=STEPS,
    runtime=dbjax.Emulated(equal),
)
check_same(plain, run.params)
assert run.trace.staleness()[:, 0].tolist() == staleness

# %% [markdown]
# Once more with all the switches: Adagrad, a fetch every 4 minibatches, a push every
# 3, local steps, five shards. This time in two halves. The order of events does not
# depend on the values, so `simulate` gives it without any gradient, as a **Trace**,
# and `replay` turns the Trace and a problem into parameters.

# %%
switches = {"n_fetch": 4, "n_push": 3}
plain, _ = downpour(REPLICAS, 5, adagrad, 0.03, alpha=0.01, **switches)
trace = dbjax.simulate(equal, replicas=REPLICAS, shards=5, steps=STEPS, **switches)
run = dbjax.replay(
    trace, *problem, optimizer=dbjax.adagrad(0.03), local_optimizer=optax.sgd(0.01)
)
check_same(plain, run.params)

# %% [markdown]
# ## What a cluster does to staleness
#
# Real machines differ. A `Cluster` says how long everything takes, as distributions.

# %%
clusters = {
    "step times of 10 % spread": dbjax.Cluster.equal(),
    "step times with a heavy tail": dbjax.Cluster.heavy_tailed(),
    "one replica 10 times slower": dbjax.Cluster(speeds=(0.1,) + (REPLICAS - 1) * (1,)),
}
figure, panels = plt.subplots(1, 3, figsize=(11, 3.5), sharex=True, sharey=True)
for panel, (name, cluster) in zip(panels, clusters.items(), strict=True):
    trace = dbjax.simulate(cluster, replicas=REPLICAS, steps=STEPS)
    stale = trace.staleness()[:, 0]
    bins = np.arange(0, 4 * REPLICAS, 2) - 0.5
    share = np.full(len(stale), 100 / len(stale))
    panel.hist(np.minimum(stale, bins[-1]), bins, weights=share)
    panel.axvline(stale.mean(), color="C1", label=f"mean {stale.mean():.1f}")
    panel.set_title(f"{name}: at most {stale.max()}", fontsize=10)
    panel.legend()
panels[1].set_xlabel(
    f"staleness of a push (updates missed; the last bar: {bins[-2]:.0f} up)"
)
panels[0].set_ylabel("share of pushes (%)")
plt.show()

# %% [markdown]
# The mean is `REPLICAS - 1` whatever the cluster, since every update is missed once
# by each of the others. What differs is the tail: a slow machine, or a slow moment,
# makes a few pushes very stale (the bar at the right).
#
# ## How many replicas, at which rate?
#
# `sweep` replays many Traces at many settings, compiled once: a phase diagram is one
# call.

# %%
rates = np.logspace(-2.5, 0.5, RATES)
counts = (1, 5, REPLICAS, CROWD)
traces = [dbjax.simulate(dbjax.Cluster(), replicas=n, steps=STEPS) for n in counts]


def on_test(params):
    return {"accuracy": accuracy(params)}


figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
rules = {"SGD": optax.sgd, "Adagrad": dbjax.adagrad}
for panel, (name, rule) in zip(panels, rules.items(), strict=True):
    grid = dbjax.sweep(traces, *problem, rule, rates, metrics_fn=on_test)
    for count, row in zip(counts, grid.metrics["accuracy"], strict=True):
        panel.semilogx(rates, 100 * row, "o-", label=f"replicas: {count}")
    panel.set(title=name, xlabel=f"learning rate on the shards ({STEPS} minibatches)")
panels[0].set_ylabel("accuracy on the test set (%)")
panels[0].legend()
plt.show()

# %% [markdown]
# With SGD each curve ends at a cliff, beyond which nothing is learned (10 % is
# chance). Staleness moves it: the more replicas, the smaller the largest rate that
# works, and roughly in proportion. Adagrad has no such cliff. It too gets worse at
# large rates, and sooner with more replicas, and its curves are rough there; but they
# stay above chance. Hence the paper's remark that with Adagrad one can use more
# replicas.
#
# ## What is gained, and the warm start
#
# All these runs see the same number of minibatches. More replicas get through them
# sooner, and the question is what staleness costs. The paper has one more remedy, a
# **warm start**: one replica trains alone at first, and then the others join.

# %%
slow, fast = dbjax.adagrad(0.01), dbjax.adagrad(0.03)
warm = STEPS // 10
curves = {
    "1 replica": (1, slow, 0),
    f"{CROWD} replicas": (CROWD, slow, 0),
    f"{CROWD} replicas, warm start": (CROWD, slow, warm),
    f"{CROWD} replicas, warm start, rate 0.03": (CROWD, fast, warm),
}
figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
for name, (replicas, optimizer, alone) in curves.items():
    trace = dbjax.simulate(
        dbjax.Cluster(), replicas=replicas, steps=STEPS, warmstart_steps=alone
    )
    run = dbjax.replay(
        trace,
        *problem,
        optimizer=optimizer,
        exact=False,  # compiled: equal to rounding, and faster
        eval_fn=lambda params, step, time: on_test(params),
        eval_every=STEPS // 40,
    )
    rows = run.trace.evaluations
    percent = [100 * row["accuracy"] for row in rows]
    panels[0].semilogx([row["time"] for row in rows], percent, label=name)
    panels[1].plot([row["step"] for row in rows], percent)
panels[0].set(xlabel="emulated time (s; a minibatch takes 1 s)")
panels[0].set_ylabel("accuracy on the test set (%)")
panels[1].set(xlabel="minibatches of all replicas together")
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# Left: at rate 0.01 many replicas are at 80 % much sooner than one is. Right: they
# need more minibatches for it, which is the price of staleness. The first pushes of a
# crowd are the worst ones, as all of them are computed on about the same parameters.
# After the warm start this does not happen at rate 0.01: what was learned stays,
# though on the clock the time alone was not worth its while here. At three times the
# rate the warm start does not help: when the crowd joins, nearly all is lost, and has
# to be learned again. Small problems can be harsher than large ones in this.
#
# From here: `runtime=dbjax.Threads()` is asynchronous in earnest (notebook 04),
# `dbjax.stale` brings staleness into a training loop of your own, and notebook 02 is
# the paper's other method, Sandblaster.
