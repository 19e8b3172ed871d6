"""The numpy archive of a state of Meta's distributed_shampoo: written from torch's, read with care.

Layout, one array a key, numbers alone:

  params/NAME                                              the parameter, not needed for the state
  state/NAME/step                                          steps taken, equal for all parameters
  state/NAME/lr_sum, state/NAME/train_mode                 of iterate averaging
  state/NAME/block_I/filtered_grad, .../adagrad            first moment; V of graft or direction
  state/NAME/block_I/momentum_buffer, .../weight_buffer    momentum; z of iterate averaging
  state/NAME/block_I/shampoo/factor_matrices/K             factors, inverse roots of them
  state/NAME/block_I/shampoo/inv_factor_matrices/K
  state/NAME/block_I/shampoo/factor_matrices_eigenvectors/K, .../factor_matrices_eigenvalues/K
  state/NAME/block_I/shampoo/corrected_eigenvalues         second moment in the eigenbasis

Blocks I are counted row by row over the merged parameter, K counts the dimensions that have a
factor. Factors and inverse roots are `[d, d]`, or their upper triangles row by row, `[d(d+1)/2]`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

SHAMPOO = "shampoo/"
OF_BLOCKS = ("filtered_grad", "adagrad", "momentum_buffer", "weight_buffer")
OF_FACTORS = (
    *("factor_matrices", "inv_factor_matrices"),
    *("factor_matrices_eigenvectors", "factor_matrices_eigenvalues"),
)
CORRECTED = "corrected_eigenvalues"
OF_GROUPS = ("step", "lr_sum", "train_mode")
_BLOCK = re.compile(
    rf"block_(\d{{1,9}})/(?:({'|'.join(OF_BLOCKS)})|{SHAMPOO}({CORRECTED}|(?:{'|'.join(OF_FACTORS)})/\d+))"
)

Arrays = dict[str, np.ndarray]


class MetaParameter(NamedTuple):
    """Their state of one parameter."""

    name: str
    scalars: Arrays  # of OF_GROUPS
    blocks: list[Arrays]  # by field, "factor_matrices/0" among them

    def key(self, block: int, field: str) -> str:
        """Where a field of a block is in the archive."""
        inside = field if field in OF_BLOCKS else SHAMPOO + field
        return f"state/{self.name}/block_{block}/{inside}"


def meta_archive(saved: Mapping[str, Any]) -> Arrays:
    """Flattens parameters and state of Meta's `DistributedShampoo` into the numpy archive.

    In the program that trained, `torch.save({"params": dict(model.named_parameters()), "state":
    optimizer.state_dict()["state"]}, path)` makes a file that `torch.load(path, weights_only=True)`
    reads: numbers alone, since options are objects, which a safe reader refuses.

    Args:
      saved: `"params"`, arrays or tensors by name in the order in which the optimizer was given
        them, and `"state"`, the state of its state dict, by number or by name. Tensors have to be
        on this host, whole.

    Returns:
      The archive, to be written by `np.savez_compressed(path, **archive)`: `params/NAME` and
      `state/NAME/...`. What is stored in bfloat16 becomes float32.

    Raises:
      ValueError: Another structure, or a number or name that is no parameter's.

    Example:
      >>> import numpy as np
      >>> from shampoo_jax import meta_archive
      >>> state = {0: {"step": np.array(1), "block_0": {"filtered_grad": np.ones(2)}}}
      >>> sorted(meta_archive({"params": {"w": np.zeros(2)}, "state": state}))
      ['params/w', 'state/w/block_0/filtered_grad', 'state/w/step']
    """
    parts = [saved.get(key) if isinstance(saved, Mapping) else None for key in ("params", "state")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(
            'a dictionary {"params": {name: tensor}, "state": optimizer.state_dict()["state"]} is '
            f"expected, not {list(saved) if isinstance(saved, Mapping) else type(saved).__name__}."
        )
    params: Any = parts[0]
    states: Any = parts[1]
    names = {**dict(enumerate(params)), **{name: name for name in params}}
    archive = {f"params/{name}": _array(value) for name, value in params.items()}
    for key, entry in states.items():
        if key not in names:
            raise ValueError(
                f'"state" has {key!r}, "params" has {list(params)}: name the parameters in the '
                "order in which the optimizer was given them."
            )
        leaves = _flat(entry, f"state/{names[key]}")
        archive |= {path: _array(value) for path, value in leaves}
    return archive


def _flat(entry: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(entry, Mapping):
        yield path, entry
        return
    for key, value in entry.items():
        yield from _flat(value, f"{path}/{key}")


def _array(value: Any) -> np.ndarray:
    """A tensor of torch or anything that numpy takes."""
    if hasattr(value, "detach"):
        value = value.detach()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    return np.asarray(value)


def read_archive(archive: Mapping[str, Any]) -> dict[str, MetaParameter]:
    """Their state by the archive's names, after a look at every key and number.

    Args:
      archive: What `np.load(path, allow_pickle=False)` gives, or the dictionary itself.

    Raises:
      ValueError: A key that is not in the layout, a block or step that is missing, an array of no
        numbers, or a number that is not finite.
    """
    found: dict[str, MetaParameter] = {}
    blocks: dict[str, dict[int, Arrays]] = {}
    for key in archive:
        name, inside = _split(key)
        value = np.asarray(archive[key])
        if value.dtype.kind not in "biuf" or not np.isfinite(value).all():
            raise ValueError(
                f"{key} of dtype {value.dtype} holds what is no finite number: save the state of "
                "a run that did not diverge, as numbers."
            )
        if not inside:  # a parameter
            continue
        entry = found.setdefault(name, MetaParameter(name, {}, []))
        if match := _BLOCK.fullmatch(inside):
            block = blocks.setdefault(name, {}).setdefault(int(match[1]), {})
            block[match[2] or match[3]] = value
        else:
            entry.scalars[inside] = value
    for name, entry in found.items():
        own = blocks.get(name, {})
        missing = ["step"] * ("step" not in entry.scalars)
        missing += [f"block_{i}" for i in range(len(own)) if i not in own]
        if missing:
            raise ValueError(
                f"state/{name}/{missing[0]} is missing: of a run on several processes, gather the "
                "state of all of them into one archive."
            )
        entry.blocks.extend(own[i] for i in sorted(own))
    return found


def _split(key: str) -> tuple[str, str]:
    """Name, and what follows it; nothing for parameters."""
    kind, _, rest = key.partition("/")
    if kind == "params" and rest:
        return rest, ""
    name, _, last = rest.rpartition("/")
    start = re.search(r"/block_\d+/", rest)
    if start:
        name, last = rest[: start.start()], rest[start.start() + 1 :]
    if kind == "state" and name and (last in OF_GROUPS or _BLOCK.fullmatch(last)):
        return name, last
    raise ValueError(
        f"{key!r} is no key of an archive of Meta's state: see docs/migration.md for the layout, "
        "and meta_archive, which writes it."
    )
