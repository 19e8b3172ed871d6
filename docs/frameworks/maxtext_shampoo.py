"""Shampoo in MaxText, without changing its source.

    python maxtext_shampoo.py base.yml run_name=shampoo learning_rate=3e-3 ...

is `python -m maxtext.trainers.pre_train.train` with the optimizer below in place of `opt_type`. It
reads what MaxText has for AdamW: learning_rate, adam_b1, adam_b2, adam_weight_decay, mu_dtype,
adamw_mask, skip_step_on_spikes.
"""

import jax
import optax
from absl import app
from flax import linen, nnx
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
from maxtext.utils import maxtext_utils, sharding

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
        placement=placement(config, model),
        solver="auto",
        mu_dtype=config.mu_dtype or None,
        weight_decay=config.adam_weight_decay,
        decay=shampoo_jax.Decay(mask=optimizers.get_adamw_mask(config)),
    )
    if config.skip_step_on_spikes:
        interval, factor = config.skip_step_interval, config.skip_step_scaling_factor
        tx = optimizers.skip_step_on_spikes(tx, interval, factor)
    return spread(tx)


def name(path):
    """Components of a path, joined; gradients come without the boxes of Flax."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def placement(config, model):
    """Blocks and their arithmetic split over the axis fsdp; None without one."""
    mesh = maxtext_utils.get_mesh_from_config(config)
    if mesh.shape["fsdp"] == 1 or model is None:
        return None
    with linen.logical_axis_rules(config.logical_axis_rules):
        lies = sharding.nnx_construct_named_sharding(nnx.state(model, nnx.Param), mesh)
    specs = {name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(lies)}
    return shampoo_jax.Placement(mesh, "fsdp", lambda path, leaf: specs[name(path)])


def spread(tx):
    """`tx` whose stacks of blocks, [N, m, n], tell MaxText that they are split along N.

    MaxText keeps on every device what carries no names of axes; its "embed" is split over fsdp.
    """

    def named(x):
        stack = not isinstance(x, nnx.Variable) and x.ndim >= 3
        return nnx.Variable(x, out_sharding=("embed", *(None,) * (x.ndim - 1))) if stack else x

    def init(params):
        return jax.tree.map(named, tx.init(params), is_leaf=lambda x: isinstance(x, nnx.Variable))

    return optax.GradientTransformationExtraArgs(init, tx.update)


if __name__ == "__main__":
    optimizers.get_optimizer = get_optimizer
    app.run(train.main)
