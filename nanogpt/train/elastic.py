"""A saved state on another number of devices."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nanogpt.train.compatible import Meta
from nanogpt.train.digests import DamagedError
from nanogpt.train.paths import Path, absolute
from nanogpt.train.stored import STUMBLES


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Says in a sentence what TensorStore says in pages, and Orbax as an error of no class.

    Raises:
        DamagedError: arrays in the folder cannot be read.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, STUMBLES):
            raise
        raise DamagedError(
            f"checkpoint {folder.parent} is damaged: arrays in {folder.name} cannot be read."
        ) from error


def read_state(folder: Path, state: Any, saved: Meta) -> Any:
    """Loads a state; every device reads its own ranges of every array, and nothing is gathered.

    Stacks hold the same blocks on every layout, and zero blocks behind them up to a multiple of
    their owners. TensorStore cuts or adds the latter; those that are added are taken from a fresh
    state, in which their bases, say, are identities.

    Args:
        folder: what Orbax wrote of the state.
        state: a fresh one, the pattern for shapes, dtypes and placement.
        saved: of the saved one, see `nanogpt.train.compatible.layout_of`.

    Returns:
        The saved state, placed like `state`.
    """
    pattern = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    lengths = [tuple(shape) for shape in saved["shapes"].values()]
    fresh, structure = jax.tree.flatten(state)
    other = [k for k, leaf in enumerate(fresh) if leaf.shape != lengths[k]]
    with ocp.StandardCheckpointer() as reader, reading(folder):
        read = jax.tree.leaves(reader.restore(absolute(folder), pattern, strict=not other))
    short = [k for k in other if fresh[k].shape[0] > lengths[k][0]]
    if short:
        full = _filled([(read[k], fresh[k], lengths[k][0]) for k in short])
        read = [full[short.index(k)] if k in short else leaf for k, leaf in enumerate(read)]
    return structure.unflatten(read)


def _filled(stacks: list[tuple[jax.Array, jax.Array, int]]) -> list[jax.Array]:
    """From (restored, fresh, blocks that were saved): the fresh ones behind those saved."""
    restored, fresh, saved = zip(*stacks, strict=True)

    def fill(restored: tuple[jax.Array, ...], fresh: tuple[jax.Array, ...]) -> list[jax.Array]:
        masks = [jnp.arange(len(x)) < n for x, n in zip(restored, saved, strict=True)]
        return [
            jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, y)
            for mask, x, y in zip(masks, restored, fresh, strict=True)
        ]

    shardings = [x.sharding for x in restored]
    return jax.jit(fill, out_shardings=shardings, donate_argnums=0)(restored, fresh)
