"""Factors of the gradient whitened by the roots of its other dimensions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_jax.base.options import check_options
from shampoo_jax.blocks.blocks import Matrices, Part, Stacks, each, make_part, where_block
from shampoo_jax.matrix.products import apply_matrices, contract
from shampoo_jax.parts.factors import averaged, zero_factors
from shampoo_jax.parts.filtering import Average
from shampoo_jax.parts.roots import decoded
from shampoo_jax.solvers.solver import identities

Array = jax.Array


class AccumulateKLFactorsState(NamedTuple):
    """State of `accumulate_kl_factors`."""

    count: Array  # int32[], steps taken
    factors: Any  # per stack a tuple over dimensions of float32 [N, d, d] or None
    inner: Any  # state of the part that turns factors into roots


Step = tuple[Stacks, AccumulateKLFactorsState]


def accumulate_kl_factors(
    inner_roots: optax.GradientTransformation,
    b2: float | Array = 0.9,
    *,
    bias_correction: bool = True,
    weighted: bool = True,
    normalize: bool = False,
) -> Part:
    """Factors of the gradient preconditioned by the previous roots of all other dimensions.

    `S_k = b2 * S_k + w * H_(k) H_(k)^T` with `H = G x_{j != k} P_j`, `P_j` the roots before this
    step. With exponents 1/2 this is KL-Shampoo's fixed-point iteration (Lin et al. 2025,
    arXiv:2509.03378, eq. for S_a and S_b); with a single dimension it is plain Shampoo. A root that
    is zero, that of a factor which is zero, counts as the identity, as before the first refresh.

    A truncated root maps to 0 what its factor has not seen, so the part of a gradient that is new
    to the roots of *both* sides of a matrix never enters the factors. Where supports may change, as
    with rows that are not used at first, take `ShiftedEigh`, or
    `scale_by_kl_shampoo(rtol=None)`, which truncates updates, not statistics.

    Unlike Shampoo's, directions depend on the scale of the gradients: the identities that whiten
    the first ones do not scale with them.

    Args:
      inner_roots: Part that turns factors into roots, `invert_roots` alone or in a chain: one state
        in it keeps them in a field `roots`.
      b2: Decay in [0, 1].
      bias_correction: Whether factors are reported divided by `1 - b2^t`.
      weighted: Whether `w = 1 - b2`; False adds with weight 1, uncorrected.
      normalize: Whether `H_(k) H_(k)^T` is divided by its number of columns, as in the paper.

    Returns:
      A part that stands for statistics and roots together.

    Raises:
      ValueError: `b2` outside [0, 1]; at init, a part that keeps no roots.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> roots = shampoo_jax.invert_roots(shampoo_jax.ShiftedEigh(1e-4))
      >>> kl = shampoo_jax.accumulate_kl_factors(roots, 0.95)
      >>> tx = shampoo_jax.blocked(optax.chain(kl, shampoo_jax.precondition()))
      >>> updates, state = tx.update({"w": jnp.eye(2)}, tx.init({"w": jnp.eye(2)}))
      >>> updates["w"].round(2).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    check_options(locals())
    tx = optax.with_extra_args_support(inner_roots)
    average = Average(b2, bias_correction, weighted)

    def init(params: Stacks) -> AccumulateKLFactorsState:
        inner = tx.init(params)
        _roots_in(inner)
        return AccumulateKLFactorsState(jnp.zeros([], jnp.int32), each(zero_factors, params), inner)

    def update(stacks: Stacks, state: AccumulateKLFactorsState, params: Any, **extra: Any) -> Step:
        count, roots = optax.safe_increment(state.count), _roots_in(state.inner)
        given, factors = {}, {}
        for key, b in stacks.items():
            old, stored = state.factors[key], decoded(roots[key], b.gradient.dtype)
            whitening = jax.tree.map(_identity_for_zero, stored)
            squares = whitened_squares(b.gradient, old, whitening, normalize)
            own, factors[key] = averaged(average, count, b, old, squares)
            # Of whitened gradients, which no solver knows.
            given[key] = dataclasses.replace(own, weight=None)
        new, inner = tx.update(given, state.inner, params, **extra)
        return new, AccumulateKLFactorsState(count, factors, inner)

    return make_part(init, update)


def _identity_for_zero(root: Array) -> Array:
    """A root of nothing, of gradients that were zero so far, would keep them zero for ever."""
    n, d, _ = root.shape
    return where_block(jnp.any(root != 0, (1, 2)), root, identities(n, d, root.dtype))


def _roots_in(state: Any) -> Any:
    """The roots in the state of a part, or of a chain of parts."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "roots"))
    found = [node.roots for node in nodes if hasattr(node, "roots")]
    if len(found) != 1:
        raise ValueError(
            f"inner_roots keeps {len(found)} sets of roots, one is needed: give invert_roots(...), "
            "alone or in optax.chain with parts that change factors."
        )
    return found[0]


def whitened_squares(g: Array, factors: Matrices, roots: Matrices, normalize: bool) -> Matrices:
    """`H_(k) H_(k)^T` for every dimension that has a factor."""

    def one(k: int) -> Array:
        others = tuple(None if j == k else p for j, p in enumerate(roots))
        h = contract(apply_matrices(g, others), k)
        return h / (g[0].size // g.shape[k + 1]) if normalize else h

    return tuple(None if s is None else one(k) for k, s in enumerate(factors))
