"""Which parameters are preconditioned."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from shampoo_jax.base.options import check_real
from shampoo_jax.base.paths import as_written, check_named
from shampoo_jax.blocks.dimension_numbers import (
    DimensionOption,
    component_names,
    resolve_dimension_numbers,
)
from shampoo_jax.stacks.blocked import described

Rule = Callable[[tuple[Any, ...], Any], bool]

# Parameters whose rows are looked up or whose columns are vocabulary entries: two-dimensional, but
# their gradients are sparse or tall and Adam serves them as well for less.
_EMBEDDINGS = r"embed|(^|_)emb($|_)|^w[tp]e$"
_TABLES = re.compile(
    _EMBEDDINGS + r"|vocab|logits|^(?!(multi|attn|attention)_)(\w*_)?(lm)?head(_\d+)?$"
)

# What Flax, Equinox, Haiku and Keras call vectors, by itself or at the end of a longer name.
# Stacked by vmap or scan they have two axes.
_VECTORS = re.compile(r"(^|_)(bias(es)?|scale|offset|gamma|beta)$|^bias_|norm_(weight|w|g)$")
# Modules whose `weight` is a vector; `layernorm_mlp` and the like hold matrices.
_NORMS = re.compile(
    r"(norm|(^|_)(ln|rms))\d*(_(?!\w*(mlp|proj|linear|dense|fc|conv|attn|attention))\w+)?$"
)
_ABOUT_NORMS = re.compile(r"norm|(^|_)(ln|rms)")


def is_hidden_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """The default rule: two or more dimensions above 1, no bias, embedding or output head.

    Args:
      path: Key path of the parameter. A component that contains `embed`, `vocab`, `logits` or the
        word `emb`, is `wte` or `wpe`, or ends in the word `head` (but `multi_head`, `attn_head`),
        names a table. Slashes separate components, as in Haiku's names. A parameter whose name is
        or ends in `bias`, `scale`, `offset`, `gamma` or `beta`, one that is itself named a norm,
        `rms` or `ln` (`q_norm`, `ln_f`), a `b` in a module that is no `lora`, `bq` and the like,
        and the `weight`, `w` or `g` of what is named so, is a vector even where it has more axes
        (heads, scanned layers).
      leaf: The parameter or its shape.

    Returns:
      Whether Shampoo takes it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from shampoo_jax import is_hidden_matrix
      >>> params = {"attn": {"q": jnp.ones((4, 4))}, "lm_head": jnp.ones((4, 9)), "b": jnp.ones(4)}
      >>> jax.tree_util.tree_map_with_path(is_hidden_matrix, params)
      {'attn': {'q': True}, 'b': False, 'lm_head': False}
    """
    ndim = sum(d > 1 for d in np.shape(leaf))
    names = component_names(path)
    *modules, name = names
    is_vector = bool(_VECTORS.search(name) or _NORMS.search(name))
    is_vector |= name in ("weight", "w") and any(map(_NORMS.search, modules))
    is_vector |= name == "g" and any(map(_ABOUT_NORMS.search, modules))
    # Haiku's bias; the second matrix of a low-rank adapter has the same name.
    adapter = any("lora" in m for m in names)
    is_vector |= name == "b" and bool(modules) and not adapter
    is_vector |= bool(re.fullmatch(r"b_?[qkvo]", name)) and not adapter
    return ndim >= 2 and not is_vector and not any(map(_TABLES.search, names))


def is_embedding(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a component of a path contains `embed`, is `wte` or `wpe`, or has the word `emb`."""
    del leaf
    return any(re.search(_EMBEDDINGS, name) for name in component_names(path))


def hidden_matrix_of(dimension_numbers: DimensionOption) -> Rule:
    """`is_hidden_matrix` of one slice where a rule names batch axes: a stack of vectors is none."""
    numbers = resolve_dimension_numbers(dimension_numbers)

    def rule(path: tuple[Any, ...], leaf: Any) -> bool:
        named = numbers(path, leaf)
        if named is not None and named.batch:
            sizes = [d for axis, d in enumerate(np.shape(leaf)) if axis not in named.batch]
            leaf = jax.ShapeDtypeStruct(sizes, leaf.dtype)
        return is_hidden_matrix(path, leaf)

    return rule


def labels_by(rule: Rule) -> Callable[[Any], Any]:
    """`"matrices"` or `"others"` for every parameter, the labels that `optax.partition` wants.

    They follow from paths and shapes, so they are made once for each tree. A complex parameter
    raises ValueError.
    """

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        check_real(path, leaf)
        return "matrices" if rule(as_written(path), leaf) else "others"

    @functools.lru_cache(maxsize=16)
    def labels_of(structure: Any, *leaves: tuple[tuple[int, ...], Any]) -> Any:
        tree = structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
        check_named(tree)
        return jax.tree_util.tree_map_with_path(label, tree)

    def labels(params: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        return labels_of(structure, *map(described, leaves))

    return labels
