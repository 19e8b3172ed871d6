"""When roots are recomputed, what happens when that fails, and their application."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from shampoo_jax.blocks.blocks import Blocks
from shampoo_jax.matrix.products import apply_matrices
from shampoo_jax.parts.factors import accumulate_factors
from shampoo_jax.parts.refresh import Refresh
from shampoo_jax.parts.roots import invert_roots, precondition
from shampoo_jax.solvers.eigh import TruncatedEigh
from shampoo_jax.solvers.solver import Solver


@dataclasses.dataclass(frozen=True)
class Copy(Solver):
    """Returns the factor itself as its root, so that a root tells which step it is of."""

    def __call__(self, factor, exponent, state):
        return factor, jnp.ones(len(factor), bool), state


@dataclasses.dataclass(frozen=True)
class FailsOn(Solver):
    """Copies the factor, NaN and failed where its first entry is one of these; counts its calls."""

    bad: tuple[float, ...]

    def init(self, n, d, dtype):
        return jnp.zeros(n, jnp.int32)

    def __call__(self, factor, exponent, state):
        first = factor[:, 0, 0]
        ok = ~jnp.isin(first, jnp.asarray(self.bad, factor.dtype))
        return jnp.where(ok[:, None, None], factor, jnp.nan), ok, state + 1


def blocks_of(x, *matrices, exponents=None):
    return {"k": dataclasses.replace(Blocks.of(x, exponents), matrices=matrices)}


def run(tx, factors):
    """Runs over factors `[T, N, d, d]` of vectors; Blocks of every step and the last state."""
    zeros = jnp.zeros(factors.shape[1:3])

    def step(state, factor):
        new, state = tx.update(blocks_of(zeros, factor), state)
        return state, new["k"]

    init = tx.init(blocks_of(zeros))
    state, blocks = jax.jit(lambda s, f: jax.lax.scan(step, s, f))(init, jnp.asarray(factors))
    return blocks, state


STEPS = np.arange(1, 13, dtype=np.float32).reshape(12, 1, 1, 1)


@pytest.mark.trap("S4")
@pytest.mark.parametrize(
    ("every", "start", "refreshes"),
    [
        (1, None, range(1, 13)),
        (3, None, [3, 6, 9, 12]),
        (3, 4, [4, 6, 9, 12]),
        (3, 3, [3, 6, 9, 12]),
        (1, 4, range(4, 13)),
        (5, None, [5, 10]),
        (5, 12, [12]),
        (2, 7, [7, 8, 10, 12]),
        (1, 13, []),
    ],
)
def test_refresh_schedule(every, start, refreshes):
    first = every if start is None else start
    for interval in (every, jnp.asarray(every)):
        blocks, state = run(invert_roots(Copy(), every=interval, refresh=Refresh(start)), STEPS)
        # A root of 1 before the first refresh is the identity, later the step of the last refresh.
        last = [max((r for r in refreshes if r <= t), default=1) for t in range(1, 13)]
        np.testing.assert_array_equal(blocks.matrices[0].ravel(), last)
        np.testing.assert_array_equal(blocks.ready, np.arange(1, 13) >= first)
        assert int(state.count) == 12


def test_nothing_is_computed_between_refreshes():
    _, state = run(invert_roots(FailsOn(()), every=3, refresh=Refresh(start=4)), STEPS)
    np.testing.assert_array_equal(state.solver["k"][0], [4])


def test_a_failed_root_keeps_the_last_good_one_and_counts():
    # Two blocks; the first fails at steps 3, 4 and 6, the second at step 1.
    steps = np.arange(1, 7, dtype=np.float32)
    factors = np.stack([steps, 10 * steps], 1)[:, :, None, None]
    blocks, state = run(invert_roots(FailsOn((3.0, 4.0, 6.0, 10.0))), factors)
    np.testing.assert_array_equal(blocks.matrices[0][:, 0].ravel(), [1, 2, 2, 2, 5, 5])
    np.testing.assert_array_equal(blocks.matrices[0][:, 1].ravel(), [1, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(blocks.figures["failures"][-1], [3, 1])
    np.testing.assert_array_equal(state.failures["k"], [3, 1])
    np.testing.assert_array_equal(state.solver["k"][0], [3, 5])  # a failure keeps this as well
    assert blocks.ready.all()


def test_a_block_that_fails_in_both_dimensions_counts_once_and_the_good_side_is_kept():
    zeros = jnp.zeros((2, 1, 1))
    tx = invert_roots(FailsOn((7.0,)))
    state = tx.init(blocks_of(zeros))
    left, right = jnp.float32([7, 7]).reshape(2, 1, 1), jnp.float32([2, 7]).reshape(2, 1, 1)
    new, state = jax.jit(tx.update)(blocks_of(zeros, left, right), state)
    assert [m.ravel().tolist() for m in new["k"].matrices] == [[1, 1], [2, 1]]
    assert state.failures["k"].tolist() == [1, 1]


def test_a_factor_that_is_not_finite_keeps_its_root_with_the_real_solver():
    factors = np.stack([np.eye(2) * 16, np.full((2, 2), np.nan), np.eye(2) * 81])[:, None]
    blocks, state = run(invert_roots(TruncatedEigh()), factors.astype(np.float32))
    for root, expected in zip(blocks.matrices[0], [1 / 4, 1 / 4, 1 / 9], strict=True):
        np.testing.assert_allclose(root[0], np.eye(2) * expected, rtol=1e-6, atol=1e-6)
    assert state.failures["k"].tolist() == [1]


def test_exponents_choose_root_and_dimensions():
    factors = tuple(jnp.eye(d)[None] * 16 for d in (2, 3))
    x = jnp.ones((1, 2, 3))
    tx, exponents = invert_roots(), (0.5, 0.0)
    state = tx.init(blocks_of(x, exponents=exponents))
    assert state.roots["k"][1] is None
    new, _ = tx.update(blocks_of(x, factors[0], None, exponents=exponents), state)
    np.testing.assert_allclose(new["k"].matrices[0][0], np.eye(2) / 4, rtol=1e-6, atol=1e-6)
    assert new["k"].matrices[1] is None


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 4), (2, 1, 2, 3), ()])
def test_application_of_matrices(shape, transpose):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    matrices = [rng.normal(size=(2, d, d)).astype(np.float32) for d in shape]
    if len(matrices) > 2:
        matrices[1] = None
    result = apply_matrices(jnp.asarray(x), tuple(matrices), transpose=transpose)
    for n in range(2):
        expected = x[n]
        for k, m in enumerate(matrices):
            if m is not None:
                m = m[n].T if transpose else m[n]
                expected = np.moveaxis(np.tensordot(m, expected, (1, k)), 0, k)
        np.testing.assert_allclose(result[n], expected, rtol=1e-4, atol=1e-5)


def test_precondition_without_matrices_changes_nothing():
    x = jnp.arange(6.0).reshape(1, 2, 3)
    new, _ = precondition().update(blocks_of(x), optax.EmptyState())
    np.testing.assert_array_equal(new["k"].update, x)


def test_preconditioning_one_gradient_orthogonalizes_it():
    """With b2 = 0 the walk is `(G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T`."""
    g = np.random.default_rng(3).normal(size=(1, 4, 3)).astype(np.float32)
    tx = optax.chain(accumulate_factors(0.0), invert_roots(), precondition())
    blocks = blocks_of(jnp.asarray(g))
    new, _ = jax.jit(tx.update)(blocks, tx.init(blocks))
    u, _, vt = np.linalg.svd(g[0], full_matrices=False)
    np.testing.assert_allclose(new["k"].update[0], u @ vt, atol=1e-4)


def test_a_block_whose_exponent_the_solver_lacks_is_named_at_init():
    tx = sj.scale_by_shampoo(
        solver="polynomial", blocking=sj.Blocking(merge=None, dimension_numbers=None)
    )
    with pytest.raises(ValueError, match="blocks of shape 2x1x1x1x1: exponent=0.1 is not.*'eigh'"):
        tx.init({"w": jnp.ones((2, 1, 1, 1, 1))})
