"""A GPT-2-size training harness for optimizers, equal to modded-nanogpt track 3."""
