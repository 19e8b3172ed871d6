"""Optimizers by name, and which parameter goes to which.

The only file that knows both parameter names and optimizers. Gradients are sums over the tokens of
a batch, so every eps is on that scale.
"""

import dataclasses
import functools
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shampoo_jax
from nanogpt.config import presets
from nanogpt.config.run import Config
from nanogpt.config.settings import SETTINGS, MatrixConfig, MuonConfig, SoapMuonConfig
from nanogpt.optimizers.decay import decay_by_factor
from nanogpt.optimizers.directions import DIRECTIONS, Direction, adam, uncorrected_adam
from nanogpt.optimizers.schedules import learning_rate, lookahead_schedule, matrices_schedule
from nanogpt.optimizers.transfer import of_base

ROUTES: tuple[tuple[str, str], ...] = (
    (r"blocks/\d+/(attn|mlp)/\w+/kernel", "matrices"),
    (r"(embed|value_embeds/\d+)/embedding", "embed"),
    (r"head/kernel", "head"),
    (r"(.*/)?(bias|scale)|scalars", "vectors"),
)


# Of every optimizer its direction: `direction(settings, placement)` gives the update before weight
# decay and learning rate. The class of the settings is in `SETTINGS`, or that of those in `OWN`.
REGISTRY: dict[str, Direction] = dict(DIRECTIONS)
_TRIED = 4  # updates of a direction of a user's own, of which the first may be zero


def register(name: str, direction: Direction, settings: MatrixConfig) -> None:
    """Adds an optimizer of the block matrices, for this process.

    Afterwards `preset` of any name gives the preset's AdamW run with this optimizer, and
    `nanogpt.lab.speedrun.main` takes it by `--optimizer`.

    Args:
        name: Letters, digits, ".", "_" and "-"; not one of this package's, recipes included. A name
            added before is replaced.
        direction: Function of (settings, placement) giving an Optax transformation of the summed
            gradients, without weight decay and learning rate. It may ignore the placement, which
            tells how state is split over a mesh. If its update takes `obj_fn`, it gets the summed
            loss as a function of the parameters.
        settings: Starting values; its class is `MatrixConfig` or one derived from it.

    Raises:
        ValueError: a bad or taken name, a direction of other arguments, settings of another class.

    Example:
        >>> register("sign", lambda settings, _: optax.scale_by_sign(), MatrixConfig(1e-3, 0.1))
        >>> presets.preset("cpu", "sign").matrices.learning_rate
        0.001
        >>> del REGISTRY["sign"], presets.OWN["sign"]
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name={name!r}: must be of letters, digits, '.', '_' and '-'.")
    if name in DIRECTIONS or name in presets.PUBLISHED:
        raise ValueError(f"name={name!r} is taken: choose another one.")
    if not isinstance(settings, MatrixConfig):
        raise ValueError(
            f"settings={settings!r}: must be a MatrixConfig, as MatrixConfig(1e-3, 0.1), or of a "
            "class derived from it."
        )
    try:
        inspect.signature(direction).bind(settings, None)
    except TypeError:
        raise ValueError(
            f"direction={direction!r}: must be a function of (settings, placement) that returns an "
            "Optax transformation."
        ) from None
    REGISTRY[name], presets.OWN[name] = direction, settings


def build_optimizer(
    config: Config,
    params: optax.Params,
    placement: shampoo_jax.Placement | None = None,
    factors: tuple[Any, Any] = (1.0, 1.0),
) -> optax.GradientTransformationExtraArgs:
    """Builds the run's optimizer: `config.optimizer` on the block matrices, AdamW on the rest.

    Every group is updated by p <- p - lr(s) (direction + weight_decay p), lr(s) = peak * eta(s);
    block matrices with `hyperball` set as in `shampoo_jax.hyperball`. A step with a gradient that
    is not finite leaves everything as it was and is counted, see `shampoo_jax.guard`.

    With `model.transfer` rates, eps and decay of the run are those of the base model, and every
    group has its own multiples of them, see `nanogpt.optimizers.transfer`.

    Args:
        config: The run.
        params: Parameter tree of the model; shapes and dtypes suffice.
        placement: Splits the state over the devices of a mesh: Shampoo's blocks, AdamW's moments.
        factors: Of the rates of the block matrices and of all others; may be traced.

    Returns:
        Optax transformation of gradients of the run's loss, with updates in float32; its state is
        an `optax.ApplyIfFiniteState`. Its update takes `obj_fn`, that loss as a function of all
        parameters; only directions that ask for it need it.

    Raises:
        ValueError: Unknown optimizer, settings of another optimizer, a direction that is none, or a
            parameter that does not match exactly one rule of `ROUTES`.
    """
    if presets.is_own(config.optimizer):
        with jax.ensure_compile_time_eval():  # a step that is being traced may build its own
            _try(config)
    labels = route(params)
    groups = of_base(config, params, labels) if config.model.transfer else {}
    transforms = {}
    for name in ("embed", "head"):
        own = groups.get(name, config)
        peak = getattr(own.auxiliary, name + "_learning_rate") * factors[1]
        transforms[name] = _adamw(own, peak, placement)
    transforms["vectors"] = _vectors(groups.get("vectors", config), placement, factors[1])
    own = groups.get("matrices", config)
    rate = learning_rate(own.matrices.learning_rate * factors[0], matrices_schedule(own))
    transforms["matrices"] = optax.chain(_direction(own, placement), *descent(own.matrices, rate))
    grouped = optax.partition(transforms, labels)
    if config.clip_norm is not None:
        tokens = config.data.batch_rows * config.model.sequence_length
        norm = config.clip_norm * (1 if config.loss == "mean" else tokens)
        grouped = optax.chain(optax.clip_by_global_norm(norm), grouped)
    grouped = optax.chain(grouped, *_around(config, placement)) if _around(config) else grouped
    # The guard widens parameters; moments are stored in the precision of the parameters themselves.
    stored = optax.GradientTransformationExtraArgs(
        lambda p: grouped.init(jax.tree.map(lambda x, own: x.astype(own.dtype), p, params)),
        grouped.update,
    )
    return _of_whole_params(shampoo_jax.guard(stored))


def _direction(config: Config, placement: shampoo_jax.Placement | None) -> Any:
    """The direction of the block matrices, for settings of its own class."""
    name = config.optimizer
    if name not in REGISTRY:
        raise ValueError(f"optimizer={name!r} is unknown: choose one of {', '.join(REGISTRY)}.")
    wanted = type(presets.OWN[name]) if presets.is_own(name) else SETTINGS[name]
    if not isinstance(config.matrices, wanted):
        raise ValueError(
            f"matrices={type(config.matrices).__name__} does not fit optimizer={name!r}: give it a "
            f"{wanted.__name__}."
        )
    direction = REGISTRY[name](config.matrices, placement)
    if not (hasattr(direction, "init") and hasattr(direction, "update")):
        raise ValueError(
            f"optimizer={name!r}: its direction is {direction!r}, no Optax transformation."
        )
    # The guard around everything does the work of a direction's own.
    return getattr(direction, "inner", direction)


def _try(config: Config) -> None:
    """Refuses a direction that would climb, since the learning rate turns its sign, or stand still.

    So a complete optimizer shows itself. Tried on one small matrix with a linear loss: gradients
    are symmetric and the matrix is not, so that what a direction does to weights does not count.
    """
    noise = jax.random.normal(jax.random.key(0), (_TRIED, 8, 8))
    gradients = jnp.eye(8) + 0.1 + 0.1 * (noise + noise.swapaxes(1, 2))
    tree = lambda kernel: {"blocks": {"0": {"mlp": {"fc": {"kernel": kernel}}}}}  # noqa: E731
    params = tree(jnp.triu(jnp.ones((8, 8)), 1) - jnp.tril(jnp.ones((8, 8)), -1))
    direction = optax.with_extra_args_support(_direction(config, None))
    state, along = direction.init(params), 0.0
    for gradient in map(tree, gradients):
        loss = functools.partial(optax.tree.vdot, gradient)
        step, state = direction.update(gradient, state, params, obj_fn=loss)
        along += float(loss(step))
    if not 0 < along < math.inf:
        what = "goes against the gradient" if along < 0 else "is zero or not finite"
        raise ValueError(
            f"optimizer={config.optimizer!r}: its direction {what}, so training would climb or "
            "stand still. Register the direction alone, as optax.scale_by_adam(), not a complete "
            "optimizer such as optax.adamw(...): the learning rate is added around it."
        )


def descent(matrices: MatrixConfig, rate: optax.Schedule) -> list[optax.GradientTransformation]:
    """Weight decay and learning rate of the block matrices, behind their direction.

    Args:
        matrices: Their settings.
        rate: Their learning rate at every step.
    """
    if matrices.hyperball:
        return [shampoo_jax.hyperball(rate)]
    if isinstance(matrices, SoapMuonConfig):
        steps = optax.chain(optax.scale_by_learning_rate(rate), shampoo_jax.keep_radius())
        return [shampoo_jax.cautious_decay(matrices.weight_decay, rate, steps)]
    if isinstance(matrices, MuonConfig) and matrices.factor_decay:
        more, own = matrices.mlp_decay * matrices.weight_decay, matrices.weight_decay
        decay_of = lambda p: jax.tree.map(lambda mlp: more if mlp else own, _in_mlp(p))  # noqa: E731
        return [optax.scale_by_learning_rate(rate), decay_by_factor(rate, decay_of)]
    if getattr(matrices, "cautious", False):
        return [shampoo_jax.cautious_decay(matrices.weight_decay, rate)]
    parts = [optax.add_decayed_weights(matrices.weight_decay)]
    if isinstance(matrices, MuonConfig) and matrices.mlp_decay != 1:
        more = matrices.weight_decay * (matrices.mlp_decay - 1)
        parts.append(optax.add_decayed_weights(more, mask=_in_mlp))
    return [*parts, optax.scale_by_learning_rate(rate)]


def _around(config: Config, placement: Any = None) -> list[optax.GradientTransformation]:
    """What follows the finished steps of all parameters: averages of weights, the look ahead."""
    parts = []
    if config.tail is not None:
        chosen: Any = dataclasses.asdict(config.tail)
        averaged = lambda path, _: not _name(path).startswith("embed/")  # noqa: E731
        parts.append(shampoo_jax.tail_average(**chosen, averaged=averaged))
    if config.lookahead is not None:
        ahead = lookahead_schedule(config)
        parts.append(shampoo_jax.ema_nesterov(ahead, config.lookahead.decay))
    return parts if placement is None else [placement.elementwise(part) for part in parts]


def _in_mlp(params: optax.Params) -> optax.Params:
    return jax.tree_util.tree_map_with_path(lambda path, _: "/mlp/" in _name(path), params)


def _adamw(
    config: Config, peak: float, placement: shampoo_jax.Placement | None, moments: Direction = adam
) -> optax.GradientTransformation:
    """AdamW of everything that is not a block matrix."""
    return in_float32(
        optax.chain(
            moments(config.auxiliary, placement),
            optax.add_decayed_weights(config.auxiliary.weight_decay),
            optax.scale_by_learning_rate(learning_rate(peak, config.schedule)),
        )
    )


def _vectors(
    config: Config, placement: shampoo_jax.Placement | None, factor: Any
) -> optax.GradientTransformation:
    """AdamW of biases and gains, by kinds where these have decays of their own."""
    auxiliary = config.auxiliary
    rate, b2s = auxiliary.vector_learning_rate * factor, auxiliary.vector_b2
    own: dict[str, Any] = {"b1": auxiliary.vector_b1, "eps": auxiliary.vector_eps}
    own = {name: value for name, value in own.items() if value is not None}
    config = dataclasses.replace(config, auxiliary=dataclasses.replace(auxiliary, **own))
    moments = adam if config.auxiliary.vector_bias_correction else uncorrected_adam
    if b2s is None:
        return _adamw(config, rate, placement, moments)
    kinds = {}
    for kind, b2 in zip(("gains", "attn_proj", "others"), b2s, strict=True):
        kind_of = dataclasses.replace(config.auxiliary, b2=b2)
        run = dataclasses.replace(config, auxiliary=kind_of)
        kinds[kind] = _adamw(run, rate, placement, moments)

    def label(path: tuple, _: object) -> str:
        name = _name(path)
        if name.endswith("scale"):
            return "gains"
        return "attn_proj" if name.endswith("attn/proj/bias") else "others"

    return optax.partition(kinds, functools.partial(jax.tree_util.tree_map_with_path, label))


def _of_whole_params(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Lets a group of `inner` ask for the loss at its own parameters, the others as they are.

    Gradients are widened, so that updates are not rounded before they are added to parameters.
    """

    def update(updates, state, params=None, obj_fn=None, **extra: Any):
        if obj_fn is not None:
            extra["obj_fn"] = functools.partial(_at_group, obj_fn, params)
        return inner.update(_widen(updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _at_group(obj_fn: Any, params: optax.Params, group: optax.Params) -> jax.Array:
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    whole = jax.tree.map(lambda own, p: p if masked(own) else own, group, params, is_leaf=masked)
    return obj_fn(whole)


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
        name = _name(path)
        matches = [pair for pair in rules if re.fullmatch(pair[0], name)]
        if len(matches) != 1:
            found = " and ".join(pattern for pattern, _ in matches) or "none"
            raise ValueError(
                f"parameter {name!r} must match exactly one routing rule, but matches {found}: "
                "edit nanogpt.optimizers.build.ROUTES."
            )
        return matches[0][1]

    return jax.tree_util.tree_map_with_path(label, params)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


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

    def update(updates, state, params=None):
        updates, new_state = inner.update(_widen(updates), _widen(state), _widen(params))
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)

    return optax.GradientTransformation(inner.init, update)


def _widen(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: (
            x.astype(jnp.promote_types(x.dtype, jnp.float32))
            if jnp.issubdtype(x.dtype, jnp.floating)
            else x
        ),
        tree,
    )
