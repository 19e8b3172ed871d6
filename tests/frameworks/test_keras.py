"""The recipe for Keras 3, trained by Keras: run by `make test-frameworks FRAMEWORK=keras`."""

import importlib
import os
import sys

import jax
import numpy as np
import pytest

import shampoo_jax
from tests.frameworks.running import RECIPES, speeches

os.environ["KERAS_BACKEND"] = "jax"
pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("default"),
]
LENGTH, WIDTH, ROWS = 32, 32, 960


@pytest.fixture(scope="module")
def keras():
    return importlib.import_module("keras")


@pytest.fixture(scope="module")
def Shampoo(keras):
    sys.path.insert(0, str(RECIPES))
    return importlib.import_module("keras_shampoo").Shampoo


@pytest.fixture(scope="module")
def data():
    text = np.frombuffer("".join(speeches()[:20]).encode(), np.uint8).astype(np.int32)
    rows = text[: (ROWS + 160) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return rows[:, :-1], rows[:, 1:]


def transformer(keras):
    """Two blocks; the same initial values every time."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(256, WIDTH, name="embed")(tokens)
    x = x + layers.Embedding(LENGTH, WIDTH, name="positions")(keras.ops.arange(LENGTH))
    for k in range(2):
        y = layers.LayerNormalization(name=f"norm_a{k}")(x)
        x = x + layers.MultiHeadAttention(4, 8, name=f"attention{k}")(y, y, use_causal_mask=True)
        y = layers.LayerNormalization(name=f"norm_m{k}")(x)
        y = layers.Dense(4 * WIDTH, activation="relu", name=f"fc{k}")(y)
        x = x + layers.Dense(WIDTH, name=f"proj{k}")(y)
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(tokens, layers.Dense(256, name="head")(x))


def compiled(keras, optimizer):
    model = transformer(keras)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fit(model, x, y):
    return model.fit(x, y, batch_size=16, shuffle=False, verbose=0).history["loss"][0]


def new_shampoo(Shampoo, **options):
    return Shampoo(0.01, adamw=["head"], solver="eigh", weight_decay=0.1, **options)


@pytest.fixture(scope="module")
def trained(keras, Shampoo, data):
    """A model after one epoch of Shampoo."""
    model = compiled(keras, new_shampoo(Shampoo))
    fit(model, *(d[:ROWS] for d in data))
    return model


def test_parameters_are_read_by_their_names(trained):
    params = {v.path: v.value for v in trained.trainable_variables}
    report = shampoo_jax.explain(params, trained.optimizer.transformation(0.1))
    read = {row.name: row.merged for row in report.rows if row.merged}
    assert {name.rsplit("/kernel")[0].rpartition("/")[2] for name in read} == {
        *("query", "key", "value", "attention_output", "fc0", "fc1", "proj0", "proj1")
    }
    assert all(len(shape) == 2 for shape in read.values())


def test_shampoo_trains_beside_adamw(keras, trained, data):
    other = compiled(keras, keras.optimizers.AdamW(0.01, weight_decay=0.1))
    fit(other, *(d[:ROWS] for d in data))
    shampoo, adamw = (m.evaluate(*(d[ROWS:] for d in data), verbose=0) for m in (trained, other))
    print("Keras: validation loss of Shampoo", shampoo, "of AdamW", adamw)
    assert shampoo < min(adamw + 0.1, 3.0)


def test_a_saved_model_goes_on(keras, trained, data, tmp_path):
    trained.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    few = [d[:160] for d in data]
    assert fit(loaded, *few) == fit(trained, *few)
    for ours, theirs in zip(trained.optimizer.arrays, loaded.optimizer.arrays, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_a_callback_changes_the_rate(keras, Shampoo, data):
    model = compiled(keras, new_shampoo(Shampoo))
    few = [d[:64] for d in data]
    fit(model, *few)
    model.optimizer.learning_rate = 0.0
    before = jax.tree.map(np.asarray, model.get_weights())
    fit(model, *few)
    assert all(map(np.array_equal, before, model.get_weights()))
