"""Temporary memory of a step: python -m scripts.maintenance.memory [--against FOLDER] [NAME ...].

For twelve matrices of 2048 x 2048 (`squares`) and 12 layers of BERT size (`bert`), what XLA reports
for one update with donated gradients and state, beside what `explain` says. One device, shapes
alone, nothing is executed. NAME is an optimizer, `soap` by default. FOLDER is one from which
`soap_jax` (haydn-jones/SOAP_JAX, with `jaxtyping`) can be imported, to be measured in the same run.
Prints one JSON line each.
"""

import argparse
import importlib
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shampoo_jax
from scripts.maintenance.compile_size import gpt2_matrices

NAMES = ("soap", "kl_soap", "kl_shampoo", "shampoo", "one_sided_shampoo")
CASES = {
    "squares": lambda: {
        str(i): {"kernel": jax.ShapeDtypeStruct((2048, 2048), jnp.float32)} for i in range(12)
    },
    "bert": lambda: gpt2_matrices(12, 768),
}


def temporary_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """XLA's account of one update of such parameters, gradients and state donated."""
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    memory = update.lower(params, state, params).compile().memory_analysis()
    assert memory is not None  # a platform that tells none
    return memory.temp_size_in_bytes


def row(tx: optax.GradientTransformation, params: Any, own: bool) -> dict[str, Any]:
    """Figures of one optimizer, with the estimate where it is one of this package."""
    found = temporary_bytes(tx, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    figures = {"temporary_mib": round(found / 2**20, 1), "of_parameters": round(found / size, 2)}
    if own:
        figures["explain"] = round(shampoo_jax.explain(params, tx).temporary_bytes / found, 3)
    return figures


def main() -> None:
    """Prints a line for each case and optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--against", metavar="FOLDER", help="holds soap_jax")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"NAME={unknown[0]} is unknown: choose from {', '.join(NAMES)}.")
    makers = {name: getattr(shampoo_jax, name) for name in args.names or NAMES[:1]}
    if args.against:
        sys.path.insert(0, args.against)
        makers["SOAP_JAX"] = importlib.import_module("soap_jax").soap
    for case, shapes in CASES.items():
        for name, make in makers.items():
            figures = row(make(1e-3), shapes(), name in NAMES)
            print(json.dumps({"case": case, "optimizer": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
