"""Time to compile a step and its memory.

    python -m scripts.maintenance.compile_size [--layers L] [--width D]

Compares one root computation per block shape and side with one per factor, on the weight matrices
of a GPT-2. Nothing is executed; prints one JSON line for each. Memory is XLA's account for
gradients, parameters, state (donated) and temporary arrays.
"""

import argparse
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_jax import Blocking, Refresh, explain, scale_by_shampoo

# What XLA calls for a symmetric eigendecomposition: LAPACK on CPU, cuSolver on GPU.
EIGH_CALL = re.compile(r'custom_call_target="([^"]*syev|shampoo_jax_(eigh|truncated_root))')


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
      `trace_s` (Python to StableHLO), `compile_s`, `eigh_calls` in the compiled program, and
      `temporary_mb` and `peak_mb` of memory.
    """
    state = jax.eval_shape(tx.init, params)
    begin = time.perf_counter()
    lowered = jax.jit(tx.update, donate_argnums=1).lower(params, state, params)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert memory is not None  # every backend of jax tells it for a whole program
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "trace_s": round(traced - begin, 2),
        "compile_s": round(done - traced, 2),
        "eigh_calls": len(EIGH_CALL.findall(text)),
        "temporary_mb": memory.temp_size_in_bytes // 10**6,
        "peak_mb": (memory.temp_size_in_bytes + held) // 10**6,
    }


def main() -> None:
    """Prints a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--block-size", type=int, default=None)
    args = parser.parse_args()
    params, blocking = gpt2_matrices(args.layers, args.width), Blocking(args.block_size)
    expected = explain(params, scale_by_shampoo(blocking=blocking)).root_batches
    variants: dict[str, dict[str, Any]] = {
        "stacked": {},
        "stacked, chunk=8": {"refresh": Refresh(chunk=8)},
        "stacked, polynomial": {"solver": "polynomial"},
        "stacked, polynomial, chunk=8": {"solver": "polynomial", "refresh": Refresh(chunk=8)},
    }
    for name, options in variants.items():
        figures = measure(scale_by_shampoo(blocking=blocking, **options), params)
        print(json.dumps({"variant": name, "root_batches": expected, **figures}), flush=True)
    apart = measure(one_root_per_factor(params, blocking=blocking), params)
    print(json.dumps({"variant": "one eigh per factor", **apart}))


if __name__ == "__main__":
    main()
