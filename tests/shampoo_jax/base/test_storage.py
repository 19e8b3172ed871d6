"""One door for stored arrays: dtypes, and forms of one's own through whole optimizers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj


class Halves(NamedTuple):
    """A float32 array as the bfloat16 of it and that of the rest: sixteen bits of mantissa."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def encode(cls, x):
        high = x.astype(jnp.bfloat16)
        return cls(high, (x - high.astype(x.dtype)).astype(jnp.bfloat16))

    def decode(self, dtype):
        return self.high.astype(dtype) + self.low.astype(dtype)


PARAMS = {"w": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}


def train(tx, steps=5):
    rng, state, out = np.random.default_rng(0), tx.init(PARAMS), []
    for _ in range(steps):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)
        updates, new = tx.update(grads, state, PARAMS)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert jax.tree.map(jnp.result_type, new) == jax.tree.map(jnp.result_type, state)
        state, out = new, [*out, updates["w"]]
    return np.stack(out), state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"statistics": "kl", "solver": "shifted_eigh"},
        {"every": 2, "refresh": sj.Refresh(stagger=True, chunk=1), "blocking": sj.Blocking(3)},
    ],
    ids=["plain", "kl", "staggered"],
)
def test_a_form_of_ones_own_stores_moments_and_roots(options):
    plain, _ = train(sj.shampoo(0.1, **options))
    stored, state = train(sj.shampoo(0.1, mu_dtype=Halves, root_dtype=Halves, **options))
    narrow, _ = train(sj.shampoo(0.1, mu_dtype="bfloat16", root_dtype="bfloat16", **options))
    scale = np.abs(plain).max()
    # 2^-17 a value; what is left of bfloat16's 2^-9 shows that the form is in use at all.
    assert 0 < np.abs(stored - plain).max() < 1e-3 * scale < np.abs(narrow - plain).max()
    forms = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Halves))
    assert sum(isinstance(x, Halves) for x in forms) >= 3  # mu and a root on each side


def test_a_stored_form_is_carried_by_parameter():
    tx = sj.shampoo(0.1, mu_dtype=Halves, root_dtype=Halves)
    _, state = train(tx)
    back = sj.tree_to_state(sj.state_to_tree(state, PARAMS), tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@pytest.mark.parametrize(
    ("option", "value"),
    [("mu_dtype", jnp.float16), ("root_dtype", jnp.int8), ("mu_dtype", Halves.encode)],
)
def test_what_cannot_store_is_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}=.*bfloat16"):
        sj.shampoo(0.1, **{option: value})


def test_an_eigenbasis_refuses_a_form_that_it_cannot_carry():
    class Scaled(NamedTuple):
        values: jax.Array
        scale: jax.Array

        @classmethod
        def encode(cls, x):
            return cls(x, jnp.ones(len(x)))

        def decode(self, dtype):
            return self.values

    for alias in (sj.soap, sj.kl_soap):
        with pytest.raises(ValueError, match="mu_dtype=.*Scaled.*use bfloat16 or float32"):
            alias(0.1, mu_dtype=Scaled)
    inside = optax.chain(
        sj.accumulate_factors(), sj.eigenbasis(sj.filter_gradient(mu_dtype=Scaled))
    )
    with pytest.raises(ValueError, match="scale.*elementwise"):
        sj.blocked(inside).init(PARAMS)
