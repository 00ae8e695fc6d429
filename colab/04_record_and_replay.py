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
# # 04 Record and replay
#
# An asynchronous run cannot be repeated: threads and machines are never equally fast
# twice, and every order of events gives other parameters. But it can be recorded.
# Every run of dbjax brings home a **Trace**, which says who fetched, computed and
# pushed what, and in which order. To replay it gives the same bits, and to replay it
# with another optimizer says what would have been.
#
# To run it in [Colab](https://colab.research.google.com), choose "File", "Upload
# notebook". The whole takes less than a minute on two CPU cores.

# %% tags=["parameters"]
SOURCE = ".."  # where to install dbjax from: a checkout, or git+https://... of one
RUNTIME = "threads"  # or "ray": processes of this machine; needs ray to be installed
STEPS = 2_000  # minibatches of all replicas together
REPLICAS = 4
RATES = 9

# %%
import importlib.util

if importlib.util.find_spec("dbjax") is None:
    print("installing dbjax from", SOURCE)
    # %pip install --quiet {SOURCE} matplotlib scikit-learn

# %%
import dataclasses
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import dbjax
from dbjax.trace import COMPUTE, PUSH

plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True})

# %% [markdown]
# ## Record
#
# Handwritten digits and a small network. Nothing is emulated now: each replica is a
# thread (or a process, on Ray), and who is first is up to the operating system.

# %%
images, labels = load_digits(return_X_y=True)
images = np.float32(images / 16)
data = dbjax.from_arrays({"x": images, "label": labels}, batch_size=32)
model = dbjax.models.dense((64, 128, 10), activation=jnp.tanh, gain=1.0)
problem = model.loss, model.init(jax.random.key(0)), data
options = {"replicas": REPLICAS, "shards": 2, "steps": STEPS}
optimizer = dbjax.adagrad(0.02)

runtime = dbjax.Ray(address="local") if RUNTIME == "ray" else dbjax.Threads()
run = dbjax.downpour.train(*problem, optimizer=optimizer, runtime=runtime, **options)
trace = run.trace
print(trace)
print(f"{trace.throughput():,.0f} minibatches a second")
print("minibatches of each replica:", trace.minibatches_per_replica())
print("time spent computing:", *(f"{share:.0%}" for share in trace.utilisation()))

# %% [markdown]
# The same once more gives another Trace, and other parameters.


# %%
def vector(run):
    return np.asarray(ravel_pytree(run.params)[0])


def pushers(trace):
    pushes = trace.take((trace.kind == PUSH) & (trace.shard == 0))
    return "".join(str(replica) for replica in pushes.replica)


second = dbjax.downpour.train(*problem, optimizer=optimizer, runtime=runtime, **options)
print("who pushed, first run: ", pushers(trace)[:60], "...")
print("who pushed, second run:", pushers(second.trace)[:60], "...")
print(f"parameters differ by up to {np.abs(vector(run) - vector(second)).max():.3f}")

# %% [markdown]
# ## Look
#
# A time line from the middle of the run. A Trace is a table of arrays, with one row
# for each event.

# %%
work = trace.take(trace.kind == COMPUTE)
middle = np.median(work.start)
turn = np.median(work.time - work.start)
seen = work.take((work.time > middle) & (work.start < middle + 25 * turn))
figure, panel = plt.subplots(figsize=(10, 0.6 + 0.4 * REPLICAS))
panel.barh(
    seen.replica,
    1e3 * (seen.time - seen.start),
    left=1e3 * (seen.start - middle),
    edgecolor="white",
)
panel.set(xlim=(0, 25e3 * turn), yticks=range(REPLICAS), ylabel="replica")
panel.set(xlabel="time (ms); a bar is a minibatch's gradient")
panel.grid(visible=False)
plt.show()

# %%
stale = trace.staleness()
pushed = trace.take((trace.kind == PUSH) & (trace.shard == 0))
figure, panels = plt.subplots(1, 2, figsize=(10, 3.5))
top = int(np.quantile(stale, 0.995)) + 2
share = np.full(len(stale), 100 / len(stale))
for shard in range(2):
    missed = np.minimum(stale[:, shard], top)
    bins = np.arange(top + 2) - 0.5
    look = {"histtype": "step", "linewidth": 2, "label": f"shard {shard}"}
    panels[0].hist(missed, bins, weights=share, **look)
panels[0].axvline(REPLICAS - 1, color="black", linestyle="--", label="replicas - 1")
panels[0].set(
    xlabel=f"staleness of a push (updates missed; at the right {top} and more)"
)
panels[0].set_ylabel("share of pushes (%)")
panels[0].legend()
panels[1].plot(pushed.time - trace.start.min(), np.arange(len(pushed)))
panels[1].set(xlabel="time since the start (s)", ylabel="version of shard 0 (updates)")
plt.show()

# %% [markdown]
# Above, replicas lose step with each other at once; the gaps between bars are
# fetches, pushes and waiting for a core. At the left, the mean staleness is about
# `replicas - 1`, as in emulation, and the two shards, which handle pushes each in its
# own order, agree but for details. At the right, the line is flat while programs are
# compiled; after that it is straight where the run keeps its speed, and bends where
# something else keeps the machine busy.
#
# To see all of it, open the file below in <https://ui.perfetto.dev> ("Open trace
# file"; it stays on your computer): a track for each replica and each shard, and all
# that is known of an event if one clicks on it.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
trace.to_perfetto(folder / "trace.json.gz")
trace.save(folder / "trace.npz")
for path in sorted(folder.iterdir()):
    print(path, f"{path.stat().st_size / 1024:,.0f} KiB")

# %% [markdown]
# ## Replay
#
# The Trace is read from its file (an npz of plain arrays, no pickle), so this could
# be another day. `verify=True` compares the parameters with the digests that the live
# run left in the Trace, and would name the first row that differs.
#
# The bits are the same if the kind of device, jax and its number of threads are. The
# header says what they were.

# %%
recorded = dbjax.Trace.load(folder / "trace.npz")
assert recorded.diff(trace) is None
again = dbjax.replay(recorded, *problem, optimizer=optimizer, verify=True)
assert np.array_equal(vector(again), vector(run))
print(f"{len(vector(run)):,} parameters, all bits equal")
print({key: recorded.header[key] for key in ("runtime", "replicas", "shards", "steps")})

# %% [markdown]
# ## What would have been
#
# The order of events depends on no value, so the same Trace can be run with another
# optimizer, rate or loss: then what differs is due to that alone, and not to another
# order. `sweep` does it for many rates at once, compiled.
#
# To tell what staleness costs, replay Traces of other staleness beside it. Emulated
# machines of equal speed miss each other once, so one replica has no staleness, and
# 21 always have 20. (`Trace.from_delays` makes a Trace of any delays.)

# %%
rates = np.logspace(-3, 0.5, RATES)
equal = dbjax.Cluster(step_time=1.0)
traces = {"recorded": recorded}
for count in (1, 21):
    traces[f"staleness {count - 1}"] = dbjax.simulate(
        equal, replicas=count, shards=2, steps=STEPS
    )


@jax.jit
def loss(params):
    return model.loss(params, {"x": images, "label": labels})


figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
rules = {"Adagrad, as recorded": dbjax.adagrad, "SGD instead": optax.sgd}
for panel, (name, rule) in zip(panels, rules.items(), strict=True):
    grid = dbjax.sweep(
        list(traces.values()),
        *problem,
        rule,
        rates,
        metrics_fn=lambda params: {"loss": loss(params)},
    )
    for label, row in zip(traces, grid.metrics["loss"], strict=True):
        panel.loglog(rates, row, "o-", label=label)
    panel.set(title=name, xlabel=f"learning rate ({STEPS} minibatches)")
    panel.set_ylim(1e-3, 10)
panels[0].set_ylabel("training loss at the end (nats)")
panels[0].legend()
plt.show()

# %% [markdown]
# On the recorded Trace Adagrad does a little worse than without staleness, and much
# better than at a staleness of 20. With SGD, staleness hardly matters at small rates,
# but it takes the large ones away, where the curves leave the picture. The best rate
# without staleness is already too large for this run.
#
# ## A larger cluster like this one
#
# `Cluster.fit` reads from a Trace how long everything took: step times, speeds of
# replicas, latency, and what shards need for a push. With that one can ask for more
# machines of the kind, before there are any. The first quarter of the run is left
# out, as programs are still compiled then.

# %%
fitted = dbjax.Cluster.fit(recorded.take(recorded.step >= STEPS // 4))
kind = dataclasses.replace(fitted, speeds=1.0)  # machines of the typical speed
step, service = fitted.step_time.mean, fitted.shard_service.mean
print(f"mean seconds: a minibatch {step:.5f}, a push on a shard {service:.5f}")
counts = REPLICAS * 2 ** np.arange(6)
speed = [
    dbjax.simulate(kind, replicas=int(n), shards=2, steps=100 * int(n)).throughput()
    for n in counts
]
figure, panel = plt.subplots(figsize=(6.5, 4))
panel.loglog(counts, speed, "o-", label="emulated")
panel.loglog(counts, speed[0] * counts / counts[0], ":", label="in proportion")
panel.axhline(
    1 / service, color="black", linestyle="--", label="a shard that never rests"
)
panel.set(xlabel="replicas", ylabel="minibatches a second", xticks=counts)
panel.set_xticklabels(counts)
panel.minorticks_off()
panel.legend()
plt.show()

# %% [markdown]
# More replicas are faster until a shard is busy all the time; from there on they only
# queue. What helps then are more shards, or pushing less often (`n_push`). On a
# machine of few cores the fit is gloomy, because a push also waits for its core, and
# that would be another machine's on a cluster.
#
# From here: `RUNTIME = "ray"` above records the same on processes, and
# `dbjax.Ray(address="auto")` on a cluster; `Trace.from_events` makes a Trace of logs
# that were written elsewhere.
