"""Whole optimizers on trees of any kind: what holds whatever the shapes, dtypes and gradients are.

What once failed stands in rows of `@example`. Examples are the same in every run.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import shampoo_jax as sj

few = functools.partial(
    settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
# With next to no eps updates do not depend on the scale of the gradients.
adamw = functools.partial(optax.adamw, 0.1, eps=1e-30, weight_decay=0.0)
ALIASES = {
    "shampoo": functools.partial(sj.shampoo, 0.1),
    "one_sided": functools.partial(sj.one_sided_shampoo, 0.1, side="smaller", graft="adam"),
    "soap": functools.partial(sj.soap, 0.1, eps=0.0, rtol=None),
    "kl_shampoo": functools.partial(sj.kl_shampoo, 0.1, eps=0.0, max_scale="relative", rtol=None),
    "kl_soap": functools.partial(sj.kl_soap, 0.1, eps=0.0, max_scale="relative", rtol=None),
}


class Pair(NamedTuple):
    first: Any
    second: Any


CONTAINERS = {
    "dict": lambda leaves: {f"w{i}": x for i, x in enumerate(leaves)},
    "list": list,
    "tuple": tuple,
    "nested": lambda leaves: {"a": {"b": leaves[:1]}, "c": tuple(leaves[1:]), "none": None},
    "namedtuple": lambda leaves: Pair(leaves[0], list(leaves[1:])),
}
KINDS = ("normal", "rank one", "wide", "sparse", "zero")


class Case(NamedTuple):
    """A tree of parameters and what its gradients are like."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ("float32",)  # in turns
    kinds: tuple[str, ...] = ("normal",)  # in turns
    container: str = "dict"
    missing: tuple[int, ...] = ()  # leaves without a gradient
    size: int | None = 4
    every: int = 1
    all_leaves: bool = True  # whether vectors and scalars are preconditioned, too

    def optimizer(self, alias):
        rule = (lambda path, leaf: True) if self.all_leaves else None
        cut = {"blocking": sj.Blocking(self.size), "preconditioned": rule}
        return alias(every=self.every, others=adamw(), **cut)

    def tree(self, leaves):
        return CONTAINERS[self.container](leaves)

    def params(self):
        rng = np.random.default_rng(0)
        return self.tree([jnp.asarray(rng.normal(size=s), d) for s, d in self.leaves()])

    def leaves(self):
        return [(s, self.dtypes[i % len(self.dtypes)]) for i, s in enumerate(self.shapes)]

    def gradients(self, step, scale=1.0, kinds=None):
        rng, kinds, found = np.random.default_rng(step + 1), kinds or self.kinds, []
        for i, (shape, dtype) in enumerate(self.leaves()):
            x = scale * _gradient(rng, shape, kinds[i % len(kinds)], dtype)
            found.append(None if i in self.missing else jnp.asarray(x, dtype))
        return self.tree(found)


def _gradient(rng, shape, kind, dtype):
    x = rng.normal(size=shape)
    if kind == "zero" or 0 in shape:
        return 0 * x
    if kind == "rank one":
        factors = [rng.normal(size=d) for d in shape]
        return functools.reduce(np.multiply.outer, factors, 1.0) * np.ones(shape)
    if kind == "wide" and shape:
        # Rows of very different length; float16 has five decades in all.
        decades = 1.5 if dtype == "float16" else 6
        rows = 10.0 ** np.linspace(-decades, decades, shape[0])
        return x * rows.reshape(-1, *[1] * (len(shape) - 1))
    if kind == "sparse":
        return x * (np.arange(x.size).reshape(shape) == x.size // 2)
    return x


SIZES = st.sampled_from([1, 2, 3, 5, 7])
SHAPES = st.one_of(
    st.lists(SIZES, max_size=3).map(tuple),
    st.sampled_from([(), (0,), (0, 3), (4, 0, 2), (1, 1), (1, 40), (33, 2), (2, 2, 2, 2)]),
)


@st.composite
def cases(draw, dtypes=("float32", "bfloat16", "float16"), kinds=KINDS):
    shapes = tuple(draw(st.lists(SHAPES, min_size=2, max_size=4)))
    missing = draw(st.sets(st.integers(0, len(shapes) - 1), max_size=1))
    some = functools.partial(st.lists, min_size=1, max_size=3)
    return Case(
        shapes,
        tuple(draw(some(st.sampled_from(dtypes)))),
        tuple(draw(some(st.sampled_from(kinds)))),
        draw(st.sampled_from(sorted(CONTAINERS))),
        tuple(missing),
        draw(st.sampled_from([None, 1, 3, 4])),
        draw(st.sampled_from([1, 2])),
        draw(st.booleans()),
    )


def types(tree):
    def of(x):
        return np.shape(x), jnp.result_type(x), bool(getattr(x, "weak_type", False))

    return jax.tree.map(of, tree)


def finite(tree):
    return all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree))


def run(tx, case, gradients, update=None):
    """Updates of some steps and the last state; parameters stay as they are."""
    update, params = update or jax.jit(tx.update), case.params()
    state, found = tx.init(params), []
    for g in gradients:
        new, state = update(g, state, params)
        found.append(new)
    return found, state


def close(a, b):
    """Whether updates are the same but for rounding, leaf by leaf."""
    for x, y in zip(*(jax.tree.leaves(t) for t in (a, b)), strict=True):
        tolerance = max(1e-2, 4 * float(jnp.finfo(x.dtype).eps))
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        bound = tolerance * max(np.abs(x).max(initial=0.0), 1e-30)
        np.testing.assert_allclose(x, y, rtol=0, atol=bound)


# Kinds of trees that have failed in some version: empty and 0-dimensional leaves beside matrices,
# long thin ones, rows of very different length in half precision, and a leaf without a gradient.
EMPTY = Case(((0, 3), (), (3, 2)), container="tuple", missing=(2,))
THIN = Case(((1, 40), (33, 2), (1, 1)), ("bfloat16", "float32"), ("rank one", "wide"), size=None)
NARROW = Case(((5, 3), (2, 2, 2, 2)), ("float16",), ("wide", "sparse"), "namedtuple", every=2)
DOUBLE = Case(((4, 3), (3,)), ("float64", "float32"), ("wide", "normal"), "nested", (1,))


def check(alias, case, exponent):
    tx, params = case.optimizer(alias), case.params()
    gradients = [case.gradients(step) for step in range(3)]
    update = jax.jit(tx.update)
    updates, state = run(tx, case, gradients, update)
    assert finite(updates) and finite(state) and int(state.total_notfinite) == 0
    assert types(state) == types(tx.init(params)), "the state changes its structure"
    assert types(updates[0]) == types(gradients[0]), "updates are not like gradients"
    # Zero gradients give zero updates, from the first step on.
    nothing, state = run(tx, case, [case.gradients(0, kinds=("zero",))] * 2, update)
    assert finite(state) and all(not np.any(x) for x in jax.tree.leaves(nothing))
    # The scale of the gradients does not matter.
    scaled = [case.gradients(step, 2.0**exponent) for step in range(3)]
    again, state = run(tx, case, scaled, update)
    assert finite(again) and finite(state)
    close(updates, again)


@pytest.mark.parametrize("name", ALIASES)
@few(max_examples=1)
@given(case=cases(), exponent=st.sampled_from([-8, 6]))
@example(case=EMPTY, exponent=6)
@example(case=NARROW, exponent=-8)
def test_updates_are_finite_alike_in_kind_and_indifferent_to_scale(name, case, exponent):
    check(ALIASES[name], case, exponent)


@pytest.mark.parametrize(
    ("name", "case"),
    [("shampoo", THIN), ("soap", DOUBLE), ("kl_shampoo", THIN), ("one_sided", DOUBLE)],
)
def test_thin_matrices_and_double_precision(name, case):
    with jax.enable_x64("float64" in case.dtypes):
        check(ALIASES[name], case, 6)


@pytest.mark.parametrize("name", ["shampoo", "kl_soap"])
@few(max_examples=1)
@given(case=cases(dtypes=("float32",)))
@example(case=Case(((5, 3), (3, 5), (2, 3, 2), (4,)), kinds=("normal", "rank one"), every=2))
def test_eager_steps_and_other_names_and_orders_are_the_same(name, case):
    case = case._replace(container="list")
    params, gradients = case.params(), [case.gradients(step) for step in range(3)]
    updates, _ = run(case.optimizer(ALIASES[name]), case, gradients)
    names = "zyxw"  # a dictionary has its leaves in the order of their names

    def renamed(leaves):
        return dict(zip(names, leaves, strict=False))

    again = eagerly(case.optimizer(ALIASES[name]), renamed(params), list(map(renamed, gradients)))
    close(updates, [[u[n] for n in names if n in u] for u in again])


@pytest.mark.parametrize("name", ["shampoo", "soap"])
@few(max_examples=1)
@given(shape=SHAPES, kind=st.sampled_from(KINDS), size=st.sampled_from([None, 1, 3]))
@example(shape=(5, 3), kind="rank one", size=3)
def test_a_batch_axis_is_a_loop(name, shape, kind, size):
    case = Case((shape, shape, shape), kinds=(kind,))
    gradients = [case.gradients(step) for step in range(3)]
    numbers = sj.batch_axes({"layers": 0}, rule=None)
    cut = sj.Blocking(size, merge=None, dimension_numbers=numbers)
    everything = {"others": adamw(), "preconditioned": lambda path, leaf: True}
    tx = ALIASES[name](every=1, blocking=cut, **everything)

    def stack(tree):
        return {"layers": jnp.stack(jax.tree.leaves(tree))}

    updates, _ = run(tx, case, gradients)
    found = eagerly(tx, stack(case.params()), list(map(stack, gradients)))
    close(list(map(stack, updates)), found)


def eagerly(tx, params, gradients):
    state, found = tx.init(params), []
    for g in gradients:
        new, state = tx.update(g, state, params)
        found.append(new)
    return found
