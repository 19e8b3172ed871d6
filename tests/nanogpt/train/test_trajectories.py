"""Forty steps from the torch script's weights on its batches, optimizer by optimizer."""

import numpy as np
import pytest

from scripts.maintenance.parity import golden
from scripts.maintenance.parity.measurement import misses
from scripts.maintenance.parity.trajectories import (
    KINDS,
    loss_tolerance,
    trajectory,
    trajectory_in_bfloat16,
)

# Eigenvalues near a relative cutoff are kept or dropped by the rounding of a decomposition: one of
# factors with reversed rows and columns moves the parameters by four of their tolerances.
ROUGHER = {"shampoo_rtol_none": 10}


@pytest.mark.trap("A14", "A18", "A20", "A21", "S1", "S2", "S3", "S6", "S7")
@pytest.mark.parametrize("kind", KINDS)
def test_trajectory_follows_the_script(kind):
    found, rougher = list(trajectory(kind)), ROUGHER.get(kind, 1)
    assert not misses(m for m in found if "losses" in m.what)
    assert not misses(m._replace(tolerance=rougher * m.tolerance) for m in found)


@pytest.mark.trap("A11")
def test_bfloat16_trajectory_is_nearer_to_the_scripts_than_float32_is():
    assert not misses(trajectory_in_bfloat16("shampoo"))


@pytest.mark.trap("S1")
def test_the_first_losses_tell_the_cutoffs_apart():
    """What follows one of the two recordings within its tolerance misses the other's."""
    z = golden.load("train_e2e.npz")
    zero, relative = (z[f"{kind}__train_loss"][:4] for kind in ("shampoo", "shampoo_rtol_none"))
    assert np.abs(zero - relative).max() > 20 * loss_tolerance(z["shampoo__spread_train"][:4])
