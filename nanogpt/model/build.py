"""The model of a run by its kind."""

from flax import nnx

from nanogpt.config.run import ModelConfig
from nanogpt.model.gpt import GPT
from nanogpt.model.medium import MediumGPT

MODELS = {"track3": GPT, "medium": MediumGPT}


def make_model(config: ModelConfig, rngs: nnx.Rngs) -> GPT | MediumGPT:
    """Draws a model.

    Args:
        config: `kind` says which.
        rngs: its `params` stream is drawn from.
    """
    return MODELS[config.kind](config, rngs)
