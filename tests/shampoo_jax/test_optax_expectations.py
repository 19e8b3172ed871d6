"""What Optax asks of its own contributed optimizers, asked of every direction and alias.

Small problems solved, states alike in and outside of jit, from shapes alone, narrow and complex
parameters, traced hyperparameters; and on a mesh with Explicit axes, without a placement and with
one, types of states and updates that no update changes. `test_contract` has what is asked of any
transformation: wrappers, containers, donation, gradients that are not finite.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import shampoo_jax as sj
from shampoo_jax.base.hyperparameters import TRACED
from tests.shampoo_jax.test_contract import (
    ALIAS,
    DIRECTIONS,
    FACTORIES,
    GRADIENTS,
    PARAMS,
    assert_close,
    bare,
    described,
    everyone,
)

START = {"parabola": jnp.array([-1.0, 10.0, 1.0]), "rosenbrock": jnp.zeros(2)}
END = {"parabola": jnp.array([1.0, -1.0, 1.0]), "rosenbrock": jnp.ones(2)}
SINGLE = [name for name in DIRECTIONS if name.startswith("scale_by")]  # one public function each


def loss(params):
    """The two problems of Optax, vectors both; blocks know nothing of each other."""
    x, y = params["rosenbrock"]
    bowl = jnp.sum((params["parabola"] - END["parabola"]) ** 2)
    return bowl + (1 - x) ** 2 + 100 * (y - x * x) ** 2


@pytest.mark.parametrize("name", ALIAS)
def test_parabola_and_rosenbrock(name):
    """With all defaults, and through a map over the state that changes nothing."""
    rate = optax.linear_schedule(0.1, 0.0, 1000)
    tx = getattr(sj, name)(rate, preconditioned=lambda path, leaf: True)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        state = optax.tree.map_params(tx, lambda x: x, tx.init(params))
        return jax.lax.scan(step, (params, state), None, 1000)[0][0]

    errors = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), train(START), END)
    assert max(errors.values()) < 1e-2


# Numbers that float32 holds, so that an array is the number that Python computes with.
EXACT = {"b1": 0.5, "b2": 0.75}
RATE = {"learning_rate": 0.125, "weight_decay": 0.25}


@pytest.mark.parametrize("name", [*SINGLE, *ALIAS])
def test_injected_hyperparameters_change_no_bit_of_updates_and_state(name):
    factory = getattr(sj, name)
    options = EXACT | (RATE if name in ALIAS else {})
    with jax.disable_jit():
        results = []
        for make in (factory, sj.inject_hyperparams(factory)):
            tx = make(**options)
            results.append(tx.update(GRADIENTS[0], tx.init(PARAMS), PARAMS))
    (updates, state), (updates_injected, injected) = results
    assert options.keys() <= injected.hyperparams.keys()
    jax.tree.map(np.testing.assert_array_equal, updates_injected, updates)
    jax.tree.map(np.testing.assert_array_equal, injected.inner_state, state)


@pytest.mark.parametrize("name", ALIAS)
def test_optax_injects_too_where_it_is_told_which_defaults_are_static(name):
    """It traces every number among the defaults; the error names one of these and what to use."""
    factory = getattr(sj, name)
    defaults = {n: p.default for n, p in inspect.signature(factory).parameters.items()}
    static = {n for n, x in defaults.items() if type(x) in (int, float)} - TRACED
    if static:
        message = f"^({'|'.join(static)})=.* use shampoo_jax.inject_hyperparams"
        with pytest.raises(ValueError, match=message):
            optax.inject_hyperparams(factory)(learning_rate=0.1).init(PARAMS)
    tx = optax.inject_hyperparams(factory, static)(learning_rate=0.1)
    state = jax.eval_shape(tx.init, PARAMS)
    updates, new = jax.eval_shape(tx.update, GRADIENTS[0], state, PARAMS)
    assert described(updates) == described(PARAMS)
    assert described(new) == described(state)


@functools.cache
def initial():
    """States that jit makes, of all in one program."""
    return jax.jit(lambda: {name: make().init(PARAMS) for name, make in FACTORIES.items()})()


@everyone
def test_a_state_is_the_same_from_jit_from_outside_and_from_shapes(name):
    tx = FACTORIES[name]()
    state = tx.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, initial()[name], state)
    assert described(initial()[name]) == described(state)
    array = jnp.zeros((2, 4, 8))  # bare
    abstract = tx.init(jax.ShapeDtypeStruct(array.shape, array.dtype))
    assert described(abstract) == described(tx.init(array))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@everyone
def test_narrow_gradients_are_rounded_at_the_end_alone(name, dtype):
    tx = FACTORIES[name]()
    narrow = [jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (GRADIENTS[0], PARAMS)]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in narrow]
    with jax.disable_jit():
        (got, state), (expected, wide_state) = (
            tx.update(g, tx.init(w), w) for g, w in (narrow, wide)
        )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), got, expected)
    jax.tree.map(np.testing.assert_array_equal, state, wide_state)


@everyone
def test_complex_parameters_are_two_real_ones(name):
    """An update is odd in gradients and parameters together: the imaginary part mirrors."""
    tx = optax.contrib.split_real_and_imaginary(FACTORIES[name]())
    gradients, params = (jax.tree.map(lambda x: x * (1 - 1j), t) for t in (GRADIENTS[0], PARAMS))
    with jax.disable_jit():
        updates, _ = tx.update(gradients, tx.init(params), params)
    for part, sign in ((jnp.real, 1), (jnp.imag, -1)):
        assert_close(jax.tree.map(lambda x, p=part, s=sign: s * p(x), updates), bare(name)[0])
