"""The ImageNet command on a folder of small JPEGs: runs, their resumption, the ablation."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from docs.gallery.images import ablation, train
from docs.gallery.images.folder import val_batches
from docs.gallery.images.recipe import Settings, make_optimizer, rate
from tests.docs.gallery.images.test_folder import write_folder

TINY = Settings(
    network="tiny", rows=8, size=8, epochs=2.0, warmup_epochs=0.5, every=2, dtype="float32",
    checkpoint_every=100, threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, train=10, val=3)
    return train.make_run(dataclasses.replace(TINY, data=folder, out=folder / "whole"))


def in_folder(run: train.Run, name: str) -> train.Run:
    """The same run, and the same programs, in another folder."""
    settings = dataclasses.replace(run.settings, out=run.settings.data / name)
    return dataclasses.replace(run, settings=settings)


def saved(run: train.Run):
    """The state in the last checkpoint of a run."""
    with train.checkpoints(run) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(run.abstract))


def test_a_resumed_run_ends_where_an_undisturbed_one_does(run):
    assert run.steps == 5
    whole = train.train(run)
    stopped = in_folder(run, "stopped")
    train.train(stopped, until=2)
    again = train.train(stopped)
    same = ("train_loss", "val_loss", "val_accuracy", "step")
    assert {k: whole[k] for k in same} == {k: again[k] for k in same}
    states = saved(run), saved(stopped)
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert int(states[0].step) == 5
    # Training changed kernels and statistics; Shampoo's blocks are split over the devices.
    first, last = run.first(), states[0]
    moved = jax.tree.map(
        lambda a, b: a.ndim == 1 or bool((a != b).any()), first.params, last.params
    )
    assert all(jax.tree.leaves(moved))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, first.stats, last.stats)))
    split = [x for x in jax.tree.leaves(states[0].opt_state) if not x.sharding.is_fully_replicated]
    assert split


def test_images_that_fill_a_batch_do_not_count(run):
    state, settings = run.first(), run.settings
    batch = next(val_batches(settings.data, rows=8, size=8, threads=1))
    assert batch["weights"].tolist() == [1] * 6 + [0] * 2
    other = batch | {"labels": np.where(batch["weights"], batch["labels"], 1 - batch["labels"])}
    sums = [
        np.asarray(run.evaluate(state.params, state.stats, train.on_devices(b, run.mesh)))
        for b in (batch, other)
    ]
    np.testing.assert_array_equal(*sums)
    assert sums[0][0] == pytest.approx(6 * np.log(2), rel=0.02)  # nothing is known yet


def test_other_settings_do_not_go_on_with_a_run(run):
    other = in_folder(run, "other")
    with train.checkpoints(other):
        pass
    changed = dataclasses.replace(other.settings, every=3)
    with (
        pytest.raises(ValueError, match="holds a run with every=2, not 3: choose another --out"),
        train.checkpoints(dataclasses.replace(other, settings=changed)),
    ):
        pass


def test_devices_have_to_share_a_batch(run):
    with pytest.raises(ValueError, match="rows=8 is not a multiple of the 3 devices"):
        train.make_run(run.settings, jax.devices()[:3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(every=0), "every=0 must be at least 1."),
        (dict(epochs=1.0, warmup_epochs=1.0), "epochs=1.0 must be more than warmup_epochs=1.0."),
    ],
)
def test_settings_that_make_no_sense(changed, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changed)


def test_rates_of_the_recipe():
    cosine = rate(Settings(optimizer="sgd"), 900)
    assert [round(float(cosine(k)), 6) for k in (0, 49, 475, 900)] == [0.008, 0.4, 0.2, 0.0]
    steps = rate(Settings(schedule="steps", graft="adam", rows=256), 900)
    assert [round(float(steps(k)), 9) for k in (49, 299, 300, 600, 800)] == [
        *(5e-4, 5e-4, 5e-5, 5e-6, 5e-7)
    ]


def test_gains_do_not_decay_and_kernels_do():
    params = {
        "conv": {"kernel": np.ones((1, 1, 4, 4), np.float32)},
        "scale": np.ones(4, np.float32),
    }
    still = jax.tree.map(np.zeros_like, params)
    for optimizer in ("sgd", "shampoo"):
        tx = make_optimizer(Settings(optimizer=optimizer, weight_decay=0.5, every=1), 900)
        updates, _ = tx.update(still, tx.init(params), params)
        assert not np.any(updates["scale"])
        # The first rate, 0.008, times decay, looked ahead by Nesterov's 1.9.
        np.testing.assert_allclose(updates["conv"]["kernel"], -0.008 * 0.5 * 1.9, rtol=1e-5)


def test_the_ablation_trains_its_arms_and_writes_their_table(tmp_path, monkeypatch):
    def trained(own):
        own.out.mkdir()
        about = {k: getattr(own, k) for k in ("optimizer", "graft", "every", "block_size")}
        (own.out / "settings.json").write_text(json.dumps(about))
        found = {"step": 5, "val_accuracy": 0.5, "val_loss": 0.7}
        found["step_s"] = 0.5 if own.optimizer == "sgd" else 0.75
        (own.out / "metrics.jsonl").write_text(json.dumps(found) + "\n")

    monkeypatch.setattr(ablation, "make_run", lambda settings: settings)
    monkeypatch.setattr(ablation, "train", trained)
    settings = Settings(out=tmp_path, weight_decay=0.5)
    path = ablation.run(ablation.Ablation(("graft-adam", "nesterov", "every-10"), settings))
    assert path.read_text().splitlines()[2:] == [
        "| nesterov | - | - | - | 5 | 50.00 | 0.7000 | 500.0 | 1.00 |",
        "| graft-adam | adam | 50 | 2048 | 5 | 50.00 | 0.7000 | 750.0 | 1.50 |",
        "| every-10 | sgd | 10 | 2048 | 5 | 50.00 | 0.7000 | 750.0 | 1.50 |",
    ]
    assert ablation.arm("every-10", settings).weight_decay == 0.5
    with pytest.raises(ValueError, match="arms='every-7': choose from nesterov, shampoo"):
        ablation.run(ablation.Ablation(("every-7",), settings))
