"""Figures of the monitor against eigendecompositions in numpy, and where its state may live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shampoo_jax.blocks.blocks import Blocks, stateless
from shampoo_jax.parts.eigenbasis import eigenbasis
from shampoo_jax.parts.factors import accumulate_factors
from shampoo_jax.parts.grafting import graft, scale_by_second_moment
from shampoo_jax.parts.kl_eigenbasis import kl_eigenbasis
from shampoo_jax.parts.kl_factors import accumulate_kl_factors
from shampoo_jax.parts.monitoring import (
    MonitorState,
    effective_rank,
    monitor_spectrum,
    read_monitor,
    rotation_angle,
)
from shampoo_jax.parts.roots import invert_roots, precondition
from shampoo_jax.solvers.carried import CarriedBasis
from shampoo_jax.solvers.eigh import ShiftedEigh, TruncatedEigh
from shampoo_jax.stacks.blocked import blocked


def walk(monitor, solver=None, exponents=None, every=1):
    roots = invert_roots(solver, every=every)
    direction = optax.chain(accumulate_factors(0.9), roots, precondition())
    grafted = graft(scale_by_second_moment(0.9), direction)
    return blocked(optax.chain(grafted, *monitor), exponents=exponents)


def low_rank(m, n, rank, seed=0, spread=100.0):
    """A gradient with `rank` singular values between 1 and `spread`."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(m, rank)))[0]
    v = np.linalg.qr(rng.normal(size=(n, rank)))[0]
    return (u * np.geomspace(1, spread, rank)) @ v.T


def some_ones(m, n, *places):
    """A gradient whose factors have eigenvalues of exactly 0: none is rounding near the cutoff."""
    return jnp.zeros((m, n)).at[places, places].set(1.0)


def oracle(factor, exponent, rtol=None):
    """Figures from the spectrum of the factor itself, in float64."""
    w = np.linalg.eigvalsh(factor)
    cutoff = (len(w) * np.finfo(np.float32).eps if rtol is None else rtol) * w.max()
    kept = w > cutoff
    return {
        "effective_rank": w.sum() ** 2 / (w**2).sum(),
        "kept_rank": kept.sum(),
        "condition_number": w.max() / w[kept].min(),
        "dropped_energy": np.maximum(w[~kept], 0).sum() / w.sum(),
    }


def one_step(tx, grads):
    return jax.jit(tx.update)(grads, tx.init(grads))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_figures_of_a_low_rank_factor_match_numpy(scale):
    g = low_rank(12, 8, rank=3, spread=20.0)
    grads = {"w": jnp.asarray(scale * g, jnp.float32)}
    _, state = one_step(walk([monitor_spectrum()]), grads)
    figures = read_monitor(state)
    assert sorted(figures) == ["12x8", "12x8/0", "12x8/1"]
    for key, factor in (("12x8/0", g @ g.T), ("12x8/1", g.T @ g)):
        for name, expected in oracle(factor, 0.25).items():
            np.testing.assert_allclose(figures[key][name], [expected], rtol=2e-4, atol=1e-6)
        assert 0 < figures[key]["root_residual"][0] < 1e-3
        assert figures[key]["rotation"] == 0


@pytest.mark.parametrize("exponent", [0.25, 1 / 3, 0.5])
def test_a_cutoff_that_drops_real_directions_shows_as_dropped_energy(exponent):
    g = low_rank(8, 8, rank=8, spread=30.0)
    tx = walk([monitor_spectrum()], TruncatedEigh(rtol=0.01), exponent)
    _, state = one_step(tx, {"w": jnp.asarray(g, jnp.float32)})
    figures = read_monitor(state)["8x8/0"]
    expected = oracle(g @ g.T, exponent, rtol=0.01)
    assert 0 < expected["kept_rank"] < 8 and expected["dropped_energy"] > 1e-3
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], [value], rtol=1e-4)
    assert figures["root_residual"][0] < 1e-4


def test_residual_is_the_distance_from_the_projector():
    """With damping, X^p A misses the identity by e / (w + e) in every direction."""
    g = low_rank(6, 6, rank=6, spread=3.0)
    _, state = one_step(walk([monitor_spectrum()], ShiftedEigh(damping=0.5)), {"w": jnp.asarray(g)})
    w = np.linalg.eigvalsh(g @ g.T)
    expected = np.sqrt(np.mean((0.5 / (w + 0.5)) ** 2))
    for key in ("6x6/0", "6x6/1"):
        residual = read_monitor(state)[key]["root_residual"]
        np.testing.assert_allclose(residual, [expected], rtol=1e-4)


def test_residual_between_refreshes_shows_how_stale_the_root_is():
    tx = walk([monitor_spectrum()], every=2)
    grads = [{"w": jnp.asarray(low_rank(6, 6, 6, seed=s, spread=3.0))} for s in range(3)]
    state = tx.init(grads[0])
    residuals = []
    for g in grads:
        _, state = jax.jit(tx.update)(g, state)
        residuals.append(read_monitor(state)["6x6/0"]["root_residual"][0])
    assert residuals[0] == 0  # not in use before step 2
    assert residuals[1] < 1e-4 and residuals[2] > 0.1


def test_graft_ratio_is_the_stretch_of_the_direction():
    g = low_rank(6, 4, rank=4, spread=5.0)
    updates, state = one_step(walk([monitor_spectrum()]), {"w": jnp.asarray(g)})
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    # At step 1 Adam's direction is the sign, and Shampoo's the polar factor.
    expected = np.linalg.norm(np.sign(g)) / np.linalg.norm(u @ vt)
    np.testing.assert_allclose(read_monitor(state)["6x4"]["graft_ratio"], [expected], rtol=1e-4)
    assert read_monitor(state)["6x4"]["failures"] == 0


def test_a_zero_gradient_has_rank_zero_and_no_nan():
    _, state = one_step(walk([monitor_spectrum()]), {"w": jnp.zeros((4, 3))})
    for figures in read_monitor(state).values():
        for value in figures.values():
            assert value == 0


def test_updates_pass_unchanged_and_other_blocks_do_not_mix():
    rng = np.random.default_rng(0)
    grads = {"a": jnp.asarray(rng.normal(size=(5, 3))), "b": some_ones(5, 3, 1)}
    plain, _ = one_step(walk([]), grads)
    watched, state = one_step(walk([monitor_spectrum()]), grads)
    for name, update in plain.items():  # of another program, which XLA may round otherwise
        np.testing.assert_allclose(watched[name], update, rtol=0, atol=1e-4)
    assert read_monitor(state)["5x3/1"]["kept_rank"].tolist() == [3, 1]


def test_records_are_made_at_step_1_and_every_interval():
    tx = walk([monitor_spectrum(every=3)])
    state = tx.init({"w": jnp.ones((4, 4))})
    ranks = []
    for step in range(1, 7):
        g = {"w": some_ones(4, 4, step % 4)}
        _, state = jax.jit(tx.update)(g, state)
        ranks.append(int(read_monitor(state)["4x4/0"]["kept_rank"][0]))
    assert ranks == [1, 1, 3, 3, 3, 4]


def report_basis(basis, previous):
    """Stands in for an eigenbasis part whose bases are known."""

    def report(b):
        figures = {f"factor/{k}": s for k, s in enumerate(b.matrices)}
        figures |= {f"previous/{k}": previous[None] for k in range(2)}
        figures |= {f"basis/{k}": basis[None] for k in range(2)}
        return dataclasses.replace(b, figures=figures)

    return stateless(report)


def figures_of(factor, root=None, basis=None, previous=None):
    """Figures of one vector block with exponent 1/4 and these matrices."""
    arrays = {"factor/0": factor, "basis/0": basis, "previous/0": previous}
    given = {name: jnp.asarray(x, jnp.float32)[None] for name, x in arrays.items() if x is not None}
    matrices = () if root is None else (jnp.asarray(root, jnp.float32)[None],)
    blocks = Blocks.of(jnp.ones((1, len(factor))), (0.25,))
    blocks = {"k": dataclasses.replace(blocks, matrices=matrices, figures=given)}
    tx = monitor_spectrum()
    _, state = tx.update(blocks, tx.init(blocks))
    return {name: float(value[0]) for name, value in read_monitor(state)["k/0"].items()}


def test_figures_do_not_depend_on_the_scale_of_the_gradients():
    """Here the trace is beyond float32."""
    factor, root = np.diag([128.0, 128.0, 1.0, 2.0**-15]), np.diag([0.3, 0.3, 0.0, 0.0])
    figures = figures_of(factor, root)
    assert figures_of(factor * 2.0**120, root * 2.0**-30) == pytest.approx(figures, rel=1e-4)
    assert figures["dropped_energy"] > 0 and figures["kept_rank"] == 2
    basis, previous = turn(0.1), turn(0.3)
    figures = figures_of(factor, None, basis, previous)
    large = figures_of(factor * 2.0**120, None, basis, previous)
    assert large == pytest.approx(figures, rel=1e-4)
    assert figures["dropped_energy"] > 0 and figures["kept_rank"] == 3


def test_energy_is_not_negative_where_rounding_makes_an_eigenvalue_so():
    factor = np.diag([1.0, 0.0, -0.25, 0.0])
    root = np.diag([1.0, 0.0, 0.0, 0.0])
    assert figures_of(factor, root)["dropped_energy"] == 0
    # Nor does it count where the angle is weighted: the first two columns have turned.
    figures = figures_of(factor, None, np.eye(4), turn(0.3))
    np.testing.assert_allclose(figures["rotation"], 0.3, rtol=1e-5)


def test_directions_of_a_basis_count_above_rounding_of_the_largest():
    figures = figures_of(np.diag([1.0, 1e-6, 2e-7, 0.0]), None, np.eye(4), np.eye(4))
    assert figures["kept_rank"] == 2  # 4 eps is 4.8e-7
    np.testing.assert_allclose(figures["condition_number"], 1e6, rtol=1e-5)
    np.testing.assert_allclose(figures["dropped_energy"], 2e-7, rtol=1e-5)


def turn(angle, d=4):
    basis = np.eye(d)
    basis[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return basis


def test_eigenbases_report_spectrum_and_rotation():
    g = np.diag([3.0, 2.0, 1.0, 0.0])
    basis, previous = jnp.eye(4), jnp.asarray(turn(0.3))
    tx = blocked(
        optax.chain(accumulate_factors(), report_basis(basis, previous), monitor_spectrum())
    )
    _, state = one_step(tx, {"w": jnp.asarray(g)})
    figures = read_monitor(state)["4x4/0"]
    for name, value in oracle(g @ g.T, 0.25).items():
        np.testing.assert_allclose(figures[name], [value], rtol=1e-5)
    share = (9 + 4) / 14  # of the trace, in the two directions that turned
    expected = np.arcsin(np.sqrt(share) * np.sin(0.3))
    np.testing.assert_allclose(figures["rotation"], [expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("direction", "refreshes"),
    [
        ([accumulate_factors(0.9), eigenbasis(optax.identity(), every=2)], [2, 4]),
        ([kl_eigenbasis(optax.identity(), 0.9, scaled=True, every=2)], [3, 5]),
    ],
    ids=["eigenbasis", "kl_eigenbasis"],
)
def test_rotation_of_a_real_eigenbasis_is_kept_until_the_next_refresh(direction, refreshes):
    tx = blocked(optax.chain(*direction, monitor_spectrum()))
    state = tx.init({"w": jnp.ones((5, 5))})
    angles = []
    for step in range(1, 6):
        g = np.random.default_rng(step).normal(size=(5, 5))
        _, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state)
        figures = read_monitor(state)["5x5/0"]
        angles.append(float(figures["rotation"][0]))
        assert figures["effective_rank"] > 1 or step == 1
    assert [t + 1 for t in range(1, 5) if angles[t] != angles[t - 1]] == refreshes
    assert 0 < angles[-1] < np.pi / 2


@pytest.mark.parametrize("angle", [1e-4, 0.1, 0.7])
def test_rotation_is_the_angle_whatever_order_and_signs(angle):
    rng = np.random.default_rng(1)
    previous = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    basis = previous @ turn(angle)
    shuffled = (basis * rng.choice([-1, 1], 4))[:, rng.permutation(4)]
    weights = np.abs(shuffled.T @ basis).round()[:, :2].sum(1)  # 1 on the columns that turned
    bases = jnp.asarray([shuffled, previous], jnp.float32)
    found = rotation_angle(bases[:1], bases[1:], jnp.asarray(weights[None]))
    np.testing.assert_allclose(found, [angle], rtol=2e-3)


def test_effective_rank_survives_the_range_of_float32():
    factor = jnp.asarray(np.diag([1.0, 1.0, 0.0])[None], jnp.float32)
    for scale in (1e-36, 1.0, 1e36):
        np.testing.assert_allclose(effective_rank(scale * factor), [2.0], rtol=1e-6)


def test_a_dimension_without_exponent_has_no_figures():
    tx = walk([monitor_spectrum()], exponents="left")
    _, state = one_step(tx, {"w": jnp.ones((5, 3))})
    assert sorted(read_monitor(state)) == ["5x3", "5x3/0"]


def test_the_state_is_found_inside_chain_partition_and_multi_steps():
    tx = optax.MultiSteps(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.partition(
                {"shampoo": walk([monitor_spectrum()]), "adam": optax.adam(1e-3)},
                {"w": "shampoo", "b": "adam"},
            ),
        ),
        every_k_schedule=1,
    )
    grads = {"w": some_ones(4, 3, 0), "b": jnp.ones(3)}
    _, state = tx.update(grads, tx.init(grads), grads)
    assert read_monitor(state)["4x3/0"]["kept_rank"] == 1


def test_two_monitors_are_told_apart_by_their_place():
    tx = optax.partition(
        {"x": walk([monitor_spectrum()]), "y": walk([monitor_spectrum()])}, {"a": "x", "b": "y"}
    )
    grads = {"a": some_ones(4, 3, 1), "b": some_ones(4, 3, 0, 2)}
    _, state = one_step(tx, grads)
    ranks = {
        key.split("/")[1]: int(figures["kept_rank"][0])
        for key, figures in read_monitor(state).items()
        if key.endswith("4x3/1")
    }
    assert ranks == {"x": 1, "y": 2}


def test_a_state_without_monitor_is_named_as_such():
    with pytest.raises(ValueError, match="monitor_spectrum"):
        read_monitor(optax.adam(1e-3).init({"w": jnp.ones(3)}))


def test_a_monitor_before_the_roots_says_where_it_belongs():
    tx = blocked(optax.chain(monitor_spectrum(), accumulate_factors()))
    params = {"w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="after invert_roots"):
        tx.update(params, tx.init(params))


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every=0"):
        monitor_spectrum(every=0)


def test_state_keeps_structure_dtypes_and_can_be_donated():
    tx = walk([monitor_spectrum(every=2)])
    grads = {"w": jnp.ones((4, 3)), "v": jnp.ones(3), "s": jnp.ones(())}
    state = tx.init(grads)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    _, after = jax.jit(tx.update, donate_argnums=1)(grads, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == before


def test_without_a_monitor_reported_factors_leave_nothing_in_the_program():
    """The walk with a stand-in that drops all figures compiles to as many operations."""
    forget = stateless(lambda b: Blocks(b.gradient, b.update))
    grads = {"w": jnp.ones((4, 3))}
    sizes = []
    for tail in ([], [forget]):
        tx = walk(tail)
        text = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
        sizes.append((text or "").count("\n"))
    assert sizes[0] == sizes[1]


def test_monitor_state_is_exported_as_the_type_to_look_for():
    state = walk([monitor_spectrum()]).init({"w": jnp.ones((2, 2))})
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MonitorState))
    assert sum(isinstance(x, MonitorState) for x in leaves) == 1


forget = stateless(lambda b: dataclasses.replace(b, figures={}))
inside = optax.chain(forget, scale_by_second_moment(0.9), forget)
WALKS = {
    "roots": [accumulate_factors(0.9), invert_roots(CarriedBasis(), every=2), precondition()],
    "kl statistics": [accumulate_kl_factors(invert_roots(), 0.9), precondition()],
    "eigenbasis": [accumulate_factors(0.9), eigenbasis(inside, every=2, rtol=None)],
    "kl_shampoo": [kl_eigenbasis(forget, 0.9, scaled=True, every=2)],
    "kl_soap": [kl_eigenbasis(inside, 0.9, scaled=False, every=2)],
    "graft": [graft(inside, optax.chain(accumulate_factors(0.9), invert_roots(), precondition()))],
}


@pytest.mark.parametrize("name", WALKS)
def test_no_number_depends_on_figures(name):
    """Parts that remove all figures, in the walk and inside of its parts, change no bit."""
    fields = [f.name for f in dataclasses.fields(Blocks) if f.name != "figures"]

    def keep(stacks):
        return {k: {f: getattr(b, f) for f in fields} for k, b in stacks.items()}

    def watched(b):  # as a part does that reports
        return dataclasses.replace(b, figures={**b.figures, "eigenvalues/0": b.update, "noise": 1})

    rng = np.random.default_rng(0)
    steps = [{"w": Blocks.of(jnp.asarray(rng.normal(size=(2, 4, 3))))} for _ in range(4)]
    results = []
    for between in (forget, stateless(watched)):
        tx = optax.chain(*(x for part in WALKS[name] for x in (between, part)), between)
        state, update, found = tx.init(steps[0]), jax.jit(tx.update), []
        for stacks in steps:
            new, state = update(stacks, state)
            found.append(keep(new))
        results.append((found, state))
    jax.tree.map(np.testing.assert_array_equal, *results)
