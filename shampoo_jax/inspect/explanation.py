"""What an optimizer will do with a set of parameters, before any training."""

import collections
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from shampoo_jax.base.paths import name_of
from shampoo_jax.blocks.exponents import (
    Exponents,
    default_exponents,
    resolve_exponents,
    uncut_exponents,
)
from shampoo_jax.blocks.plan import Cell, LeafPlan, make_plan
from shampoo_jax.inspect.report import Report, Row
from shampoo_jax.optimizers.aliases import shampoo
from shampoo_jax.optimizers.routing import is_hidden_matrix
from shampoo_jax.solvers.bases import make_basis
from shampoo_jax.solvers.costs import Cost, basis_cost, root_cost
from shampoo_jax.solvers.registry import make_solver
from shampoo_jax.stacks.exchanges import OnMesh, abstract, elementwise_moves, on_mesh
from shampoo_jax.stacks.placement import Placement, replicated

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


class Side(NamedTuple):
    """One root computation: a dimension of a stack, its size, and the root's exponent."""

    key: str
    dimension: int
    size: int
    exponent: float


def explain(
    params: Any,
    optimizer: Callable[..., Any] = shampoo,
    /,
    *,
    mesh: Mapping[str, int] | None = None,
    owners: str | tuple[str, ...] | None = None,
    parameter_spec: Callable[..., Any] = replicated,
    **options: Any,
) -> Report:
    """Tells how parameters are routed, read, cut and paid for, without computing anything.

    Args:
      params: Parameters, or their shapes from `jax.eval_shape`.
      optimizer: `shampoo`, `scale_by_shampoo` or another function of this package that takes
        `block_size`. One without an option `preconditioned` preconditions every parameter.
      mesh: Sizes by axis of a mesh to plan for, `{"data": 64, "fsdp": 4}`: no such devices have to
        be there. An option `placement` is reported on likewise.
      owners: Mesh axes over which blocks are split, see `Placement`; None means all.
      parameter_spec: Layout of the parameters on it, see `Placement`.
      **options: What the optimizer will be called with; the learning rate may be left out.

    Returns:
      The report.

    Raises:
      TypeError: An option that the optimizer does not have, an optimizer without blocks or one
        that is built already.
      ValueError: Options that the optimizer refuses, complex parameters, a mesh whose sizes are
        not whole numbers of at least 1, `mesh` and `placement` together, `owners` or
        `parameter_spec` without `mesh`.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> params = {"layer0": {"w": jnp.ones((8, 4))}, "layer1": {"w": jnp.ones((8, 4))}}
      >>> report = explain(params | {"bias": jnp.ones(4)}, block_size=4)
      >>> report.root_batches, report.largest_factor, report.adamw_bytes
      (2, 4, 548)
      >>> explain(params, block_size=4, mesh={"data": 64, "fsdp": 4}).on_mesh.blocks
      {'4x4': 1}
      >>> print(str(report).splitlines()[1])
      bias       1      4      adamw           -        -         -
    """
    if not callable(optimizer):
        raise TypeError(
            "explain takes the function that makes the optimizer, and its options: "
            "explain(params, shampoo, block_size=64)."
        )
    signature = inspect.signature(optimizer)
    if mesh is not None:
        options["placement"] = _planned(mesh, owners, parameter_spec, options.get("placement"))
    elif owners is not None or parameter_spec is not replicated:
        raise ValueError("owners and parameter_spec say nothing without mesh: give mesh={axis: n}.")
    if options.get("placement") is not None:
        options["placement"] = abstract(options["placement"])
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
    # A d x d matrix per factor times the block, or the block times itself.
    products = [
        (2 * leaf.batch * math.prod(cell.size) * sum(edges), len(edges))
        for leaf in plan
        for cell in leaf.cells
        for edges in [_edges(cell, factored)]
    ]
    product = sum(flops for flops, _ in products)
    # For each side the block is multiplied by the roots of all other ones first.
    whitened = chosen.get("statistics") == "kl" or _nodes_with("eigenvalues", state)
    return Report(
        rows=_rows(params, ours, plan, factored),
        state_bytes=_bytes_by_kind(state),
        dtypes=_dtypes_by_kind(state),
        adamw_bytes=state_bytes(optax.scale_by_adam(), params),
        muon_bytes=state_bytes(optax.trace(0.9), ours)
        + (state_bytes(optax.scale_by_adam(), others) if jax.tree.leaves(others) else 0),
        statistics_flops=sum(f * n for f, n in products) if whitened else product,
        apply_flops=product * (3 if _nodes_with("bases", state) else 1),
        on_mesh=_on_mesh(chosen, plan, factored, state, ours, others),
        **_refresh(chosen, _sides(plan, chosen, factored), _factor_dtype(state)),
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
    return {kind: sum(map(_size, leaves)) for kind, leaves in _by_kind(state).items()}


def _dtypes_by_kind(state: Any) -> dict[str, str]:
    dtypes = {
        k: [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        for k, leaves in _by_kind(state).items()
    }
    return {kind: ", ".join(sorted({x.name for x in each})) for kind, each in dtypes.items()}


def _by_kind(state: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {kind: [] for kind in [*KINDS.values(), ADAM, OTHER]}
    nodes = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
    )
    for path, node in nodes:
        fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        kind = KINDS.get(fields[-1], OTHER) if fields else OTHER
        kind = ADAM if isinstance(node, optax.ScaleByAdamState) else kind
        found[kind] += jax.tree.leaves(node)
    return found


def _factored(state: Any) -> Factored:
    """Read from the state that was built, whatever options decided it."""
    stacks = [node.factors for node in _nodes_with("factors", state)]
    return {k: tuple(f is not None for f in v) for s in stacks for k, v in s.items()}


def _factor_dtype(state: Any) -> Any:
    factors = [node.factors for node in _nodes_with("factors", state)]
    return jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(factors)))


def _nodes_with(field: str, state: Any) -> list[Any]:
    """States of the parts that keep a field of this name."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, field))
    return [node for node in nodes if hasattr(node, field)]


def _sides(
    plan: list[LeafPlan], chosen: Mapping[str, Any], factored: Factored
) -> collections.Counter[Side]:
    """Number of factors of each root computation."""
    exponents = resolve_exponents(chosen.get("side", chosen.get("exponents")))
    sides: collections.Counter[Side] = collections.Counter()
    for leaf in plan:
        for cell in leaf.cells:
            sizes = cell.stored
            each = zip(sizes, exponents(sizes), factored[cell.key], strict=True)
            for k, (d, exponent, has) in enumerate(each):
                if has:
                    sides[Side(cell.key, k, d, exponent)] += leaf.batch
    return sides


def _refresh(chosen: Mapping[str, Any], sides: Mapping[Side, int], dtype: Any) -> dict[str, Any]:
    """The fields of the report about refreshes."""
    costs = {side: _cost(chosen, side, dtype) for side in sides}
    every, chunk = int(chosen.get("every", 1)), chosen.get("chunk")
    turns = every if chosen.get("stagger") else 1
    # Stacks with fewer blocks than turns are left alone in some.
    share = {side: math.ceil(n / turns) if n >= turns else n / turns for side, n in sides.items()}

    def flops(numbers: Mapping[Side, float]) -> float:
        return sum(n * costs[side].flops * side.size**3 for side, n in numbers.items())

    def working(side: Side) -> int:
        at_once = min(math.ceil(share[side]), chunk or sides[side])
        return at_once * costs[side].matrices * side.size**2 * dtype.itemsize

    return {
        "refresh_flops": flops(sides),
        "refresh_method": _method(costs),
        "every": every,
        "staggered_flops": flops(share),
        "working_bytes": max(map(working, sides), default=0),
        "root_batches": len(sides),
        "fallback_batches": sum(cost.fallback for cost in costs.values()),
        "largest_factor": max((side.size for side in sides), default=0),
    }


def _planned(
    mesh: Any, owners: Any, parameter_spec: Callable[..., Any], other: Placement | None
) -> Placement:
    """A placement on a mesh of sizes alone, where no other one is given."""
    if other is not None:
        raise ValueError("mesh and placement both name a mesh to plan for: drop one of them.")
    sizes = tuple(mesh.values()) if isinstance(mesh, Mapping) else ()
    if not sizes or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sizes):
        raise ValueError(
            f"mesh={mesh!r} must give the size of each axis, at least 1: {{'data': 64, 'fsdp': 4}}."
        )
    abstract_mesh = AbstractMesh(sizes, tuple(mesh))
    return Placement(abstract_mesh, tuple(mesh) if owners is None else owners, parameter_spec)


def _on_mesh(
    chosen: Mapping[str, Any], plan: list[LeafPlan], factored: Factored, state: Any, *trees: Any
) -> OnMesh | None:
    """The part of the report about a mesh, if there is one."""
    placement = chosen.get("placement")
    if placement is None:
        return None
    block_flops = dict.fromkeys(factored, 0.0)
    for side in _sides(plan, chosen, factored):
        block_flops[side.key] += _cost(chosen, side, _factor_dtype(state)).flops * side.size**3
    matrices, others = trees
    moves = elementwise_moves(placement, others) if "adamw_b1" in chosen else []
    if chosen.get("momentum") is not None:
        moves += elementwise_moves(placement, matrices)
        placement = placement.split_out
    exponents = _uncut(chosen) or default_exponents
    return on_mesh(placement, plan, state, matrices, moves, block_flops, exponents)


def _cost(chosen: Mapping[str, Any], side: Side, dtype: Any) -> Cost:
    if "basis" in chosen:
        sorts = "reorder" in chosen  # SOAP; the KL directions do not
        return basis_cost(make_basis(chosen["basis"], keep_order=not sorts))
    options = {n: chosen[n] for n in ("cutoff", "rtol", "atol", "eps") if n in chosen}
    solver = make_solver(chosen["solver"], **options) if "solver" in chosen else None
    return root_cost(solver, side.size, dtype, side.exponent)


def _method(costs: Mapping[Side, Cost]) -> str:
    """The methods in words, each with its multiple of d^3 and, of several, with the sizes."""
    sizes: dict[str, set[int]] = {}
    for side, cost in costs.items():
        unit = "factor and iteration" if "iterations" in cost.method else "factor"
        sizes.setdefault(f"{cost.method}, {cost.flops:.3g} d^3 per {unit}", set()).add(side.size)
    if len(sizes) < 2:
        return next(iter(sizes), "nothing")
    return "; ".join(f"{text} of {', '.join(map(str, sorted(d)))}" for text, d in sizes.items())


def _plan_of(params: Any, chosen: Mapping[str, Any], factored: Factored) -> list[LeafPlan]:
    """The plan whose stacks are those of the state; it tells how blocks were cut and turned."""
    options = {name: chosen[name] for name in ("block_size", "merge", "dimension_numbers")}
    options["exponents"] = _uncut(chosen)
    plan = make_plan(params, canonical=True, **options)
    if {cell.key for leaf in plan for cell in leaf.cells} == factored.keys():
        return plan
    return make_plan(params, canonical=False, **options)


def _size(x: Any) -> int:
    return x.size * x.dtype.itemsize


def _uncut(chosen: Mapping[str, Any]) -> Exponents | None:
    return uncut_exponents(chosen.get("side", chosen.get("exponents")))


def _edges(cell: Cell, factored: Factored) -> list[int]:
    """Edge lengths of the factors of one block."""
    return [d for d, has in zip(cell.stored, factored[cell.key], strict=True) if has]


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
            blocks[cell.stored] += layout.batch
            for d in _edges(cell, factored):
                factors[d] += layout.batch
        rows.append(Row(name, shape, True, layout.batch, layout.merged, blocks, factors))
    return tuple(rows)
