"""The KL family where finite gradients overflow, and KL statistics around a chain of parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.blocks.blocks import Blocks

KL = {
    "kl_soap": lambda: sj.as_optimizer(sj.scale_by_kl_soap(**sj.presets.record_19()), 0.1),
    "kl_shampoo": lambda: sj.kl_shampoo(0.1, every=2, b2=0.9),
}


def failures(state):
    """Failures of every part that counts them, summed."""
    nodes = jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "failures"))
    counted = [x for s in nodes if hasattr(s, "failures") for x in jax.tree.leaves(s.failures)]
    assert counted
    return sum(int(x.sum()) for x in counted)


def assert_finite(tree):
    for x in jax.tree.leaves(tree):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("name", KL)
def test_whitened_squares_that_overflow_are_skipped_and_counted(name):
    """One entry of 4e18: its square is a float32, 4000^2 times its square is not."""
    rng = np.random.default_rng(0)
    tx = KL[name]()
    params = {"w": jnp.ones((4, 4))}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, 121):
        g = 1e-3 * rng.normal(size=(4, 4))
        if step == 110:
            g[1, 2] = 4e18
            assert failures(state) == 0
        updates, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        assert_finite((updates, state))
        params = optax.apply_updates(params, updates)
    assert failures(state) == 1
    assert np.abs(updates["w"]).max() > 0


def test_only_the_block_that_overflows_is_skipped():
    rng = np.random.default_rng(0)
    grads = [1e-3 * rng.normal(size=(4, 8)).astype(np.float32) for _ in range(8)]
    huge = [*grads[:5], grads[5].copy(), *grads[6:]]
    huge[5][0, 0] = 3e18  # squares fit, but not divided by eigenvalues that are down at 1/100
    tx = sj.scale_by_kl_shampoo(0.9, 0.5, every=2, blocking=sj.Blocking(size=4))
    params = {"w": jnp.ones((4, 8))}

    def run(grads):
        state, update, updates = tx.init(params), jax.jit(tx.update), []
        for g in grads:
            u, state = update({"w": jnp.asarray(g)}, state)
            updates.append(np.asarray(u["w"]))
        return updates, state

    (plain, _), (skipped, state) = run(grads), run(huge)
    for a, b in zip(plain, skipped, strict=True):
        np.testing.assert_array_equal(a[:, 4:], b[:, 4:])
    np.testing.assert_array_equal(skipped[5][:, :4], 0.0)
    assert failures(state) == 1
    assert_finite(state)


def test_soap_counts_refused_bases():
    """Of the parts alone: `blocked` skips a step whose squares overflow."""
    refresh = sj.BasisRefresh()
    part = sj.eigenbasis(sj.scale_by_second_moment(0.95), basis=sj.QRBasis(), refresh=refresh)
    tx = optax.chain(sj.accumulate_factors(0.95), part)
    steps = [{"3x2": Blocks.of(size * jnp.eye(3, 2)[None])} for size in (1.0, 1.0, 1e30, 1.0)]
    state, update, counts = tx.init(steps[0]), jax.jit(tx.update), []
    for step in steps:
        _, state = update(step, state)
        counts.append(failures(state))
    assert counts == [0, 0, 1, 2]


def test_kl_statistics_need_roots():
    tx = sj.blocked(sj.accumulate_kl_factors(sj.damp(0.1)))
    with pytest.raises(ValueError, match="keeps 0 sets of roots"):
        tx.init({"w": jnp.ones((3, 2))})


def test_decay_in_the_basis_is_decay_of_the_parameters():
    rng = np.random.default_rng(0)
    params, *grads = (jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for _ in range(5))

    def run(inner):
        tx = sj.blocked(sj.kl_eigenbasis(sj.on_updates(inner), 0.9, scaled=False, every=2))
        state, update, updates = tx.init(params), jax.jit(tx.update), []
        for g in grads:
            u, state = update(g, state, params)
            updates.append(u)
        return updates

    bare, decayed = (
        run(optax.trace(0.9)),
        run(optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1))),
    )
    for a, b in zip(bare[1:], decayed[1:], strict=True):  # the first step is skipped
        np.testing.assert_allclose(b - a, 0.1 * params, atol=1e-5)


AFTER, BEFORE = sj.BasisRefresh(), sj.BasisRefresh(when="before", skip_first=False)


def practical(
    grads,
    *,
    second_moment,
    normalize=True,
    bias_correction=False,
    refresh=AFTER,
    b1=0.9,
    b2=0.8,
    every=2,
    max_scale="size",
):
    """KL-Shampoo, or with second moments KL-SOAP, of square gradients in numpy."""
    n = len(grads[0])
    size, cap, relative = (n if normalize else 1), max(10, n), max_scale == "relative"
    start = np.sqrt(np.mean(grads[0] ** 2)) if relative else 0.1
    whitening = start if relative else 1.0
    left, right = ((1 - b2) * x @ x.T / size / whitening for x in (grads[0], grads[0].T))
    ql, qr = (np.linalg.eigh(s)[1][:, ::-1] for s in (left, right))
    before, skip_first = refresh.when == "before", refresh.skip_first
    if before:
        ql = qr = np.eye(n)
    dl, dr, m, v, uses, updates = np.full(n, start), np.full(n, start), 0.0, 0.0, 0, []
    for t, g in enumerate(grads):
        for act in ("learn", "use") if before else ("use", "learn"):
            if act == "use" and not (t == 0 and skip_first):
                uses += 1
                m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (ql.T @ g @ qr) ** 2
                c1, c2 = (1 - b**uses if bias_correction else 1.0 for b in (b1, b2))
                s = np.outer(dl, dr) ** -0.5
                s = 1 / (np.sqrt(v / c2) + 1e-8) if second_moment else s / (1 + 1e-8 * s)
                updates.append(ql @ ((ql.T @ m @ qr / c1) * s) @ qr.T)
            elif act == "use":
                updates.append(np.zeros_like(g))
            elif t > 0:
                p = (ql.T @ g @ qr) ** 2
                left = b2 * left + (1 - b2) * g @ qr @ np.diag(1 / dr) @ qr.T @ g.T / size
                right = b2 * right + (1 - b2) * g.T @ ql @ np.diag(1 / dl) @ ql.T @ g / size
                new = (p / dr).sum(1) / size, (p.T / dl).sum(1) / size
                dl, dr = (b2 * d + (1 - b2) * x for d, x in zip((dl, dr), new, strict=True))
                units = (dl.max(), dr.max()) if relative else (1.0, 1.0)
                dl, dr = (
                    np.maximum(d, u * cap**-2.0) for d, u in zip((dl, dr), units, strict=True)
                )
                if (t + 1 - skip_first) % every == 0:
                    ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]
    return updates


OPTIONS = {
    "sums, corrected": dict(normalize=False, bias_correction=True, max_scale="size"),
    "first step used": dict(refresh=sj.BasisRefresh(skip_first=False)),
    "before, corrected": dict(refresh=BEFORE, bias_correction=True, max_scale="size"),
    "relative": dict(max_scale="relative"),
    "relative, before": dict(max_scale="relative", refresh=BEFORE, normalize=False),
}


@pytest.mark.parametrize(
    ("direction", "options"),
    [
        (sj.scale_by_kl_shampoo, "sums, corrected"),
        (sj.scale_by_kl_soap, "first step used"),
        (sj.scale_by_kl_shampoo, "before, corrected"),
        (sj.scale_by_kl_soap, "before, corrected"),
        (sj.scale_by_kl_shampoo, "relative"),
        (sj.scale_by_kl_soap, "relative, before"),
    ],
)
def test_what_others_do_differently(direction, options):
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(4, 4))
    grads = [mixed @ rng.normal(size=(4, 4)) for _ in range(8)]
    soap = direction is sj.scale_by_kl_soap
    expected = practical(grads, second_moment=soap, **OPTIONS[options])
    with jax.enable_x64(True):
        tx = direction(0.9, 0.8, every=2, **OPTIONS[options])
        params = jnp.zeros((4, 4), jnp.float64)
        state, update = tx.init(params), jax.jit(tx.update)
        for g, e in zip(grads, expected, strict=True):
            u, state = update(jnp.asarray(g), state, params)
            np.testing.assert_allclose(u, e, rtol=0, atol=1e-6 * max(1, np.abs(e).max()))


@pytest.mark.parametrize("direction", [sj.scale_by_kl_shampoo, sj.scale_by_kl_soap])
def test_relative_eigenvalues_do_not_know_the_scale(direction):
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "t": (3, 4, 2), "late": (4, 3), "never": (4, 3)}
    grads = [{k: rng.normal(size=s).astype("f") for k, s in shapes.items()} for _ in range(6)]
    for t, g in enumerate(grads):
        # No gradient at first, as behind weights that start at zero.
        g["late"], g["never"] = g["late"] * (t > 1), g["never"] * 0
    tx = direction(0.0, 0.8, eps=0.0, every=2, max_scale="relative", blocking=sj.Blocking(merge=3))
    update, found = jax.jit(tx.update), []
    for scale in (1.0, 2.0**-16, 2.0**16):
        state, updates = tx.init(grads[0]), []
        for g in grads:
            new, state = update(jax.tree.map(lambda x, s=scale: s * x, g), state)
            updates.append(new)
        found.append(updates)
        assert_finite((updates, state))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), other, found[0])
    assert all(0.1 < np.abs(u["late"]).max() < 10 for u in found[0][3:])
    assert np.abs(found[0][5]["never"]).max() == 0


def test_tiny_gradients_are_preconditioned_by_default():
    """As those of 1: with the authors' bound the update would be the gradient times a constant."""
    rng = np.random.default_rng(0)
    mixed, tx = rng.normal(size=(16, 16)), sj.scale_by_kl_shampoo(0.0, 0.9)
    states = [tx.init(jnp.zeros((16, 16))) for _ in range(2)]
    update = jax.jit(tx.update)
    for _ in range(30):
        g = jnp.float32(mixed @ rng.normal(size=(16, 16)))
        (large, states[0]), (small, states[1]) = (
            update(c * g, s) for c, s in zip((1.0, 1e-4), states, strict=True)
        )
    np.testing.assert_allclose(small, large, rtol=0, atol=1e-3 * float(jnp.abs(large).max()))
    cosine = float((small * g).sum() / jnp.linalg.norm(small) / jnp.linalg.norm(g))
    assert cosine < 0.95  # by 30 steps 0.92, by that bound 0.999998


def test_a_monitor_tells_of_gradients_that_are_too_small():
    """A root mean square below 1/10 to the power of the number of factors meets the bound."""
    rng = np.random.default_rng(0)
    params = {"small": jnp.zeros((4, 3)), "large": jnp.zeros((5, 3))}
    tx = sj.scale_by_kl_shampoo(0.0, 0.1, monitor=1, max_scale="size")
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(5):
        g = {"small": 1e-3 * rng.normal(size=(4, 3)), "large": rng.normal(size=(5, 3))}
        updates, state = update(jax.tree.map(jnp.float32, g), state)
    with pytest.warns(UserWarning, match="eigenvalues of blocks 4x3 are .*max_scale='relative'"):
        figures = sj.read_monitor(state)
    assert [figures[f"{key}/{k}"]["capped"].item() for key in ("4x3", "5x3") for k in (0, 1)] == [
        *(1.0, 1.0, 0.0, 0.0)
    ]
    np.testing.assert_allclose(updates["small"], 100 * g["small"], rtol=1e-4)  # of any direction
