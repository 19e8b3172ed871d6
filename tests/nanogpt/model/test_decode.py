"""Tokens one after the other against the whole model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nanogpt.config.run import ModelConfig
from nanogpt.model.decode import draw, empty_cache, extend, generate
from nanogpt.train.train_step import draw_params, model_structure

CONFIG = ModelConfig(50, 2, 16, 8, 32, 12, dtype="float32", embed_dtype="float32")


@pytest.fixture(scope="module")
def model():
    """With weights that are large enough for tokens to differ, the last layers' included."""
    shapes = draw_params(CONFIG, 0)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge(model_structure(CONFIG), structure.unflatten(drawn))


TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))


def test_pieces_have_the_logits_of_the_whole(model):
    """Also behind garbage, which later tokens replace."""
    whole, cache, found = model(TOKENS), empty_cache(model, 2, 12), []
    _, cache = extend(model, cache, TOKENS[:, ::-1], 0)
    step = nnx.jit(extend)
    for start, end in [(0, 5), *((k, k + 1) for k in range(5, 12))]:
        logits, cache = step(model, cache, jnp.asarray(TOKENS[:, start:end]), start)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, 1), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("prompt", "length"), [(1, 12), (12, 12), (17, 12), (2, 1)])
def test_the_likeliest_tokens_are_those_of_whole_contexts(model, prompt, length):
    """Beyond the positions that there are, the second half of them begins anew."""
    graphdef, params = nnx.split(model)
    context = TOKENS.ravel()[:prompt].tolist()
    drawn = generate(graphdef, params, context, length=length, vocab_size=40, temperature=0)
    found = list(itertools.islice(drawn, 20))
    forward, expected = nnx.jit(lambda model, x: model(x)), []
    for _ in range(20):
        context = context[-max(length // 2, 1) :] if len(context) > length else context
        padded = np.array([context + [0] * (12 - len(context))])
        expected.append(int(forward(model, padded)[0, len(context) - 1, :40].argmax()))
        context = [*context, expected[-1]]
    assert found == expected and len(set(found)) > 2


def test_draws_have_the_chances_of_the_model():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    keys = jax.random.split(jax.random.key(0), 4000)

    def shares(temperature, top_k=None):
        found = jax.vmap(lambda key: draw(logits, key, temperature, top_k))(keys)
        return np.bincount(found, minlength=4) / len(keys)

    np.testing.assert_allclose(shares(1.0), [0.1, 0.2, 0.3, 0.4], atol=0.03)
    np.testing.assert_allclose(shares(1.0, 2), [0, 0, 3 / 7, 4 / 7], atol=0.03)
    np.testing.assert_allclose(shares(0.5), np.array([1, 4, 9, 16]) / 30, atol=0.03)
    assert shares(0.0)[3] == shares(1.0, 1)[3] == 1
    np.testing.assert_allclose(shares(1.0, 9), [0.1, 0.2, 0.3, 0.4], atol=0.03)
    # Also where quotients, or the temperature itself, are beyond float32.
    logits = logits + 10
    assert shares(1e-38)[3] == shares(1e-60)[3] == 1
    np.testing.assert_allclose(shares(1e300, 2), [0, 0, 0.5, 0.5], atol=0.03)


def test_a_seed_is_a_text(model):
    graphdef, params = nnx.split(model)

    def text(seed):
        drawn = generate(graphdef, params, [1], length=12, vocab_size=50, seed=seed)
        return list(itertools.islice(drawn, 8))

    assert text(3) == text(3) != text(4)
