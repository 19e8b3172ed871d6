"""The recipe for Levanter, trained by it: run by `make test-frameworks FRAMEWORK=levanter`."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.frameworks.running import RECIPES, run, speeches, write_tokenizer

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("default"),
]

RUN = """
data: {tokenizer: llama, train_urls: [], validation_urls: [], cache_dir: cache}
model: {type: llama, reference_checkpoint: llama, seq_len: 64, hidden_dim: 64,
        intermediate_dim: 128, num_layers: 2, num_heads: 4, num_kv_heads: 2}
trainer:
  id: run
  num_train_steps: 60
  train_batch_size: 16
  require_accelerator: false
  tracker: {type: json_logger}
  ray: {auto_start_cluster: false}
  mp: f32
  max_eval_batches: 8
  steps_per_eval: 1000
  checkpointer: {base_path: saved, keep: [{every: 20}]}
optimizer: {learning_rate: 0.01, weight_decay: 0.1, warmup: 0.1}
"""

# Levanter 1.2.dev1644 multiplies its loss by a mask of floats, which jax from 0.8.0 on refuses as
# `where`, whatever the optimizer; the numbers are those of a mask of booleans.
BOOLEAN_MASKS = """
import runpy, sys
import haliax.nn.loss as loss
whole = loss.maybe_reduce_loss
loss.maybe_reduce_loss = lambda array, reduction, axis, where: whole(
    array, reduction, axis, where if where is None else where != 0
)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LLAMA = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=64,
    intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token caches, tokenizer and settings of a tiny Llama."""
    from levanter.store.cache import SerialCacheWriter  # type: ignore[missing-import]

    place = tmp_path_factory.mktemp("levanter")
    write_tokenizer(place / "llama")
    (place / "llama" / "config.json").write_text(json.dumps(LLAMA))
    (place / "run.yaml").write_text(RUN)
    (place / "masks.py").write_text(BOOLEAN_MASKS)
    tokens = np.frombuffer("".join(speeches()).encode(), np.uint8).astype(np.int32)
    for split, part in (("train", tokens[:1_000_000]), ("validation", tokens[-100_000:])):
        empty = {"input_ids": np.zeros(0, np.int32)}
        with SerialCacheWriter(str(place / "cache" / split), empty) as writer:
            writer.write_batch([{"input_ids": row} for row in part.reshape(-1, 1000)])
    return place


def losses(printed: str) -> tuple[list[float], float]:
    """Training losses, and the last validation's."""
    trained = [float(x) for x in re.findall(r'"train/loss": ([\d.e-]+), "global_step"', printed)]
    return trained, float(re.findall(r'"eval/loss": ([\d.e-]+)', printed)[-1])


def train(folder, *words, devices=1):
    """Losses of one run of the recipe."""
    recipe = RECIPES / "levanter_shampoo.py"
    return losses(run(folder, "masks.py", recipe, "--config_path", "run.yaml", *words,
                      devices=devices))  # fmt: skip


SHAMPOO = ("--optimizer.type", "shampoo", "--optimizer.solver", "eigh")


@pytest.fixture(scope="module")
def shampoo(folder):
    return train(folder, *SHAMPOO)


def test_shampoo_trains_beside_adam(folder, shampoo):
    _, adam = train(folder, "--optimizer.type", "adam", "--trainer.id", "adam")
    trained, validated = shampoo
    print("Levanter: validation loss of Shampoo", validated, "of Adam", adam)
    assert trained[0] > 5 and trained[-1] < 2.5
    assert validated < adam + 0.1


def test_a_run_goes_on_from_its_checkpoint(folder, shampoo):
    trained, validated = shampoo
    shutil.rmtree(folder / "saved" / "run" / "step-40", ignore_errors=True)
    for path in (folder / "saved" / "run").glob("step-6*"):
        shutil.rmtree(path)
    again, once_more = train(folder, *SHAMPOO)
    assert len(again) < len(trained)
    np.testing.assert_allclose(again[-1], trained[-1], rtol=1e-3)
    np.testing.assert_allclose(once_more, validated, rtol=1e-3)


def test_a_mesh_computes_the_same(folder, shampoo):
    trained, validated = shampoo
    split, once_more = train(folder, *SHAMPOO, "--trainer.id", "split", devices=4)
    np.testing.assert_allclose(split[:5], trained[:5], rtol=1e-3)
    np.testing.assert_allclose(once_more, validated, rtol=0.02)
