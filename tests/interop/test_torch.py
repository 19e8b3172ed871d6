"""The exported model in torch, from its two files alone: run by `make test-interop`."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipeline import gpt2
from nanogpt.config.presets import preset
from nanogpt.config.run import ModelConfig
from nanogpt.train.export import export
from nanogpt.train.train_step import abstract_params, model_structure
from nanogpt.train.trained import Trained

pytestmark = pytest.mark.interop


def logits(folder, tokens):
    """(T,) -> (T, V) by torch's own functions, in float32."""
    import torch  # type: ignore[missing-import]
    from safetensors.torch import load_file
    from torch.nn import functional as F  # type: ignore[missing-import]

    settings = json.loads((folder / "config.json").read_text())
    arrays = {name: x.float() for name, x in load_file(folder / "model.safetensors").items()}
    model, width = settings["model"], settings["model"]["head_dim"]

    def norm(x, gain=None):
        return F.rms_norm(x, x.shape[-1:], gain, settings["rms_eps"])

    def linear(name, x):  # kernels are (in, out)
        return F.linear(x, arrays[f"{name}.kernel"].T, arrays[f"{name}.bias"])

    moving = (1 / 1024) ** torch.linspace(0, 1, width // 4)
    angles = torch.outer(torch.arange(len(tokens)), torch.cat([moving, torch.zeros(width // 4)]))
    turns = torch.polar(torch.ones_like(angles), -angles)

    def rotate(x):  # pairs (i, i + width / 2) as complex numbers
        a, b = x.chunk(2, -1)
        turned = torch.complex(a.contiguous(), b.contiguous()) * turns
        return torch.cat([turned.real, turned.imag], -1)

    x = norm(arrays["embed.embedding"][tokens], arrays["norm1.scale"])
    for k in range(model["num_layers"]):
        at = f"blocks.{k}"
        y = norm(x, arrays[f"{at}.norm1.scale"])
        q, key, v = (
            linear(f"{at}.attn.{n}", y).unflatten(-1, (-1, width)).transpose(0, 1) for n in "qkv"
        )
        attended = F.scaled_dot_product_attention(
            rotate(norm(q)), rotate(norm(key)), v, is_causal=True, scale=settings["attention_scale"]
        )
        attended = attended.transpose(0, 1).flatten(1)
        x = x + settings["residual"] * linear(f"{at}.attn.proj", attended)
        hidden = linear(f"{at}.mlp.fc", norm(x, arrays[f"{at}.norm2.scale"])).relu().square()
        x = x + settings["residual"] * linear(f"{at}.mlp.proj", hidden)
    raw, cap = linear("head", norm(x, arrays["norm2.scale"])), settings["logit_cap"]
    return (cap * raw / torch.sqrt(raw * raw + cap * cap)).numpy()


@pytest.mark.parametrize("name", ["cpu", "track3"])
def test_torch_computes_the_same_logits(name, tmp_path):
    """Of the demo's model in float32, and of track 3's, narrower, with its bfloat16 embedding."""
    config = preset(name, "adamw")
    if name == "track3":
        config = dataclasses.replace(config, model=ModelConfig(512, 3, 64, 32, 256, 128))
    leaves, structure = jax.tree.flatten(abstract_params(config.model))
    random = np.random.default_rng(0)
    drawn = [jax.numpy.asarray(random.normal(0, 0.1, x.shape), x.dtype) for x in leaves]
    params = structure.unflatten(drawn)
    trained = Trained(pathlib.Path("run"), config, 1, params, gpt2(512))
    export(trained, tmp_path)
    tokens = random.integers(0, 512, config.model.sequence_length)
    whole = jax.tree.map(lambda x: x.astype("float32"), params)
    wide = dataclasses.replace(config.model, dtype="float32")
    ours = nnx.merge(model_structure(wide), whole)(tokens[None])[0]
    theirs = logits(tmp_path, tokens)
    error = np.abs(theirs - np.asarray(ours)).max()
    print(f"{name}: largest error of a logit {error:.1e}, of logits up to {np.abs(ours).max():.1f}")
    assert error < 1e-4 < np.abs(ours).max()
