"""Optimizers against the benchmark script; A.. and M.. are rows of the list of parity traps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanogpt.config import AuxiliaryConfig, ScheduleConfig
from nanogpt.directions import nesterov_ema, scale_by_aspect
from nanogpt.optimizers import REGISTRY, build_optimizer, in_float32, route
from nanogpt.presets import preset
from nanogpt.settings import AdamWConfig, MuonConfig
from nanogpt.train_step import abstract_params
from tests.oracles import speedrun


def replay(config, params, gradients):
    """Parameters after each step, and the last optimizer state; gradients have a step axis."""
    tx = build_optimizer(config, params)

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), history = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(
        params, gradients
    )
    return history, state


def adamw_config(recipe):
    rates = dict(recipe["groups"])
    b1, b2 = recipe["betas"]
    auxiliary = AuxiliaryConfig(
        rates["embed"], rates["head"], rates["1d"], recipe["wd"], b1, b2, recipe["eps"]
    )
    block = recipe.get("mat", {"betas": (0.9, 0.95), "wd": 0.0, "eps": 1e-10})
    matrices = AdamWConfig(rates.get("mat", 1.0), block["wd"], *block["betas"], block["eps"])
    warmup = {"warmup_steps": recipe["warmup"], "warmup_from": 1e-7} if "warmup" in recipe else {}
    return dataclasses.replace(
        preset("track3", "adamw"),
        matrices=matrices,
        auxiliary=auxiliary,
        schedule=ScheduleConfig(12, **warmup),
    )


ADAMW_PATHS = {
    "embed": ("embed", "embedding"),
    "head": ("head", "kernel"),
    "head_bias": ("head", "bias"),
    "gain": ("norm1", "scale"),
    "late": ("norm2", "scale"),
    "sparse": ("sparse", "bias"),
    "mat": ("blocks", 0, "attn", "q", "kernel"),
}


def tree(arrays):
    """{path: array} as a nested dict."""
    out = {}
    for path, array in arrays.items():
        node = out
        for folder in path[:-1]:
            node = node.setdefault(folder, {})
        node[path[-1]] = array
    return out


def leaf(nested, path):
    for key in path:
        nested = nested[key]
    return nested


@pytest.mark.parametrize("name", ["tuned", "old", "matrices"])
def test_a18_a20_a21_adamw_equals_torch(name):
    """Form, eps (A18), decay by the scheduled rate (A20) of 1-D too (A2), a rate a group (A21).

    Also with gradients that are zero for two steps, and with the bfloat16 embedding (A12): a fused
    kernel's float32 arithmetic, parameter and moments rounded on store.
    """
    z = speedrun.load("adamw.npz")
    config = adamw_config(speedrun.read_json(z["recipes"])[name])
    paths = {k: path for k, path in ADAMW_PATHS.items() if k != "mat" or name == "matrices"}
    params = tree({path: jnp.asarray(z["init__" + k]) for k, path in paths.items()})
    gradients = tree({path: jnp.asarray(z["grad__" + k]) for k, path in paths.items()})
    history, _ = replay(config, params, gradients)
    for k, path in paths.items():
        np.testing.assert_allclose(leaf(history, path), z[f"{name}__{k}"], atol=5e-6, rtol=0)

    embed = {"embed": {"embedding": params["embed"]["embedding"].astype(jnp.bfloat16)}}
    gradient = {"embed": {"embedding": gradients["embed"]["embedding"].astype(jnp.bfloat16)}}
    history, state = replay(config, embed, gradient)
    off = np.abs(np.float32(history["embed"]["embedding"]) - z[f"{name}__embed_bf16"])
    assert (off > 0).mean(axis=(1, 2)).max() <= 0.03
    assert off.max() <= 2.0**-6  # 1 ulp of values up to 4
    moments = [x for x in jax.tree.leaves(state) if x.ndim == 2]
    for moment, key in zip(moments, ("m", "v"), strict=True):
        assert moment.dtype == jnp.bfloat16
        expected = z[f"{name}_embed_bf16_{key}_last"]
        off = np.abs(np.float32(moment) - expected) > 0
        assert off.mean() <= 0.03


def test_a12_optax_adam_alone_on_bfloat16_is_another_optimizer():
    """The golden file tells the difference that `in_float32` makes."""
    z = speedrun.load("adamw.npz")
    param = jnp.asarray(z["init__embed"], jnp.bfloat16)
    wrapped, bare = in_float32(optax.scale_by_adam(0.8, 0.95)), optax.scale_by_adam(0.8, 0.95)
    gradients = jnp.asarray(z["grad__embed"], jnp.bfloat16)
    updates = []
    for tx in (wrapped, bare):
        state = tx.init(param)
        for gradient in gradients:
            update, state = tx.update(gradient, state, param)
        updates.append(update)
    assert updates[0].dtype == jnp.float32 and updates[1].dtype == jnp.bfloat16
    assert (updates[0] != updates[1]).mean() > 0.2


MUON_NAMES = ("square", "tall", "wide", "odd", "rank3")


def muon_case(z, names=MUON_NAMES, **changes):
    """Initial kernels and gradients of muon.npz, as (in, out) kernels of one block."""
    scale = z["grad_scale"][:, None, None]
    path = {name: ("blocks", 0, "mlp", name, "kernel") for name in names}
    params = tree({path[n]: jnp.asarray(z["init__" + n].T) for n in names})
    gradients = tree(
        {
            path[n]: jnp.asarray((np.float32(z["grad_int8__" + n]) * scale).swapaxes(1, 2))
            for n in names
        }
    )
    base = preset("track3", "muon_track3")
    matrices = dataclasses.replace(base.matrices, **changes)
    config = dataclasses.replace(base, matrices=matrices, schedule=ScheduleConfig(12))
    return config, params, gradients


def muon_deviation(z, history, precision, name):
    """Largest deviation from the golden parameters, over all steps that the file holds."""
    ours = np.asarray(leaf(history, ("blocks", 0, "mlp", name, "kernel"))).swapaxes(1, 2)
    rows, columns = speedrun.read_json(z["config"])["sample_stride"]
    whole, last = f"param_{precision}__{name}", f"param_{precision}_last__{name}"
    if whole in z:
        return np.abs(ours - z[whole]).max()
    worst = np.abs(ours[:, ::rows, ::columns] - z[f"param_{precision}_sample__{name}"]).max()
    return max(worst, np.abs(ours[-1] - z[last]).max() if last in z else 0.0)


def test_m1_m2_a5_muon_equals_torch_in_float32():
    """Iteration (M1), momentum (M2) and the factor of tall and wide kernels (A5), 12 steps."""
    z = speedrun.load("muon.npz")
    history, state = replay(*muon_case(z, ns_dtype="float32"))
    for name in MUON_NAMES:
        tolerance = 1e-4 if name == "rank3" else 5e-7
        assert muon_deviation(z, history, "f32", name) <= tolerance, name
    momentum = next(x for x in jax.tree.leaves(state) if x.shape == (24, 40))
    np.testing.assert_allclose(momentum.T, z["momentum_last__odd"], rtol=1e-5, atol=1e-4)


def test_m1_muon_equals_torch_in_bfloat16():
    """Not on the rank-3 gradient, where the iteration lifts rounding noise to size 1."""
    z = speedrun.load("muon.npz")
    history, _ = replay(*muon_case(z))
    for name in MUON_NAMES[:-1]:
        deviation = muon_deviation(z, history, "bf16", name)
        assert deviation <= 1e-3, (name, deviation)
        assert muon_deviation(z, history, "f32", name) > 5e-6, "computed in float32?"


@pytest.mark.parametrize(
    "optimizer, changes, least",
    [
        pytest.param("muon_track3", {"ns_steps": 5}, 1e-4, id="M1-steps"),
        pytest.param("muon_track3", {"ns_coeffs": (3.4445, -4.775, 2.0315)}, 1e-3, id="M1-coeffs"),
        pytest.param("muon", {}, 1e-4, id="M2-bias-correction"),
    ],
)
def test_golden_muon_tells_the_trap(optimizer, changes, least):
    z = speedrun.load("muon.npz")
    config, params, gradients = muon_case(z, ("odd",), ns_dtype="float32", **changes)
    history, _ = replay(dataclasses.replace(config, optimizer=optimizer), params, gradients)
    assert muon_deviation(z, history, "f32", "odd") > least


@pytest.mark.parametrize("case", [2, 3, 4])
def test_m1_newton_schulz_alone(case):
    """One step without momentum: near singular, tiny (eps 1e-7) and zero inputs."""
    z = speedrun.load("muon.npz")
    x = jnp.asarray(z[f"ns{case}_in"].T)
    undo = max(1.0, x.shape[1] / x.shape[0]) ** 0.5
    for dtype, key in (("float32", "out_f32"), ("bfloat16", "out_bf16")):
        settings = MuonConfig(1.0, 0.0, 0.0, 12, (2.0, -1.5, 0.5), dtype)
        tx = REGISTRY["muon_track3"].direction(settings, None)
        update, _ = jax.jit(lambda x, tx=tx: tx.update(x, tx.init(x)))(x)
        tolerance = (1e-4 if case == 2 else 2e-5) if dtype == "float32" else 0.15
        expected = z[f"ns{case}_{key}"].T
        np.testing.assert_allclose(np.float32(update) / undo, expected, atol=tolerance, rtol=0)


def test_m2_momentum_is_a_plain_moving_average():
    gradients = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    tx, average = nesterov_ema(0.95), np.zeros(3)
    state = tx.init(jnp.zeros(3))
    for gradient in gradients:
        update, state = tx.update(jnp.asarray(gradient), state)
        average = 0.95 * average + 0.05 * gradient
        np.testing.assert_allclose(update, 0.95 * average + 0.05 * gradient, rtol=1e-5)
        np.testing.assert_allclose(state.mu, average, rtol=1e-5)


def test_a5_aspect_reads_out_over_in_of_kernels():
    """A (768, 3072) kernel maps 768 inputs to 3072 outputs: factor 2; its reverse: 1."""
    tx = scale_by_aspect()
    for shape, factor in (((2, 8), 2.0), ((8, 2), 1.0), ((3, 3), 1.0)):
        update, _ = tx.update(jnp.ones(shape), tx.init(None))
        np.testing.assert_array_equal(update, np.full(shape, factor, np.float32))


def test_a2_m3_every_parameter_of_the_model_has_its_group():
    """Vectors by order 1 whatever their name (A2); no embedding and no head in Muon (M3)."""
    params = abstract_params(preset("track3", "muon_track3").model)
    labels = route(params)
    assert labels["embed"] == {"embedding": "embed"}
    assert labels["head"] == {"kernel": "head", "bias": "vectors"}
    for shape, label in zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True):
        assert (label == "vectors") == (shape.ndim < 2)
    assert jax.tree.leaves(labels).count("matrices") == 72


def test_a_parameter_without_rule_or_with_two_is_refused_by_name():
    with pytest.raises(ValueError, match="'value_embed/table' must match exactly one .* none"):
        route({"value_embed": {"table": 0}})
    rules = (("head/.*", "head"), (".*/kernel", "matrices"))
    with pytest.raises(ValueError, match=r"'head/kernel' .* head/\.\* and \.\*/kernel"):
        route({"head": {"kernel": 0}}, rules)


def test_unknown_optimizer_and_foreign_settings_are_refused():
    config = preset("cpu", "adamw")
    params = abstract_params(config.model)
    with pytest.raises(ValueError, match="optimizer='adam' is unknown: .* adamw, muon"):
        build_optimizer(dataclasses.replace(config, optimizer="adam"), params)
    with pytest.raises(ValueError, match="matrices=AdamWConfig .* MuonConfig"):
        build_optimizer(dataclasses.replace(config, optimizer="muon"), params)
