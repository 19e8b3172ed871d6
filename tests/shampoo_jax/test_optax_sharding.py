"""What Optax asks of its optimizers on a mesh: no update changes the type of a state.

Eight devices, Explicit axes, on which dtype, shape and layout are the type of an array, float16
parameters split along their middle dimension; without a placement, where blocks are whole on every
device, and with one. What jit returns has the types that are traced, so only what is computed is
compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_jax as sj
from tests.shampoo_jax.test_contract import ALIASES, DIRECTIONS, FACTORIES, everyone

SINGLE = [name for name in DIRECTIONS if name.startswith("scale_by")]
PLACED = {
    **{name: functools.partial(getattr(sj, name), b2=0.8, every=2) for name in SINGLE},
    **{name: functools.partial(alias, 0.1) for name, alias in ALIASES.items()},
}


def mesh_of(kind, **axes):
    axes = axes or {"x": 8}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def middle(path, leaf):
    if leaf.size == 0 and jax.__version_info__ < (0, 8, 1):
        return P()  # jax 0.8.0 can compute nothing, not even x + x, of such an array in pieces
    return P(None, "x") if leaf.ndim == 3 else P("x")


def drawn(seed, mesh=None):
    """A square's statistics have full rank: in a null space all is a matter of rounding."""
    draw = np.random.default_rng(seed)
    shapes = {"square": (8, 8), "bias": (8,), "empty": (0, 8, 4)}
    tree = {name: jnp.asarray(draw.normal(size=s), jnp.float16) for name, s in shapes.items()}
    if mesh is None:
        return tree
    return {n: jax.device_put(x, NamedSharding(mesh, middle((), x))) for n, x in tree.items()}


def types(tree):
    """Shape, dtype and layout of every leaf."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).sharding.spec), tree)


def traced(function, *arguments):
    """The types of what a function returns inside of jit."""
    found = []
    jax.eval_shape(lambda *x: found.append(types(function(*x))), *arguments)
    return found[0]


def assert_types_stay(tx, params, state):
    assert traced(tx.init, params) == types(state)
    updates, new = traced(tx.update, params, state, params)
    assert new == types(state)
    assert updates == types(params)


@everyone
def test_types_stay_without_a_placement(name):
    mesh, tx = mesh_of(AxisType.Explicit), FACTORIES[name]()
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P(None, "x"))
        params = jax.device_put(jnp.zeros((2, 8, 4), jnp.float16), split)
        assert_types_stay(tx, params, tx.init(params))


@pytest.mark.parametrize("name", PLACED)
def test_types_stay_with_a_placement(name):
    mesh = mesh_of(AxisType.Explicit)
    tx = PLACED[name](placement=sj.Placement(mesh, "x", middle))
    with jax.set_mesh(mesh):
        params = drawn(0, mesh)
        state = tx.init(params)
        assert_types_stay(tx, params, state)
        owned = [x for x in jax.tree.leaves(state) if x.ndim == 3 and x.size]
        assert owned and all(jax.typeof(x).sharding.spec[0] == "x" for x in owned)


@functools.cache
def alone(name):
    """Updates of two steps and the state, on one device, without jit."""
    tx, params = PLACED[name](), drawn(0)
    with jax.disable_jit():
        state, updates = tx.init(params), []
        for seed in (1, 2):
            new, state = tx.update(drawn(seed), state, params)
            updates.append(new)
    return updates, state


@pytest.mark.parametrize(
    ("name", "kind"),  # each alias holds its direction
    [*((name, AxisType.Explicit) for name in ALIASES), ("shampoo", AxisType.Auto)],
)
def test_updates_of_split_parameters_are_those_of_one_device(name, kind):
    """Outside of jit; on Explicit axes with the types that the test above finds inside."""
    expected, _ = alone(name)
    mesh, tx = mesh_of(kind), PLACED[name]()
    with jax.set_mesh(mesh):
        params = drawn(0, mesh)
        state = tx.init(params)
        for seed, wanted in zip((1, 2), expected, strict=True):
            before, (updates, state) = state, tx.update(drawn(seed, mesh), state, params)
            assert types(state) == types(before)
            assert types(updates) == types(params)
            for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted), strict=True):
                atol = 2e-3 * float(jnp.abs(y).max(initial=0.0))  # float16 has 2^-11
                np.testing.assert_allclose(np.asarray(x, float), np.asarray(y, float), 0, atol)


SPECS = [P("x"), P("x", "y"), P(None, ("y", "x"))]


@pytest.mark.parametrize("placed", [False, True], ids=["no placement", "placement"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_layout_is_taken_where_no_rule_tells_of_it(spec, placed):
    mesh = mesh_of(AxisType.Explicit, x=2, y=4)
    tx = sj.shampoo(0.1, placement=sj.Placement(mesh, "y") if placed else None, momentum=0.5)
    with jax.set_mesh(mesh):
        params = jax.device_put({"w": jnp.ones((8, 16))}, NamedSharding(mesh, spec))
        state = tx.init(params)
        updates, new = traced(tx.update, params, state, params)
    assert updates == types(params)
    assert new == types(state)


def test_gradients_need_not_lie_as_parameters_do():
    mesh, tx = mesh_of(AxisType.Explicit), sj.soap(0.1)
    with jax.set_mesh(mesh):
        params = drawn(0, mesh)
        whole = jax.device_put(drawn(1), NamedSharding(mesh, P()))
        state = tx.init(params)
        updates, new = traced(tx.update, whole, state, params)
        alone, _ = traced(sj.scale_by_soap().update, whole, sj.scale_by_soap().init(params))
    assert updates == types(params)
    assert new == types(state)
    assert alone == types(whole)


def test_further_trees_are_taken_as_they_lie():
    mesh, tx = mesh_of(AxisType.Explicit), sj.scale_by_shampoo()
    with jax.set_mesh(mesh):
        params = drawn(0, mesh)
        pairs = jax.tree.map(lambda x: jnp.stack([x, x]), params)
        step = functools.partial(tx.update, further={"pairs": pairs})
        updates, _ = traced(step, params, tx.init(params), params)
    assert updates == types(params)
