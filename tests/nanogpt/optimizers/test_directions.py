"""Directions by settings: what single settings do, and complete recipes against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax
from nanogpt.config.presets import preset
from nanogpt.config.settings import KLConfig, MuonConfig, ShampooConfig, SoapConfig
from nanogpt.optimizers.build import build_optimizer
from nanogpt.optimizers.directions import DIRECTIONS
from tests.oracles import papers

RNG = np.random.default_rng(0)
GRADIENTS = [RNG.normal(size=(6, 4)) for _ in range(5)]


def updates_of(settings, name, gradients=GRADIENTS):
    """Updates of one matrix, float64 as far as the optimizer is."""
    tx = DIRECTIONS[name](settings, None)
    params = {"w": jnp.ones(gradients[0].shape)}
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for g in gradients:
        u, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        out.append(np.asarray(u["w"]))
    return out


@pytest.mark.parametrize("name", ["soap_h", "kl_soap_h"])
def test_records_27_and_19_equal_numpy(name):
    """Five steps of the recipe as published: direction, schedule, hyperball.

    A square of float64: what is 0 in the first bases is noise that #27 divides by its own size, and
    the bases of a null space are arbitrary.
    """
    config = preset("track3", name)
    oracle = {"soap_h": papers.record_27, "kl_soap_h": papers.record_19}[name]
    end, power = {"soap_h": (3200, 1.25), "kl_soap_h": (3125, 1.0)}[name]
    start, gradients = RNG.normal(size=(4, 4)), list(RNG.normal(size=(5, 4, 4)))
    tree = lambda x: {"blocks": {"0": {"mlp": {"fc": {"kernel": jnp.asarray(x)}}}}}  # noqa: E731
    with jax.enable_x64(True):
        params, expected = tree(start), start
        tx = build_optimizer(config, params)
        state, update = tx.init(params), jax.jit(tx.update)
        for s, (g, u) in enumerate(zip(gradients, oracle(gradients), strict=True)):
            updates, state = update(tree(g), state, params)
            params = optax.apply_updates(params, updates)
            expected = papers.hyperball(expected, u, 0.018 * (1 - s / end) ** power)
            got = params["blocks"]["0"]["mlp"]["fc"]["kernel"]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_exponent_and_size_of_shampoo():
    """After one gradient G = U S V^T the direction is U S^(1 - 4e) V^T."""
    g = GRADIENTS[0]
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    third = ShampooConfig(0.1, 0.0, b1=0.0, exponent=1 / 3, size="rows")
    expected = u @ np.diag(s ** (-1 / 3)) @ vt
    expected *= 4**0.5 / np.linalg.norm(expected)
    np.testing.assert_allclose(updates_of(third, "shampoo", [g])[0], expected, atol=1e-4)
    quarter = dataclasses.replace(third, exponent=0.25, size="adam")
    expected = u @ vt * (24 / 4) ** 0.5  # Adam's first update has entries of size 1
    np.testing.assert_allclose(updates_of(quarter, "shampoo", [g])[0], expected, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_side_of_shampoo(side):
    """After one gradient (G G^T)^(-1/2) G and G (G^T G)^(-1/2) are U V^T."""
    g = GRADIENTS[0][:4]
    u, _, vt = np.linalg.svd(g)
    settings = ShampooConfig(0.1, 0.0, b1=0.0, exponent=side, size="rows")
    tx = DIRECTIONS["shampoo"](settings, None)
    factor, root = (6, 6) if side == "left" else (4, 4), GRADIENTS[0]
    shapes = {x.shape[1:] for x in jax.tree.leaves(tx.init({"w": jnp.asarray(root)}))}
    assert {s for s in shapes if len(s) == 2} == {factor, (6, 4)}
    np.testing.assert_allclose(updates_of(settings, "shampoo", [g])[0], u @ vt, atol=1e-4)


@pytest.mark.parametrize(("tolerance", "counts"), [(0.5, [2, 2, 2]), (0.0, [2, 4, 6])])
def test_soap_keeps_bases_that_will_do_and_counts_the_others(tolerance, counts):
    """The first step's are of its gradient, which comes again; columns change their order."""
    params = {"w": jnp.asarray(np.linalg.qr(GRADIENTS[0][:4])[0] * [1, 2, 3, 4], jnp.float32)}
    tx = DIRECTIONS["soap"](SoapConfig(0.1, 0.0, every=1, tolerance=tolerance), None)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for factor in ([1, 1, 1, 1], [4, 1, 1, 1], [1, 1, 1, 1]):
        _, state = update({"w": params["w"] * jnp.array(factor, jnp.float32)}, state, params)
        found.append(int(optax.tree.get(state, "refreshed")))
    assert found == counts


def test_shampoo_of_microbatches():
    """Factors are of the others than momentum where cross-fitted; roots may be corrected."""
    micro = RNG.normal(size=(8, 4, 4))
    settings = ShampooConfig(0.1, 0.0, b1=0.0, size="rows", statistics="microbatches")

    def direction(settings):
        tx, params = DIRECTIONS["shampoo"](settings, None), {"w": jnp.ones((4, 4))}
        further = {"microbatches": {"w": jnp.asarray(micro, jnp.float32), "embed": jnp.ones(8)}}
        gradient = {"w": jnp.asarray(micro.mean(0), jnp.float32)}
        return tx.update(gradient, tx.init(params), params, further=further)[0]["w"]

    def in_numpy(own, others, corrected=False):
        sides = []
        for x in (others, others.swapaxes(1, 2)):
            w, q = np.linalg.eigh(np.einsum("jab,jcb->ac", x, x) / len(x))
            variance = ((q.T @ x) ** 2).sum(-1).var(0, ddof=1) / len(x)
            power = w**-0.25 - (5 / 32 * w**-2.25 * variance if corrected else 0)
            sides.append((q * np.maximum(power, 0)) @ q.T)
        update = sides[0] @ own.mean(0) @ sides[1]
        return update * 2 / np.linalg.norm(update)

    crossed = dataclasses.replace(settings, cross_fit=True)
    corrected = dataclasses.replace(crossed, statistics="corrected")
    for given, expected in (
        (settings, in_numpy(micro, micro)),
        (crossed, in_numpy(micro[:4], micro[4:])),
        (corrected, in_numpy(micro[:4], micro[4:], corrected=True)),
    ):
        np.testing.assert_allclose(direction(given), expected, atol=2e-4)
    with pytest.raises(ValueError, match="cross_fit=True with statistics='batch'"):
        ShampooConfig(0.1, 0.0, cross_fit=True)


def test_shift_amplifies_what_a_cutoff_drops():
    """#21 against #35: of a gradient of rank 1 almost nothing is left along the gradient."""
    g = 1e3 * np.outer(RNG.normal(size=6), RNG.normal(size=4))
    settings = ShampooConfig(0.1, 0.0, b1=0.9)
    later = [g, g + 1e-3 * GRADIENTS[0]]
    truncated = updates_of(settings, "shampoo", later)[1]
    shifted = updates_of(dataclasses.replace(settings, cutoff="shift"), "shampoo", later)[1]
    cosine = lambda a: abs(np.vdot(a, g)) / np.linalg.norm(a) / np.linalg.norm(g)  # noqa: E731
    assert cosine(truncated) > 0.99 > 0.9 > cosine(shifted)


def test_kl_shampoo_of_a_sum_sees_the_mean():
    """With tokens = 512 a gradient 512 times as large gives the same updates."""
    square = [g[:4] for g in GRADIENTS]  # a null space would have any basis at all
    large = [512 * g for g in square]
    small = np.stack(updates_of(KLConfig(0.1, 0.0, every=1), "kl_shampoo", square))
    scaled = updates_of(KLConfig(0.1, 0.0, every=1, tokens=512), "kl_shampoo", large)
    np.testing.assert_allclose(scaled, small, rtol=0, atol=1e-3 * np.abs(small).max())
    assert np.abs(updates_of(KLConfig(0.1, 0.0, every=1), "kl_shampoo", large)[1]).max() > 100


def test_momentum_of_the_medium_track_rises():
    """0.85 at the first step, b1 after the warmup: the averages of `nesterov_ema` with that b1."""
    settings = MuonConfig(0.1, 0.0, b1=0.95, b1_warmup=2)
    got = updates_of(settings, "muon_track3", GRADIENTS[:4])
    constant = updates_of(dataclasses.replace(settings, b1_warmup=0), "muon_track3", GRADIENTS[:4])
    assert np.abs(got[1] - constant[1]).max() > 1e-3
    mu, expected = np.zeros((6, 4)), []
    for g, b1 in zip(GRADIENTS[:4], (0.85, 0.9, 0.95, 0.95), strict=True):
        mu = b1 * mu + (1 - b1) * g
        expected.append(b1 * mu + (1 - b1) * g)
    plain = updates_of(dataclasses.replace(settings, b1=0.0, b1_warmup=0), "muon_track3", expected)
    np.testing.assert_allclose(got, plain, atol=2e-4)


def test_muon_on_a_mesh_is_taken_by_owners_of_whole_matrices():
    """The same updates, and every device multiplies matrices of its own, a quarter of all."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    settings, updates, work = MuonConfig(0.1, 0.0, b1_warmup=2, ns_steps=3), [], []
    gradients = {str(k): jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32) for k in range(4)}
    for placement in (None, shampoo_jax.Placement(mesh, "data")):
        tx = DIRECTIONS["muon_track3"](settings, placement)
        state = tx.init(gradients)
        step = jax.jit(tx.update).lower(gradients, state, gradients).compile()
        updates.append(step(gradients, state, gradients)[0])
        work.append(sum(shampoo_jax.read_program(step.as_text()).flops.values()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *updates)
    assert work[0] == 4 * work[1] > 0
