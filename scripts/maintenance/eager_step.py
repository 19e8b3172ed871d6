"""A step outside jit, by alias: python -m scripts.maintenance.eager_step [--steps 100].

On the README's tree of three leaves, beside Optax's AdamW and Muon: compilations from the second
step on, milliseconds a step (median), and by how much the process's memory grew from step 10 to the
last one. One JSON line an optimizer; run it alone on the machine.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax

import shampoo_jax

ALIASES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "shampoo": shampoo_jax.shampoo,
    "soap": shampoo_jax.soap,
    "kl_shampoo": shampoo_jax.kl_shampoo,
    "kl_soap": shampoo_jax.kl_soap,
    "one_sided_shampoo": shampoo_jax.one_sided_shampoo,
    "optax.adamw": optax.adamw,
    "optax.contrib.muon": optax.contrib.muon,
}
PARAMS = {"embed": jnp.ones((512, 64)), "w": jnp.ones((64, 64)), "b": jnp.zeros(64)}
COMPILED = "/jax/core/compile/backend_compile_duration"


def resident() -> int:
    """Bytes of memory that the process holds now, or at most so far where that is not told."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(tx: optax.GradientTransformation, steps: int) -> dict[str, Any]:
    """Figures of so many eager steps with gradients that change."""
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    gradients = [
        jax.tree.map(lambda p: jax.random.normal(jax.random.key(i), p.shape), PARAMS)  # noqa: B023
        for i in range(4)
    ]
    state, seconds, before, first = tx.init(PARAMS), [], 0, 0
    for step in range(steps):
        begin = time.perf_counter()
        _, state = jax.block_until_ready(tx.update(gradients[step % 4], state, PARAMS))
        seconds.append(time.perf_counter() - begin)
        first = first if step else len(compilations)
        before = resident() if step == 9 else before
    return {
        "first_step_s": round(seconds[0], 2),
        "later_compilations": len(compilations) - first,
        "step_ms": round(1e3 * statistics.median(seconds[1:]), 2),
        "growth_kb": (resident() - before) // 1024,
    }


def main() -> None:
    """Prints one line an optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    for name, alias in ALIASES.items():
        print(json.dumps({"optimizer": name, **measure(alias(1e-3), steps)}), flush=True)


if __name__ == "__main__":
    main()
