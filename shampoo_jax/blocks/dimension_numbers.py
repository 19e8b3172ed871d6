"""Which axes of a parameter are its rows, its columns and its batch."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from shampoo_jax.base.options import refuse


@dataclasses.dataclass(frozen=True)
class DimensionNumbers:
    """Which axes of a parameter form which dimension of its blocks.

    Attributes:
      dimensions: One tuple of axes per dimension of the block, in order; the axes of one tuple are
        flattened together. `((0,), (1, 2))` reads a `(d, heads, head_dim)` attention kernel as a
        `d x heads*head_dim` matrix.
      batch: Axes along which the parameter is a batch of independent tensors, each with factors of
        its own (scanned layers, experts, heads).

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> query = shampoo_jax.DimensionNumbers(dimensions=((1,), (2, 3)), batch=(0,))
      >>> blocking = shampoo_jax.Blocking(dimension_numbers=lambda path, leaf: query)
      >>> params = {"query": jnp.ones((12, 16, 2, 4))}  # layers, width, heads, head width
      >>> report = shampoo_jax.explain(params, shampoo_jax.scale_by_shampoo(blocking=blocking))
      >>> report.rows[0].batch, report.rows[0].merged
      (12, (16, 8))
    """

    dimensions: tuple[tuple[int, ...], ...]
    batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for what are no tuples of axes."""
        groups = self.dimensions
        if not isinstance(groups, Sequence) or not all(map(_are_axes, groups)):
            refuse("dimensions", groups, ": give axes by dimension, ((0,), (1, 2)) say")
        if not _are_axes(self.batch):
            refuse("batch", self.batch, ": give a tuple of axes, such as (0,)")


def _are_axes(axes: Any) -> bool:
    """Whether this is a sequence of whole numbers."""
    whole = isinstance(axes, Sequence) and all(isinstance(a, int | np.integer) for a in axes)
    return whole and not isinstance(axes, str)


DimensionRule = Callable[[tuple[Any, ...], Any], DimensionNumbers | None]

# What options accept: a rule, the name of a rule, or None for merging alone. The default is a name
# because optax.inject_hyperparams takes every callable for a schedule.
DimensionOption = DimensionRule | str | None

# Layers of nn.ConvLocal share no weights between positions: their kernels are no convolutions.
_CONVOLUTION = re.compile(r"conv(?!_?local)")


def component_names(path: tuple[Any, ...]) -> list[str]:
    """Components of a key path in lower case, without what a box around an array appends.

    That is the `.value` of an NNX variable, and the number that jax gives to the array in a node
    without keys, such as Haliax's NamedArray. Slashes separate components, as in the flat names of
    Haiku.
    """
    last = path[-1] if path else None
    boxed = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value"
    if boxed or isinstance(last, jax.tree_util.FlattenedIndexKey):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/").lower().split("/")


def default_dimension_numbers(path: tuple[Any, ...], leaf: Any) -> DimensionNumbers | None:
    """Reads attention and convolution kernels of Flax and Keras as matrices from inputs to outputs.

    A parameter `kernel` (Linen or NNX) is recognised by the name of its module, the nearest
    component of the path that is not a number, and by its rank:

      - `query`, `key`, `value`, rank 3, `(d, heads, head_dim)`: `d x heads*head_dim`;
      - `out`, in Keras `attention_output`, rank 3, `(heads, head_dim, d)`: `heads*head_dim x d`;
      - a name that contains `conv`, rank 3 to 5, `(*window, in, out)`: `window*in x out`.

    Rows are inputs and columns outputs in all of them, as in the kernel of a dense layer, so a
    one-sided preconditioner stands on the same side everywhere. Everything else is left to merging;
    axes of scanned layers and of experts are named with `batch_axes`.

    Args:
      path: Key path of the parameter.
      leaf: The parameter or its shape.

    Returns:
      Its dimension numbers, or None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from shampoo_jax.blocks.dimension_numbers import default_dimension_numbers
      >>> params = {"attn": {"query": {"kernel": jnp.ones((8, 2, 3))}}}
      >>> jax.tree_util.tree_map_with_path(default_dimension_numbers, params)
      {'attn': {'query': {'kernel': DimensionNumbers(dimensions=((0,), (1, 2)), batch=())}}}
    """
    names, rank = component_names(path), np.ndim(leaf)
    if names[-1:] != ["kernel"]:
        return None
    module = next((name for name in reversed(names[:-1]) if not name.isdigit()), "")
    if module in ("query", "key", "value") and rank == 3:
        return DimensionNumbers(((0,), (1, 2)))
    outward = module in ("out", "attention_output") and rank == 3
    if outward or _CONVOLUTION.search(module) and 3 <= rank <= 5:
        return DimensionNumbers((tuple(range(rank - 1)), (rank - 1,)))
    return None


RULES: dict[str | None, DimensionRule] = {
    "flax": default_dimension_numbers,
    None: lambda path, leaf: None,
}


def resolve_dimension_numbers(option: DimensionOption) -> DimensionRule:
    """The rule that an option stands for.

    Args:
      option: A callable of (path, leaf), `"flax"` for `default_dimension_numbers`, or None.

    Returns:
      The callable; for None one that leaves every parameter to merging.

    Raises:
      ValueError: An unknown name.
    """
    if callable(option):
        return option
    if option not in RULES:
        raise ValueError(
            f"dimension_numbers={option!r} is unknown: choose from {list(RULES)}, or pass a "
            "callable of (path, leaf)."
        )
    return RULES[option]


def batch_axes(
    axes: Mapping[str, int | Sequence[int]], rule: DimensionOption = "flax"
) -> DimensionRule:
    """A rule for stacked parameters: scanned layers, experts, everything that `vmap` initialized.

    Each slice along the named axes is read by `rule` as if it were a parameter of its own, and gets
    factors of its own. Axes that `rule` does not mention are dimensions of their own: nothing is
    merged in a parameter that has batch axes.

    Args:
      axes: Axis or axes, counted in the whole parameter, by component of the path. A parameter
        below several of them has the axes of all.
      rule: Reads one slice; see `resolve_dimension_numbers`.

    Returns:
      A rule for `Blocking(dimension_numbers=...)`. It raises ValueError for a parameter that does
      not have the axes.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> from shampoo_jax.blocks.dimension_numbers import batch_axes
      >>> params = {"layers": {"dense": {"kernel": jnp.ones((12, 8, 4))}}}
      >>> rule = batch_axes({"layers": 0})
      >>> jax.tree_util.tree_map_with_path(rule, params)
      {'layers': {'dense': {'kernel': DimensionNumbers(dimensions=((1,), (2,)), batch=(0,))}}}
      >>> blocking = shampoo_jax.Blocking(dimension_numbers=rule)
      >>> tx = shampoo_jax.scale_by_shampoo(blocking=blocking)
    """
    named = axes.items() if isinstance(axes, Mapping) else ()
    if not named or not all(isinstance(a, int) or _are_axes(a) for _, a in named):
        refuse("axes", axes, ": give the batch axes of each component by name, {'layers': 0} say")
    by_name = {name: (a,) if isinstance(a, int) else tuple(a) for name, a in named}
    inner = resolve_dimension_numbers(rule)

    def numbers(path: tuple[Any, ...], leaf: Any) -> DimensionNumbers | None:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        wanted = [a for name, of_name in by_name.items() if name in names for a in of_name]
        if not wanted:
            return inner(path, leaf)
        shape = np.shape(leaf)
        if not all(-len(shape) <= a < len(shape) for a in wanted):
            raise ValueError(
                f"batch_axes names the axes {tuple(wanted)} of parameter "
                f"{jax.tree_util.keystr(path)}, whose shape is {shape}: name other components, or "
                "pass a callable of your own as dimension_numbers."
            )
        batch = tuple(sorted({a % len(shape) for a in wanted}))
        rest = [a for a in range(len(shape)) if a not in batch]
        one = inner(path, jax.ShapeDtypeStruct([shape[a] for a in rest], leaf.dtype))
        one = one or DimensionNumbers(tuple((k,) for k in range(len(rest))))
        dimensions = tuple(tuple(rest[k] for k in group) for group in one.dimensions)
        return DimensionNumbers(dimensions, (*batch, *(rest[k] for k in one.batch)))

    return numbers
