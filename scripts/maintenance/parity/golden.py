"""Reads data recorded from the torch benchmark script into this project's names and layout."""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nanogpt.config.run import ModelConfig
from nanogpt.lab.import_meta import our_name

RECORDED = pathlib.Path(__file__).parents[3] / "tests" / "golden"


@functools.cache
def load(name: str) -> Mapping[str, np.ndarray]:
    """All arrays of a recorded file.

    Args:
        name: File in `tests/golden/speedrun`, as in "muon.npz".
    """
    with np.load(RECORDED / "speedrun" / name) as file:
        return dict(file)


def read_json(array: np.ndarray) -> Any:
    """A JSON string stored as an array."""
    return json.loads(str(array))


def model_config(shape: Mapping[str, int], **changes: Any) -> ModelConfig:
    """The golden model's configuration, in float32 unless changed."""
    settings: dict[str, Any] = dict(
        vocab_size=shape["vocab"],
        num_layers=shape["layers"],
        model_dim=shape["dim"],
        head_dim=shape["head_dim"],
        mlp_dim=4 * shape["dim"],
        sequence_length=shape["T"],
        dtype="float32",
        embed_dtype="float32",
    )
    return ModelConfig(**(settings | changes))


def from_torch(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Parameter tree from arrays named prefix + torch name; kernels become (in, out)."""
    tree: dict[Any, Any] = {}
    for key, value in arrays.items():
        if not key.startswith(prefix):
            continue
        *folders, leaf = our_name(key.removeprefix(prefix)).split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(int(folder) if folder.isdigit() else folder, {})
        node[leaf] = value.T if leaf == "kernel" else value
    return tree


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Flattens a parameter tree to {"a/b/c": array}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float32)
        for path, leaf in leaves
    }
