"""What a run trained: its weights, settings and tokenizer, as those who use the model want them."""

from typing import Any, NamedTuple

import jax

from data_pipeline import Tokenizer, gpt2
from data_pipeline.tokenizer import GPT2_VOCAB_SIZE
from nanogpt.config.recorded import read_settings
from nanogpt.config.run import Config
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.ancestors import params_of, refuse_damaged, run_of
from nanogpt.train.compatible import read_meta
from nanogpt.train.elastic import read_state
from nanogpt.train.metrics import read_start
from nanogpt.train.paths import Path
from nanogpt.train.stored import expecting_form
from nanogpt.train.train_step import abstract_params, init_state
from shampoo_jax import eval_params


class Trained(NamedTuple):
    """A run's model.

    Attributes:
        folder: of the run.
        config: its settings.
        step: updates that the weights have had.
        params: nested dict, the weights that the run validates: averaged where it averages.
        tokenizer: of its text.
    """

    folder: Path
    config: Config
    step: int
    params: Any
    tokenizer: Tokenizer


def read_trained(run: str, step: int | None = None) -> Trained:
    """Reads the model of a run from a checkpoint, on one device.

    Args:
        run: the folder that has metrics.jsonl and checkpoints/, here or in gs://.
        step: of which checkpoint; None for the newest.

    Raises:
        ValueError: no run, no such checkpoint, one that is damaged, an unknown form, or a model
            of another kind than track 3's.
    """
    folder, recorded, steps = run_of("run", run)
    if step is not None and step not in steps:
        told = ", ".join(map(str, sorted(steps)))
        raise ValueError(f"step={step}: {run} has checkpoints of the steps {told}: choose one.")
    with expecting_form(folder / "metrics.jsonl"):
        config = read_settings(recorded)
        tokenizer = _tokenizer(read_start(folder / "metrics.jsonl"), config)
    if config.model.kind != "track3":
        raise ValueError(
            f"run={run!r} has a model of kind={config.model.kind!r}: nanogpt sample, evaluate and "
            "export know those of kind='track3' alone."
        )
    at = max(steps) if step is None else step
    checkpoint = folder / "checkpoints" / str(at)
    refuse_damaged("run", checkpoint)
    return Trained(folder, config, at, _weights(checkpoint, config), tokenizer)


def _weights(checkpoint: Path, config: Config) -> Any:
    shapes = abstract_params(config.model)
    if not (config.tail or config.lookahead):
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        return params_of(checkpoint, jax.tree.map(place, shapes))
    _, state = init_state(config, build_optimizer(config, shapes))
    state = read_state(checkpoint / "state", state, read_meta(checkpoint)["stored"])
    return eval_params(state.opt_state, state.params)


def _tokenizer(start: dict[str, Any], config: Config) -> Tokenizer:
    """That of the shards' manifest; shards without one are FineWeb's, of all GPT-2's tokens."""
    told = start["fingerprint"].get("tokenizer")
    if not told and config.model.vocab_size < GPT2_VOCAB_SIZE:
        raise ValueError(
            f"run {config.name}: its shards had no manifest.json, so nobody knows its tokenizer of "
            f"at most {config.model.vocab_size} ids: train on a folder that `nanogpt data` made."
        )
    return gpt2(int(told.split()[1])) if told else gpt2()
