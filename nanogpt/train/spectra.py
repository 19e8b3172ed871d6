"""What a run records of its factors: their spectra, and the figures of the library's monitor."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax
from nanogpt.train.mesh import Layout
from nanogpt.train.train_step import TrainState

POINTS = 24  # eigenvalues of a factor that are recorded, from the largest to the smallest
_FACTOR = re.compile(r"/factors/(?P<stack>[^/]+)/(?P<side>\d)$")
_FIGURE = re.compile(r"/figures/(?P<stack>[^/]+)/(?:(?P<side>\d)/)?(?P<name>[a-z_]+)$")


def spectra_reader(layout: Layout | None = None) -> Callable[[TrainState], dict[str, Any]]:
    """Builds the function that reads spectra off a training state with a monitor in it.

    Args:
        layout: of the state on a mesh; eigenvalues are computed where the factors lie, and all
            processes get all of them.

    Returns:
        Function of a state giving {"blocks/0/attn/q": {"graft_ratio": ..., "0": {...}, "1": {...}}}
        by matrix, or "blocks/0/attn/q#1" by block where there are several; 0 is the side of the
        inputs (of a matrix that is cut unevenly both ways, perhaps of the outputs). Of each side
        `dimension` d, `eigenvalues` of the factor over the largest one at `POINTS` ranks from 0 to
        d - 1, evenly, and the figures of `shampoo_jax.monitor_spectrum`.
    """
    everywhere = None if layout is None else NamedSharding(layout.mesh, P())
    reduce = jax.jit(_reduced, out_shardings=everywhere)

    def read(state: TrainState) -> dict[str, Any]:
        tree = shampoo_jax.state_to_tree(reduce(state.opt_state), state.params)["parameters"]
        shapes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
            for path, x in jax.tree_util.tree_leaves_with_path(state.params)
        }
        found = {n.removesuffix("/kernel"): _blocks(x, shapes[n]) for n, x in tree.items()}
        return {
            name if len(blocks) == 1 else f"{name}#{k}": block
            for name, blocks in found.items()
            for k, block in enumerate(blocks)
        }

    return read


def ranks(dimension: int) -> np.ndarray:
    """Ranks of the recorded eigenvalues; a small factor has some of them several times.

    >>> ranks(47)[:4].tolist(), ranks(2).tolist()[-1]
    ([0, 2, 4, 6], 1)
    """
    return np.round(np.linspace(0, dimension - 1, POINTS)).astype(int)


def _reduced(opt_state: Any) -> Any:
    """The state with eigenvalues in the place of factors, and nothing of other stacks."""

    def reduce(path: Any, x: jax.Array) -> jax.Array:
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        if not _FACTOR.search(name):
            return x[..., :0] if x.ndim > 2 else x
        values = jnp.linalg.eigvalsh(x.astype(jnp.float32))[:, ::-1]
        largest = values[:, :1]
        relative = values / jnp.where(largest > 0, largest, 1.0)
        size = jnp.full((len(x), 1), x.shape[-1], jnp.float32)
        return jnp.concatenate([size, relative[:, ranks(x.shape[-1])]], 1)

    return jax.tree_util.tree_map_with_path(reduce, opt_state)


def _blocks(entries: dict[str, Any], shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """Records of the blocks of a matrix, stack by stack; none of what has no factors."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for path, values in entries.items():
        factor, figure = _FACTOR.search(path), _FIGURE.search(path)
        for k in range(len(values) if factor or figure else 0):
            match: Any = factor or figure
            block = found.setdefault((match["stack"], k), {})
            number = match["side"] and int(match["side"])
            number = 1 - number if number is not None and _turned(match["stack"], shape) else number
            side = block if number is None else block.setdefault(str(number), {})
            if factor:
                side["dimension"] = int(values[k][0])
                side["eigenvalues"] = [_short(x) for x in values[k][1:]]
            else:
                side[match["name"]] = _short(values[k])
    return [found[key] for key in sorted(found)]


def _turned(stack: str, shape: tuple[int, ...]) -> bool:
    """Whether a stack, as 512x128, holds blocks of a matrix the other way round.

    >>> _turned("512x128", (128, 512)), _turned("512x128", (512, 128)), _turned("8x8", (8, 16))
    (True, False, False)
    """
    rows, columns = map(int, stack.split("x"))
    return rows > columns and not (rows <= shape[0] and columns <= shape[1])


def _short(x: Any) -> float | None:
    """Four digits, or None, which JSON knows, for what is no number."""
    return float(f"{float(x):.4g}") if math.isfinite(x) else None
