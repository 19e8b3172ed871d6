"""Decompositions of several stacks on CPU with nothing set in the environment.

Batched decompositions of different shapes in one program can starve XLA's thread pool on a machine
with few cores: no error, 0 % CPU, for ever. The rest of the suite raises NPROC and cannot see it.
"""

import os
import subprocess
import sys

SCRIPT = """
import warnings
import jax, jax.numpy as jnp
import shampoo_jax

assert len(jax.devices()) == 1
params = {
    f"{m}x{n}-{i}": jax.random.normal(jax.random.key(i), (m, n))
    for m, n in SHAPES for i in range(4)
}
tx = shampoo_jax.scale_by_shampoo()
state = jax.jit(tx.init)(params)
step = jax.jit(tx.update)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        updates, state = step(params, state)
        jax.block_until_ready(updates)
assert all(jnp.isfinite(u).all() for u in updates.values())
print(sum("OPENBLAS_NUM_THREADS=1" in str(w.message) for w in caught), "warning")
"""
SHAPES = [(96, 64), (80, 48), (72, 40)]


def test_several_stacks_with_a_plain_environment():
    cleared = ("NPROC", "XLA_FLAGS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in cleared}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("SHAPES", repr(SHAPES))],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1 warning"  # it names the remedy, once
