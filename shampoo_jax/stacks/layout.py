"""The way of blocks between the layout of their parameters and their owners on a mesh."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from shampoo_jax.base.paths import KeyPath, stack_of
from shampoo_jax.blocks.exponents import Exponents, default_exponents
from shampoo_jax.blocks.plan import Cell, LeafPlan, count_blocks, leading_axes
from shampoo_jax.stacks.placement import Axes, Placement, Spec, axes_of
from shampoo_jax.stacks.slots import Slots, balanced, in_turn

Array = jax.Array


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
        self.starts = {p.name: self._start_spec(p) for p in plan}
        self.cuts = {p.name: self._cut_specs(p) for p in plan}
        self.stacks = self._stack_specs(plan)
        # Gradients may come in another layout than that in which updates go.
        self.incoming = self
        self.ends: dict[str, Axes] = {}  # order of owner axes, where it is another layout's
        if placement.gradient_spec is not None:
            self.incoming = StackLayout(placement.incoming, tree, plan, exponents)
            self.incoming.ends = {key: self.route(key)[-1][0] for key in self.stacks}
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
        return specs or [tuple(spec)]  # blocks that are scalars are not cut

    def merged(self, leaf: LeafPlan) -> Spec:
        """Layout of `(batch, *merged)` as the leaf's own implies it, lost axes on the batch."""
        return self.starts[leaf.name]

    def _start_spec(self, leaf: LeafPlan) -> Spec:
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
            for cell in leaf.cells:
                votes.setdefault(cell.key, Counter())[self.stored(leaf, cell)] += leaf.batch
        return {key: counter.most_common(1)[0][0] for key, counter in votes.items()}

    def stored(self, leaf: LeafPlan, cell: Cell) -> Spec:
        """Layout of a cell when it has been cut and turned."""
        lead, *rest = self.cuts[leaf.name][-1]
        return (lead, *(reversed(rest) if cell.transposed else rest))

    def shared(self, leaf: LeafPlan, dtype: Any) -> Hashable | None:
        """What leaves have in common that can be exchanged as one before they are stacked.

        Args:
          leaf: Of the plan.
          dtype: What it travels in.

        Returns:
          None if it is not exchanged before, or is split along the axis where leaves would meet.
        """
        start = self.merged(leaf)
        stays = {start, *self.cuts[leaf.name]} == {start}
        stays = stays and all(self.stored(leaf, c) == self.stacks[c.key] for c in leaf.cells)
        return None if stays or start[0] else (start, jnp.dtype(dtype))

    def _slots(self, plan: Sequence[LeafPlan], exponents: Exponents) -> Slots:
        """Slots of all stacks."""
        counts, owners = count_blocks(plan), self.placement.count
        if self.placement.stack_multiple is not None:
            return in_turn(counts, owners, self.placement.stack_multiple)
        shapes = {c.key: c.stored for leaf in plan for c in leaf.cells}
        costs = {
            key: sum(d**3 for d, e in zip(shape, exponents(shape), strict=True) if e)
            for key, shape in shapes.items()
        }
        return balanced(counts, costs, owners, {key: self._runs(key) for key in counts})

    def _runs(self, key: str) -> np.ndarray:
        """The run of each owner, `int[owners]`: stacks differ in the order of their owner axes."""
        (axes, *_), owners = self.route(key)[-1], self.placement.owner_axes
        runs = np.arange(self.placement.count).reshape([self.placement.size((a,)) for a in axes])
        return runs.transpose([axes.index(a) for a in owners]).ravel()

    def leave(self, x: Array, leaf: LeafPlan) -> Array:
        """A leaf in its own layout."""
        return self.placement.put(x, self.own[leaf.name])

    def enter(self, x: Array, leaf: LeafPlan) -> Array:
        """A leaf in its own layout, rounded to what travels."""
        narrow = self.placement.communication_dtype
        x = self.leave(x, leaf)
        # The narrow value is pinned as well, or the wide one would travel.
        return x if narrow is None else self.leave(x.astype(narrow), leaf)

    def leaving(self, x: Array, dtype: Any) -> Array:
        """A block of an update in the dtype that it travels in to its leaf of another."""
        return x.astype(self.placement.communication_dtype or dtype)

    def merge(self, x: Array, leaf: LeafPlan) -> Array:
        """A permuted leaf as `(batch, *merged)`."""
        spec = self.merged(leaf)
        if not self._divides(spec[0], {leaf.batch}):  # lost axes need not fit there
            spec = self.cuts[leaf.name][0]
        return self.placement.reshape(x, (leaf.batch, *leaf.merged), spec)

    def unmerge(self, x: Array, leaf: LeafPlan) -> Array:
        """The way back."""
        shape = [leaf.shape[a] for a in leaf.permutation]
        spec = tuple(self.own[leaf.name][a] for a in leaf.permutation)
        return self.placement.reshape(x, shape, spec)

    def loose(self, x: Array, leaf: LeafPlan) -> Array:
        """Merged leaves, `(batch, *merged)`, as they come."""
        return self.placement.put(x, self.merged(leaf))

    def before(self, leaf: LeafPlan, axis: int) -> list[Spec]:
        """Layouts from which, and on the way by which, what is cut along an axis comes."""
        specs = [self.merged(leaf), *self.cuts[leaf.name]]
        return [specs[axis], *_between(specs[axis], specs[axis + 1])]

    def open(self, x: Array, leaf: LeafPlan, axis: int) -> Array:
        """A merged leaf or a strip of it on its way to be cut along an axis."""
        return self.cut(self._travel(x, self.before(leaf, axis)[1:]), leaf, axis)

    def close(self, x: Array, leaf: LeafPlan, axis: int) -> Array:
        """The way back."""
        return self._travel(self.cut(x, leaf, axis), self.before(leaf, axis)[:0:-1])

    def cut(self, x: Array, leaf: LeafPlan, axis: int) -> Array:
        """A merged leaf or a strip of it, `(batch, *merged)`, whole along the axis cut next."""
        return self.placement.put(x, self.cuts[leaf.name][axis])

    def piece(self, x: Array, key: str) -> Array:
        """A piece in the layout that its stack is concatenated in."""
        return self.placement.put(x, self.stacks[key])

    def route(self, key: str) -> list[Spec]:
        """Layouts from the concatenated stack to its owners, one mesh axis moved at a time."""
        spec = self.stacks[key]
        used = [a for e in spec[1:] for a in reversed(e)]  # a major axis first would permute
        owners = self.placement.owner_axes
        moves = [a for a in used if a in owners] + [a for a in owners if a not in used]
        route = [spec]
        for axis in moves:
            lead, *rest = route[-1]
            rest = [tuple(a for a in e if a != axis) for e in rest]
            route.append(((*lead, axis), *rest))
        end = (self.ends.get(key, route[-1][0]), *[()] * (len(spec) - 1))
        return route if end == route[-1] else [*route, end]

    def owner_spec(self, key: str) -> PartitionSpec:
        """Layout of everything that has one entry a block."""
        return PartitionSpec(self.route(key)[-1][0])

    def to_owners(self, x: Array, key: str, order: Sequence[int]) -> Array:
        """A concatenated stack in its slots, at its owners; zero blocks stay zero in all parts.

        Args:
          x: Blocks `[n, *block]`, pinned.
          key: Of the stack.
          order: Place of each block in the order of the plan.

        Returns:
          The stack `[N, *block]`.
        """
        n, slots = len(x), self.slots.order[key]
        if len(slots) > n:
            x = jnp.pad(x, ((0, len(slots) - n), *[(0, 0)] * (x.ndim - 1)))
        return self._travel(
            _take(x, np.where(slots < 0, n, np.argsort(order)[slots])), self.route(key)
        )

    def from_owners(self, x: Array, key: str, order: Sequence[int]) -> Array:
        """The way back, its first entries the blocks, rounded to what travels."""
        narrow = self.placement.communication_dtype
        x = self._travel(x if narrow is None else x.astype(narrow), self.route(key)[::-1])
        (places,) = np.nonzero(self.slots.order[key] >= 0)
        return _take(x, places[np.asarray(order)])

    def _travel(self, x: Array, route: Sequence[Spec]) -> Array:
        for spec in route:
            x = self.placement.put(x, spec)
        return x

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
            lead = tuple(axes_of(e) for e in spec)
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


def _take(x: Array, places: np.ndarray) -> Array:
    """`x[places]`, or all of `x` where that is how it begins."""
    return x if (places == np.arange(len(places))).all() else x[places]


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
