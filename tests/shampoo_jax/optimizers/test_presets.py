"""Presets of Meta's forms against the trajectories of its package, on one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_jax as sj
from scripts.maintenance import replay_golden
from tests.shampoo_jax.test_golden import FILES, only

ADAM = dict(graft=sj.scale_by_second_moment(0.95, 1e-8))
UNMERGED = sj.Blocking(merge=None, canonical=False, dimension_numbers=None)


@pytest.mark.parametrize(
    ("number", "preset"),
    [
        ("35", sj.presets.meta_eigendecomposed(damping=1e-4, every=2) | ADAM),
        ("36", sj.presets.meta_eigendecomposed(sj.QRBasis(), damping=1e-3) | ADAM),
        ("39", sj.presets.meta_kl_shampoo(damping=1e-2) | ADAM),
        ("40", sj.presets.meta_eigendecomposed_kl(damping=0.1) | dict(exponents={2: 0.5})),
    ],
)
def test_presets_of_meta_reproduce_its_trajectories(number, preset):
    direction = sj.scale_by_shampoo(**preset | dict(b2=0.95, blocking=UNMERGED))
    tx = optax.chain(direction, optax.scale_by_learning_rate(0.01))
    trajectory = only(replay_golden.load(FILES[number]), ["mat"])
    assert replay_golden.replay(trajectory, lambda config: tx) <= 1


@pytest.mark.parametrize("alias", [sj.soap, sj.kl_shampoo])
def test_presets_of_papers_have_adamw_at_one_rate_for_vectors(alias):
    vector = {"bias": jnp.arange(1.0, 5.0)}
    mine = alias(**getattr(sj.presets, alias.__name__)())
    plain = optax.adamw(3e-3, 0.9, 0.95, 1e-15, weight_decay=0.01)
    states = mine.init(vector), plain.init(vector)
    for step in range(3):
        gradient = {"bias": jax.random.normal(jax.random.key(step), (4,))}
        found, states = zip(
            *(tx.update(gradient, s, vector) for tx, s in zip((mine, plain), states, strict=True)),
            strict=True,
        )
        np.testing.assert_allclose(found[0]["bias"], found[1]["bias"], rtol=1e-6)


# `tuning_search_space.json` of the winning submission, mlcommons/submissions_algorithms at
# 12c8e4ea: rate, 1 - beta1, 1 - beta2, momentum or None, decay, grafted norm, warmup, smoothing,
# dropout, share of the steps.
PUBLISHED = [
    (0.0017486387539278373, 0.06733926164, 0.00448403102, None, 0.08121616522670176),
    (
        0.0014381744028656841,
        0.025337537053408913,
        0.02508024059481679,
        None,
        0.00019716633625688372,
    ),
    (4.199449275251465, 1.0, 0.0023701743773090066, 1 - 0.03150207249544311, 6.404237434173623e-05),
    (0.0012, 0.016610699316537858, 0.005888216674053163, 0.5, 0.00040349948255455174),
    (0.001308209823469072, 0.02686663061, 0.00187670778, None, 0.16375311233774334),
]
REST = [(0.02, 0.0, 0.1, 1.0), (0.05, 0.2, 0.0, 0.6), (0.02, 0.1, 0.0, 1.0), (0.02, 0.1, 0.1, 1.0)]
REST += [(0.1, 0.1, 0.0, 1.0)]


def by_hand(trial, gradients, w, steps):
    """Parameters after some steps before the first root: filtered gradient over Adam's root."""
    rate, one_minus_b1, one_minus_b2, momentum, decay = PUBLISHED[trial - 1]
    warmup, _, _, share = REST[trial - 1]
    b1, b2, rise = 1 - one_minus_b1, 1 - one_minus_b2, int(warmup * share * steps)
    mu, nu, buffer, sgd = 0 * w, 0 * w, 0 * w, trial == 3
    for t, g in enumerate(gradients, start=1):
        filtered = b1 * (b1 * mu + (1 - b1) * g) + (1 - b1) * g if not sgd else g
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
        # NAdam's look ahead divided by the sum of its weights.
        filtered = filtered if sgd else filtered / (1 - b1 ** (t + 1))
        direction = filtered if sgd else filtered / (np.sqrt(nu / (1 - b2**t)) + 1e-8)
        direction = direction + decay * w
        if momentum is not None:
            buffer = momentum * buffer + (1 - momentum) * direction
            direction = (1 - momentum) * direction + momentum * buffer
        w = w - rate * (t - 1) / rise * direction
    return w


@pytest.mark.parametrize("trial", range(1, 6))
def test_algoperf_is_the_published_optimizer(trial):
    steps, rng = 1000, np.random.default_rng(trial)
    options = sj.presets.algoperf(trial, steps)
    tx = sj.shampoo(**options)
    update = jax.jit(tx.update)
    params = {"w": jnp.array(rng.normal(size=(3, 2)), jnp.float32)}
    w, gradients = np.float64(params["w"]), rng.normal(size=(4, 3, 2)).astype(np.float32)
    state = tx.init(params)
    for g in gradients:
        updates, state = update({"w": g}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], by_hand(trial, gradients, w, steps), rtol=2e-4)


@pytest.mark.parametrize("trial", range(1, 6))
def test_algoperf_has_the_published_numbers(trial):
    rate, one_minus_b1, one_minus_b2, _, decay = PUBLISHED[trial - 1]
    warmup, smoothing, dropout, share = REST[trial - 1]
    options, about = sj.presets.algoperf(trial, 186_666), sj.presets.ALGOPERF[trial - 1]
    assert (about.label_smoothing, about.dropout_rate) == (smoothing, dropout)
    assert (options["b1"], options["b2"]) == (1 - one_minus_b1, 1 - one_minus_b2)
    assert (options["weight_decay"], options["every"]) == (decay, 100)
    assert options["exponents"] == (0.5 if trial == 4 else None)
    assert options["blocking"].size == 1024
    schedule = options["learning_rate"]
    rise = int(warmup * share * 186_666)
    assert float(schedule(rise)) == pytest.approx(rate)
    half = rise + (share * 186_666 - rise) / 2
    assert float(schedule(round(half))) == pytest.approx(rate / 2, rel=1e-3)
    assert float(schedule(round(share * 186_666))) == pytest.approx(0, abs=1e-9 * rate + 1e-9)


def test_algoperf_leaves_large_tables_to_adam():
    rule = sj.presets.algoperf(1, 10)["preconditioned"]
    shapes = [(1_000_000, 4), (999_999, 4), (4,), ()]
    assert [rule((), jax.ShapeDtypeStruct(s, float)) for s in shapes] == [False, True, True, True]
