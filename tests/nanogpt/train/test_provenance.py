"""Where numbers come from."""

import jax
import numpy as np

from nanogpt.train.provenance import peak_memory_bytes, provenance


def test_versions_and_device():
    found = provenance()
    assert found["versions"]["numpy"] == np.__version__
    assert found["device"]["count"] == jax.device_count()
    assert "cores" in found["device"]["kind"]


def test_git_state_is_both_or_neither():
    found = provenance()
    if found["git_commit"] is None:
        assert found["git_dirty"] is None
    else:
        assert len(found["git_commit"]) == 40
        assert isinstance(found["git_dirty"], bool)


def test_peak_memory_is_in_bytes():
    held = np.ones(5 * 10**6)
    assert held.nbytes < peak_memory_bytes() < 10**12
