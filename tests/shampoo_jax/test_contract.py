"""What every transformation and alias keeps to as an Optax transformation.

Values under wrappers are compared without jit, where nothing is compiled; that the same code can be
traced, with a state of one structure, is shown by `jax.eval_shape`; each is compiled once.
"""

import functools
import operator
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax.training.train_state import TrainState

import shampoo_jax as sj

DIRECTIONS = {
    "scale_by_shampoo": lambda: sj.scale_by_shampoo(b2=0.8, every=2),
    "scale_by_soap": lambda: sj.scale_by_soap(b2=0.8, every=2),
    "scale_by_kl_shampoo": lambda: sj.scale_by_kl_shampoo(b2=0.8, every=2),
    "scale_by_kl_soap": lambda: sj.scale_by_kl_soap(b2=0.8, every=2),
    "scale_by_one_sided_shampoo": lambda: sj.scale_by_one_sided_shampoo(b2=0.8, every=2),
    "in_eigenbasis": lambda: sj.blocked(
        optax.chain(
            sj.accumulate_factors(0.8),
            sj.in_eigenbasis(optax.scale_by_lion(), every=2),
            sj.monitor_spectrum(every=2),
        )
    ),
    "chain of roots": lambda: sj.blocked(
        optax.chain(
            sj.filter_gradient(0.9),
            sj.graft(
                sj.scale_by_second_moment(0.8),
                optax.chain(
                    sj.accumulate_factors(0.8),
                    sj.damp(1e-4),
                    sj.invert_roots(sj.TruncatedEigh(), every=2),
                    sj.precondition(),
                ),
            ),
        ),
        blocking=sj.Blocking(2),
        exponents={2: 0.5},
    ),
}
ALIAS = {
    "shampoo": functools.partial(sj.shampoo, momentum=sj.momentum(0.5, nesterov=True)),
    "soap": functools.partial(sj.soap, basis="eigh", rtol=None, monitor=2),
    "kl_shampoo": functools.partial(sj.kl_shampoo, decay=sj.Decay("l2")),
    "kl_soap": functools.partial(sj.kl_soap, refresh=sj.BasisRefresh(stagger=True)),
    "one_sided_shampoo": functools.partial(sj.one_sided_shampoo, graft="adam", side="left"),
}
ALIASES = {
    name: functools.partial(alias, b2=0.8, every=2, weight_decay=0.1)
    for name, alias in ALIAS.items()
}
OTHERS = {
    "momentum": lambda: sj.momentum(0.9, dampening=0.5),
    "averaging": lambda: sj.averaging(optax.sgd(0.1), learning_rate=0.1),
    "as_optimizer": lambda: sj.as_optimizer(
        sj.scale_by_soap(b2=0.8, every=2), 0.1, others=optax.adamw(0.1)
    ),
    "guard": lambda: sj.guard(optax.adam(0.1)),
    "decay": lambda: sj.add_scheduled_weight_decay(0.1, 0.2, kind="over_peak"),
}
FACTORIES: dict[str, Any] = {
    **DIRECTIONS,
    **{name: functools.partial(alias, 0.1) for name, alias in ALIASES.items()},
    **OTHERS,
}
everyone = pytest.mark.parametrize("name", FACTORIES)
# In its alias each of the other directions is wrapped, and sees only some of the tree, anyway.
WRAPPED = DIRECTIONS.keys() - {"scale_by_shampoo", "in_eigenbasis"}
outermost = pytest.mark.parametrize("name", [name for name in FACTORIES if name not in WRAPPED])

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


# Factors have full rank from the first step: in a null space a basis is a matter of rounding.
PARAMS, *GRADIENTS = (
    {"dense": {"kernel": normal(3, 3), "bias": normal(1)}, "embed": normal(3, 3)} for _ in range(4)
)


def run(tx, gradients, params):
    """Updates of every step at constant parameters, and the last state, without jit."""
    with jax.disable_jit():
        state, updates = tx.init(params), []
        for g in gradients:
            new, state = tx.update(g, state, params)
            updates.append(new)
    return updates, state


@functools.cache
def bare(name):
    return run(FACTORIES[name](), GRADIENTS, PARAMS)[0]


def assert_close(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        atol = rtol * float(jnp.abs(y).max(initial=0.0))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@pytest.mark.parametrize("name", [*DIRECTIONS, "shampoo", *OTHERS])
def test_compiles_once_with_everything_donated(name):
    tx, traces = FACTORIES[name](), []

    def step(params, state, gradients):
        traces.append(None)
        updates, state = tx.update(gradients, state, PARAMS)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for g in GRADIENTS:
        old = jax.tree.leaves((params, state))
        params, state = step(params, state, g)
        # A scalar that is not read, only written, is left out of the program and stays.
        assert all(x.is_deleted() for x in old if x.ndim)
    assert len(traces) == 1
    moved = jax.tree.map(lambda *x: sum(x), *bare(name))
    assert_close(jax.tree.map(operator.sub, params, PARAMS), moved, 1e-4)


@everyone
def test_state_is_arrays_of_a_fixed_structure(name):
    tx = FACTORIES[name]()
    state = tx.init(PARAMS)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert described(jax.eval_shape(tx.init, PARAMS)) == described(state)

    def step(state, g):
        updates, new = tx.update(g, state, PARAMS)
        assert described(new) == described(state)
        return new, updates

    def steps(state, run):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
        return jax.lax.cond(run, lambda s: jax.lax.scan(step, s, stacked)[0], lambda s: s, state)

    assert described(jax.eval_shape(steps, state, True)) == described(state)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        *((name, params) for name in FACTORIES for params in ("float32", "bfloat16")),
        *((name, "float16") for name in ("scale_by_shampoo", "shampoo", *OTHERS)),
    ],
)
def test_updates_have_the_dtype_of_gradients_and_states_at_least_float32(name, params):
    tx = FACTORIES[name]()
    weights = jax.tree.map(lambda p: p.astype(params), PARAMS)
    state = jax.eval_shape(tx.init, weights)
    for dtype in ("bfloat16", "float32"):
        gradients = jax.tree.map(lambda p, d=dtype: p.astype(d), PARAMS)
        updates, new = jax.eval_shape(tx.update, gradients, state, weights)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert described(new) == described(state)
    floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats <= {jnp.dtype(jnp.float32)}


def split_off_bias(tx, other):
    labels = {"dense": {"kernel": "a", "bias": "b"}, "embed": "a"}
    return optax.partition({"a": tx, "b": other}, labels)


def without_bias(updates, bias):
    """The updates with those of the bias replaced by a function of its gradient."""
    return [
        {**u, "dense": {**u["dense"], "bias": bias(g["dense"]["bias"])}}
        for u, g in zip(updates, GRADIENTS, strict=True)
    ]


# Wrapper -> (how it wraps, gradients, what it makes of the bare updates).
NAN = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADIENTS[0])
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)
WRAPPERS = {
    "chain": (
        lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx, optax.scale(-0.5)),
        GRADIENTS,
        lambda updates: jax.tree.map(lambda u: -0.5 * u, updates),
    ),
    "partition": (
        lambda tx: split_off_bias(tx, optax.sgd(2.0)),
        GRADIENTS,
        lambda updates: without_bias(updates, lambda g: -2.0 * g),
    ),
    "masked": (
        lambda tx: optax.masked(tx, {"dense": {"kernel": True, "bias": False}, "embed": True}),
        GRADIENTS,
        lambda updates: without_bias(updates, lambda g: g),
    ),
    "MultiSteps": (
        lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
        [jax.tree.map(lambda x, k=k: k * x, g) for g in GRADIENTS for k in (0.5, 1.5)],
        lambda updates: [u for update in updates for u in (ZERO, update)],
    ),
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=5),
        [GRADIENTS[0], NAN, *GRADIENTS[1:]],
        lambda updates: [updates[0], ZERO, *updates[1:]],
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@outermost
def test_under_wrappers(name, wrapper):
    wrap, gradients, expected = WRAPPERS[wrapper]
    tx = wrap(FACTORIES[name]())
    updates, state = run(tx, gradients, PARAMS)
    assert_close(updates, expected(bare(name)))
    traced = jax.eval_shape(tx.update, GRADIENTS[0], state, PARAMS)[1]
    assert jax.tree.structure(traced) == jax.tree.structure(state)
    for new, old in zip(jax.tree.leaves(traced), jax.tree.leaves(state), strict=True):
        assert (new.shape, new.dtype) == (jnp.shape(old), jnp.result_type(old))


@everyone
def test_under_schedule_free(name):
    tx = optax.contrib.schedule_free(FACTORIES[name](), learning_rate=0.1, b1=0.9)
    _, state = run(tx, GRADIENTS, PARAMS)
    moved = jax.tree.map(lambda *x: sum(x), *bare(name))
    assert_close(jax.tree.map(operator.sub, state.z, PARAMS), moved, 1e-4)
    averaged = optax.contrib.schedule_free_eval_params(state, PARAMS)
    assert jax.tree.map(jnp.shape, averaged) == jax.tree.map(jnp.shape, PARAMS)
    jax.eval_shape(tx.update, GRADIENTS[0], state, PARAMS)


@pytest.mark.parametrize("name", ALIASES)
def test_a_constant_schedule_is_a_number(name):
    constant = ALIASES[name](optax.constant_schedule(0.1))
    assert_close(run(constant, GRADIENTS, PARAMS)[0], bare(name), 1e-6)


@pytest.mark.parametrize("wrapper", ["nothing", "chain", "partition"])
@pytest.mark.parametrize("name", [*DIRECTIONS, *ALIASES])
def test_map_params_finds_what_mirrors_parameters(name, wrapper):
    tx = FACTORIES[name]()
    # AdamW's two moments of two parameters, and momentum of one.
    mirrored = 0 if name in DIRECTIONS else 4 + (name == "shampoo")
    if wrapper == "chain":
        tx, mirrored = optax.chain(tx, optax.trace(0.9)), mirrored + 3
    elif wrapper == "partition":
        tx = split_off_bias(tx, optax.adam(0.1))
        mirrored += 2 if name in DIRECTIONS else 0
    found = []
    state = jax.eval_shape(tx.init, PARAMS)
    mapped = optax.tree.map_params(
        tx,
        lambda x: found.append(x.shape) or x,
        state,
        transform_non_params=lambda x: x,
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert len(found) == mirrored
    assert set(found) <= {p.shape for p in jax.tree.leaves(PARAMS)}


class Pair(NamedTuple):
    bias: Any
    kernel: Any


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bias", "kernel", "scale"], meta_fields=["act"]
)
class Module:
    """As Equinox: a module is a tree, what is not an array is None in params and gradients."""

    def __init__(self, bias, kernel, scale=None, act="relu"):
        self.bias, self.kernel, self.scale, self.act = bias, kernel, scale, act


CONTAINERS = {
    "tuple": lambda bias, kernel: (bias, kernel),
    "list": lambda bias, kernel: [[bias], kernel],
    "namedtuple": Pair,
    "None": lambda bias, kernel: {"a": bias, "b": None, "c": kernel},
    "module": Module,
    "nnx.State": lambda bias, kernel: nnx.State(
        {"bias": nnx.Param(bias), "kernel": nnx.Param(kernel)}
    ),
}


@functools.cache
def dense(name):
    gradients = [g["dense"] for g in GRADIENTS]
    return run(FACTORIES[name](), gradients, PARAMS["dense"])[0]


@pytest.mark.parametrize("container", CONTAINERS)
@outermost
def test_any_container(name, container):
    def pack(tree):
        return CONTAINERS[container](tree["bias"], tree["kernel"])

    gradients = [pack(g["dense"]) for g in GRADIENTS]
    updates, _ = run(FACTORIES[name](), gradients, pack(PARAMS["dense"]))
    assert jax.tree.structure(updates) == jax.tree.structure(gradients)
    assert_close(updates, dense(name), 1e-6)


# What an alias does with shapes that its direction does not take is the same for all of them.
@pytest.mark.parametrize("name", [*DIRECTIONS, "shampoo", *OTHERS])
def test_any_shape(name):
    shapes = [(), (1,), (3,), (1, 1), (2, 3, 2), (0,), (0, 3)]
    params, *gradients = ([normal(*shape) for shape in shapes] for _ in range(4))
    updates, _ = run(FACTORIES[name](), gradients, params)
    for update in updates:
        assert [u.shape for u in update] == shapes
        assert all(jnp.isfinite(u).all() for u in update)
    assert all(jnp.abs(u).max() > 0 for u in updates[-1] if u.size)


# Every transformation whose state could be spoilt; the others have none that gradients enter.
GUARDED = [name for name in FACTORIES if name not in ("momentum", "decay")]
SPOILT = {
    "NaN": jnp.nan,
    "infinity": -jnp.inf,
    "overflow": 1e30,  # finite, but its square is not
}


@pytest.mark.parametrize(
    ("value", "dtype"), [*((value, "float32") for value in SPOILT), ("NaN", "bfloat16")]
)
@pytest.mark.parametrize("name", GUARDED)
def test_a_gradient_that_is_not_finite_leaves_all_state_as_it_was(name, value, dtype):
    """One entry of one parameter: updates are zero, nothing else has been, and it is counted."""
    tx = FACTORIES[name]()
    good, later = (jax.tree.map(lambda g: g.astype(dtype), g) for g in GRADIENTS[:2])
    bad = {**later, "embed": later["embed"].at[1, 2].set(SPOILT[value])}
    with jax.disable_jit():
        _, state = tx.update(good, tx.init(PARAMS), PARAMS)
        updates, after = tx.update(bad, state, PARAMS)
        expected, _ = tx.update(later, state, PARAMS)
        again, _ = tx.update(later, after, PARAMS)
    for update in jax.tree.leaves(updates):
        assert update.dtype == dtype
        np.testing.assert_array_equal(update, jnp.zeros_like(update))
    assert isinstance(after, optax.ApplyIfFiniteState)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert described(after) == described(state)
    counts = after.notfinite_count, after.last_finite, after.total_notfinite
    assert [int(c) for c in counts] == [1, 0, 1]
    with pytest.raises(FloatingPointError, match="1 step was skipped"):
        sj.check_finite(after)
    sj.check_finite(state)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


@pytest.mark.parametrize("name", [*DIRECTIONS, *ALIASES])
def test_complex_parameters_are_refused_by_name(name):
    params = {"block": {"kernel": jnp.ones((3, 2), jnp.complex64)}}
    with pytest.raises(ValueError, match=r"\['block'\]\['kernel'\] is complex.*split_real_and_im"):
        FACTORIES[name]().init(params)


@everyone
def test_flax_train_state(name):
    with jax.disable_jit():
        state = TrainState.create(apply_fn=None, params=PARAMS, tx=FACTORIES[name]())
        state = state.apply_gradients(grads=GRADIENTS[0])
    assert_close(jax.tree.map(operator.sub, state.params, PARAMS), bare(name)[0], 1e-4)


def linear():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    nnx.update(model, in_state(PARAMS["dense"]))
    return model


def in_state(tree):
    return nnx.State({k: nnx.Param(v) for k, v in tree.items()})


@everyone
def test_nnx_optimizer(name):
    model = linear()
    optimizer = nnx.Optimizer(model, FACTORIES[name](), wrt=nnx.Param)
    with jax.disable_jit():
        optimizer.update(model, in_state(GRADIENTS[0]["dense"]))
    moved = jax.tree.map(operator.sub, nnx.to_pure_dict(nnx.state(model)), PARAMS["dense"])
    assert_close(moved, dense(name)[0], 1e-4)


def test_nnx_optimizer_under_nnx_jit():
    model = linear()
    optimizer = nnx.Optimizer(model, sj.shampoo(0.1), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, gradients):
        traces.append(None)
        optimizer.update(model, gradients)

    for g in GRADIENTS:
        step(model, optimizer, in_state(g["dense"]))
    assert len(traces) == 1
    expected, _ = run(sj.shampoo(0.1), [g["dense"] for g in GRADIENTS], PARAMS["dense"])
    moved = jax.tree.map(operator.sub, nnx.to_pure_dict(nnx.state(model)), PARAMS["dense"])
    assert_close(moved, jax.tree.map(lambda *x: sum(x), *expected), 1e-4)


def ill_conditioned():
    """Parameters and losses of two problems on which gradient descent crawls.

    A quadratic whose Hessian has condition number 1e6, and a regression on correlated inputs (1e2)
    in which every principal direction matters alike. Both losses are 1 at the start.
    """
    draw = np.random.default_rng(1)
    (q, _), (p, _) = (np.linalg.qr(draw.normal(size=(n, n))) for n in (5, 3))
    a = jnp.asarray((q * np.geomspace(0.03, 1, 5)) @ q.T, jnp.float32)
    b = jnp.asarray((p * np.geomspace(0.03, 1, 3)) @ p.T, jnp.float32)
    inputs = jnp.asarray(q * np.geomspace(0.1, 1, 5), jnp.float32)
    start = {"quadratic": jnp.asarray(draw.normal(size=(5, 3)), jnp.float32)}
    target = jnp.asarray(q @ draw.normal(size=(5, 3)), jnp.float32)

    def losses(params):
        errors = a @ params["quadratic"] @ b, inputs @ params["regression"] - target
        sizes = jnp.sum((a @ start["quadratic"] @ b) ** 2), jnp.sum(target**2)
        return jnp.stack([jnp.sum(e**2) / s for e, s in zip(errors, sizes, strict=True)])

    return {**start, "regression": jnp.zeros((5, 3))}, losses


def trained(tx, params, losses, steps):
    """Losses after training on their sum."""

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(lambda p: losses(p).sum())(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return losses(jax.lax.scan(step, (params, tx.init(params)), None, steps)[0][0])

    return train(params)


@pytest.mark.parametrize("name", ALIASES)
def test_converges_where_gradient_descent_crawls(name):
    tx = getattr(sj, name)(optax.linear_schedule(0.3, 0.0, 300), every=2)
    assert (trained(tx, *ill_conditioned(), 300) < 3e-4).all()


def test_gradient_descent_crawls():
    for rate in (0.03, 0.1):  # just stable, and not
        assert not (trained(optax.sgd(rate), *ill_conditioned(), 300) < 1e-2).any()
