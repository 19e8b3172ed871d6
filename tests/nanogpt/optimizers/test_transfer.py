"""A family of models: sizes, residual branches, and what its members' optimizers are given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config.presets import preset
from nanogpt.config.run import ModelConfig
from nanogpt.model.gpt import GPT
from nanogpt.optimizers.build import build_optimizer, route
from nanogpt.optimizers.transfer import of_base
from nanogpt.train.train_step import abstract_params

BASE = ModelConfig(64, 1, 8, 4, 32, 4, dtype="float32", embed_dtype="float32")


def member(optimizer, *, width=4.0, depth=2.0, transfer=True, **model):
    config = preset("board", optimizer)
    changed = dict(width_multiplier=width, depth_multiplier=depth, transfer=transfer, **model)
    return dataclasses.replace(config, model=dataclasses.replace(BASE, **changed))


def of_groups(config):
    params = abstract_params(config.model)
    return of_base(config, params, route(params))


def test_sizes_are_multiplied():
    wide = dataclasses.replace(BASE, width_multiplier=1.5, depth_multiplier=2.0)
    shapes = abstract_params(wide)
    assert shapes["blocks"].keys() == {0, 1}
    assert shapes["blocks"][1]["mlp"]["fc"]["kernel"].shape == (12, 48)
    assert shapes["embed"]["embedding"].shape == (64, 12)
    explicit = dataclasses.replace(BASE, num_layers=2, model_dim=12, mlp_dim=48)
    assert jax.tree.leaves(abstract_params(explicit)) == jax.tree.leaves(shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(width_multiplier=1.1), "width_multiplier=1.1 makes model_dim=8.8"),
        (dict(depth_multiplier=1.5), "depth_multiplier=1.5 makes num_layers=1.5"),
        (dict(width_multiplier=0.25), "head_dim=4 does not divide model_dim=2"),
        (dict(width_multiplier=0.0), "width_multiplier=0.0: must be positive"),
    ],
)
def test_multipliers_that_give_no_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


@pytest.mark.parametrize(("transfer", "share"), [(True, 0.5), (False, 1.0)])
def test_residual_branches_shrink_with_depth(transfer, share):
    config = dataclasses.replace(BASE, depth_multiplier=2.0, transfer=transfer, init="record33")
    model = GPT(config, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    block = model.blocks[0]
    after = x + share * block.attn(block.norm1(x))
    expected = after + share * block.mlp(block.norm2(after))
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-6)


def test_every_group_has_the_rates_of_its_rule():
    # Width 4, depth 2: matrices 1/4 for Adam and its graft, 1 for Muon and SOAP; heads 1/4.
    for optimizer, rate in (("adamw", 0.25), ("shampoo", 0.25), ("muon", 1.0), ("soap", 1.0)):
        config = member(optimizer)
        groups = of_groups(config)
        own, rest = config.matrices, config.auxiliary
        matrices = groups["matrices"].matrices
        assert matrices.learning_rate == pytest.approx(rate * own.learning_rate)
        # Decay is a quarter of the base's whatever the rate's multiplier.
        before = own.learning_rate * own.weight_decay
        assert matrices.learning_rate * matrices.weight_decay == pytest.approx(before / 4)
        assert groups["head"].auxiliary.head_learning_rate == rest.head_learning_rate / 4
        assert groups["embed"].auxiliary.embed_learning_rate == rest.embed_learning_rate
        assert groups["embed"].auxiliary.eps == rest.eps / 4
        vectors = groups["vectors"].auxiliary
        assert vectors.vector_learning_rate == rest.vector_learning_rate
    adam, soap, shampoo = (of_groups(member(o)) for o in ("adamw", "soap", "shampoo"))
    assert adam["matrices"].matrices.eps == member("adamw").matrices.eps / 8
    assert soap["matrices"].matrices.eps == member("soap").matrices.eps / 2
    settings = member("shampoo").matrices
    assert shampoo["matrices"].matrices.graft_eps == settings.graft_eps / 8
    assert shampoo["matrices"].matrices.damping == settings.damping / 4


def test_the_optimizer_of_a_member_takes_its_steps():
    tx, plain = (
        build_optimizer(c, abstract_params(c.model))
        for c in (member("adamw"), member("adamw", transfer=False))
    )
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), abstract_params(member("adamw").model))
    ones = jax.tree.map(jnp.ones_like, params)
    step, usual = (t.update(ones, t.init(params), params)[0] for t in (tx, plain))
    ratio = jax.tree.map(lambda a, b: float((a / b).mean()), step, usual)
    assert ratio["blocks"][1]["attn"]["q"]["kernel"] == pytest.approx(0.25, rel=1e-4)
    assert ratio["head"]["kernel"] == pytest.approx(0.25, rel=1e-4)
    assert ratio["embed"]["embedding"] == pytest.approx(1.0, rel=1e-4)
    assert ratio["norm1"]["scale"] == pytest.approx(1.0, rel=1e-4)


def test_the_base_itself_is_as_without_the_rules():
    for optimizer in ("adamw", "shampoo"):
        config = member(optimizer, width=1.0, depth=1.0)
        for settings in of_groups(config).values():
            assert (settings.matrices, settings.auxiliary) == (config.matrices, config.auxiliary)


def test_optimizers_without_a_rule_are_refused():
    with pytest.raises(ValueError, match="optimizer='lion': rules are known for adamw, muon"):
        of_groups(dataclasses.replace(member("adamw"), optimizer="lion"))
    config = member("muon")
    held = dataclasses.replace(config.matrices, hyperball=True, weight_decay=0.0)
    with pytest.raises(ValueError, match="optimizer='muon' with updates of a fixed norm"):
        of_groups(dataclasses.replace(config, matrices=held))
