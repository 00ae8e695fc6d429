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
# # 03 Model partitions
#
# In the paper (Dean et al., NIPS 2012) a model that is too large, or too slow, for
# one machine is cut over several. Each of these **partitions** computes its units and
# holds their parameters, and a partition talks only to the shards of the parameter
# server that hold the same ones. Here the machines are 8 devices, which one CPU
# pretends to have: what is exchanged is as real as on accelerators, but nothing gets
# faster.
#
# To run it in [Colab](https://colab.research.google.com), choose "File", "Upload
# notebook". The whole takes less than a minute on two CPU cores.

# %% tags=["parameters"]
SOURCE = ".."  # where to install dbjax from: a checkout, or git+https://... of one
STEPS = 400  # minibatches of all replicas together
WIDTH = 512  # units of a hidden layer
PARTITIONS = (2, 4, 8)  # to compare

# %%
import importlib.util

if importlib.util.find_spec("dbjax") is None:
    print("installing dbjax from", SOURCE)
    # %pip install --quiet {SOURCE} matplotlib scikit-learn

# %% [markdown]
# How many devices there are is settled when jax first uses one, so this comes before
# all else. `NPROC` is the size of XLA's pool of threads: programs that talk to each
# other must not run out of them. On real accelerators leave both out. (If the
# notebook has been running already, restart it.)

# %%
import os

os.environ["NPROC"] = "64"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import dbjax
from dbjax import mesh as mesh_lib

plt.rcParams.update({"figure.constrained_layout.use": True})
print(jax.device_count(), "devices")

# %% [markdown]
# ## Meshes and rules
#
# A mesh gives the devices names: here 8 partitions along the axis "model". Rules say
# how parameters are cut: from the path of a parameter to a `PartitionSpec`, and the
# first rule that matches counts. The network is fully connected, as the paper's for
# speech (`dbjax.models.speech()` is that one, of 42 million parameters), and brings
# its own rules.

# %%
images, labels = load_digits(return_X_y=True)
images = np.float32(images / 16)
data = dbjax.from_arrays({"x": images, "label": labels}, batch_size=32)

model = dbjax.models.dense((64, WIDTH, WIDTH, 16))
params = model.init(jax.random.key(0))
mesh = dbjax.make_mesh(model=8)
sharded = dbjax.shard_params(params, mesh, model.rules)
paths, _ = jax.tree_util.tree_flatten_with_path(sharded)
for path, leaf in paths:
    name, shape = jax.tree_util.keystr(path), leaf.sharding.shard_shape(leaf.shape)
    print(f"{name:28}{leaf.shape!s:14} cut by {leaf.sharding.spec!s:36} into {shape}")

# %% [markdown]
# The layers alternate. The first is cut by columns: each partition computes some of
# the units, from all inputs. The second is cut by rows: each reads the units that it
# has computed, and gives its share of every sum. So two layers need one exchange, an
# all-reduce of the sums.
#
# ## Whole and cut, the loss is the same
#
# The loss is an ordinary function that knows no mesh. XLA compiles it for 8 devices
# from where the parameters lie; sums are added up in another order, so the result is
# equal to rounding.

# %%
batch = data.batch(0, 0)
grad = jax.jit(jax.value_and_grad(model.loss))
whole_value, whole_gradient = jax.block_until_ready(grad(params, batch))
cut_value, cut_gradient = jax.block_until_ready(grad(sharded, batch))
difference = jax.tree.map(
    lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()),
    whole_gradient,
    cut_gradient,
)
print(f"loss on one device {whole_value:.7f}, on eight {cut_value:.7f}")
print("largest difference in the gradient", max(jax.tree.leaves(difference)))
np.testing.assert_allclose(whole_value, cut_value, rtol=1e-5)
assert max(jax.tree.leaves(difference)) < 1e-5

# %% [markdown]
# ## What a partition costs
#
# `partition_costs` reads from the compiled program which collectives it holds, and
# how many bytes each device has to send. Nothing is run.

# %%
print(mesh_lib.partition_costs(jax.jit(jax.grad(model.loss)), sharded, batch))

# %% [markdown]
# It depends on the network what that comes to. The paper's networks for images are
# locally connected: a unit sees a small patch of the layer below, and a partition
# that holds some rows of the image needs from the others only the rows at its border.
# Below is a small one of that kind beside the fully connected one.

# %%
pixels = np.zeros((32, 18, 18, 3), np.float32)
networks = {
    "fully connected": (model, batch),
    "locally connected": (
        dbjax.models.vision("small"),
        {"x": pixels, "label": batch["label"]},
    ),
}


def shapes_on(parts, network):
    """The parameters' shapes, and where they are to lie; nothing is allocated."""
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        network.shapes,
        mesh_lib.shardings(network.shapes, parts, network.rules),
    )


figure, panel = plt.subplots(figsize=(7, 4))
for colour, (name, (network, example)) in enumerate(networks.items()):
    sent = []
    for count in PARTITIONS:
        parts = dbjax.make_mesh(model=count)
        with jax.set_mesh(parts):
            costs = mesh_lib.partition_costs(
                jax.jit(jax.grad(network.loss)), shapes_on(parts, network), example
            )
        sent.append(costs.total.sent_bytes / 1024)
    size = f"{network.num_parameters:,} parameters"
    panel.plot(PARTITIONS, sent, "o-", color=f"C{colour}", label=f"{name}, {size}")
    panel.axhline(4 * network.num_parameters / 1024, color=f"C{colour}", linestyle=":")
panel.set(ylim=(0, None), xticks=PARTITIONS, xlabel="partitions")
panel.set_ylabel("sent by each in a step (KiB)")
panel.set_title("dotted: the whole gradient, which stays where it is", fontsize=10)
panel.grid(axis="y")
panel.legend()
plt.show()

# %% [markdown]
# What is sent grows with the examples of a minibatch, not with the parameters, whose
# gradients are needed only where they are. More partitions add little for each of
# them. In images as small as these (18 x 18) most rows are at some border; in the
# paper's network of 80 million parameters two partitions send 1.2 MiB in a step, of a
# gradient of 321 MB.
#
# ## Downpour on partitions
#
# Now both at once: 2 replicas, each with 4 partitions of its own. Shards have the
# same edges as partitions, so that each partition has one shard to talk to.

# %%
both = dbjax.make_mesh(replica=2, model=4)


@jax.jit
def accuracy(params):
    return jnp.mean(model.apply(params, images).argmax(1) == labels)


shared = {
    "optimizer": dbjax.adagrad(0.02),
    "eval_fn": lambda params, step, time: {"accuracy": accuracy(params)},
    "eval_every": STEPS // 10,
}
options = {"replicas": 2, "shards": 4, "steps": STEPS, **shared}
run = dbjax.downpour.train(
    model.loss, params, data, mesh=both, rules=model.rules, **options
)
whole = dbjax.replay(run.trace, model.loss, params, data, exact=False, **shared)
for name, each in {"partitions": run, "whole": whole}.items():
    row = each.trace.evaluations[-1]
    print(f"{name:11} accuracy on the training set {row['accuracy']:.1%}")

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.8))
for name, each, style in (("4 partitions", run, "-"), ("whole", whole, "--")):
    rows = each.trace.evaluations
    percent = [100 * row["accuracy"] for row in rows]
    panels[0].plot([row["step"] for row in rows], percent, style, label=name)
panels[0].set(xlabel="minibatches of both replicas together")
panels[0].set_ylabel("accuracy on the training set (%)")
panels[0].grid()
panels[0].legend()

table = run.trace.partition_bytes() / 2**20
picture = panels[1].imshow(table, vmin=0)
for (partition, shard), value in np.ndenumerate(table):
    look = {"ha": "center", "color": "black" if value > table.max() / 2 else "white"}
    panels[1].text(shard, partition, f"{value:.0f}", **look)
panels[1].set(xlabel="shard", ylabel="partition", xticks=range(4), yticks=range(4))
figure.colorbar(picture, label="exchanged in the run (MiB)")
plt.show()

# %% [markdown]
# Left: cut or whole, training goes the same way. Right: a partition exchanges its
# parameters and gradients with the shard of the same edges, and next to nothing with
# the others (the small rest are biases that are not cut). The paper built Downpour
# this way so that no network link carries a whole model.
#
# From here: `rules` for a network of your own are pairs of a pattern and a
# `PartitionSpec`, such as `((r"w1", PartitionSpec(None, "model")), ...)`; notebook
# 02's `minimize` takes `mesh` and `rules` as well.
