"""Parts and wrappers that are not ours: parameters read in any way, options of other kinds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj

PARAMS = {"w": jnp.arange(12.0).reshape(4, 3), "v": jnp.ones((5, 2))}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def is_blocks(x):
    return isinstance(x, sj.Blocks)


def mapped(stacks, params):
    plus = lambda b, p: dataclasses.replace(b, update=b.update + p.update)  # noqa: E731
    return jax.tree.map(plus, stacks, params, is_leaf=is_blocks)


def by_key(stacks, params):
    return {
        k: dataclasses.replace(b, update=b.update + params[k].update) for k, b in stacks.items()
    }


def by_leaves(stacks, params):
    structure = jax.tree.structure(stacks, is_leaf=is_blocks)
    return mapped(stacks, structure.unflatten(jax.tree.leaves(params, is_leaf=is_blocks)))


def by_length(stacks, params):
    return mapped(stacks, params) if len(params) == len(stacks) else stacks


def by_kind(stacks, params):
    return by_key(stacks, dict(params)) if isinstance(params, dict) else stacks


def by_size(stacks, params):
    return by_key(stacks, params) if len(jax.tree.leaves(params)) >= 4 else stacks


READERS = [mapped, by_key, by_leaves, by_length, by_kind, by_size]


@pytest.mark.parametrize("read", READERS)
def test_a_part_reads_parameters_in_its_own_way(read):
    part = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda stacks, s, params: (read(stacks, params), s)
    )
    tx = sj.blocked(part)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for got, g, p in zip(*map(jax.tree.leaves, (updates, GRADS, PARAMS)), strict=True):
        np.testing.assert_array_equal(got, g + p)


def test_an_error_of_a_part_comes_through():
    def update(stacks, state, params):
        raise KeyError("mine")

    tx = sj.blocked(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    with pytest.raises(KeyError, match="mine"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_a_part_branches_on_a_flag():
    def update(stacks, state, params, flag=False, **extra):
        half = lambda b: dataclasses.replace(b, update=b.update / 2)  # noqa: E731
        return ({k: half(b) for k, b in stacks.items()} if flag else stacks), state

    part = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = sj.blocked(part)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, flag=True)
    np.testing.assert_array_equal(updates["w"], GRADS["w"] / 2)


@pytest.mark.parametrize("alias", [sj.shampoo, sj.kl_soap, sj.soap, sj.kl_shampoo])
def test_defaults_are_no_schedules_to_optax(alias):
    static = [n for n in ("rtol", "every") if n in alias.__wrapped__.__code__.co_varnames]
    tx = optax.inject_hyperparams(alias, static_args=static)(0.1)
    tx.update(GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("exponents", "message"),
    [
        (lambda shape: (-1.0,) * len(shape), "exponents: -1.0 must not be negative"),
        (lambda shape: (0.25,), r"exponents gives \(0.25,\) for blocks of shape"),
        (lambda shape: 0.5, "exponents gives 0.5 for blocks"),
        (lambda shape: ["a"] * len(shape), "exponents: 'a' must not be negative, or anything but"),
    ],
)
def test_a_function_of_exponents_is_checked(exponents, message):
    with pytest.raises(ValueError, match=message):
        sj.scale_by_shampoo(exponents=exponents).init(PARAMS)
