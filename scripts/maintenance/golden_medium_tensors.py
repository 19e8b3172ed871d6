"""The medium track's model in recordings: its settings, and its weights by the script's names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt.config.run import ModelConfig
from nanogpt.train.train_step import abstract_params
from scripts.maintenance.golden_medium_inputs import check_fixed

Data = Mapping[str, np.ndarray]
Tensors = dict[str, np.ndarray]  # by the script's names, (out, in)
QKVO = ("q", "k", "v", "proj")


def configuration(config: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The model of a recording, in float32 and with the reference attention unless changed."""
    check_fixed(config)
    settings: dict[str, Any] = dict(
        kind="medium",
        init="medium",
        vocab_size=config["vocab"],
        head_columns=config["head_rows"],
        num_layers=16,
        model_dim=config["dim"],
        head_dim=config["head_dim"],
        mlp_dim=config.get("hidden", 4 * config["dim"]),
        sequence_length=config["T"],
        mask_block=config["block"],
        end_of_text=config["eot"],
        attention="dense",
        dtype="float32",
        embed_dtype="float32",
    )
    return ModelConfig(**(settings | changes))


def parameters(z: Data) -> Tensors:
    """Recorded parameters, float32."""
    names = json.loads(str(z["names"]))
    scales = 2.0 ** z["param_exp"].astype(np.float64)
    whole = {n: z[f"param_int8__{n}"] * scale for n, scale in zip(names, scales, strict=True)}
    return {n: x.astype(np.float32) for n, x in whole.items()}


def beside(path: Path, layout: str = "param_exp") -> dict[str, np.ndarray]:
    """The recording of the parameters, in the folder of another one.

    Raises:
        ValueError: There is none, or several.
    """
    found = []
    for other in sorted(path.parent.glob("*.npz")):
        with np.load(other) as z:
            if layout in z:
                found.append(dict(z))
    if len(found) != 1:
        raise ValueError(
            f"its parameters are those of a file like model_fp32.npz in {path.parent}, where "
            f"{len(found)} are: put one beside it."
        )
    return found[0]


def tree(config: ModelConfig, tensors: Tensors) -> Any:
    """Parameters of the model by the script's tensors; kernels become (in, out)."""
    shapes = abstract_params(config)

    def value(path: tuple, shape: Any) -> jax.Array:
        name, part = script_name(jax.tree_util.keystr(path, simple=True, separator="/"))
        x = tensors[name] if part is None else tensors[name][part]
        x = x.T if path[-1] == jax.tree_util.DictKey("kernel") else x
        if x.shape != shape.shape:
            raise ValueError(f"{name} has shape {x.shape}: it must be {shape.shape}.")
        return jnp.asarray(x, shape.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def script_name(path: str) -> tuple[str, int | None]:
    """Name of a parameter in the script, and which of its matrices it is.

    >>> script_name("blocks/3/attn/k/kernel"), script_name("value_embeds/1/embedding")
    (('blocks.3.attn.qkvo_w', 1), ('value_embeds.1.weight', None))
    """
    parts = path.split("/")
    if parts[-1] == "embedding":
        return ".".join([*parts[:-1], "weight"]), None
    if parts[0] in ("head", "scalars"):
        return {"head": "lm_head_w"}.get(parts[0], parts[0]), None
    if parts[2] == "attn":
        return f"blocks.{parts[1]}.attn.qkvo_w", QKVO.index(parts[3])
    return f"blocks.{parts[1]}.mlp.{parts[3]}_w", None


def tensors_of(values: Any) -> Tensors:
    """The script's tensors of a tree of parameters or gradients, float64."""
    found: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(values):
        name, part = script_name(jax.tree_util.keystr(path, simple=True, separator="/"))
        x = np.asarray(x, np.float64)
        x = x.T if path[-1] == jax.tree_util.DictKey("kernel") else x
        if part is None:
            found[name] = x
        else:
            found.setdefault(name, {})[part] = x
    stack = lambda x: np.stack([x[i] for i in range(len(x))])  # noqa: E731
    return {name: stack(x) if isinstance(x, dict) else x for name, x in found.items()}
