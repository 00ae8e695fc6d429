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
# # 02 Sandblaster
#
# Sandblaster is the other half of the paper (Dean et al., NIPS 2012): batch methods,
# such as L-BFGS, on many machines. Two ideas make that possible. A **coordinator**
# that never sees a parameter tells the shards of the parameter server what to compute
# with theirs; and a batch is handed out in **portions** much smaller than a replica's
# share, with **backup** copies at the end, so that nobody waits for a slow machine.
#
# To run it in [Colab](https://colab.research.google.com), choose "File", "Upload
# notebook". The whole takes less than a minute on two CPU cores.

# %% tags=["parameters"]
SOURCE = ".."  # where to install dbjax from: a checkout, or git+https://... of one
ITERATIONS = 200  # at most; it converges before
REPLICAS = 16
STEPS = 6_000  # minibatches of SGD and Downpour, for comparison
MACHINES = 500  # replicas of the large emulated cluster

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
# Logistic regression of handwritten digits, with a small regulariser: 650 parameters
# and one minimum, so that one can see how far from it a method is.

# %%
images, labels = load_digits(return_X_y=True)
images = np.float32(images / 16)
data = dbjax.from_arrays(
    {"image": images, "label": labels}, batch_size=32, portion_size=32
)


def loss_fn(params, batch):
    logits = batch["image"] @ params["w"] + params["b"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean() + 1e-3 * jnp.sum(params["w"] ** 2)


params = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
problem = loss_fn, params, data
print(f"{len(images):,} examples make {data.num_portions} portions")

# %% [markdown]
# ## A coordinator that sees scalars only
#
# Each shard holds its part of *every* vector, by name: the parameters `x`, the
# gradient `g`, the direction `d`, and L-BFGS's history of steps `s0, s1, ...` and
# changes of gradient `y0, y1, ...`. It knows three commands, and the answer to one of
# them is a number. (`add` is for replicas, which send it gradients.)


# %%
class Shard:
    def __init__(self, x):
        self.vectors = {"x": x}

    def combine(self, name, terms):
        parts = [scale * self.vectors[other] for other, scale in terms.items()]
        self.vectors[name] = np.sum(parts, axis=0)

    def dot(self, one, other):
        return float(self.vectors[one] @ self.vectors[other])

    def zero(self, name):
        self.vectors[name] = np.zeros_like(self.vectors["x"])

    def add(self, name, vector):
        self.vectors[name] = self.vectors[name] + vector


flat, unravel = ravel_pytree(params)
shards = [Shard(part) for part in np.array_split(np.asarray(flat, float), 4)]
rounds = 0  # of messages to all shards, for which the coordinator waits


def tell(command, *args):
    global rounds
    rounds += 1
    return [getattr(shard, command)(*args) for shard in shards]


def dot(one, other):
    return sum(tell("dot", one, other))


# %% [markdown]
# Replicas do the heavy work: the loss and gradient of a portion, which they send to
# the shards, weighted by its number of examples. Here one after the other.

# %%
value_and_grad = jax.jit(jax.value_and_grad(loss_fn))


def evaluate(point, gradient):
    tell("zero", gradient)
    total = 0.0
    for index in range(data.num_portions):
        portion = data.portion(index)
        share = len(portion["label"]) / len(images)
        x = np.concatenate([shard.vectors[point] for shard in shards])
        value, g = value_and_grad(unravel(np.float32(x)), portion)
        for shard, part in zip(
            shards, np.array_split(ravel_pytree(g)[0], 4), strict=True
        ):
            shard.add(gradient, share * np.asarray(part))
        total += share * float(value)
    return total


# %% [markdown]
# The coordinator now runs L-BFGS, with the two-loop recursion and a line search that
# halves the step. Every quantity in it that is not a name is a scalar.


# %%
def lbfgs(iterations, memory=10):
    value, history, path = evaluate("x", "g"), {}, []
    for step in range(iterations):
        path.append(value)
        tell("combine", "d", {"g": -1})
        alpha = {}
        for k in reversed(history):
            alpha[k] = dot(f"s{k}", "d") / history[k]
            tell("combine", "d", {"d": 1, f"y{k}": -alpha[k]})
        if history:
            k = max(history)
            tell("combine", "d", {"d": history[k] / dot(f"y{k}", f"y{k}")})
        for k in history:
            beta = dot(f"y{k}", "d") / history[k]
            tell("combine", "d", {"d": 1, f"s{k}": alpha[k] - beta})

        slope, length = dot("g", "d"), 1.0
        while True:
            tell("combine", "x+", {"x": 1, "d": length})
            trial = evaluate("x+", "g+")
            if trial <= value + 1e-4 * length * slope or length < 1e-6:
                break
            length /= 2

        tell("combine", f"s{step}", {"x+": 1, "x": -1})
        tell("combine", f"y{step}", {"g+": 1, "g": -1})
        curvature = dot(f"s{step}", f"y{step}")
        if curvature > 0:
            history[step] = curvature
        if len(history) > memory:
            history.pop(min(history))
        tell("combine", "x", {"x+": 1})
        tell("combine", "g", {"g+": 1})
        value = trial
    return [*path, value]


plain = lbfgs(ITERATIONS // 5)
print(f"loss {plain[0]:.4f} -> {plain[-1]:.6f} in {ITERATIONS // 5} iterations")
print(f"{rounds / (ITERATIONS // 5):.0f} rounds of messages in each")

# %% [markdown]
# ## The same with dbjax
#
# `minimize` works as described, with three differences. All inner products of an
# iteration go in one round: L-BFGS needs no vectors in between, if one keeps the
# products of its history. The line search is a better one. And replicas work at the
# same time, here on an emulated cluster, or with `runtime=dbjax.Threads()` and
# `dbjax.Ray()` for real.

# %%
runs = {}
for replicas, count in ((1, 1), (REPLICAS, 4)):
    runs[replicas] = dbjax.sandblaster.minimize(
        *problem,
        method=dbjax.LBFGS(memory_size=10),
        replicas=replicas,
        shards=count,
        iterations=ITERATIONS,
        tolerance=1e-4,
    )
    run = runs[replicas]
    print(
        f"replicas: {replicas}, shards: {count}; loss {run.value:.6f}, {run.status} "
        f"after {run.iterations} iterations and {run.evaluations} evaluations"
    )
np.testing.assert_allclose(runs[1].value, runs[REPLICAS].value, rtol=1e-4)

# %%
lowest = min(run.value for run in runs.values())


def above(values):
    gap = np.asarray(values, float) - lowest
    return np.where(gap > 1e-7, gap, np.nan)  # float32 sees no less


def column(run, name):
    return np.array([row[name] for row in run.trace.evaluations], float)


figure, panel = plt.subplots(figsize=(6.5, 4))
panel.semilogy(above(plain), color="grey", label="plain lines, halving line search")
for (replicas, run), style in zip(runs.items(), ("-", "--"), strict=True):
    label = f"dbjax, replicas: {replicas}, shards: {run.trace.header['shards']}"
    panel.semilogy(column(run, "step"), above(column(run, "value")), style, label=label)
panel.set(xlabel="iterations", ylabel="training loss above its minimum (nats)")
panel.legend()
plt.show()

# %% [markdown]
# How many replicas and shards there are makes no difference: the two curves of dbjax
# lie on each other, until they come so near to the minimum that rounding decides.
# Sums are rounded in another order, so here, other than in Downpour, bits need not be
# equal.
#
# ## Portions and backups
#
# A batch is done when its last portion is, so one slow machine can hold up all.
# `schedule` emulates that without computing a gradient. Below, one machine in fifty
# is ten times slower than the others. The work comes to the replicas in three ways:
# each has its own 1/N of the batch; or small portions, a new one whenever a replica
# is free; or portions, of which those outstanding at the end are handed out again.

# %%
cluster = dbjax.Cluster.slow_tail()
ways = {"static": "each its 1/N", "portions": "portions", "backups": "with backups"}
work = {
    way: dbjax.sandblaster.schedule(
        cluster, replicas=MACHINES, portions=20 * MACHINES, evaluations=4, strategy=way
    )
    for way in ways
}
figure, panel = plt.subplots(figsize=(7, 2.5))
for way, label in ways.items():
    seconds = work[way].seconds.max()
    bar = panel.barh(label, seconds)
    panel.bar_label(bar, [f" {seconds / work[way].ideal:.2f} times the ideal"])
panel.grid(visible=False)
panel.axvline(work["backups"].ideal, color="black", linestyle="--")
panel.set(xlabel="emulated seconds for a batch, the slowest of four (dashed: ideal)")
panel.set(xlim=(0, 1.5 * work["static"].seconds.max()), ylim=(2.6, -0.6))
plt.show()

# %% [markdown]
# The ideal is what all machines' speeds add up to. A static split waits for a slow
# machine to do a full share, ten times as long as needed. Portions take that share
# away from it, and what is left is the time of the last portion it began. Backups
# remove most of that too.
#
# Here is who computed what, in a small cluster with one slow machine.

# %%
small = dbjax.Cluster(speeds=(0.1,) + (REPLICAS - 1) * (1.0,))
portions = 6 * REPLICAS
two = dbjax.sandblaster.schedule(
    small, replicas=REPLICAS, portions=portions, evaluations=2
)
rows = two.trace.take(two.trace.batch >= 0)
dropped = rows.status != 0
backup = rows.count > 0
kinds = {
    "counts": (~dropped & ~backup, "C0"),
    "backup copy, and counts": (~dropped & backup, "C1"),
    "dropped: another copy was first": (dropped, "lightgrey"),
}
figure, panel = plt.subplots(figsize=(10, 4))
for label, (which, colour) in kinds.items():
    left, width = rows.start[which], (rows.time - rows.start)[which]
    look = {"color": colour, "edgecolor": "white", "label": label}
    panel.barh(rows.replica[which], width, left=left, height=0.8, **look)
for end in np.cumsum(two.seconds):
    panel.axvline(end, color="black")
panel.set(xlabel="emulated time (s); at a black line a batch is done", ylabel="replica")
panel.set(ylim=(REPLICAS - 0.4, -0.6))
panel.grid(visible=False)
figure.legend(loc="outside lower center", ncols=3)
plt.show()
print(
    f"{two.info.backups} backups, {two.info.dropped} dropped; each portion counts once"
)

# %% [markdown]
# Replica 0 needs 10 s for what others do in one. Its portion is computed again by
# somebody who is free (orange), and its own result is dropped (grey), also if it is
# late for the next batch. Every portion counts exactly once.
#
# ## Against SGD and Downpour
#
# A portion takes as long as a minibatch of the same size, so all methods have one
# clock. SGD has one machine, the others have `REPLICAS`.

# %%
full = jax.jit(lambda params: loss_fn(params, {"image": images, "label": labels}))
others = {
    "SGD, 1 replica": (1, optax.sgd(0.3)),
    f"Downpour, {REPLICAS} replicas, Adagrad": (REPLICAS, dbjax.adagrad(0.05)),
}
curves = {}
for name, (replicas, optimizer) in others.items():
    trace = dbjax.simulate(dbjax.Cluster(), replicas=replicas, steps=STEPS)
    run = dbjax.replay(
        trace,
        *problem,
        optimizer=optimizer,
        exact=False,
        eval_fn=lambda params, step, time: {"value": full(params)},
        eval_every=STEPS // 30,
    )
    curves[name] = (run, column(run, "step") / data.num_portions)
run = runs[REPLICAS]
passes = column(run, "portions") / data.num_portions
curves[f"Sandblaster L-BFGS, {REPLICAS} replicas"] = run, passes

figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
for name, (run, passes) in curves.items():
    gap = above(column(run, "value"))
    panels[0].loglog(column(run, "time"), gap, label=name)
    panels[1].loglog(passes, gap)
panels[0].set(
    xlabel="emulated time (s)", ylabel="training loss above its minimum (nats)"
)
panels[1].set(xlabel="passes over all examples")
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# Downpour is ahead at first: it steps after each minibatch, where a batch method has
# to see everything. L-BFGS gets lower sooner, and goes on down when SGD, at a
# constant rate, only moves about the minimum. In passes over the examples one replica
# of SGD is best for long: it wastes nothing on staleness, but it has nobody to help
# it. Problems with millions of examples that look alike are kinder to Downpour than
# these 1,797.
#
# From here: `dbjax.ConjugateGradient()`, `dbjax.OWLQN(l1=...)` and
# `dbjax.BoxLBFGS(...)` are other methods; `batches=dbjax.ProgressiveBatch(...)`
# begins with few portions; `mesh=` spreads the vectors over devices (notebook 03).
