"""The devices of a run: the mesh, what lies where on it, and who owns which blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanogpt.config.run import Config, parse_mesh
from shampoo_jax import Placement

# Rows of a batch are split over all axes; parameters over "fsdp", replicated over "data".
AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a run's arrays lie on its mesh.

    Attributes:
        mesh: axes "data" and "fsdp", in this order.
        scatter_gradients: whether every device has a part of the summed gradients, not all of
            them; then parameters are whole on every device.
    """

    mesh: Mesh
    scatter_gradients: bool = False

    @functools.cached_property
    def placement(self) -> Placement:
        """Every device owns blocks, whatever else it holds."""
        scattered = self.gradient_spec if self.scatter_gradients else None
        return Placement(self.mesh, AXES, self.parameter_spec, gradient_spec=scattered)

    def parameter_spec(self, path: tuple[Any, ...], leaf: Any) -> P:
        """The rule for every parameter: matrices are split along the first dimension that divides.

        Args:
            path: key path; unused, since the rule is the same for all.
            leaf: array or its shape.
        """
        del path
        size = self.mesh.shape["fsdp"]
        return P() if size == 1 or np.ndim(leaf) < 2 else _split(np.shape(leaf), size, "fsdp")

    def gradient_spec(self, path: tuple[Any, ...], leaf: Any) -> P:
        """The layout of scattered gradients: the first dimension that can be is split over all.

        Args:
            path: key path; unused, since the rule is the same for all.
            leaf: array or its shape.
        """
        del path
        return _split(np.shape(leaf), self.mesh.size, AXES)

    def summed(self, local: Callable[..., tuple[jax.Array, Any]], params: Any, batch: Any) -> Any:
        """Adds up what every device finds for its rows of a batch; under jit.

        Args:
            local: function (params, batch) -> (scalar, gradients), of one device.
            params: whole on every device.
            batch: tree of arrays (rows, ...).

        Returns:
            The sum of the scalars, and the sum of the gradients in the layout `gradient_spec`.
        """
        specs = jax.tree_util.tree_map_with_path(self.gradient_spec, params)

        def scatter(x: jax.Array, spec: P) -> jax.Array:
            if not spec:
                return jax.lax.psum(x, AXES)
            return jax.lax.psum_scatter(x, AXES, scatter_dimension=len(spec) - 1, tiled=True)

        def add(params: Any, batch: Any) -> tuple[jax.Array, Any]:
            total, grads = local(params, batch)
            return jax.lax.psum(total, AXES), jax.tree.map(scatter, grads, specs)

        return jax.shard_map(
            add,
            mesh=self.mesh,
            in_specs=(P(), P(AXES)),
            out_specs=(P(), specs),
            # With it, the gradient of a parameter that all devices share would be summed at once,
            # and for every microbatch.
            check_vma=False,
        )(params, batch)

    @property
    def rows(self) -> NamedSharding:
        """Of batches (rows, T)."""
        return NamedSharding(self.mesh, P(AXES))

    @property
    def microbatches(self) -> NamedSharding:
        """Of batches (microbatches, rows, T)."""
        return NamedSharding(self.mesh, P(None, AXES))

    def gathered(self, x: jax.Array) -> jax.Array:
        """An array, whole on every device; under jit."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P()))

    def pin(self, params: Any) -> Any:
        """A tree of parameters or gradients, each in its layout; under jit."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, self.parameter_spec(path, x))
            ),
            params,
        )


def _split(shape: tuple[int, ...], size: int, axes: str | tuple[str, ...]) -> P:
    """Splits the first dimension that divides."""
    dims = [k for k, d in enumerate(shape) if d % size == 0]
    return P(*[None] * dims[0], axes) if dims else P()


def make_layout(config: Config, there: Sequence[Any] | None = None) -> Layout | None:
    """The layout that `config.mesh` names, None for a single device.

    Args:
        config: the run.
        there: devices that it is for; None for all of this run's processes.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or the devices do not divide
            a microbatch, or scattered gradients where parameters are split.
    """
    if not config.mesh:
        if config.scatter_gradients:
            raise ValueError(
                "scatter_gradients=True with mesh='' (one device): name a mesh, as in data=-1."
            )
        if jax.process_count() > 1:
            raise ValueError(
                f"mesh='' is one device, but {jax.process_count()} processes run: set "
                "--mesh data=-1."
            )
        return None
    sizes, devices = parse_mesh(config.mesh), len(there or jax.devices())
    known = math.prod(n for n in sizes.values() if n > 0)
    sizes = {axis: n if n > 0 else devices // known for axis, n in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(
            f"mesh={config.mesh!r} does not make up the {devices} devices there are: choose sizes "
            "whose product that is, with -1 for what is left."
        )
    if config.data.microbatch_rows % devices:
        raise ValueError(
            f"microbatch_rows={config.data.microbatch_rows} is not a multiple of the {devices} "
            f"devices of mesh={config.mesh!r}: every device needs whole rows of every microbatch."
        )
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    whole = shape[1] == 1
    if config.scatter_gradients and config.matrices.reads_microbatches:
        raise ValueError(
            "scatter_gradients=True sums over microbatches before devices, and this optimizer's "
            "statistics are of each microbatch: leave it out, or set matrices.statistics='batch'."
        )
    if config.scatter_gradients and not whole:
        raise ValueError(
            f"scatter_gradients=True with mesh={config.mesh!r}: it needs parameters that are whole "
            "on every device; set fsdp=1, or leave it out."
        )
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=there)
    scatter, fits = config.scatter_gradients, not config.matrices.reads_microbatches
    return Layout(mesh, fits and whole and mesh.size > 1 if scatter is None else scatter)
