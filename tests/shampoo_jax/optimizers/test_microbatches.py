"""Statistics of microbatches in whole optimizers: kept, accumulated, cross-fitted, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj

PARAMS = {"w": jnp.ones((12, 8)), "embed": jnp.ones((5, 4)), "v": jnp.ones((8, 8))}


def micro_of(count, params=PARAMS, scale=1.0):
    keys = jax.random.split(jax.random.key(0), len(params))
    return {
        name: scale * jax.random.normal(key, (count, *p.shape))
        for key, (name, p) in zip(keys, params.items(), strict=True)
    }


def mean_of(micro):
    return jax.tree.map(lambda x: x.mean(0), micro)


def optimizer(placement=None, make=sj.shampoo, **options):
    statistics = sj.accumulate_factors(0.9, microbatches="micro")
    rate = (0.1,) if make is sj.shampoo else ()
    blocking = sj.Blocking(size=6)
    return make(*rate, statistics=statistics, blocking=blocking, placement=placement, **options)


def accumulated(tx, micro):
    squares = sj.mean_of_squares(tx)
    means, _ = jax.lax.scan(
        lambda means, g: (squares.add(means, g), None), squares.init(mean_of(micro)), micro
    )
    return means


def updates_of(tx, micro, *, kept):
    def step(micro):
        further = {"micro": micro if kept else accumulated(tx, micro)}
        return tx.update(mean_of(micro), tx.init(PARAMS), PARAMS, further=further)[0]

    return jax.jit(step)(micro)


def assert_close(found, expected, tolerance=2e-4):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        jax.device_get(found),
        jax.device_get(expected),
    )


def test_what_is_accumulated_in_a_scan_equals_what_is_kept():
    tx, micro = optimizer(graft=None), micro_of(4)
    kept = updates_of(tx, micro, kept=True)
    assert_close(updates_of(tx, micro, kept=False), kept)
    plain = sj.shampoo(0.1, blocking=sj.Blocking(size=6), graft=None)
    others, _ = plain.update(mean_of(micro), plain.init(PARAMS), PARAMS)
    np.testing.assert_allclose(kept["embed"], others["embed"], rtol=1e-5)
    assert float(jnp.abs(kept["w"] - others["w"]).max()) > 0.01


def test_on_a_mesh_as_on_one_device():
    mesh = jax.make_mesh((8,), ("x",))
    place, micro = sj.Placement(mesh, owners="x", parameter_spec=lambda path, _: P()), micro_of(3)
    expected = updates_of(optimizer(), micro, kept=True)
    lies = jax.device_put(micro, NamedSharding(mesh, P()))
    tx = optimizer(place)
    for kept in (True, False):
        assert_close(updates_of(tx, lies, kept=kept), expected)
    means = jax.jit(lambda micro: accumulated(tx, micro))(lies)
    for factor in jax.tree.leaves(means.factors):
        assert {shard.data.shape[0] for shard in factor.addressable_shards} == {len(factor) // 8}


def test_gradients_of_microbatches_are_not_kept():
    """Temporary memory of a loop does not grow with the number of microbatches."""
    tx = optimizer(make=sj.scale_by_shampoo)
    matrices = {"w": jnp.ones((48, 48))}

    def temporary(count):
        def loop(p, batches):
            squares = sj.mean_of_squares(tx)

            def add(carry, x):
                total, means = carry
                g = jax.grad(lambda p: jnp.sum((x @ p["w"]) ** 2))(p)
                return (optax.tree.add(total, g), squares.add(means, g)), None

            start = (optax.tree.zeros_like(p), squares.init(p))
            (total, means), _ = jax.lax.scan(add, start, batches)
            return tx.update(total, tx.init(p), p, further={"micro": means})[0]

        compiled = jax.jit(loop).lower(matrices, jnp.ones((count, 2, 48))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(32) <= temporary(2) + 48 * 48  # less than one gradient, which has 4 times that


def sides_of(g):
    """Means of `G G^T` and `G^T G` over microbatches."""
    return [np.einsum("jab,jcb->ac", g, g) / len(g), np.einsum("jab,jac->bc", g, g) / len(g)]


def inverse_root(factor, samples=None):
    """`factor^(-1/4)`, corrected for the noise of samples whose mean square is in it."""
    w, q = np.linalg.eigh(factor)
    power = w**-0.25
    if samples is not None:
        variance = ((q.T @ samples) ** 2).sum(-1).var(0, ddof=1) / len(samples)
        power = np.maximum(power - 5 / 32 * w**-2.25 * variance, 0)
    return (q * power) @ q.T


def test_disjoint_groups():
    """Momentum is of one half, factors are of the other: they have no noise in common."""
    tx, micro = optimizer(make=sj.scale_by_shampoo, b1=0.0, graft=None), micro_of(4)
    first, second = (jax.tree.map(lambda x, s=s: x[s], micro) for s in (slice(2), slice(2, None)))
    found = tx.update(mean_of(first), tx.init(PARAMS), further={"micro": second})[0]["v"]
    m, g = (np.asarray(x["v"], np.float64)[:, :6, :6] for x in (first, second))  # its first block
    left, right = map(inverse_root, sides_of(g))
    np.testing.assert_allclose(found[:6, :6], left @ m.mean(0) @ right, rtol=1e-3, atol=1e-3)


def test_corrected_roots_of_blocks_at_refreshes_whatever_the_scale():
    """The second step refreshes, the third uses its roots."""
    solver, b2 = sj.Debiased(sj.TruncatedEigh(1e-6), "micro"), 0.9
    form = {"make": sj.scale_by_shampoo, "every": 2, "b1": 0.0}
    tx = optimizer(solver=solver, graft=None, **form)
    update, micro = jax.jit(lambda g, s, f: tx.update(g, s, further={"micro": f})), micro_of(3)
    for scale in (1.0, 1e6):
        state = tx.init(PARAMS)
        for turn in (1.0, 2.0, 3.0):
            given = jax.tree.map(lambda x, t=turn, s=scale: t * s * x, micro)
            found, state = update(mean_of(given), state, given)
        g = np.asarray(micro["v"], np.float64)[:, :6, :6]
        weights = (1 - b2) / (1 - b2**2) * np.array([b2, 1.0])
        factors = [(weights @ [1.0, 4.0]) * s for s in sides_of(g)]
        samples = [2 * weights[1] ** 0.5 * x for x in (g, g.swapaxes(1, 2))]
        left, right = map(inverse_root, factors, samples)
        expected = left @ (3 * g.mean(0)) @ right
        np.testing.assert_allclose(found["v"][:6, :6], expected, rtol=1e-3, atol=1e-3)


def test_corrected_roots_take_the_size_of_the_graft():
    """Refreshes are spread over steps, a chunk of blocks at a time."""
    refresh = sj.Refresh(stagger=True, chunk=3)
    form = {"make": sj.scale_by_shampoo, "every": 2, "refresh": refresh}
    micro, found = micro_of(3), {}
    for name, solver in {"plain": "eigh", "corrected": sj.Debiased(microbatches="micro")}.items():
        tx = optimizer(solver=solver, **form)
        state, update = tx.init(PARAMS), jax.jit(tx.update)
        for _ in range(2):
            found[name], state = update(mean_of(micro), state, further={"micro": micro})
    norms = [float(jnp.linalg.norm(u["v"][:6, :6])) for u in found.values()]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    assert float(jnp.abs(found["plain"]["v"] - found["corrected"]["v"]).max()) > 0.01


def test_a_gradient_that_is_none_leaves_its_factors_alone():
    tx = sj.scale_by_shampoo(statistics=sj.accumulate_factors(microbatches="micro"), graft=None)
    squares, params = sj.mean_of_squares(tx), {"u": jnp.ones((3, 2)), "v": jnp.ones((4, 4))}
    given, add = {"u": jnp.eye(3, 2), "v": None}, jax.jit(squares.add)
    means = add(squares.init(params), given, params)
    assert_close(means, add(squares.init(params), given | {"v": jnp.zeros((4, 4))}))
    state = jax.tree.map(jnp.ones_like, tx.init(params))
    found, new = tx.update(given, state, params, further={"micro": means})
    assert found["v"] is None
    moved = {x.shape[1:] for x, y in zip(*map(jax.tree.leaves, (new, state))) if (x != y).any()}  # noqa: B905
    assert moved == {(), (3, 3), (2, 2), (3, 2)}  # counts, factors, roots and moment of u alone
    with pytest.raises(ValueError, match="gradients=None .* give add\\(means, gradients, params"):
        squares.add(means, given)


def test_with_gradients_accumulated_over_calls():
    """MultiSteps hands its extra arguments on; what the last call is given counts."""
    tx, micro = optimizer(graft=None), micro_of(3)
    expected = updates_of(tx, micro, kept=True)
    squares, several = sj.mean_of_squares(tx), optax.MultiSteps(tx, every_k_schedule=3)

    @jax.jit
    def step(gradients, state, means):
        means = squares.add(means, gradients)
        return *several.update(gradients, state, PARAMS, further={"micro": means}), means

    state, means = several.init(PARAMS), squares.init(PARAMS)
    for j in range(3):
        found, state, means = step({name: x[j] for name, x in micro.items()}, state, means)
        assert (float(jnp.abs(found["w"]).max()) > 0) == (j == 2)
    assert_close(found, expected)


def test_what_was_made_for_other_blocks_is_refused():
    tx, other = optimizer(), sj.shampoo(0.1, blocking=sj.Blocking(size=4))
    micro = micro_of(2)
    with pytest.raises(ValueError, match="made for other blocks.*call mean_of_squares with this"):
        further = {"micro": accumulated(other, micro)}
        tx.update(mean_of(micro), tx.init(PARAMS), PARAMS, further=further)
    with pytest.raises(ValueError, match="has no blocks"):
        sj.mean_of_squares(optax.adam(0.1))


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({}, r"further\['micro'\] of blocks .* is none.*gradients of 1 microbatches"),
        ({"micro": mean_of(micro_of(1))}, r"further\['micro'\] of blocks"),
    ],
)
def test_missing_microbatches_are_named(further, message):
    tx = optimizer(make=sj.scale_by_shampoo)
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, tx.init(PARAMS), further=further)


def test_a_correction_needs_samples_and_known_weights():
    kept = optimizer(make=sj.scale_by_shampoo, solver=sj.Debiased(microbatches="micro"))
    micro = micro_of(2)
    mean, means = mean_of(micro), accumulated(kept, micro)
    for further in (means, micro_of(1)):
        with pytest.raises(ValueError, match="gradients of 2 microbatches"):
            kept.update(mean, kept.init(PARAMS), further={"micro": further})
    damped = optax.chain(sj.accumulate_factors(0.9), sj.damp(1.0))
    tx = sj.scale_by_shampoo(statistics=damped, solver=sj.Debiased(microbatches="micro"))
    with pytest.raises(ValueError, match="with what weight the newest gradients count"):
        tx.update(mean, tx.init(PARAMS), further={"micro": micro})
    whitened = sj.scale_by_shampoo(statistics="kl", solver=sj.Debiased(microbatches="micro"))
    with pytest.raises(ValueError, match="with what weight the newest gradients count"):
        whitened.update(mean, whitened.init(PARAMS), further={"micro": micro})
    with pytest.raises(ValueError, match="give TruncatedEigh"):
        sj.Debiased(sj.CoupledNewton())
