"""Stacks of equal blocks, and transformations of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

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
      index: Position of each block among all blocks of all stacks, int32[N], set by `blocked`. It
        does not depend on how stacks are spread over devices.
      real: Which slots hold a block, bool[N]: for the others, zero blocks that fill a stack on a
        mesh, no root is computed. None where all are to be computed.

    Example:
      >>> import dataclasses, jax.numpy as jnp, optax, shampoo_jax
      >>> def update(blocks, state, params):  # a part of one's own
      ...     halve = lambda b: dataclasses.replace(b, update=b.update / 2)
      ...     return {key: halve(b) for key, b in blocks.items()}, state
      >>> part = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
      >>> grads = {"w": jnp.ones((2, 3))}
      >>> tx = shampoo_jax.blocked(part)
      >>> tx.update(grads, tx.init(grads))[0]["w"].tolist()
      [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    gradient: Array
    update: Array
    matrices: tuple[Array | None, ...] = ()
    ready: Array | bool = True
    figures: dict[str, Array] = dataclasses.field(default_factory=dict)
    index: Array | None = None
    real: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one block."""
        return self.gradient.shape[1:]

    @property
    def slots(self) -> Array:
        """`index`, or positions within this stack where no `blocked` has set it."""
        return jnp.arange(len(self.gradient)) if self.index is None else self.index

    @property
    def order(self) -> int:
        """Number of dimensions of one block."""
        return self.gradient.ndim - 1

    @property
    def per_dimension(self) -> tuple[Array | None, ...]:
        """`matrices`, or None for every dimension where no part has filled them."""
        return self.matrices or (None,) * self.order


def is_blocks(x: Any) -> bool:
    """Whether a tree node is a `Blocks`; the `is_leaf` of every map over stacks."""
    return isinstance(x, Blocks)


def map_blocks(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose leaves are the stacks of `tree`."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_blocks)


def is_placeholder(params: Any) -> bool:
    """Whether `optax.tree.map_params` asks which leaves of a state mirror parameters.

    It passes an empty node of a type of its own, which no tree of parameters is.
    """
    structure = jax.tree.structure(params)
    own_type = not isinstance(params, Mapping | Sequence | None)
    return structure.num_nodes == 1 and structure.num_leaves == 0 and own_type


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

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(
      ...     shampoo_jax.filter_gradient(), on_updates(optax.clip(1.0)), shampoo_jax.precondition()
      ... )
      >>> updates, _ = tx.update(jnp.array([3.0, 0.5]), tx.init(jnp.zeros(2)))
      >>> updates.tolist()
      [1.0, 0.5]
    """
    return _lifted(inner, "update", "update")


def on_gradients(inner: optax.GradientTransformation) -> Part:
    """Lifts any Optax transformation onto `Blocks.gradient`: what later statistics will read.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part to be placed between two parts of the walk.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> moment = shampoo_jax.scale_by_second_moment()
      >>> tx = shampoo_jax.blocked(optax.chain(on_gradients(optax.clip(1.0)), moment))
      >>> grads = {"w": jnp.array([3.0, 0.5])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].tolist()  # 3 divided by the moment of the clipped gradient, 1
      [3.0, 1.0]
    """
    return _lifted(inner, "gradient", "gradient")


def from_gradients(inner: optax.GradientTransformation) -> Part:
    """Replaces `Blocks.update` by what any Optax transformation makes of the raw gradient.

    This is how a stock transformation serves as the magnitude of `graft`.

    Args:
      inner: Transformation of trees of arrays; it sees stacks `[N, *block]`.

    Returns:
      A part.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(on_updates(optax.scale(9.0)), from_gradients(optax.scale_by_sign()))
      >>> tx = shampoo_jax.blocked(tx)
      >>> grads = {"w": jnp.array([3.0, -0.5])}
      >>> updates, _ = tx.update(grads, tx.init(grads))
      >>> updates["w"].tolist()
      [1.0, -1.0]
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


def norms(x: Array) -> Array:
    """Frobenius norm `[N]` of each block of a stack `[N, *block]`, free of overflow."""
    axes = tuple(range(1, x.ndim))
    largest = jnp.max(jnp.abs(x), axis=axes, initial=0.0)
    scale = jnp.where(largest > 0, largest, 1.0)
    scaled = x / scale.reshape(-1, *[1] * len(axes))
    return scale * jnp.sqrt(jnp.sum(scaled * scaled, axis=axes))


def where_block(condition: Array, new: Array, old: Array) -> Array:
    """Per block, `new` where the condition `bool[N]` holds and `old` elsewhere, in old's dtype."""
    condition = condition.reshape(-1, *[1] * (old.ndim - 1))
    return jnp.where(condition, new.astype(old.dtype), old)
