"""Where blocks live: on one device, or on a mesh, where every block has one owner.

The owner does all arithmetic on its blocks. Nothing else in this package knows a mesh:
`blocked(placement=...)` asks for the way of each gradient to its owners and back, and runs its
inner transformation there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from shampoo_jax.base.options import check_dtype, is_number, refuse
from shampoo_jax.base.paths import KeyPath, as_written, parameter_of
from shampoo_jax.blocks.blocks import is_placeholder

Array = jax.Array
Axes = tuple[str, ...]  # mesh axes that split one dimension, major first
Spec = tuple[Axes, ...]  # one entry a dimension


def replicated(path: KeyPath, leaf: Any) -> PartitionSpec:
    """The layout of data-parallel training: every device holds every parameter."""
    del path, leaf
    return PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Blocks are split over some axes of a mesh and replicated over the others.

    Attributes:
      mesh: The mesh of the training step, its axes Auto or Explicit. `optax.inject_hyperparams`
        needs Auto ones: jax refuses its arrays inside of `shard_map` on Explicit ones.
      owners: Mesh axes over which blocks and their state are split.
      parameter_spec: Function of (path, leaf) giving the `PartitionSpec` of a parameter, of its
        gradient and of its update.
      communication_dtype: What gradients and updates are rounded to where they travel between
        devices, `jnp.bfloat16` say; None leaves them in float32.
      stack_multiple: Stacks are padded with zero blocks to a multiple of this, at their end; None
        means the number of owners. A state resumed as it is on another number of devices needs the
        same value.
      gradient_spec: Likewise of a gradient that does not lie as its parameter does, reduced and
        scattered say; None where it does.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
      >>> tx = shampoo_jax.shampoo(0.1, placement=shampoo_jax.Placement(mesh, owners="data"))
      >>> state = jax.jit(tx.init)({"w": jnp.ones((8, 4))})
    """

    mesh: Mesh | AbstractMesh
    owners: str | Axes
    parameter_spec: Callable[[KeyPath, Any], PartitionSpec] = replicated
    communication_dtype: Any = None
    stack_multiple: int | None = None
    gradient_spec: Callable[[KeyPath, Any], PartitionSpec] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a field that does not fit the mesh, or is of another kind."""
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            refuse("mesh", self.mesh, ": give a jax.sharding.Mesh, as jax.make_mesh returns")
        if not isinstance(self.owners, str | Sequence):
            refuse("owners", self.owners, " must name axes of the mesh: owners='data'")
        axes = self.owner_axes
        if not axes or len(set(axes)) < len(axes) or not set(axes) <= set(self.mesh.shape):
            raise ValueError(
                f"owners={self.owners!r} must name different axes of the mesh: it has "
                f"{tuple(self.mesh.shape)}."
            )
        multiple = self.count if self.stack_multiple is None else self.stack_multiple
        if not is_number(multiple) or multiple < 1 or multiple % self.count:
            raise ValueError(
                f"stack_multiple={self.stack_multiple} must be a multiple of the {self.count} "
                f"owners along {axes}."
            )
        check_dtype("communication_dtype", self.communication_dtype)
        for name, rule in (("parameter", self.parameter_spec), ("gradient", self.gradient_spec)):
            if not callable(rule) and (rule is not None or name == "parameter"):
                raise ValueError(
                    f"{name}_spec={rule!r} must be a function of (path, leaf) that gives a "
                    "PartitionSpec: lambda path, leaf: PartitionSpec('data')."
                )

    @functools.cached_property
    def owner_axes(self) -> Axes:
        """Names of the owner axes."""
        return axes_of(self.owners)

    @functools.cached_property
    def count(self) -> int:
        """Number of owners."""
        return math.prod(self.mesh.shape[a] for a in self.owner_axes)

    @property
    def multiple(self) -> int:
        """Length that stacks are padded to a multiple of."""
        return self.stack_multiple or self.count

    def put(self, x: Array, spec: Spec) -> Array:
        """Pins a value to a layout, on Auto and on Explicit meshes."""
        return self._pin(x, self._sharding(spec))

    @functools.cached_property
    def _pin(self) -> Callable[[Array, NamedSharding], Array]:
        explicit = AxisType.Explicit in self.mesh.axis_types
        return jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint

    @functools.cached_property
    def _sharding(self) -> Callable[[Spec], NamedSharding]:
        return functools.cache(
            lambda spec: NamedSharding(self.mesh, PartitionSpec(*(e or None for e in spec)))
        )

    @functools.cached_property
    def incoming(self) -> "Placement":
        """The placement of gradients on their way in."""
        if self.gradient_spec is None:
            return self
        return dataclasses.replace(self, parameter_spec=self.gradient_spec, gradient_spec=None)

    @property
    def split_out(self) -> "Placement":
        """The placement of a direction whose updates stay as `elementwise` splits them."""

        def spec(path: KeyPath, leaf: Any) -> PartitionSpec:
            split = self.split_further(np.shape(leaf), self.spec_of(path, leaf))
            return PartitionSpec(*(e or None for e in split))

        return dataclasses.replace(
            self, parameter_spec=spec, gradient_spec=self.incoming.parameter_spec
        )

    def reshape(self, x: Array, shape: Sequence[int], spec: Spec) -> Array:
        """A reshape whose result has this layout on Explicit meshes, where none may be implied."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return x.reshape(shape)
        return jax.lax.reshape(x, shape, out_sharding=self._sharding(spec))

    def spec_of(self, path: KeyPath, leaf: Any) -> Spec:
        """The layout of a parameter, one entry a dimension."""
        spec, shape = self.parameter_spec(as_written(path), leaf), np.shape(leaf)
        known = isinstance(spec, PartitionSpec) and PartitionSpec.UNCONSTRAINED not in spec
        entries = [axes_of(e or ()) for e in spec] if known else []
        fits = known and len(entries) <= len(shape)
        entries += [()] * (len(shape) - len(entries))
        axes = [a for e in entries for a in e]
        fits = fits and set(axes) <= set(self.mesh.shape) and len(set(axes)) == len(axes)
        if not fits or any(d % self.size(e) for d, e in zip(shape, entries, strict=True)):
            raise ValueError(
                f"parameter_spec gives {spec!r} for parameter {jax.tree_util.keystr(path)} of "
                f"shape {shape}: return a PartitionSpec of different axes that divide its "
                f"dimensions; the mesh is {dict(self.mesh.shape)}."
            )
        return tuple(entries)

    def elementwise(
        self, inner: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """Splits state and arithmetic of an elementwise transformation over the owners (ZeRO-1).

        Args:
          inner: Transformation of parameter trees whose state leaves have their parameter's shape.

        Returns:
          The same transformation. A parameter none of whose dimensions can be divided further stays
          in its own layout.
        """
        tx = optax.with_extra_args_support(inner)

        def init(params: Any) -> Any:
            state = tx.init(params)
            return state if is_placeholder(params) else self._pin_like(state, params)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            own, split = self._specs(updates)
            params = None if params is None else self._put_tree(params, split)
            new, state = tx.update(self._put_tree(updates, split), state, params, **extra)
            state = self._pin_like(state, updates)
            return self._put_tree(self._put_tree(new, split), own), state

        return optax.GradientTransformationExtraArgs(init, update)

    def _specs(self, tree: Any) -> tuple[list[Spec], list[Spec]]:
        """Layouts of all leaves, and those that are split further."""
        own = [self.spec_of(*x) for x in jax.tree_util.tree_leaves_with_path(tree)]
        shapes = map(np.shape, jax.tree.leaves(tree))
        return own, [self.split_further(*x) for x in zip(shapes, own, strict=True)]

    def _put_tree(self, tree: Any, specs: Sequence[Spec]) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten([self.put(x, s) for x, s in zip(leaves, specs, strict=True)])

    def _pin_like(self, state: Any, params: Any) -> Any:
        """Pins each leaf of a state to the split layout of its parameter."""
        leaves = jax.tree_util.tree_leaves_with_path(params)
        owners = {p: (x.shape, s) for (p, x), s in zip(leaves, self._specs(params)[1], strict=True)}

        def pin(path: KeyPath, leaf: Array) -> Array:
            shape, split = owners.get(parameter_of(path, owners), (None, ()))  # type: ignore
            whole = ((),) * jnp.ndim(leaf)
            return self.put(jnp.asarray(leaf), split if shape == jnp.shape(leaf) else whole)

        return jax.tree_util.tree_map_with_path(pin, state)

    def split_further(self, shape: tuple[int, ...], spec: Spec) -> Spec:
        """The layout with as many unused owner axes as some dimension can be divided by."""
        if 0 in shape:  # no entry to split; outside of jit jax 0.8.0 cannot lay it out
            return spec
        free = tuple(a for a in self.owner_axes if a not in {b for e in spec for b in e})
        # All axes on the first dimension that they divide, or else fewer of them.
        for n in range(len(free), 0, -1):
            for k, d in enumerate(shape):
                if d % self.size((*spec[k], *free[:n])) == 0:
                    return (*spec[:k], (*spec[k], *free[:n]), *spec[k + 1 :])
        return spec

    def size(self, axes: Axes) -> int:
        """Number of devices along some axes."""
        return math.prod(self.mesh.shape[a] for a in axes)


def laid_as(x: Array, sharding: NamedSharding) -> Array:
    """An array laid out so, where Explicit axes make it part of its type how it lies."""
    if AxisType.Explicit not in sharding.mesh.axis_types or jax.typeof(x).sharding == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


def axes_of(entry: str | Sequence[str]) -> Axes:
    """The mesh axes that an entry of a `PartitionSpec` names."""
    return (entry,) if isinstance(entry, str) else tuple(entry)


def state_shardings(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Where the state of a transformation lies, without computing or allocating it.

    Args:
      tx: Any Optax transformation, one with a `placement` and wrappers around it say.
      params: Parameters, or their shapes with shardings. `jax.eval_shape` gives these on Explicit
        axes only; on Auto ones set `sharding` of each `jax.ShapeDtypeStruct`.
      mesh: The mesh of the training step.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`s, for `out_shardings` and for restoring
      checkpoints: those that `jax.jit(tx.init)` chooses, except that a leaf that it leaves whole on
      every device and that has the path and shape of a parameter lies as that parameter does.

    Example:
      >>> import jax, jax.numpy as jnp, optax, shampoo_jax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> split = NamedSharding(mesh, P("data"))
      >>> params = {"w": jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=split)}
      >>> state = shampoo_jax.state_shardings(optax.trace(0.9), params, mesh)
      >>> state.trace["w"].is_equivalent_to(split, ndim=2)
      True
    """
    owners = {p: x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    with jax.set_mesh(mesh):
        chosen = jax.jit(tx.init).lower(params).compile().output_shardings

    def place(path: KeyPath, leaf: Any, sharding: Any) -> NamedSharding:
        owner = parameter_of(path, owners)
        if owner is None:
            return sharding
        given = getattr(owners[owner], "sharding", None)
        lies = isinstance(given, NamedSharding) and owners[owner].shape == leaf.shape
        return given if sharding.is_fully_replicated and lies else sharding

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params), chosen)
