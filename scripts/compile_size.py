"""Seconds to trace and compile a step: python -m scripts.compile_size [--layers L] [--width D].

Compares one root computation per block shape and side with one per factor, on the weight matrices
of a GPT-2. Nothing is executed; prints one JSON line for each.
"""

import argparse
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax import scale_by_shampoo
from shampoo_jax.explanation import explain

# What XLA calls for a symmetric eigendecomposition: LAPACK on CPU, cuSolver on GPU.
EIGH_CALL = re.compile(r'custom_call_target="[^"]*syev')


def gpt2_matrices(layers: int, width: int) -> dict[str, Any]:
    """Shapes of a GPT-2's hidden weight matrices: q, k, v, attention output, fc and proj.

    Args:
      layers: Number of transformer blocks.
      width: Residual width; the feed-forward layer is four times as wide.

    Returns:
      `{"blocks": {"0": {"q": float32[width, width], ...}, ...}}` of shape structs.
    """
    square, tall = (width, width), (4 * width, width)
    shapes = {"q": square, "k": square, "v": square, "o": square, "fc": tall[::-1], "proj": tall}
    layer = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return {"blocks": {str(i): dict(layer) for i in range(layers)}}


def one_root_per_factor(params: Any, **options: Any) -> optax.GradientTransformation:
    """Shampoo with every parameter on its own, as a package without stacks compiles it."""
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    return optax.partition(
        {name: scale_by_shampoo(**options) for name in names},
        lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: jax.tree_util.keystr(p), tree),
    )


def measure(tx: optax.GradientTransformation, params: Any) -> dict[str, Any]:
    """Traces and compiles one update.

    Args:
      tx: Transformation of trees like `params`.
      params: Shape structs.

    Returns:
      `trace_s` (Python to StableHLO), `compile_s`, and `eigh_calls` in the compiled program.
    """
    state = jax.eval_shape(tx.init, params)
    begin = time.perf_counter()
    lowered = jax.jit(tx.update).lower(params, state, params)
    traced = time.perf_counter()
    text = lowered.compile().as_text() or ""
    done = time.perf_counter()
    return {
        "trace_s": round(traced - begin, 2),
        "compile_s": round(done - traced, 2),
        "eigh_calls": len(EIGH_CALL.findall(text)),
    }


def main() -> None:
    """Prints the two lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    params = gpt2_matrices(args.layers, args.width)
    stacked = measure(scale_by_shampoo(block_size=None), params)
    expected = explain(params, scale_by_shampoo, block_size=None).root_batches
    print(json.dumps({"variant": "stacked", **vars(args), "root_batches": expected, **stacked}))
    apart = measure(one_root_per_factor(params, block_size=None), params)
    print(json.dumps({"variant": "one eigh per factor", **vars(args), **apart}))


if __name__ == "__main__":
    main()
