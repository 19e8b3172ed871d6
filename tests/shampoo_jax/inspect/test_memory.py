"""Temporary memory against XLA's account: what a step needs, and what `explain` says of it."""

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax as sj

SQUARES = {str(i): {"kernel": jax.ShapeDtypeStruct((96, 96), jnp.float32)} for i in range(12)}
MIXED = {
    str(i): {
        k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in (("q", (64, 64)), ("w", (64, 192)))
    }
    for i in range(4)
}


def temporary(tx, params):
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    return update.lower(params, state, params).compile().memory_analysis().temp_size_in_bytes


# In chunks: the stack of gradients, which becomes that of updates, and what one block needs, 14 to
# 20 arrays of which twelve make a stack; as a whole, other versions of XLA may need some more.
@pytest.mark.parametrize(
    ("name", "params", "chunk", "most"),
    [
        ("soap", SQUARES, 1, 3.0),
        ("kl_shampoo", SQUARES, 1, 3.0),
        ("kl_soap", SQUARES, 5, 12.0),  # 4 in the last chunk of three, filled up
        ("soap", MIXED, None, 18.0),
        ("shampoo", MIXED, 2, 10.0),
        ("one_sided_shampoo", MIXED, None, 9.0),
    ],
)
def test_a_step_needs_little_and_explain_says_how_much(name, params, chunk, most):
    kind = sj.Refresh if "shampoo" in name and "kl" not in name else sj.BasisRefresh
    tx = getattr(sj, name)(1e-3, refresh=kind(chunk=chunk))
    found = temporary(tx, params)
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    assert found <= most * size
    assert 0.8 <= sj.explain(params, tx).temporary_bytes / found <= 1.2
