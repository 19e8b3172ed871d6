"""Where blocks and their state lie on a mesh, and which layouts are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from scripts.maintenance import sharding_equality as se


def rows(path, leaf):
    return P("fsdp") if leaf.ndim else P()


def test_the_state_is_an_owners_share():
    placement = se.placement_of("replicated")
    shapes = {k: s for k, s in se.SHAPES.items() if k not in ("bias", "scale")}
    params = {k: jnp.ones(s) for k, s in shapes.items()}
    state = jax.jit(se.OPTIMIZERS["eigh"](placement).init)(se.place(params, placement))
    leaves = jax.tree.leaves(state)
    share = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    assert share / sum(x.nbytes for x in leaves) == pytest.approx(1 / 8, rel=0.05)


def test_a_state_moves_between_meshes():
    """Saved by parameter on eight owners, continued on one device."""
    placement = se.placement_of("replicated")
    with jax.enable_x64(True):
        there, here = se.OPTIMIZERS["SOAP"](placement), se.OPTIMIZERS["SOAP"](None)
        params = se.gradients(0)
        far = se.place(params, placement)
        _, state = jax.jit(there.update)(se.place(se.gradients(1), placement), there.init(far), far)
        saved = sj.state_to_tree(state, far)
        state_here = sj.tree_to_state(saved, here.init(params), params)
        a, _ = jax.jit(there.update)(se.place(se.gradients(2), placement), state, far)
        b, _ = jax.jit(here.update)(se.gradients(2), state_here, params)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), y, rtol=0, atol=1e-8)


def test_shardings_are_told_before_there_is_a_state():
    placement = se.placement_of("rows")
    tx = optax.MultiSteps(
        optax.partition(
            {"a": se.OPTIMIZERS["eigh"](placement), "b": optax.adam(0.1)},
            {"blocks": {"q": "a", "bias": "a"}, "head": "b"},
        ),
        2,
    )

    @functools.partial(jax.jit, out_shardings=NamedSharding(placement.mesh, P("fsdp")))
    def init():
        return {"blocks": {"q": jnp.ones((16, 16)), "bias": jnp.ones(16)}, "head": jnp.ones((8, 3))}

    # With shardings, as a traced jit of them has.
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), init()
    )
    told = sj.state_shardings(tx, abstract, placement.mesh)
    state = jax.jit(tx.init, out_shardings=told)(init())
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(told), strict=True):
        assert x.sharding == sharding
        # Blocks by the placement; accumulated gradients and another's moments as parameters lie.
        assert x.size < 16 or sharding.spec[0] == "fsdp"


def test_shardings_of_a_state_of_nnx():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    placement = sj.Placement(mesh, "fsdp", rows)
    tx = se.OPTIMIZERS["eigh"](placement)
    params = nnx.state(nnx.eval_shape(lambda: nnx.Linear(16, 16, rngs=nnx.Rngs(0))), nnx.Param)
    told = sj.state_shardings(tx, params, mesh)
    assert sum(x.spec != P() for x in jax.tree.leaves(told)) >= 6


@pytest.mark.parametrize(
    "spec", [None, P("model"), P("data", "data"), P(None, None, "data"), P(P.UNCONSTRAINED)]
)
def test_a_layout_that_cannot_be_names_the_parameter(spec):
    mesh = jax.make_mesh((8,), ("data",))
    placement = sj.Placement(mesh, "data", lambda path, leaf: spec)
    with pytest.raises(ValueError, match=r"parameter \['w'\] of shape \(16, 8\).*'data': 8"):
        sj.scale_by_shampoo(placement=placement).init({"w": jnp.ones((16, 8))})


def test_missing_gradients_on_explicit_axes():
    placement = se.placement_of("rows, explicit")
    params = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 16))}
    far = se.place(params, placement)
    with jax.set_mesh(placement.mesh):
        tx = sj.shampoo(0.1, placement=placement)
        updates, _ = jax.jit(tx.update)({"a": None, "b": far["b"]}, jax.jit(tx.init)(far), far)
    assert updates["a"] is None and jnp.isfinite(updates["b"]).all()


def test_merged_dimensions_split_inside_on_explicit_axes():
    def spec(path, leaf):
        return P(None, None, "fsdp")

    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 8, 4)), jnp.float32)
    whole, _ = update_of(sj.scale_by_shampoo(), {"kernel": kernel})
    with jax.set_mesh(mesh):
        tx = sj.scale_by_shampoo(placement=sj.Placement(mesh, ("data", "fsdp"), spec))
        split = {"kernel": jax.device_put(kernel, NamedSharding(mesh, spec((), kernel)))}
        updates, _ = update_of(tx, split)
    assert updates["kernel"].sharding.spec[2] == "fsdp"
    np.testing.assert_allclose(updates["kernel"], whole["kernel"], rtol=0, atol=1e-4)


def test_gradients_and_parameters_split_in_another_order_on_explicit_axes():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    placement = sj.Placement(
        mesh,
        ("data", "fsdp"),
        lambda path, leaf: P("fsdp"),
        gradient_spec=lambda path, leaf: P(("data", "fsdp")),
    )
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    tx = sj.blocked(optax.identity(), blocking=sj.Blocking(4), placement=placement)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, NamedSharding(mesh, P("fsdp")))}
        grads = {"w": jax.device_put(w, NamedSharding(mesh, P(("data", "fsdp"))))}
        updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    np.testing.assert_array_equal(updates["w"], w)


def test_unmerged_scalars_have_a_layout():
    mesh = jax.make_mesh((8,), ("data",))
    placement = sj.Placement(mesh, "data")
    updates, _ = update_of(
        sj.blocked(optax.identity(), blocking=sj.Blocking(merge=None), placement=placement),
        {"scale": jnp.array(3.0)},
    )
    assert updates["scale"] == 3


def update_of(tx, grads):
    return jax.jit(tx.update)(grads, jax.jit(tx.init)(grads), grads)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(mesh={}), "mesh={} must give the size"),
        (dict(mesh={"data": 0}), "at least 1"),
        (dict(mesh={"data": "8"}), "'data': '8'.* must give the size"),
        (dict(mesh="data=8"), "mesh='data=8' must give"),
        (dict(mesh={"data": 8}, owners=()), r"owners=\(\) must name"),
        (dict(owners="data"), "without mesh"),
        (dict(parameter_spec=rows), "without mesh"),
    ],
)
def test_meshes_that_cannot_be_explained(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        sj.explain({"w": jnp.ones((16, 8))}, **options)


def test_a_mesh_for_what_has_a_placement_is_refused():
    placement = sj.Placement(AbstractMesh((2,), ("x",)), "x")
    with pytest.raises(ValueError, match="drop one of them"):
        sj.explain({"w": jnp.ones((16, 8))}, sj.shampoo(0.1, placement=placement), mesh={"x": 2})


def test_what_not_all_owners_divide_is_split_over_some():
    mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
    placement = sj.Placement(mesh, ("fsdp", "tensor"))
    assert placement.split_further((6, 12), ((), ())) == ((), ("fsdp",))
    assert placement.split_further((6, 16), ((), ())) == ((), ("fsdp", "tensor"))
    assert placement.split_further((3, 5), ((), ())) == ((), ())
