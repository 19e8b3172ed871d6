"""Other transformations in the Kronecker eigenbasis: what is rotated with them, and whose it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.blocks.blocks import Blocks

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# The first factors lack one dimension at most: any basis would do in a null space of two.
PARAMS, *GRADIENTS = ({"w": normal(4, 3), "v": normal(3, 4), "b": normal(2)} for _ in range(6))


def run(tx, gradients=GRADIENTS, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    updates = []
    for g in gradients:
        new, state = update(g, state, params)
        updates.append(new)
    return updates, state


def in_basis(inner, **options):
    part = sj.in_eigenbasis(inner, every=2, **options)
    return sj.blocked(optax.chain(sj.accumulate_factors(0.9), part))


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def test_decay_in_the_basis_is_decay_of_the_parameters():
    adam = optax.scale_by_adam()
    bare, _ = run(in_basis(adam))
    decayed, _ = run(in_basis(optax.chain(adam, optax.add_decayed_weights(0.1))))
    for a, b in zip(decayed, bare, strict=True):
        assert_close(
            jax.tree.map(jnp.subtract, a, b), jax.tree.map(lambda p: 0.1 * p, PARAMS), 1e-4
        )


def test_momentum_is_carried_without_being_named():
    """What is linear in the gradient does not depend on the basis."""
    inside, _ = run(in_basis(optax.trace(0.9)))
    outside, _ = run(optax.trace(0.9))
    assert_close(inside, outside, 1e-5)
    stays, _ = run(in_basis(optax.trace(0.9), first_moments=()))
    assert jnp.abs(stays[-1]["w"] - outside[-1]["w"]).max() > 1e-2


@pytest.mark.parametrize("when", ["before", "after"])
def test_staggered_blocks_turn_with_their_own_momentum_when_it_is_their_turn(when):
    refresh = sj.BasisRefresh(when=when, skip_first=False, stagger=True)
    tx = in_basis(optax.trace(0.9), refresh=refresh)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    outside, _ = run(optax.trace(0.9))
    turned = []
    for g, plain in zip(GRADIENTS, outside, strict=True):
        old = bases(state)
        new, state = update(g, state, PARAMS)
        assert_close(new, plain, 1e-5)
        turned.append([bool(jnp.any(a != b)) for a, b in zip(old, bases(state), strict=True)])
    # Blocks 0 to 2 are b, v and w; all turn at first, then 0 and 2 in even steps, 1 in odd ones.
    start = 2 if when == "before" else 1
    expected = [
        [t == start or (t > start and i % 2 == t % 2) for i in range(3)] for t in range(1, 6)
    ]
    assert turned == expected


def bases(state):
    """The basis of the first dimension of every block, in the order of their positions."""
    nodes = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "bases"))
    (found,) = [s.bases for s in nodes if hasattr(s, "bases")]
    return [found["2"][0][0], *found["4x3"][0]]


def test_moments_keep_their_dtype():
    half, state = run(in_basis(optax.scale_by_adam(mu_dtype=jnp.bfloat16)))
    mu = optax.tree.get(state, "mu")
    assert {x.dtype for x in jax.tree.leaves(mu)} == {jnp.dtype(jnp.bfloat16)}
    full, _ = run(in_basis(optax.scale_by_adam()))
    for x, y in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=0.03 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("names", [("momentum",), ("mu", "trace")])
def test_a_first_moment_that_is_not_there_is_refused(names):
    tx = in_basis(optax.scale_by_adam(), first_moments=names)
    unknown = {"momentum": "momentum", "mu": "trace"}[names[0]]
    with pytest.raises(ValueError, match=f"first_moments names '{unknown}', .*'mu'"):
        tx.init(PARAMS)
    assert jax.eval_shape(in_basis(optax.scale_by_adam(), first_moments=("mu",)).init, PARAMS)


def test_factored_moments_are_refused():
    with pytest.raises(ValueError, match="only elementwise transformations"):
        in_basis(optax.scale_by_factored_rms(min_dim_size_to_factor=1)).init(PARAMS)


@pytest.mark.parametrize("keys", [("w", "z/w"), ("1", "0"), ("trace", "mu"), ("bases", "inner")])
def test_stacks_of_any_name(keys):
    """Each moment is carried by the basis of its own stack, whatever these are called."""
    params, *gradients = (
        dict(zip(keys, (normal(1, 3, 2), normal(2, 4, 4)), strict=True)) for _ in range(5)
    )
    stacks = [{key: Blocks.of(x) for key, x in tree.items()} for tree in (params, *gradients)]
    parts = optax.chain(sj.accumulate_factors(0.9), sj.in_eigenbasis(optax.trace(0.9), every=2))
    inside, _ = run(parts, stacks[1:], stacks[0])
    outside, _ = run(optax.trace(0.9), gradients, params)
    for a, b in zip(inside, outside, strict=True):
        assert_close({key: blocks.update for key, blocks in a.items()}, b, 1e-5)


def test_a_refused_basis_keeps_what_it_truncates():
    """A factor that overflows leaves the old basis in use, with its old null directions."""
    low_rank = jnp.outer(jnp.arange(1.0, 5.0), jnp.arange(3.0, 0.0, -1.0))
    part = sj.eigenbasis(sj.on_updates(optax.identity()), rtol=None)
    # Without `blocked`, which skips such a step.
    tx = optax.chain(sj.accumulate_factors(0.9), part)
    steps = [{"4x3": Blocks.of(g[None])} for g in (low_rank, 1e30 * (low_rank + normal(4, 3)))]
    (_, last), _ = run(tx, steps, steps[0])
    update = last["4x3"].update[0]
    left, _, right = np.linalg.svd(low_rank)
    kept = 1e30 * np.outer(left[:, 0], right[0])  # the one direction that the old basis keeps
    share = float(jnp.vdot(update / 1e30, kept / 1e30))
    assert abs(share) > 0.1
    np.testing.assert_allclose(update / 1e30, share * kept / 1e30, atol=1e-5)


@pytest.mark.parametrize("basis", ["eigh", "qr"])
def test_reorder_needs_a_basis_that_tells_the_order(basis):
    with pytest.raises(ValueError, match="reorder=True with basis=.*sort='before'"):
        sj.scale_by_soap(basis=basis, refresh=sj.BasisRefresh(reorder=True))
    sj.scale_by_soap(basis=basis)  # by default moments follow only where that is possible


SQUARE, *SQUARES = ({key: normal(5, 5) for key in "abcde"} for _ in range(5))


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    ("direction", "options"),
    [
        (sj.scale_by_soap, {}),
        (sj.scale_by_soap, {"basis": sj.EighBasis(tolerance=0.1)}),
        (sj.scale_by_soap, {"rtol": None, "refresh": {"when": "before", "skip_first": False}}),
        (sj.scale_by_soap, {"refresh": {"stagger": True}}),
        (sj.scale_by_kl_shampoo, {}),
        (sj.scale_by_kl_soap, {}),
    ],
)
def test_bases_computed_in_chunks_have_the_same_values(direction, options, size):
    def walk(chunk):
        refresh = sj.BasisRefresh(chunk=chunk, **options.get("refresh", {}))
        return direction(every=2, **{**options, "refresh": refresh})

    whole, state = run(walk(None), SQUARES, SQUARE)
    chunked, other = run(walk(size), SQUARES, SQUARE)
    assert_close(chunked, whole, 1e-5)
    assert_close(other, state, 1e-4)


@pytest.mark.parametrize("part", [sj.eigenbasis, functools.partial(sj.kl_eigenbasis, scaled=True)])
def test_no_more_bases_are_computed_at_a_time_than_a_chunk(part, monkeypatch):
    sizes = []
    orthogonalize = sj.QRBasis.__call__

    def observed(self, factor, *args):
        sizes.append(len(factor))
        return orthogonalize(self, factor, *args)

    monkeypatch.setattr(sj.QRBasis, "__call__", observed)
    for chunk, expected in ((None, {5}), (2, {2})):
        sizes.clear()
        refresh = sj.BasisRefresh(chunk=chunk)
        tx = part(sj.on_updates(optax.identity()), basis=sj.QRBasis(sort=None), refresh=refresh)
        stacks = {"3": Blocks.of(normal(5, 3))}
        tx = optax.chain(sj.accumulate_factors(0.9), tx)
        jax.make_jaxpr(tx.update)(stacks, tx.init(stacks))
        assert set(sizes) == expected


def of_low_rank(steps):
    """Stacks of three gradients whose factors have null spaces, which become smaller or move."""
    draw = np.random.default_rng(0)
    u = np.linalg.qr(draw.normal(size=(9, 9)))[0]
    for t in range(steps):
        tall, outer = draw.normal(size=(9, 3)), np.outer(draw.normal(size=9), draw.normal(size=3))
        begin = 0 if t < 6 else 4
        yield np.stack([tall, outer, u[:, begin : begin + 3] @ draw.normal(size=(3, 3))])


@pytest.mark.parametrize(
    ("direction", "basis"),
    [(sj.scale_by_soap, None), (sj.scale_by_soap, "qr"), (sj.scale_by_kl_shampoo, None)],
)
def test_truncation_leaves_no_basis_to_rounding(direction, basis):
    """A small change of the gradients changes updates little, whatever their rank."""
    three = sj.DimensionNumbers(((1,), (2,)), batch=(0,))
    blocking = sj.Blocking(size=None, dimension_numbers=lambda path, leaf: three)
    tx = direction(0.2, 0.3, basis=basis, every=2, rtol=None, blocking=blocking)
    noise = np.random.default_rng(1)
    with jax.enable_x64(True):
        update, start = jax.jit(tx.update), tx.init(jnp.ones((3, 9, 3)))
        states = [start, start]
        for g in of_low_rank(24):
            # Far above rounding, and far below the cutoff in a factor, where it is squared.
            near = g * (1 + 1e-12 * noise.normal(size=g.shape))
            steps = [update(x, state) for x, state in zip((g, near), states, strict=True)]
            (one, other), states = zip(*steps, strict=True)
            np.testing.assert_allclose(other, one, rtol=0, atol=1e-4 * max(1.0, abs(one).max()))


@pytest.mark.parametrize("basis", ["eigh", "qr", None])
def test_second_moments_stay_with_their_columns(basis):
    """A constant gradient has one basis: every step is its polar factor, whatever the order."""
    g = np.diag([4.0, 2.0, 1.0]) + 0.1
    left, _, right = np.linalg.svd(g)
    with jax.enable_x64(True):
        updates, _ = run(sj.scale_by_soap(basis=basis, every=2), [g] * 6, g)
    np.testing.assert_allclose(updates[1:], np.broadcast_to(left @ right, (5, 3, 3)), atol=1e-6)
