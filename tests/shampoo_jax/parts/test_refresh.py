"""Refreshing a part of the blocks at a time: which ones, at what cost, and in which program."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.blocks import Blocks, make_part
from shampoo_jax.parts.refresh import Refresh, in_chunks, refresh_slots
from shampoo_jax.parts.roots import invert_roots
from shampoo_jax.solvers.carried import CarriedBasis
from shampoo_jax.solvers.eigh import TruncatedEigh
from shampoo_jax.solvers.solver import Solver
from shampoo_jax.stacks.blocked import blocked

SIZES = {"a": 7, "b": 3, "c": 1}  # blocks a stack: one more than a multiple of 3, 3, fewer


@dataclasses.dataclass(frozen=True)
class Copy(Solver):
    """Returns the factor as its root, failed where it is `bad`; counts its calls per block."""

    bad: float = -1.0
    called: Any = None  # a function told how many factors each call has

    def init(self, n, d, dtype):
        return jnp.zeros(n, jnp.int32)

    def __call__(self, factor, exponent, state):
        if self.called:
            jax.debug.callback(functools.partial(self.called, len(factor)))
        return factor, factor[:, 0, 0] != self.bad, state + 1


def stacks(value):
    """Stacks of vectors of length 1 whose factors all are this value."""
    tree, begin = {}, 0
    for key, n in SIZES.items():
        blocks = Blocks.of(jnp.zeros((n, 1)), index=jnp.arange(begin, begin + n))
        factor = jnp.full((n, 1, 1), value, jnp.float32)
        tree[key] = dataclasses.replace(blocks, matrices=(factor,))
        begin += n
    return tree


def run(tx, steps):
    """Roots of every step, `[steps, blocks]`, and the last state; the factors are the step."""

    def step(state, t):
        new, state = tx.update(stacks(t), state)
        return state, jnp.concatenate([new[k].matrices[0].ravel() for k in SIZES])

    steps = jnp.arange(1.0, steps + 1)
    state, roots = jax.jit(lambda s: jax.lax.scan(step, s, steps))(tx.init(stacks(0.0)))
    return np.asarray(roots), state


def expected(steps, every, start, bad=None):
    """The schedule by hand: roots of every step, calls and failures per block."""
    roots, calls, failures = (np.full(11, x) for x in (1, 0, 0))  # an identity to begin with
    history = []
    for t in range(1, steps + 1):
        for slot in range(11):
            if t == start or (t > start and slot % every == t % every):
                if t == bad:
                    failures[slot] += 1
                else:
                    roots[slot], calls[slot] = t, calls[slot] + 1
        history.append(roots.copy())
    return np.array(history), calls, failures


@pytest.mark.parametrize(("every", "start"), [(3, None), (3, 5), (4, 4), (2, 3), (12, None)])
def test_each_step_refreshes_the_slots_whose_turn_it_is(every, start):
    first = start or every
    tx = invert_roots(Copy(bad=first + 1.0), every=every, refresh=Refresh(start, stagger=True))
    roots, state = run(tx, first + 3 * every)
    history, calls, failures = expected(first + 3 * every, every, first, first + 1)
    np.testing.assert_array_equal(roots, history)
    for tree, by_hand in ((state.failures, failures), (state.solver, calls)):
        got = np.concatenate([jax.tree.leaves(tree[key])[0] for key in SIZES])
        np.testing.assert_array_equal(got, by_hand)


def test_only_what_is_due_is_computed_and_by_one_program():
    calls, traces = [], []
    tx = invert_roots(Copy(called=calls.append), every=3, refresh=Refresh(stagger=True))

    @jax.jit
    def step(state, t):
        traces.append(t)
        return tx.update(stacks(t), state)[1]

    state, per_step = tx.init(stacks(0.0)), []
    for t in range(1, 10):
        calls.clear()
        state = step(state, jnp.float32(t))
        jax.effects_barrier()
        per_step.append(sorted(calls))
    # Slots 0, 3, 6 | 9 in steps 3, 6, 9; 1, 4 | 7 | 10 in step 7; 2, 5 | 8 in step 8. A stack of 7
    # always computes 3.
    turns = {0: [1, 3], 1: [1, 1, 3], 2: [1, 3]}
    assert per_step[:3] == [[], [], sorted(sum(turns.values(), []))]
    assert per_step[3:] == [turns[t % 3] for t in range(4, 10)]
    assert len(traces) == 1


def test_a_stack_has_one_root_computation_whatever_part_of_it_is_refreshed():
    """7, 3 and 1 blocks of three sizes in turns of 3: one eigh each, as without turns."""
    sizes = {2: 7, 3: 3, 4: 1}
    tree = {
        d: dataclasses.replace(Blocks.of(jnp.ones((n, d))), matrices=(jnp.ones((n, d, d)),))
        for d, n in sizes.items()
    }
    tx = invert_roots(every=3, refresh=Refresh(stagger=True))
    text = jax.jit(tx.update).lower(tree, tx.init(tree)).as_text("hlo")
    assert len(re.findall("lapack_[sd]syevd", text)) == len(sizes)


def test_an_interval_of_one_is_the_plain_program():
    def program(stagger, start):
        tx = invert_roots(refresh=Refresh(start, stagger))
        return str(jax.make_jaxpr(tx.update)(stacks(1.0), tx.init(stacks(0.0))))

    for start in (None, 3):
        assert program(True, start) == program(False, start)


def test_a_traced_interval_cannot_be_staggered():
    with pytest.raises(ValueError, match=r"every=3 with stagger=True must be a Python int.*static"):
        invert_roots(every=jnp.asarray(3), refresh=Refresh(stagger=True))


def test_the_schedule_is_the_same_however_the_slots_are_spread():
    slots, zeros = jnp.arange(5, 17), jnp.zeros((12, 1))

    def share(slots, old, turn):
        return refresh_slots(lambda o: o + 1, slots, turn, 5, old)

    for devices in (1, 2, 4):
        mesh = jax.make_mesh(
            (devices,), ("owner",), (AxisType.Auto,), devices=jax.devices()[:devices]
        )
        spread = jax.shard_map(
            share, mesh=mesh, in_specs=(P("owner"), P("owner"), P()), out_specs=P("owner")
        )
        new = jax.jit(spread)(slots, zeros, jnp.array(6))
        np.testing.assert_array_equal(np.flatnonzero(new[:, 0]), [1, 6, 11])  # slots 6, 11, 16


def test_blocks_are_numbered_over_all_stacks():
    def positions(blocks):
        return {key: b.index for key, b in blocks.items()}

    look = make_part(positions, lambda blocks, state, params: (blocks, positions(blocks)))
    tx = blocked(look, blocking=Blocking(size=4))
    params = {"u": jnp.ones((6, 4)), "v": jnp.ones((4, 4)), "w": jnp.ones((4, 2))}
    _, state = tx.update(params, tx.init(params))
    seen = {key: index.tolist() for key, index in state.inner_state.inner.items()}
    assert seen == {"4x4": [0, 1], "4x2": [2, 3]}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_chunks_change_what_is_computed_at_once_and_nothing_else(size):
    sizes = []

    def f(x, carried):
        sizes.append(len(x))
        return x @ x, carried

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 2)), jnp.float32)
    got, carried = in_chunks(f, size, x, ())
    np.testing.assert_allclose(got, x @ x, rtol=1e-6)
    assert carried == ()
    assert set(sizes) == {size}  # one program for all chunks


def test_roots_are_solved_in_chunks():
    calls = []
    tx = invert_roots(Copy(called=calls.append), refresh=Refresh(chunk=2))
    new, _ = jax.jit(tx.update)(stacks(4.0), tx.init(stacks(0.0)))
    jax.effects_barrier()
    assert sorted(calls) == [1, 2, 2, 2, 2, 2, 2]  # 1, 3 and 7 blocks
    assert {b.matrices[0].sum().item() / len(b.update) for b in new.values()} == {4.0}


@pytest.mark.parametrize("solver", [TruncatedEigh(), CarriedBasis()])
def test_roots_are_stored_in_the_dtype_asked_for_and_used_in_float32(solver):
    factor = jnp.diag(jnp.array([16.0, 81.0]))[None]
    blocks = {"k": dataclasses.replace(Blocks.of(jnp.ones((1, 2))), matrices=(factor,))}
    tx = invert_roots(solver, every=2, refresh=Refresh(stagger=True), root_dtype=jnp.bfloat16)
    step = jax.jit(tx.update)
    _, state = step(blocks, tx.init(blocks))
    new, after = step(blocks, state)
    assert jax.typeof(state.roots["k"][0]) == jax.typeof(after.roots["k"][0])
    assert after.roots["k"][0].dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(state.solver)} <= {"float32"}
    assert new["k"].matrices[0].dtype == jnp.float32
    np.testing.assert_allclose(
        new["k"].matrices[0][0], np.diag([1 / 4, 1 / 9]), rtol=2**-8, atol=1e-6
    )
