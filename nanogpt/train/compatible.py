"""What may differ between a checkpoint and the run that goes on from it."""

from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nanogpt.train.digests import DamagedError
from nanogpt.train.paths import Path, absolute
from shampoo_jax import FORMAT, state_layout

Meta = dict[str, Any]

# Settings that decide where things lie and how often they are shown, but no number of the run.
FREE_SETTINGS = (
    *("name", "output", "data.directory", "mesh", "scatter_gradients", "nonfinite_limit"),
    *("go_on_from", "profile"),
)
# Likewise for a run that goes on, unless its statistics are of microbatches: rows go to devices in
# pieces of another size, and the same sums come in another order.
PIECES = "data.microbatch_rows"
# Those that a run may have otherwise than the one that it goes on from: they decide what is done
# with the state. Where they decide what it holds as well, `layout_difference` tells.
TUNABLE_SETTINGS = ("matrices", "auxiliary", "clip_norm")


def read_meta(folder: Path) -> Meta:
    """What was stored beside the state of a checkpoint.

    Raises:
        DamagedError: it cannot be read; names the checkpoint.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            found = reader.restore(absolute(folder) / "meta")
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedError(f"checkpoint {folder} is damaged: meta cannot be read.") from error
    if not isinstance(found, dict):
        raise DamagedError(f"checkpoint {folder} is damaged: meta holds no names with values.")
    return found


def first_difference(
    before: Meta, now: Meta, free: Collection[str] = FREE_SETTINGS
) -> tuple[str, Any, Any] | None:
    """Returns (dotted name, before, now) of the first setting that differs, None if none does.

    Args:
        before: settings as JSON gives them back.
        now: likewise.
        free: names of settings, or of groups of them, that may differ.

    >>> first_difference({"seed": 0, "data": {"mode": "a"}}, {"seed": 0, "data": {"mode": "b"}})
    ('data.mode', 'a', 'b')
    """
    return next(_differences(before, now, free, ""), None)


def tuned(before: Meta, now: Meta) -> Meta:
    """The first settings with the second ones' values of those that may be tuned."""
    return before | {name: now[name] for name in TUNABLE_SETTINGS}


def _differences(
    before: Meta, now: Meta, free: Collection[str], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    for key in before | now:
        name, left, right = prefix + key, before.get(key), now.get(key)
        if name in free or left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differences(left, right, free, name + ".")
        else:
            yield name, left, right


def layout_of(state: Any) -> Meta:
    """What a saved state holds, in JSON: shapes by path, blocks, how they were cut, the format."""
    leaves = [(jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(state)]
    return {
        "format": FORMAT,
        "shapes": {path: list(leaf.shape) for path, leaf in leaves},
        "stacks": state_layout(state),
        "cut": [np.asarray(x).tolist() for path, x in leaves if path.endswith(".fingerprints")],
    }


def layout_difference(saved: Meta, now: Meta) -> str:
    """Why a saved state cannot be taken for one of another layout; empty if it can.

    Stacks may be filled to another length with zero blocks at their end, since that follows from
    the number of devices. Nothing else may differ.
    """
    if saved["format"] != now["format"]:
        return (
            f"its state has format number {saved['format']}, the installed shampoo_jax reads "
            f"{now['format']}: finish the run with the one that saved it"
        )
    for path in (*saved["shapes"], *now["shapes"]):
        if (path in saved["shapes"]) != (path in now["shapes"]):
            holder = "it" if path in saved["shapes"] else "this run's optimizer alone"
            return f"{holder} has {path}: it was made by another optimizer or with other options"
    if _true_blocks(saved["stacks"]) != _true_blocks(now["stacks"]) or saved["cut"] != now["cut"]:
        return (
            "its blocks were cut or read otherwise (block_size, exponents, parameters), and what "
            "they hold cannot be cut anew"
        )
    lengths = {
        (len(old), len(new))
        for one, other in zip(saved["stacks"], now["stacks"], strict=True)
        for old, new in zip(one.values(), other.values(), strict=True)
    }
    for path, shape in saved["shapes"].items():
        new = now["shapes"][path]
        if shape != new and (shape[1:] != new[1:] or (*shape[:1], *new[:1]) not in lengths):
            return f"{path} has shape {tuple(shape)}, this run's has {tuple(new)}"
    return ""


def _true_blocks(stacks: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Stacks without the zero blocks that fill their ends."""

    def true(blocks: list[int]) -> list[int]:
        last = max((k for k, leaf in enumerate(blocks) if leaf >= 0), default=-1)
        return blocks[: last + 1]

    return [{key: true(blocks) for key, blocks in place.items()} for place in stacks]
