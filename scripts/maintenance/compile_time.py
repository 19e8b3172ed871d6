"""Seconds to compile one update, and its memory: python -m scripts.maintenance.compile_time.

Cases, all or those named: `ragged` (112 matrices of eight shapes whose sides no block divides),
`resnet50`, `gpt2` (the matrices of 124M parameters), `llama7b` (trace and lower alone), `bert_soap`
(12 layers of BERT size with SOAP). One device, shapes alone, nothing is executed; the state is
donated. Prints one JSON line a case: seconds to trace, lower and compile by the clock and, in all,
by the processors, and the temporary memory of the program.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shampoo_jax
from scripts.maintenance.compile_size import gpt2_matrices

Shapes = dict[str, Any]


def ragged() -> Shapes:
    """14 matrices of each of eight shapes, none of whose sides is a multiple of 1024."""
    sides = (1100, 1300, 1500, 1700, 1900, 2100, 2300, 2500)
    sizes = [(a, b) for a, b in zip(sides, (*sides[3:], *sides[:3]), strict=True)]
    return {f"{a}x{b}": {str(i): _matrix(a, b) for i in range(14)} for a, b in sizes}


def resnet50() -> Shapes:
    """Kernels, norms and head of ResNet-50 as Flax lays them out."""
    params: Shapes = {"conv_init": {"kernel": _struct(7, 7, 3, 64)}, "bn_init": _norm(64)}
    width, channels = 64, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            name, out = f"stage{stage}_block{block}", 4 * width
            params[name] = {
                "conv0": {"kernel": _struct(1, 1, channels, width)},
                "conv1": {"kernel": _struct(3, 3, width, width)},
                "conv2": {"kernel": _struct(1, 1, width, out)},
                **{f"bn{i}": _norm(n) for i, n in enumerate((width, width, out))},
            }
            if block == 0:
                params[name]["conv_proj"] = {"kernel": _struct(1, 1, channels, out)}
                params[name]["bn_proj"] = _norm(out)
            channels = out
        width *= 2
    return params | {"head": {"kernel": _matrix(2048, 1000), "bias": _struct(1000)}}


def llama7b() -> Shapes:
    """The hidden matrices of 32 layers."""
    d, hidden = 4096, 11008
    square = {name: _matrix(d, d) for name in ("q", "k", "v", "o")}
    layer = square | {"gate": _matrix(d, hidden), "up": _matrix(d, hidden)}
    return {str(i): layer | {"down": _matrix(hidden, d)} for i in range(32)}


# Name -> shapes, optimizer, whether the program is compiled.
CASES: dict[str, tuple[Callable[[], Shapes], Callable[[], Any], bool]] = {
    "ragged": (ragged, shampoo_jax.scale_by_shampoo, True),
    "resnet50": (resnet50, lambda: shampoo_jax.shampoo(0.1), True),
    "gpt2": (lambda: gpt2_matrices(12, 768), shampoo_jax.scale_by_shampoo, True),
    "llama7b": (llama7b, shampoo_jax.scale_by_shampoo, False),
    "bert_soap": (lambda: gpt2_matrices(12, 768), shampoo_jax.scale_by_soap, True),
}


def measure(params: Shapes, tx: optax.GradientTransformation, compiled: bool) -> dict[str, Any]:
    """Traces, lowers and, if asked to, compiles one update.

    Args:
      params: Shape structs.
      tx: Transformation of such trees.
      compiled: Whether to go as far.

    Returns:
      `trace_s`, `lower_s`, `compile_s`, `processor_s`, `temporary_mb`; the last and `compile_s` are
      None where nothing is compiled.
    """
    state = jax.eval_shape(tx.init, params)
    begin, used = time.perf_counter(), time.process_time()
    traced = jax.jit(tx.update, donate_argnums=1).trace(params, state, params)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    program = lowered.compile() if compiled else None
    done = time.perf_counter()
    memory = None if program is None else program.memory_analysis()
    return {
        "trace_s": round(after_trace - begin, 2),
        "lower_s": round(after_lower - after_trace, 2),
        "compile_s": round(done - after_lower, 2) if compiled else None,
        "processor_s": round(time.process_time() - used, 1),
        "temporary_mb": None if memory is None else memory.temp_size_in_bytes // 10**6,
    }


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    args = parser.parse_args()
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"CASE={unknown[0]} is unknown: choose from {', '.join(CASES)}.")
    for name in args.cases or CASES:
        shapes, make, compiled = CASES[name]
        print(json.dumps({"case": name, **measure(shapes(), make(), compiled)}), flush=True)


def _struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _matrix(rows: int, columns: int) -> Any:
    return {"kernel": _struct(rows, columns)}


def _norm(n: int) -> Any:
    return {"scale": _struct(n), "bias": _struct(n)}


if __name__ == "__main__":
    main()
