"""An update on a mesh is the update of one device: every solver, every layout, in float64.

docs/sharding.md has every optimizer on every mesh; here each of both occurs at least once.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from scripts.maintenance import sharding_equality as se

# Steps 1 to 7 of interval 3 are a first refresh and all three shares.
STEPS = {"eigh, ragged, staggered": 7, "carried QR, staggered": 7, "SOAP": 7, "KL-Shampoo": 7}
# Enough parameters to pad a stack, split batch axes, and leave something to AdamW.
FEW = ("q0", "q1", "q2", "layers", "bias", "scale")  # in two stacks


def of_step(names, seed):
    return {k: x for k, x in se.gradients(seed).items() if k in names}


@functools.cache
def alone(optimizer, names):
    grads = functools.partial(of_step, names)
    tx = {optimizer: se.OPTIMIZERS[optimizer](None)}
    return se.train(tx, None, STEPS.get(optimizer, 4), grads)[0]


def error(mesh, optimizer, names=FEW):
    with jax.enable_x64(True):
        expected, placement = alone(optimizer, names), se.placement_of(mesh)
        with jax.set_mesh(placement.mesh):
            grads = functools.partial(of_step, names)
            tx = {optimizer: se.OPTIMIZERS[optimizer](placement)}
            got, states = se.train(tx, placement, len(expected), grads)
    large = [x for x in jax.tree.leaves(states) if x.size >= 8 * 16 and x.dtype == jnp.float64]
    shares = [x.addressable_shards[0].data.nbytes * placement.count / x.nbytes for x in large]
    assert large and set(shares) == {1.0}  # one owner's
    return se.worst_errors(got, expected)[optimizer]


@pytest.mark.parametrize(
    "mesh",
    [
        *("replicated", "one device", "rows and columns, stacks of 16"),
        *("rows, explicit", "split experts, explicit"),
    ],
)
def test_every_way_of_a_block_changes_no_number(mesh):
    assert error(mesh, "eigh") < 1e-8


@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [
        ("replicated", "eigh, ragged, staggered"),
        ("rows and columns", "eigh, ragged, staggered"),
        ("columns", "full KL factors"),
    ],
)
def test_blocks_cut_from_a_split_parameter(mesh, optimizer):
    assert error(mesh, optimizer, ("q0", "up", "down", "empty")) < 1e-8


@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [
        ("replicas of rows", "polynomial"),
        ("rows and columns", "carried QR"),
        ("split layers", "carried QR, staggered"),
        ("replicated, stacks of 24", "higher-order Newton"),
        ("a group of owners", "SOAP"),
        ("rows and columns, explicit", "KL-Shampoo"),
        ("split experts", "one-sided"),
    ],
)
def test_every_solver_computes_the_same_numbers(mesh, optimizer):
    assert error(mesh, optimizer) < 1e-8


def test_float32_with_a_gap_at_the_cutoff():
    cut = {"eigh": se.CUT["eigh"]}
    [(_, errors)] = se.compare(["rows and columns"], cut, se.gapped, steps=3)
    assert errors["eigh"] < 1e-4
