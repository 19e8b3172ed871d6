"""States of Meta's distributed_shampoo as states of optimizers of this package."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from shampoo_jax.base.options import check_kind
from shampoo_jax.base.paths import name_of
from shampoo_jax.blocks.exponents import ExponentOption, resolve_exponents
from shampoo_jax.inspect.checkpoints import (
    LAYOUT,
    PARAMETERS,
    SHARED,
    state_to_tree,
    tree_to_state,
)
from shampoo_jax.inspect.meta_archive import MetaParameter, read_archive
from shampoo_jax.inspect.meta_blocks import match_blocks
from shampoo_jax.inspect.meta_fields import Filler
from shampoo_jax.solvers.carried import CarriedBasis


def import_meta_state(
    archive: Mapping[str, Any],
    state: Any,
    params: Any,
    *,
    names: Mapping[str, str] | None = None,
    transposed: Collection[str] = (),
    solver: CarriedBasis | None = None,
    exponents: ExponentOption = None,
) -> Any:
    """Puts a state of Meta's `DistributedShampoo` into a fresh state of an optimizer of ours.

    The optimizer has to be the counterpart of theirs, see docs/migration.md: hyperparameters are
    not in a state, so that another `b2` or another damping is not noticed, while other blocks,
    another kind of preconditioner, a graft or momentum that only one of them has are refused.
    Every count of steps becomes theirs. Parameters that the optimizer does not precondition keep
    their fresh state.

    Args:
      archive: From `meta_archive`, or what `np.load(path, allow_pickle=False)` reads of it.
      state: `optimizer.init(params)`; it decides placement and dtypes.
      params: Our parameters, or their shapes.
      names: By our path, components joined by `/`, the name in the archive; None, or a path that is
        left out, means the same name, where `.` stands for `/`.
      transposed: Our paths of matrices that are the transposes of theirs: kernels of Flax are those
        of torch's Linear weights.
      solver: The optimizer's, where they kept eigendecompositions (`EigendecomposedShampoo`): it
        makes roots of them.
      exponents: The optimizer's, likewise; None, theirs unless overridden, is not what
        `scale_by_shampoo` has by default with a graft.

    Returns:
      The state, in the structure of `state`, after as many steps as theirs.

    Raises:
      ValueError: A key that is missing, unknown or without a counterpart; an array of another
        shape; blocks that are cut differently; numbers that are not finite.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax, shampoo_jax
      >>> tx = shampoo_jax.scale_by_shampoo(**shampoo_jax.presets.meta_shampoo())
      >>> block = {"factor_matrices": {0: np.eye(2)}, "inv_factor_matrices": {0: np.eye(2)}}
      >>> block = {"filtered_grad": np.ones(2), "shampoo": block}
      >>> saved = {0: {"step": np.array(7), "block_0": block}}
      >>> archive = shampoo_jax.meta_archive({"params": {"w": np.zeros(2)}, "state": saved})
      >>> params = {"w": jnp.asarray(archive["params/w"])}
      >>> state = shampoo_jax.import_meta_state(archive, tx.init(params), params)
      >>> int(state.inner_state.inner[0].count), state.inner_state.inner[0].mu["2"].tolist()
      (7, [[1.0, 1.0]])
    """
    check_kind("solver", solver, CarriedBasis, "CarriedBasis(damping=1e-12)")
    theirs, tree = read_archive(archive), state_to_tree(state, params)
    names, powers = names or {}, resolve_exponents(exponents)
    shapes = {
        name_of(path) or "params": tuple(np.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name in sorted({*names, *transposed} - shapes.keys()):
        raise ValueError(f"{name!r} in names or transposed is no parameter: use {sorted(shapes)}.")
    pairs = _pairs(theirs, tree[PARAMETERS], names)
    averaged = any("filtered_grad" in block for one in theirs.values() for block in one.blocks)
    for name, one in pairs.items():
        shape = shapes[name][::-1] if name in transposed else shapes[name]
        _check_shape(archive.get(f"params/{one.name}"), shape, name, one)
        if 0 in shape:
            continue
        fields = tree[PARAMETERS][name]
        layout = next(int(fields[key][1]) for key in fields if _is_layout(key))
        match = match_blocks(name, one, shape, name in transposed, layout, powers)
        filler = Filler(name, one, match, fields, name in transposed, solver, powers)
        # Where none has it their beta1 was 0, and ours is not read.
        tree[PARAMETERS][name] = filler.filled(() if averaged else ("filtered_grad",))
    _count(tree[SHARED], list(pairs.values()))
    return tree_to_state(tree, state, params)


def _is_layout(key: str) -> bool:
    return key.rpartition("/")[2] == LAYOUT


def _pairs(
    theirs: Mapping[str, MetaParameter], ours: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, MetaParameter]:
    """Their state by the path of each parameter that the optimizer cuts into blocks."""
    slashed = {name.replace(".", "/"): one for name, one in theirs.items()}
    pairs = {}
    for name, fields in ours.items():
        if not any(map(_is_layout, fields)):
            continue
        wanted = names.get(name, name)
        found = theirs.get(wanted) or slashed.get(wanted.replace(".", "/"))
        if found is None:
            raise ValueError(
                f"state/{wanted} is missing, of parameter {name}; the archive has "
                f"{sorted(theirs)}: say by names={{{name!r}: ...}} which it is, or build the "
                "optimizer with a preconditioned that leaves it out."
            )
        pairs[name] = found
    for name in sorted(theirs.keys() - {one.name for one in pairs.values()}):
        raise ValueError(
            f"state/{name} is of no parameter that the optimizer preconditions, which are "
            f"{sorted(pairs)}: say by names which it is, let preconditioned=... take it, or leave "
            "it out of the archive to start it afresh."
        )
    return pairs


def _check_shape(given: Any, shape: tuple[int, ...], name: str, one: MetaParameter) -> None:
    if given is not None and np.shape(given) != shape:
        raise ValueError(
            f"params/{one.name} has shape {np.shape(given)}, parameter {name} needs {shape}: match "
            "it with its own by names, and name it in transposed if it is the transpose of theirs."
        )


def _count(shared: dict[str, Any], theirs: list[MetaParameter]) -> None:
    """Their steps for every count of ours, and their sum of rates."""
    first = theirs[0]
    for one in theirs:
        for key, value in one.scalars.items():
            if value.shape or not np.array_equal(value, first.scalars.get(key, ())):
                raise ValueError(
                    f"state/{one.name}/{key} is {value}, that of {first.name} "
                    f"{first.scalars.get(key, 'missing')}: all parameters count alike here. Import "
                    "groups that did not with an optimizer each, through optax.partition."
                )
    steps = first.scalars["step"]
    if steps.dtype.kind not in "iu" or not 0 <= steps < np.iinfo(np.int32).max:
        raise ValueError(f"state/{first.name}/step is {steps}: a number of steps is expected.")
    if not first.scalars.get("train_mode", True):
        raise ValueError(
            f"state/{first.name}/train_mode is false, so that the parameters are averages: save "
            "both after optimizer.train()."
        )
    for key, value in shared.items():
        field = key.rpartition("/")[2]
        if field == "count":
            shared[key] = np.array(steps, value.dtype)
        if field == "weight_sum" and "lr_sum" in first.scalars:
            shared[key] = np.array(first.scalars["lr_sum"], value.dtype)
