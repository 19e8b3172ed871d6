"""Recordings of methods with something changed in them, which a replay has to notice."""

import json
from pathlib import Path

import numpy as np

FILES = Path(__file__).parents[1] / "golden" / "methods"


def changed(tmp_path, name, arrays=None, **entries):
    """A copy of a file with other arrays, or entries of its config; `a__b` is b within a."""
    with np.load(FILES / f"{name}.npz") as z:
        found = dict(z)
    config = json.loads(str(found["config"]))
    for key, value in entries.items():
        *parents, last = key.split("__")
        entry = config
        for parent in parents:
            entry = entry[parent]
        entry[last] = value
    path = tmp_path / f"{name}.npz"
    np.savez(path, **found | (arrays or {}) | {"config": np.array(json.dumps(config))})
    return path
