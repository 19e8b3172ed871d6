"""The exported model in plain jax, from its two files alone."""

import json
import pathlib

import jax
import jax.numpy as jnp
from safetensors.flax import load_file


def read(folder: pathlib.Path):
    """Arrays by name, and settings."""
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def logits(arrays, settings, tokens):
    """(T,) -> (T, V), all in float32."""
    model, eps = settings["model"], settings["rms_eps"]
    arrays = {name: array.astype(jnp.float32) for name, array in arrays.items()}
    length, half = len(tokens), model["head_dim"] // 2

    def norm(x, gain=1.0):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain

    def linear(name, x):
        return x @ arrays[f"{name}.kernel"] + arrays[f"{name}.bias"]

    frequencies = jnp.zeros(half).at[: half // 2].set(1024.0 ** -jnp.linspace(0, 1, half // 2))
    angles = jnp.arange(length)[:, None, None] * frequencies

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1)

    x = norm(arrays["embed.embedding"][tokens], arrays["norm1.scale"])
    for k in range(model["num_layers"]):
        at = f"blocks.{k}"
        y = norm(x, arrays[f"{at}.norm1.scale"])
        q, k_, v = (
            linear(f"{at}.attn.{n}", y).reshape(length, -1, model["head_dim"]) for n in "qkv"
        )
        scores = jnp.einsum("qnh,knh->nqk", rotate(norm(q)), rotate(norm(k_)))
        scores = jnp.where(jnp.tri(length, dtype=bool), settings["attention_scale"] * scores, -1e30)
        attended = jnp.einsum("nqk,knh->qnh", jax.nn.softmax(scores), v).reshape(length, -1)
        x = x + settings["residual"] * linear(f"{at}.attn.proj", attended)
        hidden = jax.nn.relu(linear(f"{at}.mlp.fc", norm(x, arrays[f"{at}.norm2.scale"]))) ** 2
        x = x + settings["residual"] * linear(f"{at}.mlp.proj", hidden)
    raw = linear("head", norm(x, arrays["norm2.scale"]))
    cap = settings["logit_cap"]
    return cap * raw / jnp.sqrt(raw * raw + cap * cap)
