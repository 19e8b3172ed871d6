"""Recordings of the medium track, replayed; the dear parts of them by `make golden GOLDEN=...`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config.presets import preset
from nanogpt.model.gpt import rms_norm, soft_cap
from nanogpt.model.loss import token_losses
from nanogpt.train.train_step import model_structure
from scripts.maintenance import (
    golden_medium,
    golden_medium_inputs,
    golden_medium_model,
    golden_medium_optimizers,
    golden_medium_tensors,
    replay_golden,
)
from scripts.maintenance.parity.measurement import largest

FILES = Path(__file__).parents[1] / "golden" / "medium"


def read(name):
    with np.load(FILES / name) as z:
        return dict(z)


def worst(measurements):
    return max(map(golden_medium.ratio, measurements))


def test_batches_of_eight_ranks():
    """One process for each rank, and one for all, give the same rows."""
    assert replay_golden.error(FILES / "loader.npz") <= 1


def test_schedules_and_layers():
    table = json.loads((FILES / "schedule.json").read_text())
    run = preset("medium", "muon_mlp_decay")
    found = golden_medium_inputs.schedule(run, 5960, table["schedules"]["5960"])
    assert worst([*found, *golden_medium_inputs.layers(table)]) <= 1


def test_masks():
    """Windows of 1 to 27 blocks, documents that begin anywhere, and what attention by blocks sees.

    A token that is taken for another one's end of a document is a miss, and so is a list of blocks
    in another order.
    """
    z = read("masks.npz")
    assert worst(golden_medium_inputs.masks(FILES, z, ["mixed"])) <= 1
    z["mixed__full_order"] = z["mixed__full_order"][:, ::-1]
    assert worst(golden_medium_inputs.masks(FILES, z, ["mixed"])) == np.inf
    z["mixed__full_order"] = z["mixed__full_order"][:, ::-1]
    config = json.loads(str(z["config"]))
    z["config"] = np.array(json.dumps(config | {"eot": 50255, "windows": config["windows"][:2]}))
    assert worst(golden_medium_inputs.masks(FILES, z, ["mixed"])) == np.inf


def test_losses_logits_and_activations():
    """The forward pass in float32, at every position, with attention by blocks."""
    z = read("model_fp32.npz")
    config = golden_medium_tensors.configuration(json.loads(str(z["config"])), attention="auto")
    params = golden_medium_tensors.tree(config, golden_medium_tensors.parameters(z))
    graphdef, tokens = model_structure(config), jnp.asarray(z["tokens_A"].astype(np.int32))

    def run(params, window):
        model = nnx.merge(graphdef, params)
        streams = model.streams(tokens[None, :-1], window)
        return jnp.stack(streams)[:, 0], model.head(rms_norm(streams[-1]))[0]

    program = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    streams, raw = program(params, 3)
    allowed, nll = golden_medium_model.WIDE, token_losses(raw, tokens[1:])
    assert largest(nll, z["A_W3__nll"]) <= allowed["nll"]
    assert largest(soft_cap(raw)[z["positions"]], z["A_W3__logits"]) <= allowed["logits"]
    assert largest(streams[:, z["act_positions"]], z["A_W3__block_out"]) <= allowed["logits"]


def test_muon_with_twice_the_decay_on_mlps():
    z = read("muon_medium.npz")
    config = json.loads(str(z["config"]))
    found = golden_medium_optimizers.muon_variant(config, z, "rec8_f32ns", ["proj", "odd"])
    assert worst(found) <= 1


def test_newton_schulz_in_bfloat16_rounds_where_the_script_does():
    """Bit for bit: tall matrices, and one that is nearly 0."""
    z = read("muon_medium.npz")
    config, names = json.loads(str(z["config"])), json.loads(str(z["ns_cases"]))
    for case in ("tall", "tiny"):
        found = golden_medium_optimizers.iteration(config, z, names.index(case), case)
        errors = {m.what: m.error for m in found}
        assert errors["bf16"] == 0 and errors["f32"] <= 5e-6


@pytest.mark.parametrize("group", ["embed", "scalars"])
def test_adamw_of_the_mean_loss(group):
    """Rates, warmup from 0, and eps that counts; rows and scalars without gradients."""
    z = read("adam_medium.npz")
    config = json.loads(str(z["config"]))
    config["shapes"] = {group: config["shapes"][group]}
    found = golden_medium_optimizers.recipe(config, z, "adamw_lb")
    assert worst(m for m in found if "bf16" not in m.what) <= 1


def test_files_that_lack_what_they_name_are_refused(tmp_path):
    z = read("adam_medium.npz")
    config = json.loads(str(z["config"]))
    with pytest.raises(ValueError, match="recipe 'other': of none of its groups"):
        list(golden_medium_optimizers.recipe(config, z, "other"))
    z, path = read("masks.npz"), tmp_path / "masks.npz"
    np.savez(path, **z | {"none__first_key": z["none__first_key"][:1]})
    with pytest.raises(ValueError, match="masks.npz: index 1 is out of bounds"):
        replay_golden.error(path)


def test_a_model_of_other_constants_is_refused():
    with pytest.raises(ValueError, match="attn_scale=0.125 is not in the format: it must be 0.12"):
        golden_medium_inputs.check_fixed({"attn_scale": 0.125})


def test_parameters_have_to_lie_beside(tmp_path):
    with pytest.raises(ValueError, match="put one beside it"):
        golden_medium_tensors.beside(tmp_path / "train_e2e.npz")
