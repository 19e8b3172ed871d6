"""One step: what the optimizer receives, what is reported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanogpt.config.presets import preset
from nanogpt.config.run import ScheduleConfig
from nanogpt.config.settings import ShampooConfig
from nanogpt.model.loss import pairwise_sum
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train import train_step
from nanogpt.train.train_step import (
    TrainState,
    abstract_params,
    init_state,
    make_eval_step,
    make_train_step,
    model_structure,
)
from scripts.maintenance.parity import golden
from scripts.maintenance.parity.trajectories import HAND_OUT
from shampoo_jax import guard

Z = golden.load("model_fp32.npz")
BATCH = {"inputs": Z["inputs"], "targets": Z["targets"]}


def setup(microbatch_rows, **changes):
    """Golden weights, and an optimizer that only remembers the gradients it was given."""
    base = preset("cpu", "adamw")
    config = dataclasses.replace(
        base,
        model=golden.model_config(golden.read_json(Z["config"]), **changes),
        data=dataclasses.replace(base.data, batch_rows=4, microbatch_rows=microbatch_rows),
        schedule=ScheduleConfig(10),
    )
    recorded, shapes = golden.from_torch(Z, "param__"), abstract_params(config.model)
    params = jax.tree.map(lambda p, g: jnp.asarray(g, p.dtype), shapes, recorded)
    state = TrainState(jnp.zeros((), jnp.int32), params, HAND_OUT.init(params))
    return config, model_structure(config.model), state


@pytest.fixture(scope="module")
def stepped():
    """Embedding's dtype -> (parameters before, state after, metrics, the consumed state)."""
    out = {}
    for dtype in ("float32", "bfloat16"):
        config, graphdef, state = setup(1, embed_dtype=dtype)
        step = make_train_step(graphdef, HAND_OUT, config)
        kept = jax.tree.map(jnp.copy, state.params)
        out[dtype] = (kept, *step(state, BATCH), state)
    return out


def gradients(after):
    return golden.by_path(after.opt_state[0].trace)


@pytest.mark.trap("A14")
def test_a14_gradients_are_summed_over_all_tokens(stepped):
    """Of all four microbatches; not averaged."""
    _, after, _, _ = stepped["float32"]
    actual = gradients(after)
    for name, grad in golden.by_path(golden.from_torch(Z, "grad__")).items():
        assert np.abs(actual[name] - grad).max() <= 1e-5 * np.abs(grad).max(), name


def test_gradients_of_the_mean_loss_are_those_of_the_sum_over_all_tokens():
    """Of all rows and microbatches; the reported norm and loss are the same."""
    sizes = {"vocab_size": 64, "num_layers": 1, "model_dim": 16, "head_dim": 8, "mlp_dim": 16}
    base = preset("board", "adamw")
    model = dataclasses.replace(base.model, sequence_length=8, **sizes)
    data = dataclasses.replace(base.data, batch_rows=4, microbatch_rows=2)
    config = dataclasses.replace(base, model=model, data=data)
    batch = {k: jnp.arange(32, dtype=jnp.int32).reshape(4, 8) + i for i, k in enumerate(BATCH)}
    found = {}
    for loss in ("sum", "mean"):
        run = dataclasses.replace(config, loss=loss)
        graphdef, state = init_state(run, HAND_OUT)
        after, metrics = make_train_step(graphdef, HAND_OUT, run)(state, batch)
        found[loss] = gradients(after), metrics
    for name, whole in found["sum"][0].items():
        np.testing.assert_array_equal(found["mean"][0][name], whole / 32)
    assert found["sum"][1] == found["mean"][1]


@pytest.mark.trap("A13")
def test_a13_embedding_gradient_is_rounded_once(stepped):
    """The bfloat16 embedding's is the float32 one of the same weights, rounded after the sum."""
    wide = gradients(stepped["float32"][1])["embed/embedding"]
    _, after, _, _ = stepped["bfloat16"]
    narrow = after.opt_state[0].trace["embed"]["embedding"]
    assert narrow.dtype == jnp.bfloat16
    rounded = jnp.asarray(wide).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.float32(narrow), np.float32(rounded), rtol=2**-7)
    # The last bit of a float32 sum may decide a few; rounding each microbatch's changes 7 %.
    assert np.mean(narrow != rounded) < 0.01


def test_metrics_are_means_per_token(stepped):
    tokens = Z["targets"].size
    expected = golden.by_path(golden.from_torch(Z, "grad__"))
    norm = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in expected.values()))
    _, _, metrics, _ = stepped["float32"]
    np.testing.assert_allclose(metrics["loss"], Z["loss_sum"] / tokens, rtol=5e-7)
    np.testing.assert_allclose(metrics["grad_norm"], norm / tokens, rtol=1e-5)


def test_step_counts_keeps_the_structure_and_consumes_its_argument(stepped):
    params, after, _, before = stepped["float32"]
    assert after.step == 1 and after.step.dtype == jnp.int32
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, after.params, params)  # updates are zero
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


def test_a_gradient_that_is_not_finite_enters_no_state():
    config, graphdef, state = setup(4)
    state.params["head"]["bias"] = state.params["head"]["bias"].at[3].set(jnp.nan)
    before, tx = jax.tree.map(np.asarray, state), guard(HAND_OUT)
    state = state._replace(opt_state=tx.init(state.params))
    step = make_train_step(graphdef, tx, config)
    for count in (1, 2):
        state, metrics = step(state, BATCH)
        assert np.isnan(metrics["grad_norm"]) and state.step == count
        assert metrics["skipped"] == metrics["skipped_in_a_row"] == count
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state.inner_state, before.opt_state)


@pytest.mark.trap("A17")
def test_a17_evaluation_sums_the_losses(monkeypatch):
    config, graphdef, state = setup(2)
    sizes = []  # of what is summed in pairs: too little here to tell by the result

    def spy(x):
        sizes.append(x.size)
        return pairwise_sum(x)

    monkeypatch.setattr(train_step, "pairwise_sum", spy)
    total = make_eval_step(graphdef, config)(state.params, BATCH)
    rows, length = BATCH["targets"].shape
    assert sizes == [2 * length, rows // 2]
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, Z["loss_sum"], rtol=5e-7)


@pytest.mark.trap("R1")
def test_initial_state_follows_the_seed():
    config, _, _ = setup(4)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    tables = []
    for seed in (0, 1):
        graphdef, state = init_state(dataclasses.replace(config, seed=seed), optax.scale(1.0))
        tables.append(np.asarray(state.params["embed"]["embedding"]))
        assert graphdef == model_structure(config.model)
        shapes = jax.tree.map(lambda p: (p.shape, p.dtype), state.params)
        expected = jax.tree.map(lambda p: (p.shape, p.dtype), abstract_params(config.model))
        assert shapes == expected
    assert not np.array_equal(*tables)


def test_optimizers_may_ask_for_the_loss_again():
    """Over all microbatches, at any parameters, with gradient and Hessian products."""
    config, graphdef, state = setup(1)

    def update(gradients, state, params, obj_fn, **_):
        moved = jax.tree.map(lambda p: 0.9 * p, params)
        gradient, product = jax.jvp(jax.grad(obj_fn), (params,), (gradients,))
        off = optax.tree.norm(optax.tree.sub(gradient, gradients)) / optax.tree.norm(gradients)
        measured = obj_fn(moved), off, optax.tree.norm(product)
        return optax.tree.zeros_like(gradients), measured

    zeros = tuple(jnp.zeros(()) for _ in range(3))
    asks = optax.GradientTransformationExtraArgs(lambda params: zeros, update)
    before = TrainState(state.step, jax.tree.map(jnp.copy, state.params), zeros)
    after, _ = make_train_step(graphdef, asks, config)(before, BATCH)
    elsewhere, off, product = after.opt_state
    moved = jax.tree.map(lambda p: 0.9 * p, state.params)
    expected = make_eval_step(graphdef, config)(moved, BATCH)
    np.testing.assert_allclose(elsewhere, expected, rtol=1e-5)
    assert off < 1e-5 and product > 0 and jnp.isfinite(product)


def test_optimizers_of_microbatches_are_given_their_gradients():
    """All four, and their mean is the sum over the batch."""
    config, graphdef, state = setup(1)
    shampoo = ShampooConfig(0.1, 0.0, statistics="microbatches")

    def update(gradients, state, params, further, **_):
        kept = further["microbatches"]
        off = optax.tree.sub(jax.tree.map(lambda x: x.mean(0), kept), gradients)
        apart = optax.tree.sub(jax.tree.map(lambda x: x[0], kept), gradients)
        sizes = [optax.tree.norm(x) / optax.tree.norm(gradients) for x in (off, apart)]
        count = jnp.float32(len(jax.tree.leaves(kept)[0]))
        return optax.tree.zeros_like(gradients), (*sizes, count)

    zeros = tuple(jnp.zeros(()) for _ in range(3))
    asks = optax.GradientTransformationExtraArgs(lambda params: zeros, update)
    before = TrainState(state.step, jax.tree.map(jnp.copy, state.params), zeros)
    step = make_train_step(graphdef, asks, dataclasses.replace(config, matrices=shampoo))
    off, apart, count = step(before, BATCH)[0].opt_state
    assert off < 1e-5 and apart > 0.1 and count == 4


@pytest.mark.parametrize("optimizer, used", [("adamw", {"cudnn"}), ("sophia", {"cudnn", "xla"})])
def test_the_second_pass_has_attention_with_two_derivatives(optimizer, used, monkeypatch):
    """A stand-in for cuDNN's, whose derivative cannot be differentiated either."""
    asked = set()

    @jax.custom_vjp
    def once(x):
        return x

    def backward(_, cotangent):
        shape = jax.ShapeDtypeStruct(cotangent.shape, cotangent.dtype)
        return (jax.pure_callback(lambda x: x, shape, cotangent),)

    once.defvjp(lambda x: (x, None), backward)

    def attention(q, k, v, *, implementation, **_):
        asked.add(implementation)
        return once(q * k * v) if implementation == "cudnn" else q * k * v

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    config = preset("board", optimizer)
    model = golden.model_config(golden.read_json(Z["config"]), attention="cudnn")
    data = dataclasses.replace(config.data, batch_rows=4, microbatch_rows=4)
    config = dataclasses.replace(config, model=model, data=data)
    params = abstract_params(model)
    tx = build_optimizer(config, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.eval_shape(tx.init, params))
    jax.eval_shape(make_train_step(model_structure(model), tx, config), state, BATCH)
    assert asked == used
