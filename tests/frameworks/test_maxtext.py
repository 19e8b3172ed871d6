"""The recipe for MaxText, trained by MaxText: run by `make test-frameworks MAXTEXT=checkout`."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.frameworks.running import RECIPES, run, write_documents, write_tokenizer

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("default"),
]
SHAMPOO = RECIPES / "maxtext_shampoo.py"
ADAMW = "-m", "maxtext.trainers.pre_train.train"
TINY = """
base_emb_dim=64 base_num_query_heads=4 base_num_kv_heads=2 head_dim=16
base_mlp_dim=128 base_num_decoder_layers=2 vocab_size=256 max_target_length=64 dataset_type=grain
grain_file_type=parquet grain_train_files=docs.parquet grain_worker_count=0
tokenizer_path=tokenizer tokenizer_type=huggingface
attention=dot_product hardware=cpu dtype=float32 learning_rate=0.01 decoder_block=llama2
skip_jax_distributed_system=true async_checkpointing=false
""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents and tokenizer."""
    place = tmp_path_factory.mktemp("maxtext")
    write_documents(place / "docs.parquet", length=62)
    write_tokenizer(place / "tokenizer")
    return place


def train(folder, name, *words, program=(SHAMPOO,), devices=1, rows=16):
    """Losses by step of a run of a program."""
    base = Path(os.environ["SOURCES"]) / "maxtext" / "configs" / "base.yml"
    words = (f"per_device_batch_size={rows // devices}", *words)
    words = (*TINY, f"run_name={name}", f"base_output_directory={folder / 'out'}", *words)
    printed = run(folder, *program, base, *words, devices=devices)
    found = re.findall(r"completed step: (\d+), .*? loss: ([\d.]+)", printed)
    return {int(step): float(loss) for step, loss in found}


SAVED = ("steps=20", "enable_checkpointing=true", "checkpoint_period=10")
SPIKES = "skip_step_on_spikes=true"


@pytest.fixture(scope="module")
def saved(folder):
    """A run with MaxText's own wrapper against spikes: lax.cond, loss and norm of the gradient."""
    return train(folder, "saved", *SAVED, SPIKES)


def test_shampoo_trains_beside_adamw(folder, saved):
    adamw = train(folder, "adamw", "steps=20", "enable_checkpointing=false", program=ADAMW)
    print("MaxText: loss at step 19 of Shampoo", saved[19], "of AdamW", adamw[19])
    assert saved[0] == adamw[0] > 5
    assert saved[19] < min(adamw[19] + 0.1, 3.0)


def test_a_run_goes_on_from_its_checkpoint(folder, saved):
    checkpoints = folder / "out" / "saved" / "checkpoints"
    for path in checkpoints.iterdir():
        if path.name.isdigit() and int(path.name) > 10:
            shutil.rmtree(path)
    again = train(folder, "saved", *SAVED, SPIKES)
    assert min(again) == 11
    np.testing.assert_allclose(again[19], saved[19], atol=2e-3)  # printed with three digits


def test_a_mesh_computes_the_same(folder, saved):
    schedule = ("steps=6", "learning_rate_schedule_steps=20")
    words = (*schedule, "enable_checkpointing=false", "ici_fsdp_parallelism=4")
    split = train(folder, "mesh", *words, devices=4)
    np.testing.assert_allclose(split[2], saved[2], atol=0.02)
