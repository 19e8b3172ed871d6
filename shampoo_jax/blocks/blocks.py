"""Stacks of equal blocks, and the parts of an optimizer that transform them."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.paths import name_of
from shampoo_jax.blocks.exponents import default_exponents

Array = jax.Array
Matrices = tuple[Array | None, ...]  # one entry a dimension of a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stack of N blocks of one shape on its way through the parts of an optimizer.

    Attributes:
      gradient: Raw gradient, read by every statistic; `[N, *block]`, float32 or float64.
      update: The direction in the making, same shape and dtype.
      exponents: `e` of the inverse root `S^(-e)` of each dimension, static; a dimension of
        exponent 0 has no factor.
      matrices: One entry a dimension: its factor, later its root, `[N, d, d]`; None for a
        dimension that has no factor. Empty before a part has filled it.
      eigenvalues: One entry a dimension, `[N, d]` or None, where a part tracks them apart.
      ready: Whether the preconditioner is in use yet, bool scalar.
      figures: What parts report to a monitor (kept rank, failures ...), arrays `[N]` by name.
        No number depends on them; entries that nobody reads are removed by the compiler.
      index: Position of each block among all blocks of all stacks, int32[N]. It does not depend on
        how stacks are spread over devices.
      further: Other trees that were cut along with the gradient, by name, see `blocked`:
        `[N, *block]`, or `[N, k, *block]` of leaves with k entries for each of the gradient; of
        means that `mean_of_squares` accumulates a tuple of `[N, d, d]`, one a dimension.
      weight: Of this step's gradients in the factors, a scalar; None where no part says it.

    Example:
      >>> import dataclasses, jax.numpy as jnp, optax, shampoo_jax
      >>> def update(stacks, state, params):  # a part of one's own
      ...     halve = lambda b: dataclasses.replace(b, update=b.update / 2)
      ...     return {key: halve(b) for key, b in stacks.items()}, state
      >>> halve = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
      >>> grads = {"w": jnp.ones((2, 3))}
      >>> tx = shampoo_jax.blocked(halve)
      >>> tx.update(grads, tx.init(grads))[0]["w"].tolist()
      [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    gradient: Array
    update: Array
    exponents: tuple[float, ...] = dataclasses.field(default=(), metadata={"static": True})
    matrices: Matrices = ()
    eigenvalues: Matrices = ()
    ready: Array | bool = True
    figures: dict[str, Array] = dataclasses.field(default_factory=dict)
    index: Array | None = None
    further: dict[str, Any] = dataclasses.field(default_factory=dict)
    weight: Array | None = None

    @classmethod
    def of(
        cls, x: Array, exponents: Sequence[float] | None = None, index: Array | None = None
    ) -> "Blocks":
        """A stack `[N, *block]` as gradient and update, in float32 or wider.

        The exponents are Shampoo's where none are given.

        >>> Blocks.of(jnp.ones((5, 4, 3))).exponents
        (0.25, 0.25)
        """
        x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        powers = default_exponents(x.shape[1:]) if exponents is None else tuple(exponents)
        return cls(x, x, powers, index=jnp.arange(len(x)) if index is None else index)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one block."""
        return self.gradient.shape[1:]

    @property
    def ndim(self) -> int:
        """Number of dimensions of one block."""
        return self.gradient.ndim - 1

    @property
    def per_dimension(self) -> Matrices:
        """`matrices`, or None for every dimension where no part has filled them."""
        return self.matrices or (None,) * self.ndim

    def per_factor(self, f: Callable[[int, int, float], Any]) -> tuple[Any, ...]:
        """`f(N, d, e)` for every dimension that has a factor, None for the others."""
        pairs = zip(self.shape, self.exponents, strict=True)
        return tuple(f(len(self.update), d, e) if e else None for d, e in pairs)


class MeanSquares(NamedTuple):
    """Means of `G_j G_j^T` over microbatches so far, see `mean_of_squares`."""

    count: Array  # float32[], microbatches
    factors: Any  # per stack a tuple over dimensions of [N, d, d] or None


Stacks = dict[str, Blocks]


def each(f: Callable[..., Any], stacks: Mapping[str, Any], *states: Mapping[str, Any]) -> Any:
    """`f(blocks, *entries)` of every stack, with its entries of states that are keyed likewise."""
    new = {}
    for key, b in stacks.items():
        new[key] = f(b, *map(operator.itemgetter(key), states))
    return new


def each_of(
    n: int, f: Callable[..., Any], stacks: Mapping[str, Any], *states: Mapping[str, Any]
) -> tuple[Any, ...]:
    """`each` for a function that returns n results: as many dictionaries."""
    columns = tuple(map(dict, [()] * n))
    for key, b in stacks.items():
        results = f(b, *map(operator.itemgetter(key), states))
        for column, result in zip(columns, results, strict=True):
            column[key] = result
    return columns


class ParametersRead(Exception):
    """A part asked for parameters that have not been cut into blocks."""


class Unread(dict):
    """Stands for the parameters until a part asks for them: most parts read gradients alone.

    Whoever looks into it, as a dictionary or as a tree, raises `ParametersRead`.
    """

    def _read(self, *_: Any) -> Any:
        raise ParametersRead

    __getitem__ = __iter__ = __len__ = __contains__ = __bool__ = _read
    get = items = keys = values = _read


jax.tree_util.register_pytree_node(Unread, Unread._read, Unread._read)


def is_placeholder(params: Any) -> bool:
    """Whether `optax.tree.map_params` asks which leaves of a state mirror parameters.

    It passes an empty node of a type of its own, which no tree of parameters is.
    """
    structure = jax.tree.structure(params)
    own_type = not isinstance(params, Mapping | Sequence | None)
    return structure.num_nodes == 1 and structure.num_leaves == 0 and own_type


class Part(optax.GradientTransformationExtraArgs):
    """An Optax transformation that reads and writes stacks, `{"3072x768": Blocks, ...}`."""


def make_part(init: Callable[[Stacks], Any], update: Callable[..., Any]) -> Part:
    """A transformation of stacks that accepts trees of arrays as well.

    An array counts as a stack of one block whose gradient and update are the array itself; the
    returned tree then holds arrays again, and the state is keyed by their paths.

    Args:
      init: Function of stacks of parameters, giving the state.
      update: Function of (stacks, state, stacks of parameters or None, **extra) giving new stacks
        and new state.

    Returns:
      The part.
    """

    def init_fn(params: Any) -> Any:
        return init(params if is_stacks(params) else _stacks_of(params))

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if is_stacks(updates):
            return update(updates, state, params, **extra)
        weights = None if params is None else _stacks_of(params)
        new, state = update(_stacks_of(updates), state, weights, **extra)
        leaves, structure = jax.tree.flatten(updates)
        pairs = zip(leaves, new.values(), strict=True)
        return structure.unflatten(b.update[0].astype(jnp.result_type(x)) for x, b in pairs), state

    return Part(init_fn, update_fn)


def stateless(update: Callable[[Blocks], Blocks]) -> Part:
    """A part without state that treats every stack by itself."""
    return make_part(
        lambda params: optax.EmptyState(),
        lambda stacks, state, params, **extra: (each(update, stacks), state),
    )


def is_stacks(x: Any) -> bool:
    """Whether parts can take this as it is: a dictionary of `Blocks`."""
    return type(x) is dict and isinstance(next(iter(x.values()), None), Blocks)


def _stacks_of(tree: Any) -> Stacks:
    """Every array as a stack of one block."""
    return {
        name_of(path): Blocks.of(as_array(x)[None])
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def as_array(x: Any) -> Array:
    """An array of anything that is one, zeros of a shape: a state can be made of shapes alone."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


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


def along(x: Array, dim: int, ndim: int) -> Array:
    """`[N, d]` shaped to broadcast along dimension `dim` of a stack with `ndim` axes."""
    shape = [len(x), *[1] * (ndim - 1)]
    shape[dim + 1] = x.shape[1]
    return x.reshape(shape)


def microbatches_of(b: Blocks, name: str, least: int = 1) -> Array:
    """The gradients of microbatches that came along with a stack, `[N, m, *block]`.

    Raises:
      ValueError: There are none of this name, or fewer than `least`.
    """
    x = b.further.get(name)
    if not isinstance(x, jax.Array) or x.ndim != b.ndim + 2 or x.shape[1] < least:
        found = "none" if x is None else f"{jax.tree.map(jnp.shape, x)}"
        raise ValueError(
            f"further[{name!r}] of blocks {b.gradient.shape} is {found}: call update(gradients, "
            f"state, params, further={{{name!r}: tree}}) with a tree of the gradients of {least} "
            "microbatches or more, one axis in front of every leaf."
        )
    return x
