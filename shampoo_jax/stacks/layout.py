"""The way of blocks between the layout of their parameters and their owners."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from shampoo_jax.base.paths import KeyPath, stack_of
from shampoo_jax.blocks.plan import Cell, LeafPlan, Plan, leading_axes
from shampoo_jax.stacks.placement import Axes, Spec, axes_of, laid_as

Array = jax.Array


class OneDevice:
    """The layout without a mesh: nothing travels, one owner has all blocks.

    Leaves that Explicit axes split become whole on every device: they are all that owner.
    """

    multiple = 1
    communication_dtype = None
    gradient_spec = None

    def put(self, x: Array, spec: Spec) -> Array:
        """The value itself, whole."""
        lies = jax.typeof(x).sharding
        return laid_as(x, NamedSharding(lies.mesh, PartitionSpec(*(None for _ in spec))))

    def reshape(self, x: Array, shape: Sequence[int], spec: Spec) -> Array:
        """A reshape."""
        del spec
        return x.reshape(shape)

    def spec_of(self, path: KeyPath, leaf: Any) -> Spec:
        """No axes on any dimension."""
        del path
        return ((),) * np.ndim(leaf)


class LeafRoute(NamedTuple):
    """Layouts of a leaf until it has been cut, and on its way back.

    Attributes:
      merged: Of `(batch, *merged)` as the leaf's own layout implies it, lost axes on the batch.
      inward: By dimension the layouts on the way to the last, in which the leaf, or a strip of it,
        is whole along this dimension and cut.
    """

    merged: Spec
    inward: tuple[tuple[Spec, ...], ...]

    @property
    def cut(self) -> Spec:
        """Of the cells."""
        return self.inward[-1][-1]

    def stored(self, cell: Cell) -> Spec:
        """Of a cell when it has been turned as it is stored."""
        lead, *rest = self.cut
        return (lead, *(reversed(rest) if cell.transposed else rest))


class Bucket(NamedTuple):
    """Leaves whose merged arrays are cut and exchanged as one, one after the other on the batch.

    Attributes:
      members: Numbers of the leaves.
      leaf: Plan of any of them.
      route: Likewise.
      tiled: Whether all cells are cut at once: equal ones, of leaves that every device has whole.
    """

    members: tuple[int, ...]
    leaf: LeafPlan
    route: LeafRoute
    tiled: bool

    @property
    def cells(self) -> dict[str, list[int]]:
        """Numbers of the cells in each stack."""
        found: dict[str, list[int]] = {}
        for k, cell in enumerate(self.leaf.cells):
            found.setdefault(cell.key, []).append(k)
        return found


class Layout:
    """Where every leaf of a plan and every stack lies, and all layouts between.

    Every change of layout is pinned on both ends: left to itself the partitioner replicates what it
    concatenates.

    Attributes:
      plan: How leaves are cut.
      devices: Where to, a `Placement` or `OneDevice()`.
      own: Layout of each leaf.
      buckets: Leaves that go together.
      pieces: Layout by stack in which its blocks are concatenated.
      routes: Layouts by stack from there to its owners, one mesh axis moved at a time.
      lengths: Of stacks, with the zero blocks that fill them.
      order: By stack, for every block of the plan its place among the concatenated ones; None where
        these are in the plan's order.
      incoming: Of gradients, where they come in another layout than that in which updates go.
    """

    def __init__(self, devices: Any, tree: Any, plan: Plan) -> None:
        self.plan, self.devices = plan, devices
        paths = jax.tree_util.tree_leaves_with_path(tree)
        self.own = [devices.spec_of(*x) for x in paths]
        routes = list(map(self._route, plan.leaves, self.own))
        self.pieces = self._pieces(routes)
        self.buckets = self._buckets(routes, [x.dtype for _, x in paths])
        self.routes = {key: self._to_owners(spec) for key, spec in self.pieces.items()}
        multiple = devices.multiple
        self.lengths = {key: n + -n % multiple for key, n in plan.counts.items()}
        self.order = self._order()
        self.incoming = self
        if devices.gradient_spec is not None:
            self.incoming = Layout(self.devices.incoming, tree, plan)
            for key, route in self.incoming.routes.items():
                end = self.routes[key][-1]
                self.incoming.routes[key] = route if route[-1] == end else (*route, end)

    @functools.cached_property
    def index(self) -> dict[str, np.ndarray]:
        """By stack the position of each block among all; zero blocks go on counting."""
        begins = itertools.accumulate(self.plan.counts.values(), initial=0)
        return {
            key: (begin + np.arange(n)).astype(np.int32)
            for (key, n), begin in zip(self.lengths.items(), begins, strict=False)
        }

    def per_block(self, values: np.ndarray, fill: int) -> dict[str, Array]:
        """The value of each block's leaf, and `fill` for zero blocks: `[N]` by stack."""
        filled = np.append(values, np.asarray(fill, values.dtype))
        found = {}
        for key, leaves in self.plan.owners.items():
            zeros = [-1] * (self.lengths[key] - len(leaves))
            found[key] = jnp.asarray(filled[[*leaves, *zeros]])
        return found

    def _route(self, leaf: LeafPlan, own: Spec) -> LeafRoute:
        """Layouts of `(batch, *merged)`, then of its strips: whole along what is cut next."""
        groups: list[Axes] = [() if a is None else own[a] for a in leading_axes(leaf)]
        held = {a for e in groups for a in e}
        loose: Axes = tuple(a for e in own for a in e if a not in held)
        merged = (loose, *groups)
        spec: list[Axes] = [(), *groups]
        sizes = [{d} for d in (leaf.batch, *leaf.merged)]
        specs: list[Spec] = [merged]
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
        if len(specs) == 1:  # blocks that are scalars are not cut
            specs.append(tuple(spec))
        ways = itertools.pairwise(specs)
        return LeafRoute(merged, tuple((*_between(a, b), b) for a, b in ways))

    def _divides(self, axes: Axes, sizes: set[int]) -> bool:
        return not axes or not any(d % self.devices.size(axes) for d in sizes)

    def _pieces(self, routes: list[LeafRoute]) -> dict[str, Spec]:
        """Most common layout of the blocks of each stack."""
        votes: dict[str, Counter[Spec]] = {}
        for leaf, route in zip(self.plan.leaves, routes, strict=True):
            for cell in leaf.cells:
                votes.setdefault(cell.key, Counter())[route.stored(cell)] += leaf.batch
        return {key: counter.most_common(1)[0][0] for key, counter in votes.items()}

    def _buckets(self, routes: list[LeafRoute], dtypes: list[Any]) -> list[Bucket]:
        """Groups of the plan, split where leaves do not lie alike."""
        found = []
        for members in self.plan.groups:
            alike: dict[Hashable, list[int]] = {}
            for i in members:
                alike.setdefault(self._together(i, routes[i], dtypes[i]), []).append(i)
            for some in alike.values():
                leaf, route = self.plan.leaves[some[0]], routes[some[0]]
                equal = len({cell.size for cell in leaf.cells}) == 1
                found.append(Bucket(tuple(some), leaf, route, equal and not any(route.merged)))
        return found

    def _together(self, i: int, route: LeafRoute, dtype: Any) -> Hashable:
        """What leaves have in common that go together; a leaf's number if it goes alone.

        On a mesh it does unless it is exchanged before it is stacked; and where its batch is split,
        since that lies in runs, which a concatenation of batches would move.
        """
        if isinstance(self.devices, OneDevice):
            return None
        cells = self.plan.leaves[i].cells
        stays = {spec for way in route.inward for spec in way} <= {route.merged}
        stays = stays and all(route.stored(c) == self.pieces[c.key] for c in cells)
        return i if stays or route.merged[0] else (route, jnp.dtype(dtype))

    def _to_owners(self, spec: Spec) -> tuple[Spec, ...]:
        if isinstance(self.devices, OneDevice):
            return ()
        used = [a for e in spec[1:] for a in reversed(e)]  # a major axis first would permute
        owners = self.devices.owner_axes
        moves = [a for a in used if a in owners] + [a for a in owners if a not in used]
        route = [spec]
        for axis in moves:
            lead, *rest = route[-1]
            rest = [tuple(a for a in e if a != axis) for e in rest]
            route.append(((*lead, axis), *rest))
        end = (route[-1][0], *[()] * (len(spec) - 1))
        return tuple(route if end == route[-1] else [*route, end])

    def _order(self) -> dict[str, np.ndarray | None]:
        """Where buckets are finer than the plan's groups they may come in another order."""
        found: dict[str, np.ndarray | None] = {}
        members = np.array([i for bucket in self.buckets for i in bucket.members], int)
        rank = np.argsort(members)  # of each leaf
        for key, leaves in self.plan.owners.items():
            # Blocks of a leaf keep their order, so a stable sort by rank is the order of buckets.
            taken = np.argsort(rank[leaves], kind="stable")
            found[key] = None if (np.diff(taken) == 1).all() else np.argsort(taken)
        return found

    def owner_spec(self, key: str) -> PartitionSpec:
        """Layout of everything that has one entry a block."""
        return PartitionSpec(self.routes[key][-1][0])

    def state_specs(self, state: Any) -> Any:
        """Layout of every leaf of a state: blocks at their owners, all else replicated."""

        def spec(path: KeyPath, leaf: Any) -> PartitionSpec:
            key = self.stack_of(path, leaf)
            return PartitionSpec() if key is None else self.owner_spec(key)

        return jax.tree_util.tree_map_with_path(spec, state)

    def stack_of(self, path: KeyPath, leaf: Any) -> str | None:
        """The stack that a leaf of a state has one entry a block of, or None."""
        found = stack_of(path, [(jax.tree_util.DictKey(key),) for key in self.lengths])
        if found is None or jnp.shape(leaf)[:1] != (self.lengths[found[0].key],):
            return None
        return found[0].key

    def pin_state(self, state: Any) -> Any:
        """The state at its owners."""
        if isinstance(self.devices, OneDevice):
            return state

        def pin(x: Array, spec: PartitionSpec) -> Array:
            lead = tuple(axes_of(e) for e in spec)
            return self.devices.put(jnp.asarray(x), (*lead, *[()] * (jnp.ndim(x) - len(lead))))

        return jax.tree.map(pin, state, self.state_specs(state))

    def run(self, update: Callable[..., Any], stacks: Any, cut: Any, state: Any) -> Any:
        """`update(stacks, index, cut, state)`, every owner on its own blocks."""
        index = self.pin_state(self.index)
        if isinstance(self.devices, OneDevice):
            return update(stacks, index, cut, state)
        at_owner = {key: self.owner_spec(key) for key in stacks}
        specs = self.state_specs(state)
        run = jax.shard_map(
            update,
            mesh=self.devices.mesh,
            in_specs=(at_owner, at_owner, at_owner, specs),
            out_specs=(at_owner, specs),
            # Scalars of the state are equal everywhere by construction, which no type shows.
            check_vma=False,
        )
        try:
            return run(stacks, index, cut, state)
        except NotImplementedError as error:
            if "Closing over" not in str(error):
                raise
            raise ValueError(
                "an array that is no part of the state, as inject_hyperparams makes of an option, "
                "cannot be used on Explicit mesh axes: make the axes of the placement's mesh Auto, "
                "jax.make_mesh(..., axis_types=...), or give the option as a number."
            ) from error


def _between(before: Spec, after: Spec) -> list[Spec]:
    """Layouts between two, so that axes of one dimension move at a time.

    The partitioner would replicate what changes along several.

    >>> _between((("e",), ("f",), ("t",)), ((), (), ("t", "e", "f")))
    [((), ('f',), ('t', 'e'))]
    """
    home = {a: (k, i) for k, axes in enumerate(after) for i, a in enumerate(axes)}
    groups: dict[tuple[int, int], list[str]] = {}
    for j, axes in enumerate(before):
        for a in axes:
            if a in home and home[a][0] != j:
                groups.setdefault((j, home[a][0]), []).append(a)
    spec, found = list(before), []
    for (j, k), group in sorted(groups.items(), key=lambda item: home[item[1][0]])[:-1]:
        spec[j] = tuple(a for a in spec[j] if a not in group)
        spec[k] = (*spec[k], *group)
        found.append(tuple(spec))
    return found
