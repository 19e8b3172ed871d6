"""Products: full ones, and those that statistics and applied roots may be."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix import products

X = np.random.default_rng(0).normal(size=(2, 24, 40)).astype(np.float32)


def lowered(function, *arguments):
    """Products of a function's program, by platform."""
    traced = jax.jit(function).trace(*arguments)
    return {
        platform: re.findall(
            "dot_general.*", traced.lower(lowering_platforms=(platform,)).as_text()
        )
        for platform in ("cpu", "cuda", "rocm", "tpu")
    }


def test_a_swift_gram_is_near_the_full_one_and_symmetric():
    exact = X.astype(float) @ X.swapaxes(1, 2)
    halves = np.asarray(jax.jit(products._gram_of_halves)(X))
    assert halves.dtype == np.float32
    np.testing.assert_array_equal(halves, halves.swapaxes(1, 2))
    errors = np.linalg.norm(halves - exact, 2, axis=(1, 2)) / np.linalg.norm(exact, 2, axis=(1, 2))
    # Rests that a compiler takes for zero leave 2^-9.
    assert (errors < 2.0**-16).all()


def test_scales_do_not_matter():
    halves = jax.jit(products._gram_of_halves)
    np.testing.assert_array_equal(halves(X * 2.0**40), halves(X) * 2.0**80)


def test_two_products_of_bfloat16_numbers_on_accelerators_one_full_elsewhere():
    found = lowered(products.swift_gram, X)
    for platform in ("cuda", "rocm", "tpu"):
        assert len(found[platform]) == 2
        assert all(line.count("bf16>") == 2 and "24x24xf32>" in line for line in found[platform])
    assert len(found["cpu"]) == 1 and "[HIGHEST, HIGHEST]" in found["cpu"][0]


def test_roots_are_applied_at_high_precision_where_that_is_asked_for():
    roots = [jnp.eye(24)[None], jnp.eye(40)[None]]
    for swift, precision in ((True, "[HIGH, HIGH]"), (False, "[HIGHEST, HIGHEST]")):
        apply = functools.partial(products.apply_matrices, matrices=roots, swift=swift)
        found = lowered(apply, X)
        assert all(len(lines) == 2 and precision in str(lines) for lines in found.values())


@pytest.mark.parametrize("wanted", ["highest", "float32"])
def test_all_is_full_where_the_user_wants_that(wanted):
    with jax.default_matmul_precision(wanted):
        both = lowered(
            lambda x: (products.swift_gram(x), products.apply_matrices(x, [x], swift=True)),
            X[:, :, :24],
        )
    assert all(str(lines).count("[HIGHEST, HIGHEST]") == 2 for lines in both.values())


@pytest.mark.parametrize("wanted", ["bfloat16", "BF16_BF16_F32_X3"])
def test_what_the_user_wants_of_a_model_does_not_reach_halves(wanted):
    expected = lowered(products.swift_gram, X)
    with jax.default_matmul_precision(wanted):
        assert lowered(products.swift_gram, X) == expected


def test_other_dtypes_are_multiplied_in_full():
    with jax.enable_x64(True):
        found = lowered(products.swift_gram, X.astype(np.float64))
    assert all("[HIGHEST, HIGHEST]" in str(lines) and len(lines) == 1 for lines in found.values())


def test_derivatives_of_swift_statistics():
    gradient = jax.grad(lambda x: (products.swift_gram(x) ** 2).sum())(jnp.asarray(X))
    expected = 4 * (X @ X.swapaxes(1, 2)) @ X
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
