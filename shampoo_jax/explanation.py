"""What an optimizer will do with a set of parameters, before any training."""

import collections
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from shampoo_jax.aliases import shampoo
from shampoo_jax.bases import Basis, CarriedBasis, EighBasis, make_basis
from shampoo_jax.exponents import uncut_exponents
from shampoo_jax.options import is_off
from shampoo_jax.paths import name_of
from shampoo_jax.plan import Cell, LeafPlan, make_plan
from shampoo_jax.registry import make_solver
from shampoo_jax.report import Report, Row
from shampoo_jax.routing import is_hidden_matrix
from shampoo_jax.solvers import (
    CoupledNewton,
    HigherOrderNewton,
    ShiftedEigh,
    TruncatedEigh,
)

# Multiples of d^3 for a d x d matrix. A product, such as Q diag(w^-e) Q^T.
PRODUCT = 2.0
# Golub and Van Loan, Matrix Computations, 4th edition, algorithm 8.3.3: eigenvalues and
# eigenvectors of a symmetric matrix by tridiagonal QR, 4/3 of which is the reduction.
EIGH = 9.0
# Algorithm 5.2.1, Householder QR, and as much again to form Q.
QR = 8 / 3

# Kinds of state by the field that holds it, inside the parts of this package.
KINDS = {
    "mu": "first moment",
    "factors": "factors",
    "roots": "roots",
    "solver": "roots",
    "bases": "roots",
    "eigenvalues": "roots",
    "nu": "second moment",
}
ADAM, OTHER = "adam", "other"

# For every stack, which dimensions of its blocks have a factor.
Factored = dict[str, tuple[bool, ...]]


def explain(params: Any, optimizer: Callable[..., Any] = shampoo, /, **options: Any) -> Report:
    """Tells how parameters are routed, read, cut and paid for, without computing anything.

    Args:
      params: Parameters, or their shapes from `jax.eval_shape`.
      optimizer: `shampoo`, `scale_by_shampoo` or another function of this package that takes
        `block_size`. One without an option `preconditioned` preconditions every parameter.
      **options: What the optimizer will be called with; the learning rate may be left out.

    Returns:
      The report.

    Raises:
      TypeError: An option that the optimizer does not have, an optimizer without blocks or one
        that is built already.
      ValueError: Options that the optimizer refuses, complex parameters.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> params = {"layer0": {"w": jnp.ones((8, 4))}, "layer1": {"w": jnp.ones((8, 4))}}
      >>> report = explain(params | {"bias": jnp.ones(4)}, block_size=4)
      >>> report.root_batches, report.largest_factor, report.adamw_bytes
      (2, 4, 548)
      >>> print(str(report).splitlines()[1])
      bias       1      4      adamw           -        -         -
    """
    if not callable(optimizer):
        raise TypeError(
            "explain takes the function that makes the optimizer, and its options: "
            "explain(params, shampoo, block_size=64)."
        )
    signature = inspect.signature(optimizer)
    if "learning_rate" in signature.parameters:
        options = {"learning_rate": 1.0} | options
    tx = optimizer(**options)
    bound = signature.bind(**options)
    bound.apply_defaults()
    chosen = bound.arguments
    if "block_size" not in chosen:
        raise TypeError(
            f"{getattr(optimizer, '__name__', optimizer)} has no option block_size, so explain "
            "cannot tell its blocks: give it shampoo, scale_by_soap or another function that has."
        )
    rule = chosen.get("preconditioned", lambda path, leaf: True) or is_hidden_matrix
    state = jax.eval_shape(tx.init, params)
    factored = _factored(state)
    ours = jax.tree_util.tree_map_with_path(lambda p, x: x if rule(p, x) else None, params)
    others = jax.tree_util.tree_map_with_path(lambda p, x: None if rule(p, x) else x, params)
    plan = _plan_of(ours, chosen, factored)
    rows = _rows(params, ours, plan, factored)
    # A d x d matrix per factor times the block, or the block times itself.
    product = sum(
        2 * leaf.batch * math.prod(cell.size) * sum(_edges(cell, factored))
        for leaf in plan
        for cell in leaf.cells
    )
    edges = [(d, n) for row in rows for d, n in row.factors.items()]
    cost, method = _refresh_cost(chosen)
    return Report(
        rows=rows,
        state_bytes=_bytes_by_kind(state),
        adamw_bytes=state_bytes(optax.scale_by_adam(), params),
        muon_bytes=state_bytes(optax.trace(0.9), ours)
        + (state_bytes(optax.scale_by_adam(), others) if jax.tree.leaves(others) else 0),
        refresh_flops=cost * sum(n * d**3 for d, n in edges),
        refresh_method=method,
        statistics_flops=product,
        apply_flops=product * (3 if _nodes_with("bases", state) else 1),
        root_batches=sum(map(sum, factored.values())),
        largest_factor=max((d for d, _ in edges), default=0),
    )


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Bytes of the state of any Optax transformation, without computing or allocating it.

    Args:
      tx: The transformation.
      params: Parameters, or their shapes from `jax.eval_shape`.

    Returns:
      The sum over all arrays of the state, on all devices together.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> state_bytes(optax.adamw(1e-3), {"w": jnp.ones((10, 10))})  # two moments and a count
      804
    """
    return sum(map(_size, jax.tree.leaves(jax.eval_shape(tx.init, params))))


def _bytes_by_kind(state: Any) -> dict[str, int]:
    sizes = dict.fromkeys([*KINDS.values(), ADAM, OTHER], 0)
    nodes = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    for path, node in nodes:
        fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        kind = KINDS.get(fields[-1], OTHER) if fields else OTHER
        kind = ADAM if isinstance(node, optax.ScaleByAdamState) else kind
        sizes[kind] += sum(map(_size, jax.tree.leaves(node)))
    return sizes


def _factored(state: Any) -> Factored:
    """Read from the state that was built, whatever options decided it."""
    stacks = [node.factors for node in _nodes_with("factors", state)]
    return {k: tuple(f is not None for f in v) for s in stacks for k, v in s.items()}


def _nodes_with(field: str, state: Any) -> list[Any]:
    """States of the parts that keep a field of this name."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, field))
    return [node for node in nodes if hasattr(node, field)]


def _refresh_cost(chosen: Mapping[str, Any]) -> tuple[float, str]:
    """Multiple of d^3 for the refresh of one factor, and its method in words."""
    if "basis" in chosen:
        sorts = "reorder" in chosen  # SOAP; the KL directions do not
        cost, name = _basis_cost(make_basis(chosen["basis"], keep_order=not sorts))
        return cost, f"{name}, {cost:.3g} d^3 per factor"
    solver = make_solver(chosen["solver"]) if "solver" in chosen else None
    match solver:
        case CoupledNewton() | HigherOrderNewton():
            # For a 4th root: one product with X, two for a 4th power, one with M; then the series.
            cost = PRODUCT * (4 + getattr(solver, "order", 2) - 2)
            return cost, f"Newton iterations, {cost:.3g} d^3 per factor and iteration"
        case TruncatedEigh() | ShiftedEigh():
            cost, name = EIGH, "eigh"
        case CarriedBasis():
            cost, name = _basis_cost(solver.basis)
        case _:
            cost, name = EIGH, "a method of its own, counted as eigh"
    cost += PRODUCT
    return cost, f"{name}, {cost:.3g} d^3 per factor"


def _basis_cost(basis: Basis) -> tuple[float, str]:
    """Likewise without a root: eigenvectors and eigenvalues alone."""
    if isinstance(basis, EighBasis):
        return EIGH, "eigh" if is_off(basis.tolerance) else "eigh at most"
    n = basis.iterations
    # Eigenvalues cost one product; rotating the factor first, and basis and factor in each step,
    # or one more estimate to sort by.
    products = {"after": 2 + 2 * n, "before": 2 + n, None: 1 + n}[basis.sort]
    return PRODUCT * products + QR * n, f"{n} QR step{'s' if n > 1 else ''}"


def _plan_of(params: Any, chosen: Mapping[str, Any], factored: Factored) -> list[LeafPlan]:
    """The plan whose stacks are those of the state; it tells how blocks were cut and turned."""
    options = {name: chosen[name] for name in ("block_size", "merge", "dimension_numbers")}
    options["exponents"] = uncut_exponents(chosen.get("side", chosen.get("exponents")))
    plan = make_plan(params, canonical=True, **options)
    if {cell.key for leaf in plan for cell in leaf.cells} == factored.keys():
        return plan
    return make_plan(params, canonical=False, **options)


def _size(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _edges(cell: Cell, factored: Factored) -> list[int]:
    """Edge lengths of the factors of one block."""
    return [d for d, has in zip(_stored(cell), factored[cell.key], strict=True) if has]


def _stored(cell: Cell) -> tuple[int, ...]:
    return cell.size[::-1] if cell.transposed else cell.size


def _rows(params: Any, ours: Any, plan: list[LeafPlan], factored: Factored) -> tuple[Row, ...]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(ours)]
    layouts = dict(zip(paths, plan, strict=True))
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, shape, layout = name_of(path) or "params", np.shape(leaf), layouts.get(path)
        if layout is None:
            rows.append(Row(name, shape, preconditioned=False))
            continue
        blocks: collections.Counter[tuple[int, ...]] = collections.Counter()
        factors: collections.Counter[int] = collections.Counter()
        for cell in layout.cells:
            blocks[_stored(cell)] += layout.batch
            for d in _edges(cell, factored):
                factors[d] += layout.batch
        rows.append(Row(name, shape, True, layout.batch, layout.merged, blocks, factors))
    return tuple(rows)
