"""Parts of the optimizers, and which parameter goes to which."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanogpt.config.presets import preset
from nanogpt.optimizers.build import build_optimizer, route
from nanogpt.optimizers.directions import nesterov_ema, scale_by_aspect
from nanogpt.train.train_step import abstract_params


@pytest.mark.trap("M2")
def test_m2_momentum_is_a_plain_moving_average():
    gradients = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    tx, average = nesterov_ema(0.95), np.zeros(3)
    state = tx.init(jnp.zeros(3))
    for gradient in gradients:
        update, state = tx.update(jnp.asarray(gradient), state)
        average = 0.95 * average + 0.05 * gradient
        np.testing.assert_allclose(update, 0.95 * average + 0.05 * gradient, rtol=1e-5)
        np.testing.assert_allclose(state.mu, average, rtol=1e-5)


@pytest.mark.trap("A5")
def test_a5_aspect_reads_out_over_in_of_kernels():
    """A (768, 3072) kernel maps 768 inputs to 3072 outputs: factor 2; its reverse: 1."""
    tx = scale_by_aspect()
    for shape, factor in (((2, 8), 2.0), ((8, 2), 1.0), ((3, 3), 1.0)):
        update, _ = tx.update(jnp.ones(shape), tx.init(None))
        np.testing.assert_array_equal(update, np.full(shape, factor, np.float32))


@pytest.mark.trap("A2", "M3")
def test_a2_m3_every_parameter_of_the_model_has_its_group():
    """Vectors by order 1 whatever their name (A2); no embedding and no head in Muon (M3)."""
    params = abstract_params(preset("track3", "muon_track3").model)
    labels = route(params)
    assert labels["embed"] == {"embedding": "embed"}
    assert labels["head"] == {"kernel": "head", "bias": "vectors"}
    for shape, label in zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True):
        assert (label == "vectors") == (shape.ndim < 2)
    assert jax.tree.leaves(labels).count("matrices") == 72


def test_a_parameter_without_rule_or_with_two_is_refused_by_name():
    with pytest.raises(ValueError, match="'value_embed/table' must match exactly one .* none"):
        route({"value_embed": {"table": 0}})
    rules = (("head/.*", "head"), (".*/kernel", "matrices"))
    with pytest.raises(ValueError, match=r"'head/kernel' .* head/\.\* and \.\*/kernel"):
        route({"head": {"kernel": 0}}, rules)


def test_unknown_optimizer_and_foreign_settings_are_refused():
    config = preset("cpu", "adamw")
    params = abstract_params(config.model)
    with pytest.raises(ValueError, match="optimizer='adam' is unknown: .* adamw, muon"):
        build_optimizer(dataclasses.replace(config, optimizer="adam"), params)
    with pytest.raises(ValueError, match="matrices=AdamWConfig .* MuonConfig"):
        build_optimizer(dataclasses.replace(config, optimizer="muon"), params)


def test_long_gradients_are_scaled_to_the_norm_of_the_mean():
    config = dataclasses.replace(preset("cpu", "adamw"), clip_norm=0.5)
    tokens = config.data.batch_rows * config.model.sequence_length
    params = {"head": {"kernel": jnp.ones((2, 2))}}
    tx = build_optimizer(config, params)
    for norm, kept in ((0.25, 0.25), (4.0, 0.5)):
        grads = {"head": {"kernel": jnp.full((2, 2), norm / 2 * tokens)}}
        _, state = tx.update(grads, tx.init(params), params)
        adam = state.inner_state[1].inner_states["head"].inner_state[0]
        mu = adam.mu["head"]["kernel"] / (1 - config.auxiliary.b1)
        np.testing.assert_allclose(jnp.linalg.norm(mu) / tokens, kept, rtol=1e-5)
