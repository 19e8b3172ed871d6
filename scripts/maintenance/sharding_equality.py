"""Layouts of meshes, and how far an update on each is from the same update on one device.

`python -m scripts.maintenance.sharding_table --equality` runs every optimizer here on every layout.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj

# Mesh shape by axis, owners, layout of the parameters.
Layout = tuple[dict[str, int], str | tuple[str, ...], Callable[..., P]]


def rows(axis: str) -> Callable[..., P]:
    """Everything but scalars split along the rows of its last two dimensions."""
    return lambda path, leaf: P(*[None] * (leaf.ndim - 2), axis) if leaf.ndim else P()


def two_dimensional(path: Any, leaf: Any) -> P:
    """Matrices split along both dimensions."""
    if leaf.ndim < 2:
        return rows("fsdp")(path, leaf)
    return P(*[None] * (leaf.ndim - 2), "fsdp", "tensor")


def experts(path: Any, leaf: Any) -> P:
    """Axes before a matrix split over one mesh axis, its rows over another."""
    if leaf.ndim < 3:
        return rows("fsdp")(path, leaf)
    return P(*[None] * (leaf.ndim - 3), "expert", "fsdp")


LAYOUTS: dict[str, Layout] = {
    "replicated": ({"data": 8}, "data", lambda path, leaf: P()),
    "rows": ({"fsdp": 8}, "fsdp", rows("fsdp")),
    "columns": (
        {"data": 2, "tensor": 4},
        ("data", "tensor"),
        lambda path, leaf: P(*[None] * (leaf.ndim - 1), "tensor") if leaf.ndim else P(),
    ),
    "rows and columns": ({"fsdp": 4, "tensor": 2}, ("fsdp", "tensor"), two_dimensional),
    "replicas of rows": ({"replica": 2, "fsdp": 4}, ("replica", "fsdp"), rows("fsdp")),
    "a group of owners": ({"replica": 2, "data": 4}, "data", lambda path, leaf: P()),
    "split experts": ({"expert": 4, "fsdp": 2}, ("expert", "fsdp"), experts),
    "split layers": (
        {"stage": 2, "data": 4},
        ("stage", "data"),
        lambda path, leaf: P("stage") if leaf.ndim > 2 else P(),
    ),
    "one device": ({"data": 1}, "data", lambda path, leaf: P()),
}

# The same layouts with what else changes the way of a block.
MESHES: dict[str, tuple[str, AxisType, dict[str, Any]]] = {
    **{name: (name, AxisType.Auto, {}) for name in LAYOUTS},
    "replicated, stacks of 24": ("replicated", AxisType.Auto, {"stack_multiple": 24}),
    "rows and columns, stacks of 16": (
        "rows and columns",
        AxisType.Auto,
        {"stack_multiple": 16},
    ),
    "rows, explicit": ("rows", AxisType.Explicit, {}),
    "rows and columns, explicit": ("rows and columns", AxisType.Explicit, {}),
    "split experts, explicit": ("split experts", AxisType.Explicit, {}),
}

# Blocks of 16x16, 16x8 and 8x8: 3, 2 and 16 of them.
SHAPES = {
    **{f"q{i}": (16, 16) for i in range(3)},
    "up": (8, 16),
    "down": (16, 8),
    "experts": (8, 8, 8),
    "layers": (2, 4, 8, 8),
    "embed": (32, 16),
    "bias": (16,),
    "scale": (),
    "empty": (0, 16),
}
STACKED = sj.batch_axes({"experts": 0, "layers": (0, 1)})
BLOCKS = sj.Blocking(dimension_numbers=STACKED)
RAGGED = sj.Blocking(10, dimension_numbers=STACKED)
STAGGERED = sj.Refresh(stagger=True)


def square(path: Any, leaf: Any) -> bool:
    """Matrices whose factors have full rank from the first step.

    Of a rank-deficient factor rounding chooses the basis of the null space, and with it what an
    optimizer that works in that basis makes of the next gradient, on a mesh or not.
    """
    return leaf.ndim > 1 and leaf.shape[-1] == leaf.shape[-2]


def in_a_basis(placement: sj.Placement | None) -> dict[str, Any]:
    """Options of the optimizers that keep a basis and work in it."""
    refresh = sj.BasisRefresh(stagger=True)
    blocking = sj.Blocking(None, dimension_numbers=STACKED)
    options = {"refresh": refresh, "blocking": blocking, "preconditioned": square}
    return {**options, "placement": placement}


# Name -> optimizer with a placement or None.
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "eigh": lambda p: sj.shampoo(0.1, momentum=0.9, weight_decay=0.1, blocking=BLOCKS, placement=p),
    "eigh, ragged, staggered": lambda p: sj.shampoo(
        0.1, blocking=RAGGED, every=3, refresh=STAGGERED, placement=p
    ),
    # With the cutoff far from rounding, which this solver lets an eigenvalue near it through.
    "polynomial": lambda p: sj.shampoo(
        0.1, solver=sj.Polynomial(1e-6), blocking=BLOCKS, placement=p
    ),
    "carried QR": lambda p: sj.shampoo(
        0.1,
        solver=sj.CarriedBasis(sj.QRBasis(), damping=1e-6),
        every=2,
        blocking=BLOCKS,
        placement=p,
    ),
    "carried QR, staggered": lambda p: sj.shampoo(
        0.1,
        solver=sj.CarriedBasis(sj.QRBasis(tolerance=0.01, iterations=2), damping=1e-6),
        every=3,
        refresh=STAGGERED,
        blocking=BLOCKS,
        placement=p,
    ),
    "coupled Newton": lambda p: sj.shampoo(
        0.1, solver="coupled_newton", blocking=BLOCKS, placement=p
    ),
    "higher-order Newton": lambda p: sj.shampoo(
        0.1,
        solver="higher_order_newton",
        every=3,
        refresh=STAGGERED,
        blocking=BLOCKS,
        placement=p,
    ),
    "one-sided": lambda p: sj.one_sided_shampoo(0.1, side="smaller", blocking=RAGGED, placement=p),
    "full KL factors": lambda p: sj.shampoo(
        0.1,
        statistics="kl",
        solver=sj.ShiftedEigh(1e-6),
        blocking=BLOCKS,
        placement=p,
    ),
    "SOAP": lambda p: sj.soap(0.1, every=3, **in_a_basis(p)),
    "KL-Shampoo": lambda p: sj.kl_shampoo(0.1, every=3, **in_a_basis(p)),
    "KL-SOAP": lambda p: sj.kl_soap(0.1, every=3, **in_a_basis(p)),
}

# Optimizers whose float32 results are stable where the spectrum has a gap at their cutoff.
CUT = {
    "eigh": lambda p: sj.shampoo(0.1, solver=sj.TruncatedEigh(1e-3), placement=p),
    "polynomial": lambda p: sj.shampoo(0.1, solver=sj.Polynomial(1e-3), placement=p),
    "one-sided": lambda p: sj.one_sided_shampoo(
        0.1, solver=sj.TruncatedEigh(1e-3), every=3, refresh=STAGGERED, placement=p
    ),
}


def placement_of(name: str) -> sj.Placement:
    """The placement of one of `MESHES`, on the devices that are there."""
    layout, kind, options = MESHES[name]
    axes, owners, spec = LAYOUTS[layout]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    return sj.Placement(mesh, owners, spec, **options)


def place(tree: Any, placement: sj.Placement | None) -> Any:
    """Parameters, or gradients, where the placement says that they lie."""
    if placement is None:
        return tree
    spec, mesh = placement.parameter_spec, placement.mesh
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(x, NamedSharding(mesh, spec(path, x))), tree
    )


def gradients(seed: int, dtype: Any = jnp.float64) -> dict[str, jax.Array]:
    """Normal random numbers in all `SHAPES`."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in SHAPES.items()}


def gapped(seed: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Gradients of half rank, whose factors have no eigenvalue near a cutoff of 1e-3.

    Every matrix is `U S V^T` with the same U and V at every step and S between 1 and 2 in size, so
    that the factors' eigenvalues lie between 1 and 4, or are 0 but for rounding.
    """
    found = {}
    always, rng = np.random.default_rng(0), np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        if len(shape) < 2:
            found[name] = jnp.asarray(rng.normal(size=shape), dtype)
            continue
        left, _, right = np.linalg.svd(always.normal(size=shape), full_matrices=False)
        half = left.shape[-1] // 2
        sizes = rng.uniform(1, 2, (*shape[:-2], 1, half)) * rng.choice([-1, 1], half)
        found[name] = jnp.asarray((left[..., :half] * sizes) @ right[..., :half, :], dtype)
    return found


def train(
    optimizers: dict[str, Any],
    placement: sj.Placement | None,
    steps: int,
    of_step: Callable[[int], Any] = gradients,
) -> tuple[list[Any], dict[str, Any]]:
    """Updates of all steps and the last states of several optimizers, all in one program.

    Args:
      optimizers: Transformations by name.
      placement: Where parameters and gradients lie; None for one device.
      steps: Number of steps.
      of_step: Function of a seed giving gradients, and parameters with seed 0.

    Returns:
      For each step, updates by optimizer and parameter; states by optimizer.
    """

    def step(grads: Any, states: Any, params: Any) -> tuple[Any, Any]:
        done = {k: tx.update(grads, states[k], params) for k, tx in optimizers.items()}
        return {k: u for k, (u, _) in done.items()}, {k: s for k, (_, s) in done.items()}

    params = place(of_step(0), placement)
    states = jax.jit(lambda p: {k: tx.init(p) for k, tx in optimizers.items()})(params)
    # Values are compared, not times, and most of the time here is the compiler's.
    quick: dict[str, bool | str] = {"xla_backend_optimization_level": "0"}
    run = jax.jit(step).lower(params, states, params).compile(compiler_options=quick)
    history = []
    for seed in range(1, steps + 1):
        updates, states = run(place(of_step(seed), placement), states, params)
        history.append(jax.tree.map(np.asarray, updates))
    return history, states


def worst_errors(got: list[Any], expected: list[Any]) -> dict[str, float]:
    """Largest difference of any update, over the largest update of that parameter, by optimizer."""
    worst: dict[str, float] = {}
    for a, b in zip(got, expected, strict=True):
        for name in a:
            for x, y in zip(jax.tree.leaves(a[name]), jax.tree.leaves(b[name]), strict=True):
                if x.size:
                    error = float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-300))
                    worst[name] = max(worst.get(name, 0.0), error)
    return worst


def compare(
    names: Iterable[str],
    optimizers: dict[str, Callable[..., Any]],
    of_step: Callable[[int], Any] = gradients,
    steps: int = 7,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Trains on one device without a mesh, then on each mesh.

    Args:
      names: Of `MESHES`.
      optimizers: Functions of a placement or None, by name.
      of_step: See `train`.
      steps: Number of steps.

    Yields:
      Name of the mesh, worst error by optimizer.
    """
    expected, _ = train({k: make(None) for k, make in optimizers.items()}, None, steps, of_step)
    for name in names:
        placement = placement_of(name)
        mesh: Any = placement.mesh
        with jax.set_mesh(mesh):
            placed = {k: make(placement) for k, make in optimizers.items()}
            got, _ = train(placed, placement, steps, of_step)
        yield name, worst_errors(got, expected)


def equality(names: Iterable[str] = tuple(MESHES)) -> Iterator[tuple[str, dict[str, float]]]:
    """`compare` of all `OPTIMIZERS` in float64."""
    with jax.enable_x64(True):
        yield from compare(names, OPTIMIZERS)
