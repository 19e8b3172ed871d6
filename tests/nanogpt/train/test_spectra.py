"""What a run records of its factors."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_jax
from nanogpt.config.presets import preset
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.mesh import make_layout
from nanogpt.train.spectra import POINTS, ranks, spectra_reader
from nanogpt.train.train_step import TrainState, abstract_params, init_state

EPS = np.finfo(np.float32).eps


def tiny(optimizer, **changes):
    config = preset("board", optimizer)
    matrices: Any = config.matrices
    sizes = {"vocab_size": 32, "num_layers": 1, "model_dim": 16, "head_dim": 8, "mlp_dim": 32}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **sizes, sequence_length=8),
        matrices=dataclasses.replace(matrices, monitor=1, **changes),
    )


def trained(config, steps=2):
    """A state after some gradients of low rank."""
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract_params(config.model))
    tx = build_optimizer(config, params)
    state = tx.init(params)
    for step in range(steps):
        keys = jax.random.split(jax.random.key(step), len(jax.tree.leaves(params)))
        leaves, structure = jax.tree.flatten(params)
        drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        _, state = jax.jit(tx.update)(structure.unflatten(drawn), state, params)
    return TrainState(jnp.int32(steps), params, state)


@pytest.mark.parametrize("optimizer", ["shampoo", "soap"])
def test_eigenvalues_are_those_of_the_factors(optimizer):
    state = trained(tiny(optimizer))
    found = spectra_reader()(state)
    entries = shampoo_jax.state_to_tree(state.opt_state, state.params)["parameters"]
    assert sorted(found) == [f"blocks/0/{n}" for n in sorted(
        ("attn/q", "attn/k", "attn/v", "attn/proj", "mlp/fc", "mlp/proj"))]  # fmt: skip
    for name, record in found.items():
        for side in "01":
            size = state.params
            for part in f"{name}/kernel".split("/"):
                size = size[int(part) if part.isdigit() and int(part) in size else part]
            stored = side if size.shape[0] >= size.shape[1] else "10"[int(side)]
            (factor,) = (
                x[0]
                for path, x in entries[f"{name}/kernel"].items()
                if "/factors/" in path and path.endswith(f"/{stored}")
            )
            assert len(factor) == size.shape[int(side)]
            values = np.linalg.eigvalsh(np.asarray(factor, np.float64))[::-1]
            told = record[side]
            assert told["dimension"] == len(factor) and len(told["eigenvalues"]) == POINTS
            expected = (values / values[0])[ranks(len(factor))]
            np.testing.assert_allclose(told["eigenvalues"], expected, rtol=1e-3, atol=1e-6)
            kept = np.sum(values > len(values) * EPS * values[0])
            assert optimizer == "soap" or told["kept_rank"] == kept
        assert record["failures"] == 0 and record["graft_ratio"] >= 0


def test_blocks_of_a_matrix_have_a_number():
    found = spectra_reader()(trained(tiny("shampoo", block_size=16), 1))
    names = [name for name in found if name.startswith("blocks/0/mlp/fc")]
    assert names == ["blocks/0/mlp/fc#0", "blocks/0/mlp/fc#1"]
    assert found[names[0]]["0"] != found[names[1]]["0"]
    assert found["blocks/0/attn/q"]["1"]["dimension"] == 16


def test_one_side_has_one_record():
    found = spectra_reader()(trained(tiny("shampoo", exponent="left"), 1))
    assert "1" not in found["blocks/0/attn/q"] and found["blocks/0/attn/q"]["0"]["kept_rank"] > 0


def test_on_a_mesh_everybody_gets_the_same():
    config = dataclasses.replace(tiny("shampoo"), mesh="data=4,fsdp=2")
    layout = make_layout(config)
    tx = build_optimizer(config, abstract_params(config.model), layout.placement)
    _, state = init_state(config, tx, layout)
    alone = trained(dataclasses.replace(config, mesh=""), 1)

    def filled(path, x):
        """Factors of one device on the mesh, zero blocks behind them."""
        if "factors" not in jax.tree_util.keystr(path):
            return x
        blocks = dict(jax.tree_util.tree_leaves_with_path(alone.opt_state))[path]
        padded = np.zeros(x.shape, np.float32)
        padded[: len(blocks)] = blocks
        return jax.device_put(padded, x.sharding)

    opt_state = jax.tree_util.tree_map_with_path(filled, state.opt_state)
    found = spectra_reader(layout)(state._replace(opt_state=opt_state))
    for name, record in spectra_reader()(alone).items():
        assert found[name]["0"]["dimension"] == record["0"]["dimension"]
        np.testing.assert_allclose(
            found[name]["0"]["eigenvalues"], record["0"]["eigenvalues"], rtol=1e-3, atol=1e-6
        )
