"""Shampoo in MaxText, without changing its source.

    python maxtext_shampoo.py base.yml run_name=shampoo learning_rate=3e-3 ...

is `python -m maxtext.trainers.pre_train.train` with the optimizer below in place of `opt_type`. It
reads what MaxText has for AdamW: learning_rate, adam_b1, adam_b2, adam_weight_decay, mu_dtype,
adamw_mask, skip_step_on_spikes.
"""

from absl import app
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train

import shampoo_jax


def get_optimizer(config, learning_rate_schedule, model=None):
    """Shampoo on the kernels of layers, AdamW on embeddings, head and norms."""
    # Scanned layers lie along one axis of every kernel: each layer has factors of its own. Kernels
    # (embed, heads, head_dim) and (heads, head_dim, embed) are read as matrices by the rule "flax".
    scanned = shampoo_jax.batch_axes({"layers": config.param_scan_axis})
    blocking = shampoo_jax.Blocking(dimension_numbers=scanned if config.scan_layers else "flax")
    tx = shampoo_jax.shampoo(
        learning_rate_schedule,
        config.adam_b1,
        config.adam_b2,
        blocking=blocking,
        solver="auto",
        mu_dtype=config.mu_dtype or None,
        weight_decay=config.adam_weight_decay,
        decay=shampoo_jax.Decay(mask=optimizers.get_adamw_mask(config)),
    )
    if config.skip_step_on_spikes:
        interval, factor = config.skip_step_interval, config.skip_step_scaling_factor
        tx = optimizers.skip_step_on_spikes(tx, interval, factor)
    return tx


if __name__ == "__main__":
    optimizers.get_optimizer = get_optimizer
    app.run(train.main)
