"""Where blocks live on a mesh: every block has one owner, which does all of its arithmetic.

Nothing else in this package knows a mesh. `blocked(placement=...)` asks a `Placement` for the way
of each gradient to its owners and back, and runs its inner transformation there.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from shampoo_jax.blocks import is_placeholder
from shampoo_jax.exponents import Exponents, default_exponents
from shampoo_jax.paths import KeyPath, parameter_of, stack_of
from shampoo_jax.plan import LeafPlan, count_blocks, leading_axes
from shampoo_jax.precision import check_dtype
from shampoo_jax.slots import Slots, balanced, in_turn

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
      mesh: The mesh of the training step, its axes Auto or Explicit.
      owners: Mesh axes over which blocks and their state are split.
      parameter_spec: Function of (path, leaf) giving the `PartitionSpec` of a parameter, of its
        gradient and of its update.
      communication_dtype: What gradients and updates are rounded to where they travel between
        devices, `jnp.bfloat16` say; None leaves them in float32.
      stack_multiple: Stacks are padded with zero blocks to a multiple of this, at their end. None
        means the number of owners, and zero blocks where `slots.balanced` puts them. A run
        resumed on another number of devices needs the same value.
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
        axes = self.owner_axes
        if not axes or len(set(axes)) < len(axes) or not set(axes) <= set(self.mesh.shape):
            raise ValueError(
                f"owners={self.owners!r} must name different axes of the mesh: it has "
                f"{tuple(self.mesh.shape)}."
            )
        multiple = self.count if self.stack_multiple is None else self.stack_multiple
        if multiple < 1 or multiple % self.count:
            raise ValueError(
                f"stack_multiple={self.stack_multiple} must be a multiple of the {self.count} "
                f"owners along {axes}."
            )
        check_dtype("communication_dtype", self.communication_dtype)

    @property
    def owner_axes(self) -> Axes:
        """Names of the owner axes."""
        return _axes(self.owners)

    @property
    def count(self) -> int:
        """Number of owners."""
        return math.prod(self.mesh.shape[a] for a in self.owner_axes)

    @property
    def multiple(self) -> int:
        """Length that stacks are padded to a multiple of."""
        return self.stack_multiple or self.count

    def put(self, x: Array, spec: Spec) -> Array:
        """Pins a value to a layout, on Auto and on Explicit meshes."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*(e or None for e in spec)))
        if AxisType.Explicit in self.mesh.axis_types:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    @property
    def incoming(self) -> "Placement":
        """The placement of gradients on their way in."""
        if self.gradient_spec is None:
            return self
        return dataclasses.replace(self, parameter_spec=self.gradient_spec, gradient_spec=None)

    def reshape(self, x: Array, shape: Sequence[int], spec: Spec) -> Array:
        """A reshape whose result has this layout on Explicit meshes, where none may be implied."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return x.reshape(shape)
        sharding = NamedSharding(self.mesh, PartitionSpec(*(e or None for e in spec)))
        return jax.lax.reshape(x, shape, out_sharding=sharding)

    def spec_of(self, path: KeyPath, leaf: Any) -> Spec:
        """The layout of a parameter, one entry a dimension."""
        spec, shape = self.parameter_spec(path, leaf), np.shape(leaf)
        known = isinstance(spec, PartitionSpec) and PartitionSpec.UNCONSTRAINED not in spec
        entries = (
            [() if e is None else _axes(e) for e in spec] if known else [()] * (1 + len(shape))
        )
        entries += [()] * (len(shape) - len(entries))
        axes = [a for e in entries for a in e]
        fits = len(entries) == len(shape) and set(axes) <= set(self.mesh.shape)
        fits = fits and len(set(axes)) == len(axes)
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
            own = self._specs(updates)
            split = [
                self.split_further(x.shape, s)
                for x, s in zip(jax.tree.leaves(updates), own, strict=True)
            ]
            if params is not None:
                params = self._put_tree(params, split)
            new, state = tx.update(self._put_tree(updates, split), state, params, **extra)
            state = self._pin_like(state, updates)
            return self._put_tree(self._put_tree(new, split), own), state

        return optax.GradientTransformationExtraArgs(init, update)

    def _specs(self, tree: Any) -> list[Spec]:
        return [self.spec_of(p, x) for p, x in jax.tree_util.tree_leaves_with_path(tree)]

    def _put_tree(self, tree: Any, specs: Sequence[Spec]) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten([self.put(x, s) for x, s in zip(leaves, specs, strict=True)])

    def _pin_like(self, state: Any, params: Any) -> Any:
        """Pins each leaf of a state to the split layout of its parameter."""
        owners = {
            path: (x.shape, self.split_further(x.shape, self.spec_of(path, x)))
            for path, x in jax.tree_util.tree_leaves_with_path(params)
        }

        def pin(path: KeyPath, leaf: Array) -> Array:
            owner = parameter_of(path, owners)
            found = None if owner is None else owners[owner]
            if found is None or found[0] != jnp.shape(leaf):
                return self.put(jnp.asarray(leaf), ((),) * jnp.ndim(leaf))
            return self.put(leaf, found[1])

        return jax.tree_util.tree_map_with_path(pin, state)

    def split_further(self, shape: tuple[int, ...], spec: Spec) -> Spec:
        """The layout with the unused owner axes on the first dimension that they divide."""
        free = tuple(a for a in self.owner_axes if a not in {b for e in spec for b in e})
        for k, d in enumerate(shape if free else ()):
            if d % self.size((*spec[k], *free)) == 0:
                return (*spec[:k], (*spec[k], *free), *spec[k + 1 :])
        return spec

    def size(self, axes: Axes) -> int:
        """Number of devices along some axes."""
        return math.prod(self.mesh.shape[a] for a in axes)


def _axes(entry: str | Sequence[str]) -> Axes:
    return (entry,) if isinstance(entry, str) else tuple(entry)


class StackLayout:
    """The way of every leaf of one plan to the owners of its blocks, and back.

    Every change of layout is pinned on both ends: left to itself the partitioner replicates what it
    concatenates.
    """

    def __init__(
        self,
        placement: Placement,
        tree: Any,
        plan: Sequence[LeafPlan],
        exponents: Exponents | None = None,
    ) -> None:
        self.placement = placement
        paths = jax.tree_util.tree_leaves_with_path(tree)
        self.own = {p.name: placement.spec_of(*x) for p, x in zip(plan, paths, strict=True)}
        self.cuts = {p.name: self._cut_specs(p) for p in plan}
        self.stacks = self._stack_specs(plan)
        # Gradients may come in another layout than that in which updates go.
        self.incoming = self
        if placement.gradient_spec is not None:
            self.incoming = StackLayout(placement.incoming, tree, plan, exponents)
        self.slots = self.incoming.slots = self._slots(plan, exponents or default_exponents)

    def _cut_specs(self, leaf: LeafPlan) -> list[Spec]:
        """Layouts of `(batch, *merged)`, then of its strips: whole along what is cut next."""
        loose, *rest = self.merged(leaf)
        spec: list[Axes] = [(), *rest]
        sizes = [{d} for d in (leaf.batch, *leaf.merged)]
        specs = []
        for k in range(1, len(sizes)):
            pieces = {c.size[k - 1] for c in leaf.cells}
            if pieces != sizes[k]:
                loose, spec[k] = (*loose, *spec[k]), ()
            others = [j for j in range(1, len(sizes)) if j != k or pieces == sizes[k]]
            home = next((j for j in others if self._divides((*spec[j], *loose), sizes[j])), None)
            if home is not None:
                spec[home], loose = (*spec[home], *loose), ()
            specs.append(tuple(spec))
            sizes[k] = pieces
        return specs

    def merged(self, leaf: LeafPlan) -> Spec:
        """Layout of `(batch, *merged)` as the leaf's own implies it, lost axes on the batch."""
        own = self.own[leaf.name]
        groups: list[Axes] = [() if a is None else own[a] for a in leading_axes(leaf)]
        held = {a for e in groups for a in e}
        return (tuple(a for e in own for a in e if a not in held), *groups)

    def _divides(self, axes: Axes, sizes: set[int]) -> bool:
        return not any(d % self.placement.size(axes) for d in sizes)

    def _stack_specs(self, plan: Sequence[LeafPlan]) -> dict[str, Spec]:
        """Most common layout of the blocks of each stack."""
        votes: dict[str, Counter[Spec]] = {}
        for leaf in plan:
            lead, *rest = self.cuts[leaf.name][-1]
            for cell in leaf.cells:
                spec = (lead, *(reversed(rest) if cell.transposed else rest))
                votes.setdefault(cell.key, Counter())[spec] += leaf.batch
        return {key: counter.most_common(1)[0][0] for key, counter in votes.items()}

    def _slots(self, plan: Sequence[LeafPlan], exponents: Exponents) -> Slots:
        """Slots of all stacks; those whose blocks are split before they travel stay in turn."""
        counts, owners = count_blocks(plan), self.placement.count
        if self.placement.stack_multiple is not None:
            return in_turn(counts, owners, self.placement.stack_multiple)
        shapes = {c.key: c.stored for leaf in plan for c in leaf.cells}
        costs = {
            key: sum(d**3 for d, e in zip(shape, exponents(shape), strict=True) if e)
            for key, shape in shapes.items()
        }
        leads = {k: (s[0], self.incoming.stacks[k][0]) for k, s in self.stacks.items()}
        return balanced(counts, costs, owners, fixed=[k for k, lead in leads.items() if any(lead)])

    def enter(self, x: Array, leaf: LeafPlan) -> Array:
        """A leaf in its own layout."""
        return self.placement.put(x, self.own[leaf.name])

    def merge(self, x: Array, leaf: LeafPlan) -> Array:
        """A permuted leaf as `(batch, *merged)`."""
        return self.placement.reshape(x, (leaf.batch, *leaf.merged), self.merged(leaf))

    def unmerge(self, x: Array, leaf: LeafPlan) -> Array:
        """The way back."""
        shape = [leaf.shape[a] for a in leaf.permutation]
        spec = tuple(self.own[leaf.name][a] for a in leaf.permutation)
        return self.placement.reshape(x, shape, spec)

    def cut(self, x: Array, leaf: LeafPlan, axis: int) -> Array:
        """A merged leaf or a strip of it, `(batch, *merged)`, whole along the axis cut next."""
        return self.placement.put(x, self.cuts[leaf.name][axis])

    def piece(self, x: Array, key: str) -> Array:
        """A piece in the layout that its stack is concatenated in."""
        return self.placement.put(x, self.stacks[key])

    def route(self, key: str) -> list[Spec]:
        """Layouts from the concatenated stack to its owners, one mesh axis moved at a time."""
        spec = self.stacks[key]
        used = [a for e in spec[1:] for a in e]
        owners = self.placement.owner_axes
        moves = [a for a in used if a in owners] + [a for a in owners if a not in used]
        route = [spec]
        for axis in moves:
            lead, *rest = route[-1]
            rest = [tuple(a for a in e if a != axis) for e in rest]
            route.append(((*lead, axis), *rest))
        if any(route[-1][1:]):
            route.append((route[-1][0], *[()] * (len(spec) - 1)))
        return route

    def owner_spec(self, key: str) -> PartitionSpec:
        """Layout of everything that has one entry a block."""
        return PartitionSpec(self.route(key)[-1][0])

    def to_owners(self, x: Array, key: str) -> Array:
        """A concatenated stack in its slots, at its owners; zero blocks stay zero in all parts."""
        n, order = len(x), self.slots.order[key]
        if len(order) > n:
            x = jnp.pad(x, ((0, len(order) - n), *[(0, 0)] * (x.ndim - 1)))
            x = x if (order[:n] >= 0).all() else x[np.where(order < 0, n, order)]
        return self._travel(x, self.route(key))

    def from_owners(self, x: Array, key: str) -> Array:
        """The way back, its first entries the blocks."""
        x = self._travel(x, self.route(key)[::-1])
        (places,) = np.nonzero(self.slots.order[key] >= 0)
        return x if len(places) == places[-1] + 1 else x[places]

    def _travel(self, x: Array, route: Sequence[Spec]) -> Array:
        narrow = self.placement.communication_dtype
        dtype = x.dtype
        # The narrow value is pinned before it travels, or the wide one would.
        x = x if narrow is None else x.astype(narrow)
        for spec in route:
            x = self.placement.put(x, spec)
        return x.astype(dtype)

    def state_specs(self, state: Any, lengths: dict[str, int]) -> Any:
        """Layout of every leaf of a state: blocks at their owners, all else replicated."""
        stacks = {(jax.tree_util.DictKey(key),): n for key, n in lengths.items()}

        def spec(path: KeyPath, leaf: Any) -> PartitionSpec:
            stack = stack_of(path, stacks)
            if stack is None or jnp.shape(leaf)[:1] != (stacks[stack],):
                return PartitionSpec()
            return self.owner_spec(stack[0].key)

        return jax.tree_util.tree_map_with_path(spec, state)

    def pin_stacks(self, stacks: dict[str, Any]) -> dict[str, Array]:
        """Arrays `[N]` by stack at their owners."""
        return {
            key: self.placement.put(jnp.asarray(x), self.route(key)[-1][:1])
            for key, x in stacks.items()
        }

    def pin_state(self, state: Any, lengths: dict[str, int]) -> Any:
        """The state at its owners."""
        specs = self.state_specs(state, lengths)

        def pin(x: Array, spec: PartitionSpec) -> Array:
            lead = tuple(_axes(e) for e in spec)
            return self.placement.put(jnp.asarray(x), (*lead, *[()] * (jnp.ndim(x) - len(lead))))

        return jax.tree.map(pin, state, specs)

    def run(
        self,
        update: Callable[..., Any],
        stacks: dict[str, Array],
        weights: dict[str, Array] | None,
        state: Any,
    ) -> tuple[dict[str, Array], Any]:
        """`update(stacks, indices, real, weights, state)`, every owner on its own blocks."""
        at_owner = {key: self.owner_spec(key) for key in stacks}
        specs = self.state_specs(state, {key: len(x) for key, x in stacks.items()})
        indices = self.pin_stacks(self.slots.index)
        holds = {key: self.slots.holds(key) for key in stacks}
        real = self.pin_stacks({key: x for key, x in holds.items() if x is not None})
        return jax.shard_map(
            update,
            mesh=self.placement.mesh,
            in_specs=(
                at_owner,
                at_owner,
                {key: at_owner[key] for key in real},
                None if weights is None else at_owner,
                specs,
            ),
            out_specs=(at_owner, specs),
            # Scalars of the state are equal everywhere by construction, which no type shows.
            check_vma=False,
        )(stacks, indices, real, weights, state)


def state_shardings(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """Where the state of a transformation lies, without computing or allocating it.

    Args:
      tx: Any Optax transformation, one with a `placement` and wrappers around it say.
      params: Parameters, or their shapes with shardings, as `jax.eval_shape` gives them.
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
        if not sharding.is_fully_replicated or not isinstance(given, NamedSharding):
            return sharding
        return given if owners[owner].shape == leaf.shape else sharding

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params), chosen)
