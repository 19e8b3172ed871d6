"""The state that a recording of the newer records begins with."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import shampoo_jax

Data = Mapping[str, np.ndarray]

# Of every method the recorded arrays by field of a state: of whole matrices, and of their outputs'
# and inputs' sides. Recorded weights are (outputs, inputs), kernels the other way round.
WHOLE = {
    "soap_muon": {"mu": "state0_momentum", "nu": "state0_exp_avg_sq"},
    "klsoap": {"mu": "state0_exp_avg", "nu": "state0_exp_avg_sq"},
    "pmuon": {},
    "muonh": {},
}
SIDES: dict[str, dict[str, tuple[str, str, Callable[[Any], Any]]]] = {
    "soap_muon": {
        "factors": ("state0_row_gg", "state0_col_gg", np.asarray),
        "bases": ("state0_q_row", "state0_q_col", np.asarray),
    },
    "klsoap": {
        "factors": ("state0_GG0", "state0_GG1", np.asarray),
        "bases": ("state0_Q0", "state0_Q1", np.asarray),
        # Tracked here, where the source tracks their inverse square roots.
        "eigenvalues": ("state0_eig0", "state0_eig1", lambda e: np.asarray(e, np.float64) ** -2),
    },
    "pmuon": {
        "solver": ("normal_out", "normal_in", lambda x: np.linalg.qr(np.asarray(x, np.float64))[0])
    },
    "muonh": {},
}


def started(
    state: Any, params: Any, config: dict[str, Any], paths: Mapping[str, str], data: Data
) -> Any:
    """A state with the recorded arrays in their places, and counts of steps where they count.

    Args:
      state: Of the optimizer, before any step.
      params: The parameters.
      config: Of the file.
      paths: Recorded names by path of the parameter.
      data: Arrays of the file.
    """
    tree = shampoo_jax.state_to_tree(state, params)
    done = max((config.get("soap_step0") or config.get("step0") or {"": -1}).values())
    for path, fields in tree["parameters"].items():
        for field, rows in fields.items():
            name, parts = paths.get(path), field.split("/")
            found = None if name is None else _recorded(config["method"], parts, name, data)
            if found is None:
                continue
            if found.shape != rows.shape[1:]:
                raise ValueError(f"state of {name} has shape {found.shape}, not {rows.shape[1:]}.")
            fields[field] = np.asarray(found, rows.dtype)[None]
            for kept in {"bases", "eigenvalues"} & set(parts):
                count = "/".join([*parts[: parts.index(kept)], "count"])
                if done >= 0:  # the first gradient, which only fills the state, is over
                    tree["shared"][count] = np.asarray(done + 1, np.int32)
    return shampoo_jax.tree_to_state(tree, state, params)


def _recorded(method: str, parts: list[str], name: str, data: Data) -> Any:
    """What is recorded of a field of the state, as blocks have it; None if nothing is."""
    stack = next((tuple(map(int, p.split("x"))) for p in parts if p.replace("x", "").isdigit()
                  and "x" in p), None)  # fmt: skip
    if stack is None:
        return None
    outputs, inputs = data[f"init__{name}"].shape
    turned = stack != (inputs, outputs)  # blocks may be the transposes of kernels
    for field, array in WHOLE[method].items():
        if field in parts and f"{array}__{name}" in data:
            x = data[f"{array}__{name}"]
            return x if turned else x.T
    for field, (out, into, convert) in SIDES[method].items():
        side = (into, out)[int(parts[-1]) ^ turned] if field in parts else ""
        if f"{side}__{name}" in data:
            return convert(data[f"{side}__{name}"])
    return None
