"""SOAP's direction as a whole: what its options refuse."""

import pytest

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
