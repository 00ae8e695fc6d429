import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dbjax import trees

M = 3


def random_tree(seed, rows=None, dtype=np.float32):
    random = np.random.default_rng(seed)
    lead = () if rows is None else (rows,)
    return {
        "w": jnp.array(random.normal(size=(*lead, 4, 5)), dtype),
        "b": [jnp.array(random.normal(size=(*lead, 7)), dtype)],
        "scalar": jnp.array(random.normal(size=lead), dtype),
    }


def flat(tree, rows=None):
    lead = () if rows is None else (rows,)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*lead, -1) for x in leaves], axis=-1)


def test_products_and_combinations_equal_those_of_long_vectors():
    a, b, rows = random_tree(0), random_tree(1), random_tree(2, M)
    c = jnp.array([0.5, -2.0, 3.0])
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5)  # noqa: E731
    close(trees.vdot(a, b), flat(a) @ flat(b))
    close(trees.norm(a), np.linalg.norm(flat(a)))
    close(trees.rows_vdot(rows, a), flat(rows, M) @ flat(a))
    close(jnp.sum(trees.leaf_vdots(a, b)), flat(a) @ flat(b))
    each = [trees.rows_vdot(rows[name], a[name]) for name in ("b", "scalar", "w")]
    close(trees.leaf_rows_vdots(rows, a), each)
    close(flat(trees.combine(c, rows)), np.asarray(c) @ flat(rows, M))
    each = trees.combine(jnp.stack([c, 2 * c, 3 * c]), rows)
    close(each["w"], 3 * trees.combine(c, rows["w"]))
    many = jnp.linspace(-1, 1, 4 * trees.FEW)
    rows = random_tree(3, 4 * trees.FEW)
    want = np.asarray(many) @ flat(rows, 4 * trees.FEW)
    np.testing.assert_allclose(flat(trees.combine(many, rows)), want, atol=1e-5)
    close(flat(trees.axpy(-0.5, a, b)), flat(b) - 0.5 * flat(a))


@pytest.mark.parametrize("rows_dtype", ["bfloat16", "float16"])
def test_16_bit_rows_are_multiplied_in_float32(rows_dtype):
    rows = jax.tree.map(lambda x: x.astype(rows_dtype), random_tree(2, M))
    v, c = random_tree(0), jnp.array([0.5, -2.0, 3.0])
    got = trees.rows_vdot(rows, v)
    np.testing.assert_allclose(got, flat(rows, M) @ flat(v), rtol=1e-5)
    got = trees.combine(c, rows)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(flat(got), np.asarray(c) @ flat(rows, M), rtol=1e-5)


def test_a_sum_of_many_16_bit_products_does_not_stop_growing():
    ones = jnp.ones(3000, jnp.bfloat16)
    assert trees.vdot(ones, ones) == 3000


def test_scalars_are_float64_where_there_is_float64():
    assert trees.vdot(jnp.ones(2), jnp.ones(2)).dtype == jnp.float32
    with jax.enable_x64(True):
        product = trees.vdot(jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float32))
        assert product.dtype == jnp.float64
        # A small leaf next to a large one is not lost.
        mixed = {"a": jnp.full(1, 1e10, jnp.float64), "b": jnp.ones(1, jnp.float32)}
        assert trees.vdot(mixed, mixed) - 1e20 >= 0


def test_complex_leaves_are_pairs_of_reals():
    a, b = jnp.array([1.0 + 2.0j]), jnp.array([3.0 - 1.0j])
    assert trees.vdot(a, b) == 1 * 3 - 2 * 1
    assert trees.rows_vdot(jnp.stack([a, b]), b).tolist() == [1, 10]
    assert trees.combine(jnp.array([1.0, 2.0]), jnp.stack([a, b])) == a + 2 * b


def test_an_empty_tree_is_the_null_vector():
    assert trees.vdot({}, {}) == 0
    assert trees.axpy(1.0, {}, {}) == {}


@pytest.mark.parametrize("condition", [True, False])
def test_set_row(condition):
    rows, v = random_tree(2, M), random_tree(0)
    got = trees.set_row(rows, jnp.int32(1), v, condition)
    want = flat(rows, M)
    want[1] = flat(v) if condition else want[1]
    np.testing.assert_array_equal(flat(got, M), want)


@pytest.mark.parametrize("m", [10, 20])
@pytest.mark.parametrize("shape", [(50, 40), (2000,)])
def test_a_row_is_written_in_place(shape, m):
    """No copy of the rows, although they are read before and after."""

    def f(rows, v):
        c = trees.rows_vdot(rows, v)
        rows = trees.set_row(rows, jnp.int32(1), v, jnp.sum(c) > 0)
        return trees.combine(c, rows), rows

    rows, v = jnp.ones((m, *shape)), jnp.ones(shape)
    compiled = jax.jit(f, donate_argnums=0).lower(rows, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows.nbytes / 3
