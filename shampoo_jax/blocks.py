"""Parameter trees as stacks of equal blocks, and the one wrapper that goes there and back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.plan import DimensionRule, LeafPlan, make_plan

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stack of N blocks of one shape on its way through the parts of an optimizer.

    Attributes:
      gradient: Raw gradient, read by every statistic; `[N, *block]`, float32 or float64.
      update: The direction in the making, same shape and dtype.
      matrices: One entry a dimension: its factor, later its root, `[N, d, d]`; None for a
        dimension that is not preconditioned. Empty before a part has filled it.
      ready: Whether the preconditioner is in use yet, bool scalar.
      figures: What parts report about this step (kept rank, failures ...), arrays `[N]` by name.
        Entries that nobody reads are removed by the compiler.
    """

    gradient: Array
    update: Array
    matrices: tuple[Array | None, ...] = ()
    ready: Array | bool = True
    figures: dict[str, Array] = dataclasses.field(default_factory=dict)

    @property
    def order(self) -> int:
        """Number of dimensions of one block."""
        return self.gradient.ndim - 1


def is_blocks(x: Any) -> bool:
    """Whether a tree node is a `Blocks`; the `is_leaf` of every map over stacks."""
    return isinstance(x, Blocks)


def map_blocks(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose leaves are the stacks of `tree`."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_blocks)


class Part(optax.GradientTransformationExtraArgs):
    """An Optax transformation that reads and writes trees of `Blocks`."""


def blocks_part(init: Callable[[Any], Any], update: Callable[..., tuple[Any, Any]]) -> Part:
    """A transformation written on trees of `Blocks` that accepts plain trees of arrays as well.

    An array counts as a stack of one block whose gradient and update are the array itself; the
    returned tree then holds arrays again.

    Args:
      init: Function of a tree of `Blocks` of parameters, giving the state.
      update: Function of (tree of `Blocks`, state, tree of `Blocks` of parameters or None).

    Returns:
      The part.
    """

    def wrap(tree: Any) -> Any:
        return map_blocks(lambda x: x if is_blocks(x) else single_block(x), tree)

    def init_fn(params: Any) -> Any:
        return init(wrap(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        new, state = update(wrap(updates), state, None if params is None else wrap(params))
        new = map_blocks(
            lambda old, b: b if is_blocks(old) else b.update[0].astype(old.dtype), updates, new
        )
        return new, state

    return Part(init_fn, update_fn)


def single_block(x: Any) -> Blocks:
    """A stack of one block: the array itself, in float32 or wider."""
    x = jnp.asarray(x)[None]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return Blocks(gradient=x, update=x)


def on_updates(inner: optax.GradientTransformation) -> Part:
    """Lifts any Optax transformation onto `Blocks.update`: what the next part will divide or scale.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part to be placed between two parts of the walk.
    """
    return _lifted(inner, "update", "update")


def on_gradients(inner: optax.GradientTransformation) -> Part:
    """Lifts any Optax transformation onto `Blocks.gradient`: what later statistics will read.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part to be placed between two parts of the walk.
    """
    return _lifted(inner, "gradient", "gradient")


def from_gradients(inner: optax.GradientTransformation) -> Part:
    """Replaces `Blocks.update` by what any Optax transformation makes of the raw gradient.

    This is how a stock transformation serves as the magnitude of `graft`.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part.
    """
    return _lifted(inner, "gradient", "update")


def _lifted(inner: optax.GradientTransformation, source: str, target: str) -> Part:
    tx = optax.with_extra_args_support(inner)

    def take(tree: Any, field: str) -> Any:
        return map_blocks(lambda b: getattr(b, field), tree)

    def init(params: Any) -> Any:
        return tx.init(take(params, "update"))

    def update(blocks: Any, state: Any, params: Any) -> tuple[Any, Any]:
        arrays, state = tx.update(
            take(blocks, source), state, None if params is None else take(params, "update")
        )
        return map_blocks(lambda b, x: dataclasses.replace(b, **{target: x}), blocks, arrays), state

    return blocks_part(init, update)


def split(leaves: Sequence[Array], plan: Sequence[LeafPlan]) -> dict[str, Array]:
    """Cuts arrays into blocks and stacks equal shapes, in the order of leaves, cells and batch.

    Args:
      leaves: One array per entry of `plan`.
      plan: Layout from `make_plan`.

    Returns:
      Stacks `[N, *block]` by block key, in float32 or the leaves' wider dtype.
    """
    pieces: dict[str, list[Array]] = {}
    for x, leaf in zip(leaves, plan, strict=True):
        x = x.transpose(leaf.permutation).reshape(leaf.batch, *leaf.merged)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for cell in leaf.cells:
            limit = [s + n for s, n in zip(cell.start, cell.size, strict=True)]
            piece = jax.lax.slice(x, (0, *cell.start), (leaf.batch, *limit))
            piece = piece.swapaxes(1, 2) if cell.transposed else piece
            pieces.setdefault(cell.key, []).append(piece)
    return {
        key: jnp.concatenate([p.astype(jnp.result_type(*parts)) for p in parts])
        for key, parts in pieces.items()
    }


def join(stacks: dict[str, Array], plan: Sequence[LeafPlan], dtypes: Sequence[Any]) -> list[Array]:
    """Inverse of `split`: the leaves, cast to `dtypes`."""
    offset = dict.fromkeys(stacks, 0)
    leaves = []
    for leaf, dtype in zip(plan, dtypes, strict=True):
        pieces = []
        for cell in leaf.cells:
            begin = offset[cell.key]
            offset[cell.key] = begin + leaf.batch
            piece = stacks[cell.key][begin : begin + leaf.batch].astype(dtype)
            pieces.append(piece.swapaxes(1, 2) if cell.transposed else piece)
        x = _assemble(pieces, leaf) if pieces else jnp.zeros(leaf.shape, dtype)
        permuted = [leaf.shape[a] for a in leaf.permutation]
        inverse = sorted(range(len(permuted)), key=leaf.permutation.__getitem__)
        leaves.append(x.reshape(permuted).transpose(inverse))
    return leaves


def _assemble(pieces: list[Array], leaf: LeafPlan) -> Array:
    """Concatenates cells dimension by dimension, the last one first."""
    for axis in reversed(range(len(leaf.merged))):
        per_row = len({cell.start[axis] for cell in leaf.cells})
        pieces = [
            jnp.concatenate(pieces[i : i + per_row], axis + 1)
            for i in range(0, len(pieces), per_row)
        ]
    return pieces[0]


def blocked(
    inner: optax.GradientTransformation,
    *,
    block_size: int | None = 1024,
    merge: int | None = 2,
    canonical: bool = True,
    dimension_numbers: DimensionRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on stacks of equal blocks instead of on the parameter tree.

    Every parameter is permuted and merged to its block order, cut into boxes of at most
    `block_size` per edge, and boxes of equal shape from all parameters form one stack. `inner` sees
    `{"3072x768": Blocks, ...}`; its state is keyed likewise.

    Args:
      inner: Transformation of trees of `Blocks`: the parts of this package, chains of them, and
        stock transformations lifted by `on_updates`, `on_gradients` or `from_gradients`.
      block_size: Largest edge of a block; None for whole parameters.
      merge: Neighbouring dimensions are merged while at least this many remain and the product is
        at most `block_size`; 1 turns small matrices into vectors as Meta's package does; None
        leaves all shapes alone.
      canonical: Whether 2-D blocks are stored with the longer dimension first.
      dimension_numbers: Callable of (path, leaf) returning `DimensionNumbers` or None.

    Returns:
      A transformation of parameter trees. Updates have the dtype of the incoming updates.

    Raises:
      ValueError: `block_size` or `merge` below 1; complex parameters.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = shampoo_jax.blocked(shampoo_jax.on_updates(optax.scale(-1.0)), block_size=4)
      >>> params = {"w": jnp.ones((6, 4))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"].shape, float(updates["w"][5, 3])
      ((6, 4), -1.0)
    """
    for name, value in (("block_size", block_size), ("merge", merge)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or None for no limit.")
    tx = optax.with_extra_args_support(inner)

    def plan_of(tree: Any) -> list[LeafPlan]:
        return make_plan(
            tree,
            block_size=block_size,
            merge=merge,
            canonical=canonical,
            dimension_numbers=dimension_numbers,
        )

    def stack(tree: Any, plan: list[LeafPlan]) -> dict[str, Blocks]:
        stacks = split(jax.tree.leaves(tree), plan)
        return {key: Blocks(gradient=x, update=x) for key, x in stacks.items()}

    def init_fn(params: Any) -> Any:
        return tx.init(stack(params, plan_of(params)))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        plan = plan_of(updates)
        param_stacks = None if params is None else stack(params, plan)
        stacks, state = tx.update(stack(updates, plan), state, param_stacks, **extra)
        leaves, structure = jax.tree.flatten(updates)
        joined = join({key: b.update for key, b in stacks.items()}, plan, [x.dtype for x in leaves])
        return jax.tree.unflatten(structure, joined), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def norms(x: Array) -> Array:
    """Frobenius norm of each block of a stack `[N, *block]`, safe from over- and underflow: `[N]`."""
    axes = tuple(range(1, x.ndim))
    largest = jnp.max(jnp.abs(x), axis=axes, initial=0.0)
    scale = jnp.where(largest > 0, largest, 1.0)
    scaled = x / scale.reshape(-1, *[1] * len(axes))
    return scale * jnp.sqrt(jnp.sum(scaled * scaled, axis=axes))
