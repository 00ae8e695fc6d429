"""Flax modules as plain parameters and a pure loss, with what they hold besides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import dbjax
from dbjax.mesh import shardings

random = np.random.default_rng(0)
X = random.standard_normal((96, 6)).astype(np.float32)
Y = (X @ random.standard_normal((6, 3))).argmax(1)
BATCHES = [{"x": X[i : i + 16], "y": Y[i : i + 16]} for i in range(0, 96, 16)]


def cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


class Nnx(nnx.Module):
    """A list of layers, batch normalisation, and dropout."""

    def __init__(self, rngs, rate=0.3):
        self.layers = nnx.List(
            [nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)]
        )
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.layers[0](x))))
        return self.layers[1](x)


class Linen(nn.Module):
    """The same, and its kernels in boxes; it sows what it sees."""

    rate: float = 0.3

    @nn.compact
    def __call__(self, x, train):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.Dense(8, kernel_init=init)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("intermediates", "normed", x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, kernel_init=init)(x)


def from_nnx(**options):
    return dbjax.from_nnx(
        Nnx(nnx.Rngs(0), **options),
        loss=lambda module, batch: cross_entropy(module(batch["x"]), batch["y"]),
    )


def from_linen(**options):
    module = Linen(**options)
    return dbjax.from_linen(
        module,
        module.init(jax.random.key(0), X[:1], train=False),
        loss=lambda module, batch: cross_entropy(
            module(batch["x"], train=True), batch["y"]
        ),
    )


def first_layer(params):
    return params["layers"][0] if "layers" in params else params["Dense_0"]


def statistics(merged):
    """Mean and variance of the batch norm that `merge` gave."""
    if isinstance(merged, Nnx):
        return merged.norm.mean[...], merged.norm.var[...]
    stats = merged["batch_stats"]["BatchNorm_0"]
    return stats["mean"], stats["var"]


@pytest.fixture(params=[from_nnx, from_linen])
def adapt(request):
    return request.param


def test_a_run_trains_it_and_its_trace_replays_to_the_same_bits(adapt):
    p = adapt()
    data = dbjax.from_arrays({"x": X, "y": Y}, batch_size=16)
    rule = dbjax.adagrad(0.1)
    run = dbjax.downpour.train(
        p.loss_fn, p.params, data, optimizer=rule, replicas=3, shards=2, steps=60,
        rng=True, per_shard=True,
    )  # fmt: skip
    again = dbjax.replay(
        run.trace, p.loss_fn, p.params, data, optimizer=rule, rng=True, verify=True
    )
    jax.tree.map(np.testing.assert_array_equal, run.params, again.params)
    key, batch = jax.random.key(9), {"x": X, "y": Y}
    loss = jax.jit(p.loss_fn)  # one program, where its steps would be many
    before, after = (loss(w, batch, key) for w in (p.params, run.params))
    assert after < 0.7 * before
    merged = p.merge(run.params, BATCHES)
    if adapt is from_nnx:
        outputs = merged(X)
    else:
        outputs = Linen().apply(merged, X, train=False)
    assert (outputs.argmax(1) == Y).mean() > 0.8


def test_sandblaster_minimises_it(adapt):
    p = adapt()
    data = dbjax.from_arrays({"x": X, "y": Y}, batch_size=96)
    run = dbjax.sandblaster.minimize(
        p.loss_fn, p.params, data, method=dbjax.GradientDescent(), iterations=5,
        rng=True,
    )  # fmt: skip
    loss = jax.jit(p.loss_fn)
    assert run.value < loss(p.params, {"x": X, "y": Y}, jax.random.key(0))


def test_the_loss_is_a_pure_function_of_parameters_batch_and_key(adapt):
    p = adapt()
    one, other = jax.random.split(jax.random.key(1))
    step = jax.jit(jax.value_and_grad(p.loss_fn))
    first = step(p.params, BATCHES[0], one)
    step(p.params, BATCHES[1], other)  # moves no average, uses up no key
    jax.tree.map(np.testing.assert_array_equal, first, step(p.params, BATCHES[0], one))
    assert step(p.params, BATCHES[0], other)[0] != first[0]
    raw = jax.random.key_data(one)  # a key of the older kind
    eager = p.loss_fn(p.params, BATCHES[0], raw)
    np.testing.assert_allclose(eager, first[0], 1e-6)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_dropout_without_a_key_is_an_error(adapt, transform):
    p = adapt()
    with pytest.raises(ValueError, match="rng=True"):
        transform(p.loss_fn)(p.params, BATCHES[0])


def test_what_needs_no_key_takes_none(adapt):
    p = adapt(rate=0.0)
    with_key = p.loss_fn(p.params, BATCHES[0], jax.random.key(0))
    assert p.loss_fn(p.params, BATCHES[0]) == with_key


def test_batch_statistics_are_means_over_the_batches_given(adapt):
    p = adapt()
    layer = first_layer(p.params)
    seen = [b["x"] @ layer["kernel"] + layer["bias"] for b in BATCHES]
    mean, variance = statistics(p.merge(p.params, iter(BATCHES)))
    np.testing.assert_allclose(mean, np.mean([h.mean(0) for h in seen], 0), 1e-4, 1e-6)
    np.testing.assert_allclose(variance, np.mean([h.var(0) for h in seen], 0), 1e-4)
    # With other parameters they are others.
    doubled = jax.tree.map(lambda leaf: 2 * leaf, p.params)
    mean, _ = statistics(p.merge(doubled, BATCHES[:1]))
    np.testing.assert_allclose(mean, 2 * seen[0].mean(0), 1e-4, 1e-6)


def test_batch_statistics_are_not_lost_in_silence(adapt):
    p = adapt()
    with pytest.raises(ValueError, match="batch statistics"):
        p.merge(p.params)
    with pytest.raises(ValueError, match="there were none"):
        p.merge(p.params, iter([]))
    mean, variance = statistics(p.merge(p.params, ()))
    assert not mean.any() and (variance == 1).all()


def test_parameters_have_paths_for_rules(adapt):
    p = adapt()
    rules = [("(layers/0|Dense_0)/kernel", PartitionSpec(None, "model"))]
    where = shardings(p.params, dbjax.make_mesh(model=1), rules)
    assert first_layer(where)["kernel"].spec == PartitionSpec(None, "model")
    assert first_layer(where)["bias"].spec == PartitionSpec()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(p.params))


def test_parameters_of_another_structure_are_an_error(adapt):
    p = adapt()
    wrong = p.params | {"more": jnp.zeros(3)}
    with pytest.raises(ValueError, match="structure"):
        p.loss_fn(wrong, BATCHES[0], jax.random.key(0))
    with pytest.raises(ValueError, match="structure"):
        p.merge(wrong, ())


def test_the_module_given_stays_as_it_is_and_the_merged_one_is_in_evaluation_mode():
    module = Nnx(nnx.Rngs(0))
    p = dbjax.from_nnx(module, loss=lambda m, b: m(b["x"]).mean())
    p.loss_fn(p.params, BATCHES[0], jax.random.key(0))
    merged = p.merge(jax.tree.map(jnp.zeros_like, p.params), BATCHES)
    assert module.dropout.rngs.count[...] == 0 and not module.norm.mean[...].any()
    assert module.layers[0].kernel[...].any() and not module.dropout.deterministic
    assert merged.dropout.deterministic and merged.norm.use_running_average
    assert not merged.layers[0].kernel[...].any()


def test_streams_of_random_numbers_differ_from_each_other():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Dropout(0.5, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return self.scale * (self.first(x) - self.second(x))

    p = dbjax.from_nnx(Two(nnx.Rngs(0)), loss=lambda m, x: (m(x) ** 2).mean())
    assert p.loss_fn(p.params, jnp.ones(100), jax.random.key(0)) > 0.5


def test_stacked_layers_keep_a_key_each():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            self.dropouts = stack(rngs)
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            outputs = nnx.vmap(lambda dropout, x: dropout(x), in_axes=(0, None))(
                self.dropouts, x
            )
            return self.scale * outputs

    p = dbjax.from_nnx(Stacked(nnx.Rngs(0)), loss=lambda m, x: (m(x).std(0)).mean())
    assert jax.jit(p.loss_fn)(p.params, jnp.ones(100), jax.random.key(0)) > 0.5


def test_other_state_is_carried_only_by_merge():
    class Counting(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones(()))
            self.calls = nnx.Variable(jnp.zeros((), int))

        def __call__(self, x):
            self.calls[...] += 1
            return self.scale * x * self.calls[...]

    p = dbjax.from_nnx(Counting(), loss=lambda m, x: m(x).sum())
    assert p.loss_fn(p.params, X) == p.loss_fn(p.params, X)
    assert p.merge(p.params).calls[...] == 0
    assert p.merge(p.params, [X, X, X]).calls[...] == 3


def test_a_shared_parameter_is_one_leaf_and_sums_its_gradients():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(4, 4, rngs=rngs)
            self.down = nnx.Linear(4, 4, rngs=rngs)
            self.down.kernel = self.up.kernel

        def __call__(self, x):
            return self.down(self.up(x))

    p = dbjax.from_nnx(Tied(nnx.Rngs(0)), loss=lambda m, x: m(x).sum())
    assert len(jax.tree.leaves(p.params)) == 3

    def twice(kernel):
        return (X[:, :4] @ kernel @ kernel).sum()  # biases are zero

    (kernel,) = (leaf for leaf in jax.tree.leaves(p.params) if leaf.ndim == 2)
    gradient = jax.grad(p.loss_fn)(p.params, X[:, :4])
    (got,) = (leaf for leaf in jax.tree.leaves(gradient) if leaf.ndim == 2)
    np.testing.assert_allclose(got, jax.grad(twice)(kernel), 1e-4, 1e-4)
    merged = p.merge(p.params)
    assert merged.up.kernel is merged.down.kernel


def test_annotated_nnx_parameters_are_plain_arrays():
    with nnx.use_eager_sharding(False):
        module = nnx.Linear(
            6, 4, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": (None, "model")}
        )
    p = dbjax.from_nnx(module, loss=lambda m, b: m(b["x"]).mean())
    with jax.set_mesh(dbjax.make_mesh(model=1)):
        jax.jit(jax.grad(p.loss_fn))(p.params, BATCHES[0])
    assert p.merge(p.params)(X).shape == (96, 4)


def test_what_the_loss_returns_besides_is_passed_on():
    p = dbjax.from_nnx(
        nnx.Linear(6, 3, rngs=nnx.Rngs(0)),
        loss=lambda m, b: (m(b["x"]).mean(), {"size": 16}),
    )
    assert p.loss_fn(p.params, BATCHES[0])[1] == {"size": 16}


def variables(kernel):
    return {"params": {"kernel": kernel, "bias": jnp.zeros(3)}}


def a_loss(module, batch):
    return module(batch["x"]).mean()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: dbjax.from_nnx(nn.Dense(3), loss=a_loss), TypeError, "use from_linen"),
        (lambda: dbjax.from_nnx(Nnx, loss=a_loss), TypeError, "got the class Nnx"),
        (lambda: dbjax.from_nnx({}, loss=a_loss), TypeError, "got a dict"),
        (
            lambda: dbjax.from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), loss=None),
            TypeError,
            "loss must be callable",
        ),
        (
            lambda: dbjax.from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), loss=a_loss),
            ValueError,
            "no parameters",
        ),
        (
            lambda: dbjax.from_nnx(
                nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0))), loss=a_loss
            ),
            ValueError,
            "parameter bias must be .* got a ShapeDtypeStruct",
        ),
        (
            lambda: dbjax.from_linen(nnx.Dropout(0.5), {}, loss=a_loss),
            TypeError,
            "use from_nnx",
        ),
        (
            lambda: dbjax.from_linen(nn.Dense(3), {"kernel": X}, loss=a_loss),
            ValueError,
            r"collection \"params\".*got \['kernel'\]",
        ),
        (
            lambda: dbjax.from_linen(
                nn.Dense(3), variables(jnp.zeros((6, 3), int)), loss=a_loss
            ),
            ValueError,
            "parameter kernel must be .* got int32",
        ),
        (
            lambda: dbjax.from_linen(nn.Dense(3), {"params": {}}, loss=a_loss),
            ValueError,
            "no parameters",
        ),
    ],
)
def test_what_cannot_be_trained_is_an_error(make, error, match):
    with pytest.raises(error, match=match):
        make()
