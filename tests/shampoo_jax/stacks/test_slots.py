"""Blocks over owners: every block has one slot, and none waits long for the busiest owner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shampoo_jax.blocks.plan import make_plan
from shampoo_jax.parts.refresh import refresh_slots
from shampoo_jax.stacks.balance import greedy, makespan
from shampoo_jax.stacks.layout import StackLayout
from shampoo_jax.stacks.placement import Placement
from shampoo_jax.stacks.slots import balanced, in_turn

STACKS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4)


def named(values):
    return {f"s{i}": v for i, v in enumerate(values)}


@given(STACKS, st.integers(1, 8))
def test_every_block_has_one_slot(stacks, owners):
    counts, costs = (named(x) for x in zip(*stacks, strict=True))
    slots, plain = balanced(counts, costs, owners), in_turn(counts, owners, owners)
    begin = 0
    for key, order in slots.order.items():
        assert len(order) == len(plain.order[key])
        assert order[order >= 0].tolist() == list(range(counts[key]))
        runs = (order >= 0).reshape(owners, -1)
        assert (np.diff(runs.astype(int), axis=1) <= 0).all()  # blocks first in every run
        assert (slots.index[key][order >= 0] == begin + np.arange(counts[key])).all()
        assert (np.diff(slots.index[key].reshape(owners, -1), axis=1) == 1).all()
        begin += counts[key]


@given(STACKS, st.integers(1, 8))
def test_the_busiest_owner_has_little_more_than_the_mean(stacks, owners):
    counts, costs = zip(*stacks, strict=True)
    lengths = [n + -n % owners for n in counts]
    busiest = makespan(costs, greedy(costs, counts, owners, lengths))
    work = np.dot(costs, counts)
    assert busiest <= sum(c * n / owners for c, n in zip(costs, lengths, strict=True))
    # Whoever got the last block had then no more than the others, but for those without a slot.
    if len(stacks) == 1:
        assert busiest == costs[0] * -(-counts[0] // owners)
    assert busiest >= work / owners - 1e-9


def test_fewer_blocks_than_owners_do_not_meet():
    # 124M parameters in blocks of 1024 on 64 owners: 48 of 768x768, 72 of 1024x768.
    costs = {"768x768": 2 * 768**3, "1024x768": 768**3 + 1024**3}
    slots = balanced({"768x768": 48, "1024x768": 72}, costs, 64)
    each = slots.computed()
    assert {tuple(share.values()) for share in each} == {(0, 2), (1, 1), (0, 1)}
    busiest = max(sum(costs[k] * n for k, n in share.items()) for share in each)
    assert busiest == pytest.approx(2 * costs["1024x768"])


def test_little_waiting_changes_nothing():
    slots = balanced({"a": 95}, {"a": 1.0}, 8)
    assert not slots.skips and slots.holds("a") is None
    assert slots.order["a"].tolist() == [*range(95), -1]


def test_zero_blocks_meet_other_blocks_on_the_devices_themselves():
    """Stacks of split and of whole parameters have their owner axes in different orders."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    shapes = {f"split{i}": (16, 8) for i in range(5)} | {f"whole{i}": (14, 8) for i in range(3)}
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    placement = Placement(
        mesh, ("data", "fsdp"), lambda path, x: P() if x.shape[0] % 4 else P("fsdp")
    )
    plan = make_plan(params, block_size=None, merge=2, canonical=True)
    layout = StackLayout(placement, params, plan)
    assert layout.owner_spec("16x8") != layout.owner_spec("14x8")
    held: dict = {}
    for key, order in layout.slots.order.items():
        sharding = NamedSharding(mesh, layout.owner_spec(key))
        for device, (run,) in sharding.devices_indices_map(order.shape).items():
            held.setdefault(device.id, {})[key] = int((order[run] >= 0).sum())
    assert all(sum(share.values()) == 1 for share in held.values())
    assert list(held.values()) == layout.slots.computed()


def test_slots_without_a_block_are_not_computed():
    ran = []

    def refresh(old, x):
        jax.debug.callback(lambda v: ran.append(float(v)), x[0])
        return old + x

    real = jnp.array([True, False, True, False])
    for turn in (None, jnp.array(2)):
        old, x = jnp.zeros(4), jnp.arange(4.0)
        new = refresh_slots(refresh, jnp.arange(4), turn, 2, old, x, real=real)
        jax.effects_barrier()
        assert new.tolist() == [0, 0, 2, 0]
        assert sorted(ran) == [0, 2]
        ran.clear()
