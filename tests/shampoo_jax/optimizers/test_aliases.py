"""Complete optimizers: what their options reach, and what stands where in the chain."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj

ALIASES = {
    sj.shampoo: sj.scale_by_shampoo,
    sj.soap: sj.scale_by_soap,
    sj.kl_shampoo: sj.scale_by_kl_shampoo,
    sj.kl_soap: sj.scale_by_kl_soap,
    sj.one_sided_shampoo: sj.scale_by_one_sided_shampoo,
}
# Options of a direction that its alias leaves to `as_optimizer(scale_by_...)`, for want of room.
RARE = {
    sj.soap: {"b3", "damping", "exponent", "weighted"},
    sj.kl_soap: {"first_weight", "first_eigenvalue", "eps_hat"},
}
aliases = pytest.mark.parametrize("alias", ALIASES, ids=lambda f: f.__name__)
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


PARAMS, *GRADIENTS = (
    {"dense": {"kernel": normal(3, 3), "bias": normal(3)}, "head": normal(3, 2)} for _ in range(4)
)
KERNELS = [g["dense"]["kernel"] for g in GRADIENTS]
OTHERS = [{"bias": g["dense"]["bias"], "head": g["head"]} for g in (PARAMS, *GRADIENTS)]


def run(tx, gradients=GRADIENTS, params=PARAMS):
    """Updates at constant parameters, and the last state, without jit."""
    with jax.disable_jit():
        state, updates = tx.init(params), []
        for g in gradients:
            new, state = tx.update(g, state, params)
            updates.append(new)
    return updates, state


def kernels(updates):
    return [u["dense"]["kernel"] for u in updates]


def others(updates):
    return [{"bias": u["dense"]["bias"], "head": u["head"]} for u in updates]


def assert_close(a, b, rtol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(jnp.abs(y).max()))


@aliases
def test_the_signature_is_that_of_direction_and_frame(alias):
    direction = inspect.signature(ALIASES[alias]).parameters
    frame = dict(list(inspect.signature(sj.as_optimizer).parameters.items())[1:])
    signature = inspect.signature(alias).parameters
    assert next(iter(signature)) == "learning_rate"
    assert set(signature) | RARE.get(alias, set()) == set(direction) | set(frame)
    for name, parameter in signature.items():
        source = frame if name in frame else direction
        assert (parameter.default, parameter.kind) == (source[name].default, source[name].kind)
    assert set(direction) & set(frame) == {"placement"}
    assert len(signature) <= 23
    documented = re.findall(r"^  (\w+): ", inspect.getdoc(alias) or "", flags=re.MULTILINE)
    assert [name for name in documented if name in signature] == list(signature)
    assert alias.__doc__ and alias.__name__ in sj.__all__


@aliases
def test_matrices_take_the_direction_and_others_adamw(alias):
    updates, _ = run(alias(0.1, 0.8, b2=0.7))
    direction, _ = run(ALIASES[alias](0.8, b2=0.7), KERNELS, PARAMS["dense"]["kernel"])
    times = 1 if alias is sj.one_sided_shampoo else 4
    adam, _ = run(optax.nadam(0.1 * times, 0.9, 0.95, 1e-15), OTHERS[1:], OTHERS[0])
    assert_close(kernels(updates), [-0.1 * d for d in direction], 1e-5)
    assert_close(others(updates), adam)


@pytest.mark.parametrize("schedule", [False, True], ids=["numbers", "schedules"])
def test_rates_of_the_others_are_multiplied_and_their_decay_is_not(schedule):
    rates, decays = optax.linear_schedule(0.1, 0.2, 2), optax.linear_schedule(0.5, 0.3, 2)
    rate, decay = (rates, decays) if schedule else (0.1, 0.5)
    updates, _ = run(sj.shampoo(rate, weight_decay=decay, others_rate=3.0))
    bare, _ = run(sj.shampoo(1.0, others_rate=1.0))
    for step, (update, unit) in enumerate(zip(others(updates), others(bare), strict=True)):
        step *= schedule
        told = optax.tree.scale(-decays(step), OTHERS[0])
        expected = optax.tree.scale(rates(step), optax.tree.add_scale(told, 3.0, unit))
        assert_close(update, expected, 1e-5)
    frozen, _ = run(sj.shampoo(0.1, others_rate=0))
    assert not any(x.any() for x in jax.tree.leaves(others(frozen)))
    for wrong in ({"others_rate": -1.0}, {"others_rate": 4.0, "others": optax.sgd(0.1)}):
        with pytest.raises(ValueError, match=r"others_rate=(-1.*negative|4.*beside others)"):
            sj.shampoo(0.1, **wrong)


@pytest.mark.parametrize(
    ("alias", "options", "times"),
    [
        (sj.shampoo, {"graft": "rmsprop"}, 4),
        (sj.shampoo, {"graft": None}, 1),
        (sj.shampoo, {"graft": sj.orthogonalize()}, 1),
        (sj.one_sided_shampoo, {"graft": "adam"}, 4),
        (sj.soap, {}, 4),
        (sj.soap, {"graft": sj.orthogonalize()}, 1),
    ],
)
def test_rates_of_the_others_follow_the_size_of_updates(alias, options, times):
    found, told = (run(alias(0.1, **options, **o))[0] for o in ({}, {"others_rate": times}))
    assert_close(others(found), others(told))


def test_exponents_of_matrices_are_a_third_where_a_graft_gives_the_size():
    forms = ({}, 1 / 3), ({"graft": None}, 0.25), ({"statistics": "kl"}, 0.25)
    for form, exponents in forms:
        found, told = (
            run(sj.scale_by_shampoo(**form, **e), KERNELS, PARAMS["dense"]["kernel"])[0]
            for e in ({}, {"exponents": exponents})
        )
        assert_close(found, told)


# Options of each direction away from their defaults, to be seen to arrive.
FORWARDED = {
    sj.shampoo: dict(
        b3=0.5,
        blocking=sj.Blocking(2),
        exponents=0.3,
        solver=sj.ShiftedEigh(0.1),
        every=2,
        refresh=sj.Refresh(3),
        graft="sgd",
        weighted=False,
    ),
    sj.soap: dict(
        factor_b2=0.5,
        eps=0.1,
        basis="eigh",
        every=2,
        refresh=sj.BasisRefresh(skip_first=False, reorder=False),
    ),
    sj.kl_shampoo: dict(eps=0.1, first_weight=1.0, every=2, max_scale=10.0, basis="eigh"),
    sj.kl_soap: dict(
        factor_b2=0.5,
        every=2,
        normalize=False,
        bias_correction=True,
        refresh=sj.BasisRefresh(when="before", skip_first=False),
    ),
    sj.one_sided_shampoo: dict(
        side="left", graft="adagrad", solver=sj.TruncatedEigh(0.1), bias_correction=False
    ),
}


@aliases
def test_options_are_forwarded(alias):
    options = FORWARDED[alias]
    updates, _ = run(alias(0.1, **options))
    direction, _ = run(ALIASES[alias](**options), KERNELS, PARAMS["dense"]["kernel"])
    assert_close(kernels(updates), [-0.1 * d for d in direction], 1e-5)
    plain, _ = run(alias(0.1))
    assert jnp.abs(kernels(updates)[-1] - kernels(plain)[-1]).max() > 1e-3


def test_decay_momentum_and_learning_rate_in_their_order():
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    momentum = sj.momentum(0.5, 0.1, nesterov=True)
    tx = sj.shampoo(schedule, weight_decay=0.2, momentum=momentum, others_rate=1.0)
    updates, _ = run(tx)
    weights = PARAMS["dense"]["kernel"]
    direction, _ = run(sj.scale_by_shampoo(), KERNELS, weights)
    trace = 0.0
    for t, (update, d) in enumerate(zip(kernels(updates), direction, strict=True)):
        d = 0.9 * (d + 0.2 * weights)
        trace = 0.5 * trace + d
        assert_close(update, -schedule(t) * (d + 0.5 * trace), 1e-5)
    adamw, _ = run(
        optax.nadamw(schedule, 0.9, 0.95, 1e-15, weight_decay=0.2), OTHERS[1:], OTHERS[0]
    )
    assert_close(others(updates), adamw, 1e-5)


def test_l2_decay_goes_through_the_direction():
    weights = PARAMS["dense"]["kernel"]
    updates, _ = run(sj.shampoo(0.1, weight_decay=0.2, decay=sj.Decay("l2")))
    expected, _ = run(sj.scale_by_shampoo(), [g + 0.2 * weights for g in KERNELS], weights)
    assert_close(kernels(updates), [-0.1 * u for u in expected], 1e-5)


def test_relative_decay_needs_and_takes_the_peak():
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    with pytest.raises(ValueError, match="needs peak_lr"):
        sj.shampoo(schedule, weight_decay=0.2, decay=sj.Decay("over_peak"))
    decay = sj.Decay("over_peak", peak_lr=0.1)
    updates, _ = run(sj.shampoo(schedule, weight_decay=0.2, decay=decay))
    bare, _ = run(sj.shampoo(schedule))
    for t, (u, b) in enumerate(zip(kernels(updates), kernels(bare), strict=True)):
        assert_close(u - b, -schedule(t) * 0.2 / 0.1 * PARAMS["dense"]["kernel"], 1e-4)


@pytest.mark.parametrize("form", ["tree", "function"])
def test_a_mask_says_what_decays(form):
    mask = {"dense": {"kernel": True, "bias": False}, "head": False}
    by_function = lambda tree: jax.tree.map(lambda x: x.shape == (3, 3), tree)  # noqa: E731
    decay = sj.Decay(mask=mask if form == "tree" else by_function)
    decayed, _ = run(sj.shampoo(0.1, weight_decay=0.2, decay=decay))
    bare, _ = run(sj.shampoo(0.1))
    assert_close(others(decayed), others(bare))
    for u, b in zip(kernels(decayed), kernels(bare), strict=True):
        assert_close(u - b, -0.1 * 0.2 * PARAMS["dense"]["kernel"], 1e-4)


@aliases
def test_others_may_have_an_optimizer_of_their_own(alias):
    own = optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(0.3))
    updates, _ = run(alias(0.1, weight_decay=0.2, others=own))
    expected, _ = run(own, OTHERS[1:], OTHERS[0])
    assert_close(others(updates), expected)
    plain, _ = run(alias(0.1, weight_decay=0.2))
    assert_close(kernels(updates), kernels(plain))


def test_a_rule_of_ones_own():
    tx = sj.shampoo(0.1, preconditioned=lambda path, leaf: path[0].key == "head")
    updates, _ = run(tx)
    heads = [g["head"] for g in GRADIENTS]
    direction, _ = run(sj.scale_by_shampoo(), heads, PARAMS["head"])
    assert_close([u["head"] for u in updates], [-0.1 * d for d in direction], 1e-5)
    rest = [g["dense"] for g in GRADIENTS]
    adamw, _ = run(optax.nadamw(0.4, 0.9, 0.95, 1e-15, weight_decay=0.0), rest, PARAMS["dense"])
    assert_close([u["dense"] for u in updates], adamw)


@aliases
def test_half_precision_rounds_once(alias):
    """Everything between gradient and update is float32, AdamW's moments included."""
    half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), t) for t in (PARAMS, *GRADIENTS)]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in half]
    tx = alias(0.1, weight_decay=0.2, momentum=0.5)
    updates, state = run(tx, half[1:], half[0])
    expected, expected_state = run(tx, wide[1:], wide[0])
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    jax.tree.map(np.testing.assert_array_equal, updates, rounded)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


@aliases
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("beta2", "b2"),
        ("learning_rates", "learning_rate"),
        ("precondition_frequency", "every"),
        ("block_size", r"blocking=Blocking\(size=...\)"),
        ("stagger", r"refresh=Refresh\("),
        ("weight_decay_kind", r"decay=Decay\("),
        ("nesterov", r"momentum=momentum\("),
        ("adamw_b1", r"others=optax.adamw\("),
        ("preconditoned", "preconditioned"),
    ],
)
def test_unknown_options_are_answered_with_ours(alias, name, hint):
    with pytest.raises(TypeError, match=f"{alias.__name__} has no option '{name}': .*mean {hint}"):
        alias(0.1, **{name: 1})


@aliases
def test_an_option_without_a_near_name_and_a_missing_one(alias):
    with pytest.raises(TypeError, match="has no option 'zzz': it has learning_rate, b1, b2"):
        alias(0.1, zzz=1)
    with pytest.raises(TypeError, match="learning_rate"):
        alias()
