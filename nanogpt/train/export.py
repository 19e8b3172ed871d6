"""A trained model as files that other programs read: safetensors and JSON."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save

from nanogpt.model.gpt import ATTENTION_SCALE, LOGIT_CAP, RMS_EPS
from nanogpt.train.trained import Trained

WEIGHTS, SETTINGS = "model.safetensors", "config.json"


def export(trained: Trained, out: Path) -> Path:
    """Writes the weights, in the precision that they are trained in, and what they are of.

    Names are those of the parameters with dots, as in "blocks.0.attn.q.kernel"; kernels are stored
    (in, out). docs/using.md has the formula of the model.

    Args:
        trained: the model.
        out: folder, made if it is not there; files of these names in it are replaced.

    Returns:
        The file of weights.
    """
    leaves = jax.tree_util.tree_leaves_with_path(trained.params)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")  # noqa: E731
    settings = {
        "model": dataclasses.asdict(trained.config.model.scaled()),
        "attention_scale": ATTENTION_SCALE,
        "logit_cap": LOGIT_CAP,
        "rms_eps": RMS_EPS,
        "residual": _residual(trained),
        "tokenizer": {"name": trained.tokenizer.name, "vocab_size": trained.tokenizer.vocab_size},
        "run": trained.config.name,
        "step": trained.step,
    }
    out.mkdir(parents=True, exist_ok=True)
    arrays = {name(path): np.asarray(leaf) for path, leaf in leaves}
    # Not by its own `save_file`, which lets nobody else read the file.
    (out / WEIGHTS).write_bytes(save(arrays, {"format": "flax"}))
    (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return out / WEIGHTS


def _residual(trained: Trained) -> float:
    """Factor of what each block adds."""
    model = trained.config.model
    return 1 / model.depth_multiplier if model.transfer else 1.0
