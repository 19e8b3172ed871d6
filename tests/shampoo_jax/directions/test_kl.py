"""KL-Shampoo's and KL-SOAP's directions as a whole: what their options refuse."""

import pytest

from shampoo_jax import QRBasis, scale_by_kl_shampoo, scale_by_kl_soap


@pytest.mark.parametrize("direction", [scale_by_kl_shampoo, scale_by_kl_soap])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_scale": "largest"}, "max_scale='largest': use 'size', 'relative' or a number"),
        ({"max_scale": 0.0}, "max_scale=0.0: use"),
        ({"rtol": 2.0}, "rtol=2.0 must lie in"),
        ({"eps": -1.0}, "eps=-1.0 must not be negative"),
        ({"every": 1.5}, "every=1.5 must be a whole number"),
        ({"basis": QRBasis(sort="before")}, "sort"),
    ],
)
def test_impossible_options_are_refused(direction, options, message):
    with pytest.raises(ValueError, match=message):
        direction(**options)
