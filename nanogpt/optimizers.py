"""Optimizers by name, and which parameter goes to which.

The only file that knows both parameter names and optimizers. Gradients are sums over the tokens of
a batch, so every eps is on that scale.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import shampoo_jax
from nanogpt.config import (
    AdamWConfig,
    AuxiliaryConfig,
    Config,
    MuonConfig,
    ShampooConfig,
)
from nanogpt.schedules import learning_rate

ROUTES: tuple[tuple[str, str], ...] = (
    (r"blocks/\d+/(attn|mlp)/\w+/kernel", "matrices"),
    (r"embed/embedding", "embed"),
    (r"head/kernel", "head"),
    (r"(.*/)?(bias|scale)", "vectors"),
)
MatrixConfig = AdamWConfig | MuonConfig | ShampooConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """An optimizer of the block matrices: its settings' class and its direction.

    `direction(settings, placement)` gives the update before weight decay and learning rate; what
    cannot split its state over a mesh leaves that to the compiler.
    """

    settings: type[MatrixConfig]
    direction: Callable[..., optax.GradientTransformation]


def build_optimizer(
    config: Config, params: optax.Params, placement: shampoo_jax.Placement | None = None
) -> optax.GradientTransformation:
    """Builds the run's optimizer: `config.optimizer` on the block matrices, AdamW on the rest.

    Every group is updated by p <- p - lr(s) (direction + weight_decay p), lr(s) = peak * eta(s).

    Args:
        config: The run.
        params: Parameter tree of the model; shapes suffice.
        placement: Splits the state over the devices of a mesh: Shampoo's blocks, AdamW's moments.

    Returns:
        Optax transformation of summed gradients.

    Raises:
        ValueError: Unknown optimizer, settings of another optimizer, or a parameter that does not
            match exactly one rule of `ROUTES`.
    """
    entry = _entry(config)
    matrices, aux = config.matrices, config.auxiliary

    def group(direction: optax.GradientTransformation, peak: float, decay: float):
        return optax.chain(
            direction,
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(learning_rate(peak, config.schedule)),
        )

    def adamw(peak: float):
        return in_float32(group(_adam(aux, placement), peak, aux.weight_decay))

    transforms = {
        "matrices": group(
            entry.direction(matrices, placement), matrices.learning_rate, matrices.weight_decay
        ),
        "embed": adamw(aux.embed_learning_rate),
        "head": adamw(aux.head_learning_rate),
        "vectors": adamw(aux.vector_learning_rate),
    }
    return optax.partition(transforms, route(params))


def _entry(config: Config) -> Entry:
    """Looks the optimizer up and checks that its settings are of its class."""
    if config.optimizer not in REGISTRY:
        raise ValueError(
            f"optimizer={config.optimizer!r} is unknown: choose one of {', '.join(REGISTRY)}."
        )
    entry = REGISTRY[config.optimizer]
    if not isinstance(config.matrices, entry.settings):
        raise ValueError(
            f"matrices={type(config.matrices).__name__} does not fit "
            f"optimizer={config.optimizer!r}: give it a {entry.settings.__name__}."
        )
    return entry


def route(params: optax.Params, rules: tuple[tuple[str, str], ...] = ROUTES) -> optax.Params:
    """Labels every parameter by the one rule whose expression matches its whole path.

    Args:
        params: Parameter tree.
        rules: Pairs (regular expression over "a/b/c" paths, label).

    Returns:
        Tree of labels with the structure of `params`.

    Raises:
        ValueError: A parameter matches no rule or several; names it.

    Example:
        >>> route({"head": {"kernel": 0, "bias": 0}})
        {'head': {'bias': 'vectors', 'kernel': 'head'}}
    """

    def label(path: tuple, _: object) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matches = [pair for pair in rules if re.fullmatch(pair[0], name)]
        if len(matches) != 1:
            found = " and ".join(pattern for pattern, _ in matches) or "none"
            raise ValueError(
                f"parameter {name!r} must match exactly one routing rule, but matches {found}: "
                "edit nanogpt.optimizers.ROUTES."
            )
        return matches[0][1]

    return jax.tree_util.tree_map_with_path(label, params)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` in float32 and keeps its state in the precision of the parameters.

    With `optax.apply_updates`, whose sum is rounded once, this is the arithmetic of a fused
    bfloat16 AdamW: parameter, first and second moment are rounded on store and nowhere else.
    The identity on float32 parameters.

    Args:
        inner: Any transformation whose state's float arrays may be rounded.

    Returns:
        Transformation with float32 updates.

    Example:
        >>> tx = in_float32(optax.scale_by_adam())
        >>> p = jnp.ones(2, jnp.bfloat16)
        >>> update, state = tx.update(p, tx.init(p), p)
        >>> update.dtype.name, state.nu.dtype.name
        ('float32', 'bfloat16')
    """

    def widen(tree: optax.Params) -> optax.Params:
        return jax.tree.map(
            lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def update(updates, state, params=None):
        updates, new_state = inner.update(widen(updates), widen(state), widen(params))
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)

    return optax.GradientTransformation(inner.init, update)


class NesterovState(NamedTuple):
    """State of `nesterov_ema`."""

    mu: optax.Updates  # moving average of the gradients


def nesterov_ema(b1: float) -> optax.GradientTransformation:
    """Momentum of the benchmark's Muon: m <- b1 m + (1 - b1) g; update b1 m + (1 - b1) g.

    Zero initial m and no bias correction, unlike `optax.contrib.scale_by_muon`.

    Args:
        b1: Decay.

    Returns:
        Optax transformation.

    Example:
        >>> tx = nesterov_ema(0.5)
        >>> float(tx.update(jnp.float32(1.0), tx.init(jnp.float32(0.0)))[0])
        0.75
    """

    def mix(average: optax.Updates, updates: optax.Updates) -> optax.Updates:
        return jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, average, updates)

    def init(params):
        return NesterovState(optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        del params
        mu = mix(state.mu, updates)
        return mix(mu, updates), NesterovState(mu)

    return optax.GradientTransformation(init, update)


def scale_by_aspect() -> optax.GradientTransformation:
    """Multiplies an (in, out) kernel's update by sqrt(max(1, out / in)).

    Example:
        >>> tx = scale_by_aspect()
        >>> float(tx.update(jnp.ones((1, 4)), tx.init(None))[0][0, 0])
        2.0
    """
    return optax.stateless_with_tree_map(
        lambda update, _: update * max(1.0, update.shape[1] / update.shape[0]) ** 0.5
    )


Placement = shampoo_jax.Placement | None


def _adam(
    settings: AdamWConfig | AuxiliaryConfig, placement: Placement = None
) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    return adam if placement is None else placement.elementwise(adam)


def _muon(settings: MuonConfig, _: Placement = None) -> optax.GradientTransformation:
    """Optax's Muon, its defaults apart from what the settings name."""
    muon = optax.contrib.scale_by_muon(
        settings.ns_coeffs, settings.ns_steps, settings.b1, weight_dimension_numbers=_in_out
    )
    return optax.chain(muon, scale_by_aspect())


def _muon_track3(settings: MuonConfig, _: Placement = None) -> optax.GradientTransformation:
    """The benchmark's Muon: its own momentum, then Optax's orthogonalization alone."""
    orthogonalize = optax.contrib.scale_by_muon(
        settings.ns_coeffs,
        settings.ns_steps,
        beta=0.0,
        eps=1e-7,
        nesterov=False,
        weight_dimension_numbers=_in_out,
    )
    return optax.chain(
        nesterov_ema(settings.b1), _cast(settings.ns_dtype), orthogonalize, scale_by_aspect()
    )


def _in_out(updates: optax.Updates) -> optax.Params:
    """Names the axes of (in, out) kernels; Optax 0.2.8 takes a tree of matrices no other way."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), updates)


def _cast(dtype: str) -> optax.GradientTransformation:
    return optax.stateless_with_tree_map(lambda update, _: update.astype(dtype))


def _shampoo(settings: ShampooConfig, placement: Placement = None) -> optax.GradientTransformation:
    return shampoo_jax.scale_by_shampoo(
        settings.b1,
        settings.b2,
        block_size=settings.block_size,
        cutoff=settings.cutoff,
        every=settings.every,
        graft="adam",
        graft_b2=settings.graft_b2,
        graft_eps=settings.graft_eps,
        placement=placement,
    )


REGISTRY: dict[str, Entry] = {
    "adamw": Entry(AdamWConfig, _adam),
    "muon": Entry(MuonConfig, _muon),
    "muon_track3": Entry(MuonConfig, _muon_track3),
    "shampoo": Entry(ShampooConfig, _shampoo),
}
