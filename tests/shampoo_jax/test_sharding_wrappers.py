"""Optimizers on a mesh inside what training code puts around them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj

LR = 0.1


def rows(path, leaf):
    return P("fsdp") if leaf.ndim else P()


def placed(kind=AxisType.Auto):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
    return sj.Placement(mesh, "fsdp", rows)


def params_of(placement, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    tree = {k: rng.normal(size=s) for k, s in {"w": (16, 8), "v": (8, 8), "bias": (8,)}.items()}
    tree = {k: jnp.asarray(x, dtype) for k, x in tree.items()}
    if placement is None:
        return tree
    return jax.device_put(tree, NamedSharding(placement.mesh, P("fsdp")))


def steps(make, placement, dtype=jnp.float32, count=3):
    """Parameters after some steps, and the state, with the gradients of a fixed seed."""
    tx, params = make(placement), params_of(placement, dtype)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(1, count + 1):
        params, state = step(params, state, params_of(placement, dtype, seed))
    return params, state


def shampoo(placement):
    return sj.shampoo(LR, solver=sj.TruncatedEigh(1e-3), placement=placement)


WRAPPED = {
    "MultiSteps": lambda p: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), shampoo(p)), 2
    ),
    "averaging": lambda p: sj.averaging(shampoo(p), "schedule_free", learning_rate=LR),
    "inject_hyperparams": lambda p: sj.inject_hyperparams(sj.shampoo)(
        optax.linear_schedule(LR, 0.0, 10), solver=sj.TruncatedEigh(1e-3), placement=p
    ),
    "apply_if_finite": lambda p: optax.apply_if_finite(shampoo(p), 2),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MultiSteps", AxisType.Explicit),
        ("averaging", AxisType.Explicit),
        ("apply_if_finite", AxisType.Explicit),
        # Not on Explicit axes: jax's shard_map cannot close over a traced number there.
        ("inject_hyperparams", AxisType.Auto),
    ],
)
def test_wrappers_compute_the_same_and_keep_the_placement(name, kind):
    placement = placed(kind)
    expected, _ = steps(WRAPPED[name], None)
    with jax.set_mesh(placement.mesh):
        params, state = steps(WRAPPED[name], placement)
    for key, x in params.items():
        np.testing.assert_allclose(np.asarray(x), expected[key], rtol=0, atol=1e-4)
    stacks = [x for x in jax.tree.leaves(state) if x.ndim == 3]
    assert stacks and all(x.sharding.spec[0] == "fsdp" for x in stacks)


@pytest.mark.parametrize("make", [sj.scale_by_shampoo, shampoo])
def test_a_nonfinite_gradient_on_explicit_axes(make):
    placement = placed(AxisType.Explicit)
    with jax.set_mesh(placement.mesh):
        tx, params = make(placement=placement), params_of(placement)
        before = jax.jit(tx.init)(params)
        grads = {**params, "w": jnp.where(params["w"] == params["w"].max(), jnp.nan, params["w"])}
        updates, state = jax.jit(tx.update)(grads, before, params)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates))
    for new, old in zip(
        *map(jax.tree.leaves, (state.inner_state, before.inner_state)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    with pytest.raises(FloatingPointError, match="1 step was skipped"):
        sj.check_finite(state)


@pytest.mark.parametrize("known", [True, False])
def test_gradients_that_lie_apart_are_skipped_on_explicit_axes(known):
    """Zeros lie as updates do, as the parameters, whether these are handed over or not."""
    mesh = placed(AxisType.Explicit).mesh
    placement = sj.Placement(mesh, "fsdp", rows, gradient_spec=lambda path, leaf: P())
    tx = sj.scale_by_shampoo(placement=placement)
    with jax.set_mesh(mesh):
        params = params_of(placement)
        state = jax.jit(tx.init)(params)
        for bad in (False, True):
            grads = {k: jnp.full_like(x, jnp.nan) if bad else x for k, x in params.items()}
            grads = jax.device_put(grads, NamedSharding(mesh, P()))
            updates, state = jax.jit(tx.update)(grads, state, params if known else None)
            assert all(np.asarray(x).any() != bad for x in updates.values())
            assert all(x.sharding.spec[0] == "fsdp" for x in updates.values())


def test_bfloat16_parameters_keep_their_dtype_and_layout():
    placement = placed()
    expected, _ = steps(shampoo, None, jnp.bfloat16)
    params, state = steps(shampoo, placement, jnp.bfloat16)
    for key, x in params.items():
        assert x.dtype == jnp.bfloat16 and x.sharding.spec == P("fsdp")
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(expected[key], np.float32), atol=0.05
        )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state) if x.ndim == 3)


def test_map_params_sees_the_parameters_and_leaves_stacks_to_the_placement():
    placement = placed()
    tx, params = optax.chain(shampoo(placement), optax.trace(0.9)), params_of(placement)
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    told = sj.state_shardings(tx, params, placement.mesh)
    mirrored = jax.tree.map(lambda x: x.sharding, params)
    mapped = optax.tree.map_params(
        tx, lambda x, s: x if masked(x) else s, told, mirrored, is_leaf=masked
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(told)
    assert jax.tree.leaves(mapped[1]) == jax.tree.leaves(mirrored)
    stacks = jax.tree.map(lambda a, b: a.spec == b.spec == P("fsdp"), mapped, told)
    assert sum(jax.tree.leaves(stacks)) > 3 + 2  # more than the trace and the bias's moments
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.spec == b.spec, mapped, told)))


def test_a_train_state_keeps_the_placement():
    placement = placed()
    params = params_of(placement)

    @jax.jit
    def create(params):
        return TrainState.create(apply_fn=jnp.dot, params=params, tx=shampoo(placement))

    state = jax.jit(lambda s, g: s.apply_gradients(grads=g))(create(params), params)
    stacks = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 3]
    assert stacks and all(x.sharding.spec[0] == "fsdp" for x in stacks)
    assert all(x.sharding.spec == P("fsdp") for x in jax.tree.leaves(state.params))


def test_an_optimizer_of_nnx_keeps_the_placement():
    placement = placed(AxisType.Explicit)
    with jax.set_mesh(placement.mesh):
        # Named for flax, and laid out by hand: flax 0.12.0 knows names on Auto meshes only.
        draw = nnx.initializers.lecun_normal()
        lay_out = lambda *words: jax.sharding.reshard(draw(*words), P("fsdp", None))  # noqa: E731
        split = nnx.with_partitioning(lay_out, ("fsdp", None))
        model = nnx.Linear(16, 8, use_bias=False, kernel_init=split, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, shampoo(placement), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda m: jnp.sum(m.kernel[...] ** 2))(model)
            optimizer.update(model, grads)

        before = np.asarray(model.kernel[...])
        step(model, optimizer)
    stacks = [x for x in jax.tree.leaves(nnx.state(optimizer)) if jnp.ndim(x) == 3]
    assert stacks and all(x.sharding.spec[0] == "fsdp" for x in stacks)
    assert model.kernel[...].sharding.spec[0] == "fsdp"
    assert np.abs(np.asarray(model.kernel[...]) - before).max() > 0
