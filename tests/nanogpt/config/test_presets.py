"""Presets: the published numbers, and that every combination builds."""

import dataclasses
import functools

import jax
import pytest

from nanogpt.config.presets import PRESETS, preset
from nanogpt.config.settings import AdamWConfig
from nanogpt.optimizers.build import build_optimizer
from nanogpt.optimizers.directions import DIRECTIONS
from nanogpt.train.train_step import abstract_params

ALL = [(name, optimizer) for name, recipes in PRESETS.items() for optimizer in recipes]
# Of the smaller copies one each: what they have else differs by numbers alone, and the board's are
# all built and stepped in tests/nanogpt/optimizers/test_small_board.py.
BUILT = [x for x in ALL if x[0] in ("track3", "medium") or x[1] == "shampoo"]


of_model = functools.cache(abstract_params)


@pytest.mark.parametrize("name, optimizer", BUILT)
def test_every_preset_builds(name, optimizer):
    config = preset(name, optimizer)
    # Further layers are more of the same; the medium track's model has sixteen or none.
    if config.model.kind == "track3" and (name, optimizer) != ("track3", "shampoo"):
        model = dataclasses.replace(config.model, num_layers=2)
        config = dataclasses.replace(config, model=model)
    params = of_model(config.model)
    if config.model.kind == "medium":
        params = {**params, "blocks": {layer: params["blocks"][layer] for layer in (6, 7)}}
    tx = build_optimizer(config, params)
    state = jax.eval_shape(tx.init, params)
    loss = lambda p: sum(x.astype("float32").sum() for x in jax.tree.leaves(p))  # noqa: E731
    update = functools.partial(tx.update, obj_fn=loss)
    updates, after = jax.eval_shape(update, params, state, params)
    assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(lambda x: x.shape, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


@pytest.mark.parametrize("name", ["track3", "board"])
def test_every_optimizer_has_its_preset(name):
    assert {preset(name, optimizer).optimizer for optimizer in PRESETS[name]} == set(DIRECTIONS)


def test_track3_is_the_benchmark():
    config = preset("track3", "muon_track3")
    assert config.data.batch_rows * config.model.sequence_length == 524_288
    assert config.data.val_tokens == 10_485_760
    assert (config.val_every, config.val_every_final) == (125, 25)
    assert config.data.mode == "sequential"
    assert (config.model.dtype, config.model.embed_dtype) == ("bfloat16", "bfloat16")


@pytest.mark.trap("S1", "S6")
def test_record_35_has_no_threshold_and_no_blocks():
    """Refreshed every step, 3072 in one block, graft eps 1e-15, auxiliary groups not decayed."""
    config = preset("track3", "shampoo")
    assert config.matrices.cutoff == "positive" and config.matrices.every == 1
    assert config.matrices.block_size >= config.model.mlp_dim
    assert config.matrices.graft_eps == 1e-15
    assert config.auxiliary.weight_decay == 0


def test_unknown_names_are_refused_with_the_choice():
    with pytest.raises(ValueError, match="preset='gpu' is unknown: .* track3, cpu, board"):
        preset("gpu", "adamw")
    with pytest.raises(ValueError, match="optimizer='sgd' is unknown in preset 'cpu': .* adamw"):
        preset("cpu", "sgd")


def test_adamw_settings_are_literal():
    assert preset("track3", "adamw").matrices == AdamWConfig(0.001, 1.0, 0.9, 0.9, 1e-8)
    assert preset("track3", "adamw_record2").matrices == AdamWConfig(0.0015, 0.1, 0.9, 0.95, 1e-10)
