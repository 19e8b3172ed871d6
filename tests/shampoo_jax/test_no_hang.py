"""Decompositions of several stacks on CPU with nothing set in the environment.

Batched decompositions of different shapes in one program can starve XLA's thread pool on a machine
with few cores: no error, 0 % CPU, for ever. The rest of the suite raises NPROC and cannot see it.
Neither can it see what becomes of a program that is under way when its process ends: it calls
Python, whose lock is then held by who waits for it.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import warnings
import jax, jax.numpy as jnp
import shampoo_jax

assert len(jax.devices()) == DEVICES
params = {
    f"{m}x{n}-{i}": jax.random.normal(jax.random.key(i), (m, n))
    for m, n in SHAPES for i in range(4)
}
mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
tx = shampoo_jax.scale_by_shampoo(placement=shampoo_jax.Placement(mesh, owners="x"))
state = jax.jit(tx.init)(params)
step = jax.jit(tx.update)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        updates, state = step(params, state)
        jax.block_until_ready(updates)
assert all(jnp.isfinite(u).all() for u in updates.values())
print(sum("OPENBLAS_NUM_THREADS=1" in str(w.message) for w in caught), "warnings")


def leave():
    for _ in range(3):
        step(params, state)


leave()
"""
# A size of each shape is decomposed by threads of our own, the other one by XLA.
SHAPES = [(96, 64), (80, 48), (72, 40)]


@pytest.mark.parametrize("devices", [1, 8])
def test_several_stacks_with_a_plain_environment(tmp_path, devices):
    cleared = (
        "JAX_ENABLE_COMPILATION_CACHE",
        "NPROC",
        "XLA_FLAGS",
        "OPENBLAS_NUM_THREADS",
        "OMP_NUM_THREADS",
    )
    environment = {k: v for k, v in os.environ.items() if k not in cleared}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    script = SCRIPT.replace("SHAPES", repr(SHAPES)).replace("DEVICES", str(devices))
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,  # it takes 8 s of one core
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0 warnings"  # nothing is asked of the environment
    # A program with a callback of jax would not be kept for the next process.
    assert any(path.name.startswith("jit_update") for path in tmp_path.iterdir())
