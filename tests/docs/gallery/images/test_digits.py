"""The comparison on digits: the rule that tunes, the file of runs, the page. Its images are not."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from docs.gallery.images import digits, digits_page


@pytest.mark.parametrize(
    ("best", "tried"),
    [(0, [-2, -1, 0, 1, 2]), (4, [-2, -1, 0, 1, 2, 3, 4, 5]), (-3, [-2, -1, 0, 1, 2, -3, -4])],
)
def test_tuning_goes_on_until_the_best_rate_is_inside(best, tried):
    asked = []

    def run(power, seed):
        asked.append(power)
        assert seed == digits.TUNING
        # A rate that diverges is no best one.
        return {"validation_loss": np.nan if power == best + 2 else abs(power - best)}

    assert digits.tuned(run) == best
    assert asked == tried


def test_tuning_ends():
    assert digits.tuned(lambda power, seed: {"validation_loss": -power}) == 6


@pytest.mark.parametrize("name", digits.FIRST)
def test_a_rate_scales_the_update_and_kernels_alone_decay(name):
    tx = digits.optimizer(name)
    params = {"conv": {"kernel": jnp.eye(3).reshape(1, 1, 3, 3)}, "scale": jnp.ones(3)}
    state = tx.init(params)
    update = lambda peak: tx.update(params, state, params, peak=jnp.float32(peak))[0]  # noqa: E731
    none, one, two = update(0.0), update(1.0), update(2.0)
    now = 1 / digits.WARMUP
    decayed = -now * 1e-3 * params["conv"]["kernel"]
    np.testing.assert_allclose(none["conv"]["kernel"], decayed, rtol=1e-6)
    assert not np.any(none["scale"])
    for path in (lambda t: t["conv"]["kernel"], lambda t: t["scale"]):
        np.testing.assert_allclose(path(two) - path(none), 2 * (path(one) - path(none)), rtol=1e-5)


def fake(monkeypatch):
    """A trainer that trains nothing, and a list of what it was asked for."""
    asked = []

    def train(rate, seed):
        asked.append((rate, seed))
        ends = {"validation_loss": abs(np.log2(rate)), "test_loss": 0.1 + seed / 1e3}
        ends |= {"test_accuracy": 0.9 + seed / 1e3, "step_processor_s": 0.01}
        return ends | {"curve": [[10, 1.0, 0.5], [20, 0.5, 0.9]]}

    monkeypatch.setattr(digits, "trainer", lambda name: train)
    return asked


def test_runs_are_kept_and_not_made_again(monkeypatch, tmp_path):
    path, asked = tmp_path / "runs" / "digits.jsonl", fake(monkeypatch)
    first = digits.Runs("SGD", path)(1, 0)
    assert digits.Runs("SGD", path)(1, 0)["test_loss"] == first["test_loss"]
    assert asked == [(0.2, 0)]
    monkeypatch.setattr(digits, "STEPS", digits.STEPS + 1)
    digits.Runs("SGD", path)(1, 0)
    assert len(asked) == 2


def test_the_page_has_tables_and_pictures(monkeypatch, tmp_path):
    fake(monkeypatch)
    for name in digits.FIRST:
        runs = digits.Runs(name, tmp_path / "digits.jsonl")
        for power, seed in ((0, 100), (1, 100), (1, 0), (1, 1), (1, 2)):
            runs(power, seed)
    page = tmp_path / "images.md"
    page.write_text(f"Before\n{digits_page.BEGIN}\nold\n{digits_page.END}\nafter\n")
    known = digits.read_runs(tmp_path / "digits.jsonl")
    digits_page.write(tmp_path, known, page)
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| SGD | 0.2 | 90.10 ± 0.06 | 0.1010 ± 0.0006 | 2.3219 ± 0.0000 | 10.0 |" in text
    assert "| SGD | 0.1: 3.3219, **0.2: 2.3219** |" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"digits.png", "digits-dark.png"}
    page.write_text("no marks")
    with pytest.raises(ValueError, match="images.md: no '<!-- written by make images -->'"):
        digits_page.write(tmp_path, known, page)


def test_batches_follow_from_their_seed_and_move_by_a_pixel(monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(200, 8, 8, 1)).astype(np.float32)
    known = {"train": {"images": pixels, "labels": np.arange(200, dtype=np.int32)}}
    monkeypatch.setattr(digits, "images", lambda: known)
    first, again, other = (next(digits.batches(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["images"], again["images"])
    assert (first["labels"] != other["labels"]).any()
    for image, label in zip(first["images"], first["labels"], strict=True):
        padded = np.pad(pixels[label], ((1, 1), (1, 1), (0, 0)), constant_values=pixels.min())
        assert any(
            np.array_equal(image, padded[a : a + 8, b : b + 8]) for a in range(3) for b in range(3)
        )


def test_the_images_of_scikit_learn_are_cut_into_parts(monkeypatch):
    rng = np.random.default_rng(0)
    loaded = types.SimpleNamespace(
        images=rng.uniform(0, 16, (1797, 8, 8)), target=rng.integers(0, 10, 1797)
    )
    module = types.ModuleType("sklearn.datasets")
    module.load_digits = lambda: loaded
    monkeypatch.setitem(__import__("sys").modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", module)
    parts = digits.images.__wrapped__()
    assert [len(part["labels"]) for part in parts.values()] == [897, 300, 600]
    assert abs(parts["train"]["images"].mean()) < 1e-3
    together = np.concatenate([part["images"] for part in parts.values()])
    assert len(np.unique(together, axis=0)) == 1797


def test_the_committed_runs_are_whole():
    runs = digits.read_runs(digits.FILE)
    for name in digits.FIRST:
        own = digits_page.judged(runs, name)
        assert sorted(r["seed"] for r in own) == list(digits.SEEDS)
        tuned = {r["rate"]: r["validation_loss"] for r in runs.values()
                 if (r["optimizer"], r["seed"]) == (name, digits.TUNING)}  # fmt: skip
        best = min(tuned, key=tuned.__getitem__)
        assert {r["rate"] for r in own} == {best}
        assert min(tuned) < best < max(tuned)
        assert all(r["identity"] == digits.identity(name, r["rate"], r["seed"]) for r in own)
    assert json.loads(digits.FILE.read_text().splitlines()[0])["optimizer"] == "SGD"
