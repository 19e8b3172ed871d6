"""Counts what one gradient passes: python -m scripts.maintenance.walk [--devices 8].

While `jax.make_jaxpr` traces one update of `shampoo(1e-3)` on an 8x6 matrix, every call of a Python
function of shampoo_jax is counted: files, distinct functions, calls, and how deep they are nested.
On a mesh the blocks are split over that many fake devices. Prints one JSON line; `--functions`
lists the functions as well. Python 3.11 counts comprehensions as functions, later ones do not.
"""

import argparse
import collections
import json
import os
import sys
from types import FrameType
from typing import Any

Calls = collections.Counter[tuple[str, str]]


def count(function: Any, *args: Any) -> tuple[Calls, int]:
    """Calls of functions of shampoo_jax while `function(*args)` runs, and their greatest depth."""
    import shampoo_jax

    root = os.path.dirname(shampoo_jax.__file__) + os.sep
    calls: Calls = collections.Counter()
    depth = deepest = 0

    def observe(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth, deepest
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith(root):
            return
        depth += 1 if event == "call" else -1
        deepest = max(depth, deepest)
        if event == "call":
            calls[path.removeprefix(root).replace(os.sep, "/"), frame.f_code.co_qualname] += 1

    sys.setprofile(observe)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return calls, deepest


def walk(devices: int) -> tuple[Calls, int]:
    """`count` of tracing one update, on one device or on a mesh."""
    import jax
    import jax.numpy as jnp

    import shampoo_jax

    placement = None
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,))
        placement = shampoo_jax.Placement(mesh, owners="data")
    tx = shampoo_jax.shampoo(1e-3, placement=placement)
    params = {"w": jnp.ones((8, 6))}
    state = tx.init(params)
    return count(jax.make_jaxpr(tx.update), params, state, params)


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--functions", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if args.devices > 1:
        flag = f"--xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    calls, depth = walk(args.devices)
    if args.functions:
        for (path, name), n in sorted(calls.items()):
            print(f"{n:4} {path} {name}")
    figures = {
        "python": ".".join(map(str, sys.version_info[:2])),
        "devices": args.devices,
        "files": len({path for path, _ in calls}),
        "functions": len(calls),
        "calls": calls.total(),
        "depth": depth,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
