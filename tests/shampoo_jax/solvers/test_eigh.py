"""Eigenvalue solvers: what a cutoff of 0 keeps, what no damping means, and XLA's algorithms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.solvers.bases import EighBasis
from shampoo_jax.solvers.eigh import ShiftedEigh, TruncatedEigh


def test_a_relative_cutoff_of_zero_keeps_every_positive_eigenvalue():
    factor = jnp.diag(jnp.array([1.0, 1e-30, 0.0, -1e-3]))[None]
    root, ok, _ = TruncatedEigh(rtol=0.0)(factor, 0.5, ())
    assert ok.all()
    np.testing.assert_allclose(jnp.diag(root[0]), [1, 1e15, 0, 0], rtol=1e-5)
    root, _, _ = TruncatedEigh()(factor, 0.5, ())
    np.testing.assert_allclose(jnp.diag(root[0]), [1, 0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("before", [True, False])
def test_without_damping_a_singular_factor_has_no_root(before):
    factors = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 1.0]]])
    root, ok, _ = ShiftedEigh(damping=0.0, before=before)(factors, 0.5, ())
    assert ok.tolist() == [False, True]
    np.testing.assert_allclose(root[1], np.diag([0.5, 1.0]), rtol=1e-5, atol=1e-6)


CHOOSING = {
    "truncated": lambda name, a: TruncatedEigh(implementation=name)(a, 0.5, ())[0],
    "shifted": lambda name, a: ShiftedEigh(implementation=name)(a, 0.5, ())[0],
    "basis": lambda name, a: EighBasis(implementation=name)(a, a)[1],
    "adaptive": lambda name, a: EighBasis(0.1, implementation=name)(a, a)[1],
}


@pytest.mark.parametrize("root", CHOOSING.values(), ids=CHOOSING)
def test_the_implementation_can_be_chosen_where_the_lowered_platform_has_it(root):
    a = jnp.array([[[2.0, 1.0], [1.0, 2.0]]])
    with pytest.raises(ValueError, match="implementation='lanczos': use one of 'qr', 'jacobi'"):
        root("lanczos", a)
    if not hasattr(jax.lax.linalg, "EighImplementation"):  # jax 0.8.0
        with pytest.raises(ValueError, match="use None, or jax 0.8.1 or newer"):
            root("qr", a)
        return
    np.testing.assert_array_equal(root("qr", a), root(None, a))
    with pytest.raises(NotImplementedError, match="Jacobi implementation is not supported on CPU"):
        root("jacobi", a)

    def program(name: str, platform: str):  # for another machine, not run
        return jax.jit(lambda a: root(name, a)).trace(a).lower(lowering_platforms=(platform,))

    gpu = {name: program(name, "cuda").as_text() for name in ("qr", "jacobi")}
    assert gpu["qr"] != gpu["jacobi"]
    assert "@Eigh" in program("qdwh", "tpu").as_text()
