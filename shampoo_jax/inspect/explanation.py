"""What an optimizer will do with a set of parameters, before any training."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from shampoo_jax.base.paths import as_written, name_of
from shampoo_jax.blocks.plan import Plan, make_plan
from shampoo_jax.directions.walk import Work
from shampoo_jax.inspect.memory import temporary_bytes
from shampoo_jax.inspect.report import Report, Row
from shampoo_jax.optimizers.aliases import shampoo
from shampoo_jax.optimizers.optimizer import Routed
from shampoo_jax.parts.refresh import Refresh
from shampoo_jax.solvers.bases import Basis
from shampoo_jax.solvers.solver import Cost
from shampoo_jax.stacks.blocked import Design
from shampoo_jax.stacks.chunks import chunk_of
from shampoo_jax.stacks.exchanges import OnMesh, abstract, elementwise_moves, on_mesh
from shampoo_jax.stacks.guard import Guarded
from shampoo_jax.stacks.layout import Layout
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


class _Unknown:
    """Stands for what parts that were chained by hand do at a refresh."""

    def cost(self, *root: Any) -> Cost:
        return Cost(0.0, "parts of one's own", matrices=0)


class Side(NamedTuple):
    """One root computation: a dimension of a stack, its size, and the root's exponent."""

    key: str
    dimension: int
    size: int
    exponent: float


def explain(
    params: Any,
    optimizer: optax.GradientTransformation | None = None,
    /,
    *,
    mesh: Mapping[str, int] | None = None,
    owners: str | tuple[str, ...] | None = None,
    parameter_spec: Callable[..., Any] = replicated,
) -> Report:
    """Tells how parameters are routed, read, cut and paid for, without computing anything.

    Args:
      params: Parameters, or their shapes from `jax.eval_shape`.
      optimizer: What `shampoo`, `scale_by_soap`, `as_optimizer`, `blocked` or another function of
        this package made; None means `shampoo(1.0)`. A direction without routing takes every
        parameter.
      mesh: Sizes by axis of a mesh to plan for, `{"data": 64, "fsdp": 4}`: no such devices have to
        be there. A placement that the optimizer has is reported on likewise.
      owners: Mesh axes over which blocks are split, see `Placement`; None means all.
      parameter_spec: Layout of the parameters on it, see `Placement`.

    Returns:
      The report.

    Raises:
      TypeError: A transformation that was not made by this package, or is wrapped in another.
      ValueError: Complex parameters, a mesh whose sizes are not whole numbers of at least 1, `mesh`
        for an optimizer that has a placement, `owners` or `parameter_spec` without `mesh`.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> params = {"layer0": {"w": jnp.ones((8, 4))}, "layer1": {"w": jnp.ones((8, 4))}}
      >>> tx = shampoo_jax.shampoo(0.1, blocking=shampoo_jax.Blocking(size=4))
      >>> report = explain(params | {"bias": jnp.ones(4)}, tx)
      >>> report.root_batches, report.largest_factor, report.adamw_bytes
      (2, 4, 548)
      >>> explain(params, tx, mesh={"data": 64, "fsdp": 4}).on_mesh.blocks
      {'4x4': 1}
      >>> print(str(report).splitlines()[1])
      bias       1      4      nadamw, rate x4  -        -         -
    """
    optimizer = shampoo(1.0) if optimizer is None else optimizer
    design, routed, work = _designs(optimizer)
    placement = routed.placement if routed else design.placement
    if mesh is not None:
        placement = _planned(mesh, owners, parameter_spec, placement)
    elif owners is not None or parameter_spec is not replicated:
        raise ValueError("owners and parameter_spec say nothing without mesh: give mesh={axis: n}.")
    if placement is not None:
        placement = abstract(placement)
        optimizer = (routed or design).rebuild(placement)
    state = jax.eval_shape(optimizer.init, params)
    ours, others = _routes(params, routed)
    plan = make_plan(ours, design.blocking, design.exponents)
    sides = _sides(plan, state)
    statistics, application = _products(plan, sides, work, state)
    kinds, chunks = _by_kind(state), _chunks(design, plan, placement)
    return Report(
        rows=_rows(params, ours, plan, sides),
        others=_others(routed),
        state_bytes={kind: _bytes(leaves) for kind, leaves in kinds.items()},
        dtypes={kind: _dtypes(leaves) for kind, leaves in kinds.items()},
        adamw_bytes=state_bytes(optax.scale_by_adam(), params),
        muon_bytes=state_bytes(optax.trace(0.9), ours)
        + (state_bytes(optax.scale_by_adam(), others) if jax.tree.leaves(others) else 0),
        statistics_flops=statistics,
        apply_flops=application,
        temporary_bytes=_temporary(plan, chunks, state),
        on_mesh=_on_mesh(placement, work, routed, plan, sides, state, ours, others),
        **_refresh(work, sides, state, chunks),
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
    return _bytes(jax.tree.leaves(jax.eval_shape(tx.init, params)))


def _bytes(leaves: list[Any]) -> int:
    return sum(x.size * x.dtype.itemsize for x in leaves)


def _designs(optimizer: Any) -> tuple[Design, Routed | None, Work]:
    """What an optimizer and its direction were built from, and what refreshes cost."""
    design = optimizer.design if isinstance(optimizer, Guarded) else None
    routed = design if isinstance(design, Routed) else None
    design = routed.direction if routed else design
    if not isinstance(design, Design):
        raise TypeError(
            f"explain cannot tell the blocks of a {type(optimizer).__name__}: give it what "
            "shampoo(...), scale_by_soap(...), blocked(...) or as_optimizer of one of these "
            "returned, before it is wrapped in anything."
        )
    unknown: Any = _Unknown()
    return design, routed, design.work or Work(unknown, 1, Refresh())


def _routes(params: Any, routed: Routed | None) -> tuple[Any, Any]:
    """Parameters that the direction takes, and the others."""
    rule = routed.rule if routed else lambda path, leaf: True

    def those(taken: bool) -> Any:
        keep = lambda path, x: x if rule(as_written(path), x) == taken else None  # noqa: E731
        return jax.tree_util.tree_map_with_path(keep, params)

    return those(True), those(False)


def _others(routed: Routed | None) -> str:
    """What trains the other parameters, as the report calls it."""
    if routed is None or routed.others_rate is None:
        return "others"
    rate = float(routed.others_rate)
    return "nadamw" if rate == 1.0 else f"nadamw, rate x{rate:.3g}"


def _by_kind(state: Any) -> dict[str, list[Any]]:
    """Leaves of a state by kind, in the order of the report."""
    found: dict[str, list[Any]] = {kind: [] for kind in [*KINDS.values(), ADAM, OTHER]}
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_adam):
        fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
        kind = ADAM if is_adam(node) else KINDS.get("".join(fields[-1:]), OTHER)
        found[kind] += jax.tree.leaves(node)
    return found


def _dtypes(leaves: list[Any]) -> str:
    return ", ".join(sorted({x.dtype.name for x in leaves if jnp.issubdtype(x.dtype, np.floating)}))


def _sides(plan: Plan, state: Any) -> collections.Counter[Side]:
    """Number of factors of each root computation, none where the walk accumulates none."""
    sides: collections.Counter[Side] = collections.Counter()
    kept = any(_nodes_with(field, state) for field in ("factors", "roots"))
    for key, shape in plan.shapes.items() if kept else ():
        for k, (d, exponent) in enumerate(zip(shape, plan.exponents(shape), strict=True)):
            if exponent:
                sides[Side(key, k, d, exponent)] += plan.counts[key]
    return sides


def _nodes_with(field: str, state: Any) -> list[Any]:
    """States of the parts that keep a field of this name."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, field))
    return [node for node in nodes if hasattr(node, field)]


def _products(plan: Plan, sides: Mapping[Side, int], work: Work, state: Any) -> tuple[int, int]:
    """FLOPs of statistics and of application in one step: products of blocks with d x d each."""
    numbers = collections.Counter(side.key for side in sides)
    flops = {
        side: 2 * n * side.size * math.prod(plan.shapes[side.key]) for side, n in sides.items()
    }
    product = sum(flops.values())
    # For each side the block is multiplied by the roots of all other ones first.
    statistics = sum(f * numbers[s.key] for s, f in flops.items()) if work.whitened else product
    return statistics, product * (3 if _nodes_with("bases", state) else 1)


def _chunks(design: Design, plan: Plan, placement: Placement | None) -> dict[str, tuple[int, int]]:
    """By stack its blocks on one device, and how many of them are computed at a time."""
    chunks, owners = {}, placement.count if placement else 1
    for key, shape in plan.shapes.items():
        n = math.ceil(plan.counts[key] / owners)
        chunks[key] = n, chunk_of(design.chunk, n, shape, plan.powers[key])
    return chunks


def _temporary(plan: Plan, chunks: Mapping[str, tuple[int, int]], state: Any) -> int:
    """Temporary memory of a step on one device."""
    kind = "bases" if _nodes_with("bases", state) else "roots"
    if _nodes_with("eigenvalues", state):
        kind = "kl" if _nodes_with("nu", state) else "kl_scaled"
    return temporary_bytes(plan, chunks, kind, bool(_nodes_with("magnitude", state)))


def _refresh(
    work: Work, sides: Mapping[Side, int], state: Any, chunks: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of the report about refreshes."""
    factors = [node.factors for node in _nodes_with("factors", state)]
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(factors)))
    costs = {side: _cost(work, side, dtype) for side in sides}
    turns = int(work.every) if work.refresh.stagger else 1
    # Stacks with fewer blocks than turns are left alone in some.
    share = {side: math.ceil(n / turns) if n >= turns else n / turns for side, n in sides.items()}

    def flops(numbers: Mapping[Side, float]) -> float:
        return sum(n * costs[side].flops * side.size**3 for side, n in numbers.items())

    def working(side: Side) -> int:
        at_once = min(
            math.ceil(share[side]), work.refresh.chunk or sides[side], chunks[side.key][1]
        )
        return at_once * costs[side].matrices * side.size**2 * dtype.itemsize

    return {
        "refresh_flops": flops(sides),
        "refresh_method": _method(costs),
        "every": int(work.every),
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
        raise ValueError(
            "mesh plans for a mesh, and the optimizer has a placement on one: drop one of them."
        )
    sizes = tuple(mesh.values()) if isinstance(mesh, Mapping) else ()
    if not sizes or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sizes):
        raise ValueError(
            f"mesh={mesh!r} must give the size of each axis, at least 1: {{'data': 64, 'fsdp': 4}}."
        )
    abstract_mesh = AbstractMesh(sizes, tuple(mesh))
    return Placement(abstract_mesh, tuple(mesh) if owners is None else owners, parameter_spec)


def _on_mesh(
    placement: Placement | None,
    work: Work,
    routed: Routed | None,
    plan: Plan,
    sides: Mapping[Side, int],
    state: Any,
    matrices: Any,
    others: Any,
) -> OnMesh | None:
    """The part of the report about a mesh, None without one."""
    if placement is None:
        return None
    block_flops = dict.fromkeys(plan.shapes, 0.0)
    for side in sides:
        block_flops[side.key] += _cost(work, side, jnp.float32).flops * side.size**3
    moves = elementwise_moves(placement, others) if routed else []
    if routed and routed.momentum:
        moves += elementwise_moves(placement, matrices)
        placement = placement.split_out
    layout = Layout(placement, matrices, plan)
    return on_mesh(layout, state, matrices, moves, block_flops)


def _cost(work: Work, side: Side, dtype: Any) -> Cost:
    if isinstance(work.method, Basis):
        return work.method.cost()
    return work.method.cost(side.size, dtype, side.exponent)


def _method(costs: Mapping[Side, Cost]) -> str:
    """The methods in words, each with its multiple of d^3 and, of several, with the sizes."""
    sizes: dict[str, set[int]] = {}
    for side, cost in costs.items():
        unit = "factor and iteration" if "iterations" in cost.method else "factor"
        sizes.setdefault(f"{cost.method}, {cost.flops:.3g} d^3 per {unit}", set()).add(side.size)
    if len(sizes) < 2:
        return next(iter(sizes), "nothing")
    return "; ".join(f"{text} of {', '.join(map(str, sorted(d)))}" for text, d in sizes.items())


def _rows(params: Any, ours: Any, plan: Plan, sides: Mapping[Side, int]) -> tuple[Row, ...]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(ours)]
    plans = dict(zip(paths, plan.leaves, strict=True))
    edges: dict[str, list[int]] = {key: [] for key in plan.shapes}
    for side in sides:
        edges[side.key].append(side.size)
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        row = Row(name_of(path) or "params", np.shape(leaf), path in plans)
        if row.preconditioned:
            own = plans[path]
            cells = own.cells * own.batch
            blocks = collections.Counter(cell.stored for cell in cells)
            factors = collections.Counter(d for cell in cells for d in edges[cell.key])
            row = dataclasses.replace(
                row, batch=own.batch, merged=own.merged, blocks=blocks, factors=factors
            )
        rows.append(row)
    return tuple(rows)
