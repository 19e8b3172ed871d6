"""Optimizer states keyed by parameter, for checkpoints that outlive the order of the parameters.

Inside, blocks of all parameters share stacks in the order of the parameters, so a state saved as it
is fits the same parameters only. That is enough to resume a run, and `check_state` tells whether it
fits. `state_to_tree` regroups a state by parameter; `tree_to_state` puts it back where parameters
were added or moved, or renamed or removed with their entries.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shampoo_jax.base.paths import KeyPath, name_of, nodes_of, parameter_of
from shampoo_jax.stacks.blocked import FORMAT, BlockedState, identity

Rows = Mapping[str, Any]  # by parameter, the rows of a state leaf that are its own; ... for all
Tree = dict[str, Any]

PARAMETERS, SHARED, LAYOUT, FORMAT_KEY = "parameters", "shared", "layout", "format"


class _Parameters(NamedTuple):
    """Parameters in the ways that a state names them."""

    names: dict[KeyPath, str]
    shapes: dict[str, tuple[int, ...]]
    identities: dict[str, tuple[int, int, int]]
    found: dict[tuple[int, int], str]  # by checksum of the name


def state_to_tree(state: Any, params: Any) -> Tree:
    """Regroups an optimizer state by parameter.

    Args:
      state: State of any optimizer that contains parts of this package, in whatever wrappers.
      params: The parameters that it belongs to, or their shapes.

    Returns:
      `{"format": number, "parameters": {path: {field: array}}, "shared": {field: array}}`; the
      number says what the fields mean, and is raised when that changes. Components of a path are
      joined by `/`; a field is a place in the state, such as `"inner/0/mu/8x4"`. To a parameter
      belong its blocks in every stack and the state leaves below its own path (AdamW's moments,
      momentum); counts and the like are shared. Arrays are numpy arrays.

    Raises:
      ValueError: The state belongs to other parameters.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, orbax.checkpoint as ocp, shampoo_jax
      >>> from shampoo_jax import check_state, state_to_tree, tree_to_state
      >>> tx = shampoo_jax.shampoo(0.1)
      >>> params = {"layer1": jnp.ones((3, 2))}
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "state"
      >>> with ocp.PyTreeCheckpointer() as checkpointer:
      ...     checkpointer.save(path, state_to_tree(tx.init(params), params))
      ...     tree = checkpointer.restore(path)
      >>> params = {"layer0": jnp.ones((3, 2)), **params}  # the model grows
      >>> state = tree_to_state(tree, tx.init(params), params)
      >>> check_state(state, params, tx)
    """
    known = _known(params)
    parameters: Tree = {name: {} for name in known.shapes}
    shared: Tree = {}
    for name, key, row in _layouts(state, known):
        parameters[name][key] = row
    for leaf, key, parts in _entries(state, known):
        for name, rows in parts.items():
            parameters[name][key] = _copy(leaf, rows)
        if key and not parts:
            shared[key] = _copy(leaf)
    # Orbax does not keep empty dictionaries.
    kept = {n: fields for n, fields in parameters.items() if fields}
    return {FORMAT_KEY: np.array(FORMAT, np.int32), PARAMETERS: kept, SHARED: shared}


def tree_to_state(tree: Mapping[str, Any], state: Any, params: Any) -> Any:
    """Puts a tree from `state_to_tree` into a fresh optimizer state.

    Parameters without an entry in the tree keep the fresh state. Step counts are shared, so their
    moving averages behave as if their gradients had been zero so far. With `stagger`, a parameter
    that is added before others shifts the turns of their blocks: one refresh of each comes earlier
    or later; nothing else of them changes.

    Args:
      tree: As saved. An entry of `tree["parameters"]` may be moved to another path where a
        parameter was renamed, and deleted where it was removed.
      state: `optimizer.init(params)`; it decides placement and dtypes.
      params: Parameters of today, or their shapes.

    Returns:
      The state, in the structure of `state`.

    Raises:
      ValueError: Another format, an entry of no parameter, a parameter with another shape or layout
        than in the tree, or a state of another optimizer.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> from shampoo_jax import state_to_tree, tree_to_state
      >>> tx, old = shampoo_jax.shampoo(0.1), {"old": jnp.ones((3, 2))}
      >>> tree = state_to_tree(tx.init(old), old)
      >>> tree["parameters"]["new"] = tree["parameters"].pop("old")  # it was renamed
      >>> params = {"new": old["old"]}
      >>> state = tree_to_state(tree, tx.init(params), params)
    """
    known = _known(params)
    _check_tree(tree, state, known)
    saved = tree[PARAMETERS]

    def fill(leaf: Any, key: str, parts: Rows) -> Any:
        if not key:
            return leaf
        if not parts:
            return _like(_fitting(tree[SHARED], key, np.shape(leaf), "the tree"), leaf)
        new = np.array(leaf)
        for name, rows in parts.items():
            if name in saved:
                new[rows] = _fitting(saved[name], key, new[rows].shape, _entry_of(name))
        return _like(new, leaf)

    filled = [fill(*entry) for entry in _entries(state, known)]
    return jax.tree.unflatten(jax.tree.structure(state), filled)


def _check_tree(tree: Any, state: Any, known: _Parameters) -> None:
    """Raises where a tree is none, is of another format, or holds other parameters."""
    if not isinstance(tree, Mapping) or not {PARAMETERS, SHARED} <= tree.keys():
        raise ValueError(
            f"a tree with the keys {PARAMETERS!r} and {SHARED!r} is expected, as state_to_tree made"
            f" it, not {type(tree).__name__}: pass the whole of what was saved."
        )
    _check_format(tree.get(FORMAT_KEY, 1), "the tree")
    saved = tree[PARAMETERS]
    for name in sorted(saved.keys() - known.shapes.keys()):
        raise ValueError(
            f"the tree holds state of {name}, which is not among the parameters: move "
            f"tree['{PARAMETERS}'][{name!r}] to its new name if it was renamed, delete it if it "
            "was removed."
        )
    for name, key, row in _layouts(state, known):
        fields = saved.get(name)
        change = fields and _change(_fitting(fields, key, (2,), _entry_of(name)), row)
        if change:
            raise ValueError(
                f"parameter {name}, of shape {known.shapes[name]}, {change} in the tree: undo "
                f"the change, or delete tree['{PARAMETERS}'][{name!r}] to start it afresh."
            )


def check_state(state: Any, params: Any, tx: optax.GradientTransformation | None = None) -> None:
    """Raises where an optimizer state does not belong to these parameters.

    Args:
      state: State of any optimizer that contains parts of this package, restored from somewhere.
      params: The parameters that it will be used with, or their shapes.
      tx: The optimizer. With it, also which parameters are preconditioned and how they are read
        and cut into blocks is compared; without it, order, names and shapes are.

    Raises:
      ValueError: A difference; the message names the first parameter that differs.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> from shampoo_jax import check_state
      >>> state = shampoo_jax.scale_by_shampoo().init({"a": jnp.ones(2), "b": jnp.ones(2)})
      >>> check_state(state, {"a": jnp.ones(2), "b": jnp.ones(3)})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: ... parameter b, of shape (3,), had another shape in the state. ...
    """
    known = _known(params)
    for node in _blocked(state):
        _check_format(node.format, "the optimizer state")
    held = [np.asarray(node.fingerprints).tolist() for node in _blocked(state)]
    if not held:
        raise ValueError(
            "this optimizer state holds no stacks of blocks: there is nothing to check."
        )
    fresh = [] if tx is None else _fresh(tx, params)
    wanted = [_present(rows, known) for rows in held] if tx is None else [x[0] for x in fresh]
    if len(held) != len(wanted):
        raise ValueError(
            f"the optimizer state has stacks of blocks in {len(held)} place, the optimizer makes "
            f"them in {len(wanted)}: build it as it was when the state was saved."
        )
    for rows, expected in zip(held, wanted, strict=True):
        if difference := _difference(rows, expected, known):
            raise ValueError(
                f"the optimizer state does not fit its parameters: {difference}. Restore it with "
                "the parameters and options that it was saved with, or carry it over by "
                "state_to_tree and tree_to_state."
            )
    if tx is not None and state_layout(state) != [x[1] for x in fresh]:
        raise ValueError(
            "the optimizer state has stacks of another length, since they were filled for another "
            "number of owners: restore it on as many, or carry it over by state_to_tree and "
            "tree_to_state."
        )


def state_layout(state: Any) -> list[dict[str, list[int]]]:
    """What every stack of an optimizer state holds; its length depends on the number of owners.

    Args:
      state: State of any optimizer.

    Returns:
      For each place with stacks, by stack the number of the parameter that each block was cut from,
      -1 for a zero block that fills the stack.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3), "c": jnp.ones((2, 2))}
      >>> shampoo_jax.state_layout(shampoo_jax.scale_by_shampoo().init(params))
      [{'2x2': [0, 2], '3': [1]}]
    """
    return [_stacks(node) for node in _blocked(state)]


def _stacks(node: BlockedState) -> dict[str, list[int]]:
    return {key: np.asarray(x).tolist() for key, x in node.leaves.items()}


def _check_format(number: Any, holder: str) -> None:
    if not np.all(np.asarray(number) == FORMAT):
        raise ValueError(
            f"{holder} has format number {np.max(number)}, the shampoo_jax that is installed reads "
            f"{FORMAT}: finish the run with the one that saved it, whose shampoo_jax.FORMAT is "
            "that number (it has none for number 1), or start afresh from the parameters alone."
        )


def _known(params: Any) -> _Parameters:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    # A bare array has no path.
    names = {p: name_of(p) or "params" for p, _ in leaves}
    shapes = {names[p]: tuple(np.shape(x)) for p, x in leaves}
    if len(shapes) < len(names):
        raise ValueError(
            f"several parameters have the same path among {sorted(names.values())}: rename the key "
            "that contains '/'."
        )
    identities = {names[p]: identity(jax.tree_util.keystr(p), shapes[names[p]]) for p, _ in leaves}
    return _Parameters(names, shapes, identities, {one[:2]: n for n, one in identities.items()})


def _blocked(state: Any) -> list[BlockedState]:
    found = [node for _, node in nodes_of(BlockedState, state)]
    for node in found:
        _check_single(node)
    return found


def _check_single(node: BlockedState) -> None:
    if np.ndim(node.format):
        raise ValueError(
            "the optimizer state is a stack of several, as vmap makes them: give one of them, "
            "jax.tree.map(lambda x: x[0], state)."
        )


def _nodes(state: Any) -> list[tuple[KeyPath, Any]]:
    """Leaves of a state, in which every `BlockedState` is one leaf."""
    return jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, BlockedState))


def _owners(node: BlockedState, known: _Parameters) -> list[str]:
    """Names of the parameters of one `BlockedState` of today's format, in its order."""
    _check_format(node.format, "the optimizer state")
    _check_single(node)
    rows = np.asarray(node.fingerprints).tolist()
    if not {tuple(row[:3]) for row in rows} <= set(known.identities.values()):
        raise ValueError(
            "the optimizer state holds a parameter that is not among these, or had another shape: "
            "call check_state to find out, and pass the parameters that the state was made for."
        )
    return [known.found[row[0], row[1]] for row in rows]


def _layouts(state: Any, known: _Parameters) -> Iterator[tuple[str, str, np.ndarray]]:
    """Checksums of shape and layout of every parameter that is cut: (name, field, uint32[2])."""
    for place, node in _nodes(state):
        if isinstance(node, BlockedState):
            rows = np.array(node.fingerprints)[:, 2:]
            key = "/".join(filter(None, (name_of(place), LAYOUT)))
            yield from ((n, key, row) for n, row in zip(_owners(node, known), rows, strict=True))


def _entries(state: Any, known: _Parameters) -> Iterator[tuple[Any, str, Rows]]:
    """Every leaf of a state in the order of `jax.tree.leaves`: (leaf, field, rows by parameter).

    Without rows a leaf is shared. Without a field it follows from the parameters alone.
    """
    for place, node in _nodes(state):
        if not isinstance(node, BlockedState):
            yield node, *_own(place, known)
            continue
        stacks = _rows(node, known)
        for path, leaf in jax.tree_util.tree_leaves_with_path(node):
            if path[0] != jax.tree_util.GetAttrKey("inner"):
                yield leaf, "", {}
                continue
            # The first key that names a stack: below it, dimensions are keys as well.
            keys = (k.key for k in path if isinstance(k, jax.tree_util.DictKey))
            rows = next((stacks[key] for key in keys if key in stacks), {})
            yield leaf, name_of((*place, *path)), rows


def _rows(node: BlockedState, known: _Parameters) -> dict[str, Rows]:
    """By stack, then by parameter, the positions of its blocks."""
    owners = _owners(node, known)
    return {
        key: {owners[i]: np.flatnonzero(np.array(x) == i) for i in sorted({*x} - {-1})}
        for key, x in _stacks(node).items()
    }


def _own(path: KeyPath, known: _Parameters) -> tuple[str, Rows]:
    """The rest of a leaf's path, and the parameter that its end names."""
    owner = parameter_of(path, known.names)
    if owner is None:
        return name_of(path), {}
    return name_of(path[: len(path) - len(owner)]), {known.names[owner]: ...}


def _entry_of(name: str) -> str:
    return f"the tree's entry of parameter {name}"


def _fitting(fields: Mapping[str, Any], key: str, shape: tuple[int, ...], owner: str) -> Any:
    """The field of this name, after a look at its shape."""
    if key not in fields:
        raise ValueError(
            f"{owner} has no {key!r}: it was made by another optimizer or with other options, "
            "which is what has to be restored first."
        )
    if np.shape(fields[key]) != shape:
        raise ValueError(
            f"{owner} has {key!r} of shape {np.shape(fields[key])}, which must be {shape}: it was "
            "made for another shape or by another optimizer."
        )
    return fields[key]


def _copy(leaf: Any, rows: Any = ...) -> Any:
    """Rows of a leaf on the host; a copy, since training goes on and may donate the state."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        return jnp.copy(leaf)[rows]  # random keys have no numpy form
    return np.array(np.asarray(leaf)[rows])


def _like(value: Any, leaf: Any) -> jax.Array:
    """The value in the dtype and, if it was chosen, the placement of a leaf."""
    value = jnp.asarray(value, leaf.dtype)
    return jax.device_put(value, leaf.sharding) if leaf.committed else value


def _present(rows: list[list[int]], known: _Parameters) -> list[Any]:
    """Identities of the parameters that a state holds, or may hold under an older name."""
    held = {(row[0], row[1]) for row in rows}
    orphans = {row[2] for row in rows if (row[0], row[1]) not in known.found}
    return [x for x in known.identities.values() if x[:2] in held or x[2] in orphans]


def _fresh(tx: optax.GradientTransformation, params: Any) -> list[tuple[Any, dict[str, list[int]]]]:
    """Fingerprints and layout of a fresh state; nothing else of it is computed."""

    @jax.jit
    def fresh() -> list[BlockedState]:
        zeros = jax.tree.map(lambda x: jnp.zeros(np.shape(x), x.dtype), params)
        return [node._replace(inner=()) for node in _blocked(tx.init(zeros))]

    return [(np.asarray(node.fingerprints).tolist(), _stacks(node)) for node in fresh()]


def _difference(held: list[Any], wanted: list[Any], known: _Parameters) -> str:
    """The first place where two lists of fingerprints differ, in words; empty if there is none."""

    def name(row: Any) -> str:
        return known.found.get(tuple(row[:2]), "one that is gone or renamed")

    for old, new in itertools.zip_longest(held, wanted):
        if old is None:
            return f"parameter {name(new)} is missing from it"
        if new is None:
            return f"after the last parameter expected, it holds {name(old)}"
        if tuple(old[:2]) != tuple(new[:2]):
            return f"where parameter {name(new)} is expected, it holds {name(old)}"
        change = _change(old[2:], new[2:])
        if change:
            return (
                f"parameter {name(new)}, of shape {known.shapes[name(new)]}, {change} in the state"
            )
    return ""


def _change(old: Any, new: Any) -> str:
    """What differs between two pairs (shape, layout) of checksums; a layout may be left out."""
    if old[0] != new[0]:
        return "had another shape"
    if len(new) > 1 and old[1] != new[1]:
        return "was read or cut differently (blocking, exponents)"
    return ""
