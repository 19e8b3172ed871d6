"""SOAP's direction as a whole: what its options refuse."""

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax as sj


@pytest.mark.parametrize("alias", [sj.soap, sj.kl_shampoo, sj.kl_soap])
def test_factors_stay_in_proportion(alias):
    # Without bounds 256 thin matrices of 34 MB had 34 GB of state, a lookup table 20 GB.
    thin = {f"lora{i}": {"a": jax.ShapeDtypeStruct((4096, 8), jnp.float32)} for i in range(256)}
    params = sum(x.size * 4 for x in jax.tree.leaves(thin))
    assert sj.state_bytes(alias(1e-3), thin) < 5 * params
    table = {"tok": {"weight": jax.ShapeDtypeStruct((50257, 768), jnp.float32)}}
    assert sj.state_bytes(alias(1e-3), table) < 5 * 4 * 50257 * 768
    report = sj.explain(table, alias(1e-3))
    assert report.largest_factor == 768 and "warning" not in str(report)


def test_a_state_out_of_proportion_is_warned_of():
    params = {"w": jax.ShapeDtypeStruct((2048, 8), jnp.float32)}
    assert "blocking=Blocking(size=1024)" in str(sj.explain(params, sj.soap(0.1, exponents=None)))
