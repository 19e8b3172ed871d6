"""Whole steps without a tolerance, where every number on the way is one that float32 holds.

Gradients and parameters are small integers and hyperparameters have a denominator that is a power
of two, so sums and products are exact in whatever order and width they are taken: on one device,
traced or not, in batches, and on a mesh. The oracle computes with fractions.
"""

import functools
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj

SHAPES = {"w": (8, 8), "v": (4, 8), "u": (8, 4)}  # eight blocks of 4x4, one for each device
SIZE, STEPS = 4, 3
B1, B3, B2 = Fraction(1, 2), Fraction(1, 4), Fraction(3, 4)
DECAY, WD, LR = Fraction(1, 2), Fraction(1, 4), Fraction(1, 8)


def integers(seed, dtype=np.float32):
    draw = np.random.default_rng(seed)
    return {name: draw.integers(-3, 4, s).astype(dtype) for name, s in SHAPES.items()}


def graftable(seed):
    """Blocks whose norms are 8 or 11 times a power of two, and whose largest entry is one."""
    draw = np.random.default_rng(seed)

    def block():
        entries = [4] * 3 + [2] + [1] * 12 if draw.integers(2) else [4] * 7 + [1] * 9
        signs = draw.choice([-1, 1], 16) * 2.0 ** draw.integers(-1, 2)
        return (signs * draw.permutation(entries)).reshape(SIZE, SIZE)

    rows = {n: [[block() for _ in range(s[1] // SIZE)] for _ in range(s[0] // SIZE)]
            for n, s in SHAPES.items()}  # fmt: skip
    return {name: np.block(blocks).astype(np.float32) for name, blocks in rows.items()}


def held(x):
    """These fractions as float32, which has to hold them."""
    narrow = x.astype(np.float32)
    assert (fractions(narrow) == x).all()
    return narrow


def fractions(x):
    return np.vectorize(Fraction, otypes=[object])(x.astype(float))


def per_block(f, *arrays):
    """`f` of every box of `SIZE`, put together again."""
    out = np.empty_like(arrays[0])
    for i in range(0, out.shape[0], SIZE):
        for j in range(0, out.shape[1], SIZE):
            at = np.s_[i : i + SIZE, j : j + SIZE]
            out[at] = f(*(x[at] for x in arrays))
    return out


class Case(NamedTuple):
    """A direction, what its gradients are, and its update by the oracle."""

    make: Any  # of (dtype of a first moment, placement)
    gradients: Any
    oracle: Any  # gradients as fractions -> updates of each step


def statistics(side, b2=B2, weighted=True):
    """`update = S mu`, `mu S` of the filtered gradient and the factor in the place of its root."""

    def make(dtype=None, placement=None):
        parts = optax.chain(
            sj.filter_gradient(float(B1), float(B3), bias_correction=False, mu_dtype=dtype),
            sj.accumulate_factors(float(b2), bias_correction=False, weighted=weighted),
            sj.damp(0.5),
            sj.precondition(),
        )
        return sj.blocked(parts, blocking=sj.Blocking(SIZE), exponents=side, placement=placement)

    def oracle(gradients):
        weight = 1 if b2 == 1 or not weighted else 1 - b2
        mu = factor = 0 * gradients[0]
        eye = per_block(lambda x: fractions(np.eye(SIZE)), factor)
        for g in gradients:
            update, mu = B3 * mu + (1 - B3) * g, B1 * mu + (1 - B1) * g
            gram = per_block(lambda x: x @ x.T if side == "left" else x.T @ x, g)
            factor = b2 * factor + weight * gram
            yield per_block(
                lambda s, m: s @ m if side == "left" else m @ s, factor + eye / 2, update
            )

    return Case(make, integers, oracle)


def grafted():
    """`update = sign(G) |G| / |sign(G)|` of each block, whose signs have norm 4."""

    def make(dtype=None, placement=None):
        del dtype
        part = sj.graft(
            sj.from_gradients(optax.identity()), sj.from_gradients(optax.scale_by_sign())
        )
        return sj.blocked(part, blocking=sj.Blocking(SIZE), placement=placement)

    def norm(g):
        root = sum((g * g).ravel()) ** 0.5
        assert sum((g * g).ravel()) == Fraction(root) ** 2
        return Fraction(root)

    def oracle(gradients):
        for g in gradients:
            yield per_block(lambda x: fractions(np.sign(x.astype(float))) * norm(x) / SIZE, g)

    return Case(make, graftable, oracle)


CASES = {
    "left factor": statistics("left"),
    "right factor": statistics("right"),
    "sums": statistics("left", Fraction(1)),
    "unweighted": statistics("right", weighted=False),
    "graft": grafted(),
}


def optimizer(case, kind="decoupled", **options):
    return sj.as_optimizer(
        case.make(**options),
        float(LR),
        weight_decay=float(WD),
        decay=sj.Decay(kind),
        momentum=sj.momentum(float(DECAY), dampening=0.5, nesterov=True),
        preconditioned=lambda path, leaf: True,
    )


PARAMS = integers(0)


@functools.cache
def expected(name, seeds, kind="decoupled"):
    """Updates of each step at constant parameters: decay, Nesterov's momentum, learning rate."""
    case = CASES[name]
    found = [{} for _ in seeds]
    for key, w in PARAMS.items():
        w, gradients = fractions(w), [fractions(case.gradients(seed)[key]) for seed in seeds]
        if kind == "l2":
            gradients = [g + WD * w for g in gradients]
        alpha = {"decoupled": WD, "l2": 0, "lr_over_peak": WD, "over_peak": WD / LR}[kind]
        trace = 0 * w
        for t, update in enumerate(case.oracle(gradients)):
            direction = (update + alpha * w) / 2
            trace = DECAY * trace + direction
            found[t][key] = held(-LR * (direction + DECAY * trace))
    return found


SEEDS = tuple(range(1, STEPS + 1))


def stepped(tx, params, gradients, run=lambda f: f):
    state, found = run(tx.init)(params), []
    for g in gradients:
        updates, state = run(tx.update)(g, state, params)
        found.append(updates)
    return found


def assert_equal(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("way", ["eager", "jit", "batched"])
@pytest.mark.parametrize("name", CASES)
def test_one_device(name, way):
    tx, gradients = optimizer(CASES[name]), [CASES[name].gradients(seed) for seed in SEEDS]
    wanted = expected(name, SEEDS)
    if way == "eager":
        with jax.disable_jit():
            return assert_equal(stepped(tx, PARAMS, gradients), wanted)
    if way == "jit":
        return assert_equal(stepped(tx, PARAMS, gradients, jax.jit), wanted)
    pairs = zip(gradients, gradients[::-1], strict=True)
    both = [jax.tree.map(lambda *x: np.stack(x), *pair) for pair in pairs]
    got = jax.jit(jax.vmap(lambda g: stepped(tx, PARAMS, g)))(both)
    for k, seeds in enumerate((SEEDS, SEEDS[::-1])):
        assert_equal(jax.tree.map(lambda x, k=k: x[k], got), expected(name, seeds))


@pytest.mark.parametrize("kind", ["l2", "lr_over_peak", "over_peak"])
def test_every_kind_of_decay(kind):
    tx = optimizer(CASES["unweighted"], kind)
    wanted = expected("unweighted", SEEDS, kind)
    with jax.disable_jit():
        assert_equal(stepped(tx, PARAMS, map(integers, SEEDS)), wanted)


def test_a_narrow_first_moment_loses_nothing_that_it_can_hold():
    tx = optimizer(CASES["left factor"], dtype=jnp.bfloat16)
    assert jnp.dtype("bfloat16") in {
        x.dtype for x in jax.tree.leaves(jax.eval_shape(tx.init, PARAMS))
    }
    with jax.disable_jit():
        got = stepped(tx, PARAMS, map(integers, SEEDS))
    assert_equal(got, expected("left factor", SEEDS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_gradients_and_parameters_are_rounded_once(dtype):
    tx = optimizer(CASES["right factor"])
    with jax.disable_jit():
        params, *gradients = (
            jax.tree.map(lambda x: jnp.asarray(x, dtype), integers(seed)) for seed in (0, *SEEDS)
        )
        got = stepped(tx, params, gradients)
    rounded = jax.tree.map(lambda x: x.astype(dtype), expected("right factor", SEEDS))
    assert_equal(got, rounded)


def rows(path, leaf):
    return P("x") if leaf.shape[0] % 8 == 0 else P(None, "x")


@pytest.mark.parametrize("placed", [True, False], ids=["placement", "no placement"])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("name", ["left factor", "graft"])
def test_mesh(name, kind, placed):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    placement = sj.Placement(mesh, "x", rows) if placed else None
    tx = optimizer(CASES[name], placement=placement)

    def put(tree):
        return {n: jax.device_put(x, NamedSharding(mesh, rows((), x))) for n, x in tree.items()}

    with jax.set_mesh(mesh):
        gradients = [put(CASES[name].gradients(seed)) for seed in SEEDS]
        got = stepped(tx, put(PARAMS), gradients, jax.jit)
        assert_equal(got, expected(name, SEEDS))


def test_products_are_those_of_float32():
    """Twelve bits, one more than TF32 multiplies: its products would miss the last one."""
    g = np.full((1, 2, 3), 2049, np.float32)
    tx = sj.accumulate_factors(0.0)
    blocks = {"k": sj.Blocks.of(jnp.asarray(g))}
    new, _ = tx.update(blocks, tx.init(blocks))
    np.testing.assert_array_equal(new["k"].matrices[0], np.full((1, 2, 2), 3 * 2049**2))
