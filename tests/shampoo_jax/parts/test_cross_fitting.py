"""Adam of folds against a loop over them; recordings of it are in test_golden_microbatches.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.blocks.blocks import Blocks
from shampoo_jax.parts.cross_fitting import cross_fitted_adam

MICRO = np.random.default_rng(0).normal(size=(2, 6, 3))  # steps, microbatches, entries
B1, B2 = 0.9, 0.5


def run(micro, **options):
    """The update of the last step, of one block."""
    part, x = cross_fitted_adam(B1, B2, 0.0, **options), jnp.asarray(micro, jnp.float32)
    state = part.init({"k": Blocks.of(x[0].mean(0)[None])})
    for step in x:
        blocks = Blocks(
            step.mean(0)[None], step.mean(0)[None], further={"microbatches": step[None]}
        )
        new, state = part.update({"k": blocks}, state)
    return np.asarray(new["k"].update[0])


def in_numpy(folds, squares):
    m, v = np.zeros(3), np.zeros(3)
    for t, x in enumerate(MICRO, start=1):
        update = np.zeros(3)
        for r in range(folds):
            mine = np.arange(6) // (6 // folds) == r
            rest = (x[~mine] ** 2).mean(0) if squares == "mean_of" else x[~mine].mean(0) ** 2
            first = (B1 * m + (1 - B1) * x[mine].mean(0)) / (1 - B1**t)
            update += first / np.sqrt((B2 * v + (1 - B2) * rest) / (1 - B2**t)) / folds
        m, v = B1 * m + (1 - B1) * x.mean(0), B2 * v + (1 - B2) * x.mean(0) ** 2
    return update


@pytest.mark.parametrize(("folds", "squares"), [(6, "of_mean"), (3, "mean_of")])
def test_every_fold_is_divided_by_what_the_others_say(folds, squares):
    found = run(MICRO, folds=None if folds == 6 else folds, squares=squares)
    np.testing.assert_allclose(found, in_numpy(folds, squares), rtol=1e-4)


def test_the_scale_of_gradients_does_not_matter():
    for options in ({"debias": True}, {"debias": True, "folds": 2, "squares": "mean_of"}):
        np.testing.assert_allclose(
            run(1e-12 * MICRO, **options), run(MICRO, **options), rtol=1e-4, atol=1e-6
        )


def test_zero_gradients_give_zero_updates():
    for options in ({}, {"folds": 2, "squares": "mean_of"}):
        assert (run(0 * MICRO, debias=True, **options) == 0).all()


def test_folds_have_to_divide_the_microbatches():
    with pytest.raises(ValueError, match="folds=4 does not divide 6 microbatches"):
        run(MICRO, folds=4)
    with pytest.raises(ValueError, match="leaves 1 of 2 microbatches"):
        run(MICRO[:, :2], folds=2, squares="mean_of", debias=True)
    with pytest.raises(ValueError, match="folds=1 must be at least 2"):
        cross_fitted_adam(folds=1)
