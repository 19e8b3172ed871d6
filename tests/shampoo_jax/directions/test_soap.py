"""SOAP's direction as a whole: what its options refuse."""

import jax
import jax.numpy as jnp
import pytest

import shampoo_jax as sj
from shampoo_jax import BasisRefresh, scale_by_soap


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 1e-6, "rtol": None}, "damping=1e-06 with rtol=None: .*rtol=0.0"),
        ({"damping": -1e-6}, "damping=-1e-06 must not be negative"),
        ({"eps": -1.0}, "eps=-1.0 must not be negative"),
        ({"exponent": 0.0}, "exponent=0.0 must be positive"),
        ({"basis": "svd"}, "basis='svd': use one of 'eigh', 'qr', None"),
        ({"every": 1.5}, "every=1.5 must be a whole number"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_soap(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 20}, "start=20 with when='after'.*drop start"),
        ({"when": "never"}, "when='never': use one of 'before', 'after'"),
        ({"when": "before"}, "skip_first=True needs when='after'"),
    ],
)
def test_a_contradictory_refresh_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        BasisRefresh(**options)


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
