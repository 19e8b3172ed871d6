"""Programs for hardware that is not here, by its compilers: `make test-compilers`."""

import json
import os
import subprocess
import sys

import pytest

from nanogpt.lab.plan import environment

pytestmark = pytest.mark.compilers

TRACK3 = ("--layers", "1", "--data.microbatch-rows", "128", "--programs", "train")
PRODUCTS = ("--matrices.solver", "polynomial", "--matrices.cutoff", "relative")


def planned(target, *words):
    command = [sys.executable, "-m", "nanogpt", "plan", "--json", "--target", target, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["programs"]["train"]


def test_shampoo_by_products_on_eight_h100():
    train = planned("h100:8", "--optimizer", "shampoo", *TRACK3, *PRODUCTS)
    assert train["short"] == 0 and train["best_s"] < train["worst_s"]
    assert train["calls"]["__cudnn$fmhaSoftmax"] == 1
    # Nothing is left to the platform's own choice of precision: XLA's partitioner forgets the
    # algorithm of a product of single matrices, of which a device has one a stack here.
    assert {"bf16", "f32 high"} <= train["flops"].keys() and "f32" not in train["flops"]
    number, size = train["exchanges"]["all-gather"]
    assert number <= 8 and size < 1e9
    assert train["overlapped"].keys() <= train["exchanges"].keys()


def test_muon_sends_no_products_of_its_iteration():
    train = planned("h100:8", "--optimizer", "muon_track3", *TRACK3)
    assert sum(number for number, _ in train["exchanges"].values()) <= 16
    assert {"bf16", "bf16 highest"} == train["flops"].keys()


@pytest.mark.parametrize("target", ["a100:8", "b200:8"])
def test_shampoo_by_eigh_on_other_gpus(target):
    train = planned(target, "--optimizer", "shampoo", *TRACK3)
    assert train["short"] == 0
    assert train["calls"]["cusolver_syevd_ffi"] > 0


UPDATE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax, shampoo_jax
name, solver = sys.argv[1:]
target = shampoo_jax.target_devices(name)
mesh = jax.sharding.Mesh(np.array(target.devices), ("data",))
placement = shampoo_jax.Placement(mesh, "data")
tx = shampoo_jax.shampoo(0.1, solver=solver, placement=placement) if solver else optax.adam(0.1)
params = {str(i): jax.ShapeDtypeStruct((256, 256), jnp.float32) for i in range(8)}
found = shampoo_jax.compile_update(tx, params, target, mesh=mesh)
print(json.dumps([found.short, found.program.flops, found.program.exchanges]))
"""


def updated(target, solver):
    command = [sys.executable, "-c", UPDATE, target, solver]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | environment(target)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_polynomial_roots_on_a_tpu():
    short, flops, exchanges = updated("v5e:2x4", "polynomial")
    assert short == 0 and {"f32 highest", "f32 high", "bf16"} <= flops.keys() and exchanges


@pytest.mark.parametrize("target", ["v4:2x2x1", "v5p:2x2x2", "v6e:4x4"])
def test_an_optimizer_of_optax_on_other_tpus(target):
    short, flops, exchanges = updated(target, "")
    assert (short, flops, exchanges) == (0, {}, {})
