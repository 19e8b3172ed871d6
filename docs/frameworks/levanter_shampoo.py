"""Shampoo in Levanter: `optimizer.type: shampoo` in the YAML of a training run.

    python levanter_shampoo.py --config_path run.yaml --optimizer.type shampoo

is `python -m levanter.main.train_lm` after this file has registered the optimizer. In a program of
your own, import it before the configuration is read.
"""

from dataclasses import dataclass

import levanter.config
import optax
from levanter.main import train_lm
from levanter.optim import OptimizerConfig
from levanter.optim.util import flatten_linear_layers, unflatten_linear_layers

import shampoo_jax


@OptimizerConfig.register_subclass("shampoo")
@dataclass(frozen=True)
class ShampooConfig(OptimizerConfig):
    """Shampoo on the weights of linear layers, AdamW on embeddings, head and norms."""

    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float | None = 1.0
    block_size: int = 1024  # largest side of a factor
    solver: str = "auto"
    every: int = 1  # steps between roots

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Builds the chain that Levanter trains with."""
        # Layers lie stacked along their first axis: each has factors of its own.
        numbers = shampoo_jax.batch_axes({"stacked": 0})

        # Levanter logs what optax.inject_hyperparams holds.
        def optimizer(learning_rate):
            shampoo = shampoo_jax.shampoo(
                learning_rate,
                self.beta1,
                self.beta2,
                blocking=shampoo_jax.Blocking(self.block_size, dimension_numbers=numbers),
                solver=self.solver,
                every=self.every,
                weight_decay=self.weight_decay,
                decay=shampoo_jax.Decay(mask=self.build_weight_decay_mask()),
            )
            clip = self.max_grad_norm and optax.clip_by_global_norm(self.max_grad_norm)
            return optax.chain(clip or optax.identity(), in_matrices(shampoo))

        return optax.inject_hyperparams(optimizer)(learning_rate=self.lr_scheduler(num_train_steps))


def in_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` on linear layers with one axis in and one out, heads and their width too."""

    def update(updates, state, params=None, **extra):
        params = params if params is None else flatten_linear_layers(params)
        new, state = inner.update(flatten_linear_layers(updates), state, params, **extra)
        return unflatten_linear_layers(updates, new), state

    def init(params):
        return inner.init(flatten_linear_layers(params))

    return optax.GradientTransformationExtraArgs(init, update)


if __name__ == "__main__":
    levanter.config.main(train_lm.main)()
