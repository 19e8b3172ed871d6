"""What the hyperparameters of a base model become in a wider and deeper one of its family."""

import dataclasses
from typing import Any

import jax
import optax
from flax import nnx

import shampoo_jax
from nanogpt.config.run import AuxiliaryConfig, Config
from nanogpt.config.settings import MatrixConfig, ShampooConfig
from nanogpt.model.build import make_model

# Of every optimizer whose rule is known.
METHODS: dict[str, Any] = {
    **{"adamw": "adam", "muon": "muon", "muon_track3": "muon"},
    **{"shampoo": "shampoo", "soap": "soap"},
}
# Settings by the multiplier that is theirs; a graft's eps is that of its Adam.
SCALED = {"eps": "eps", "graft_eps": "eps", "damping": "damping"}
RATES = ("learning_rate", *(f"{x}_learning_rate" for x in ("embed", "head", "vector")))


def of_base(config: Config, params: optax.Params, labels: Any) -> dict[str, Config]:
    """The run's settings as every group of parameters is to have them.

    The parameters of a group grow alike: block matrices on both sides, the embedding's and the
    vectors' outputs (the head's bias goes with them), the head's inputs. Decay, which the rate of a
    group multiplies here, is divided by that rate's own multiplier.

    Args:
        config: The run, whose rates, eps and decay are those of width and depth multipliers 1.
        params: Parameter tree of the model; shapes suffice.
        labels: The group of every parameter, see `nanogpt.optimizers.build.route`.

    Returns:
        Settings by group; a group takes its own rate, eps and decay of them.

    Raises:
        ValueError: An optimizer, or a form of it, that no rule is known for.
    """
    group = dict(jax.tree_util.tree_leaves_with_path(labels))
    rules = shampoo_jax.transfer_rules(
        _narrow(config),
        params,
        _method(config),
        depth=config.model.depth_multiplier,
        preconditioned=lambda path, leaf: group[path] == "matrices",
        **_form(config.matrices),
    )
    found: dict[str, Config] = {}
    for path, label in group.items():
        if label not in found:
            m = rules(path)
            matrices, auxiliary = _scaled(config.matrices, m), _scaled(config.auxiliary, m)
            found[label] = dataclasses.replace(config, matrices=matrices, auxiliary=auxiliary)
    return found


def _narrow(config: Config) -> optax.Params:
    """Parameters of the model as deep at the base width."""
    model = dataclasses.replace(config.model, width_multiplier=1.0)
    draw = lambda: nnx.to_pure_dict(nnx.state(make_model(model, nnx.Rngs(0)), nnx.Param))  # noqa: E731
    return jax.eval_shape(draw)


def _method(config: Config) -> Any:
    fixed = config.matrices.hyperball or getattr(config.matrices, "size", "adam") != "adam"
    if config.optimizer not in METHODS or fixed:
        kind = " with updates of a fixed norm" if fixed else ""
        raise ValueError(
            f"model.transfer=True with optimizer={config.optimizer!r}{kind}: rules are known for "
            f"{', '.join(METHODS)}, choose one of them or set model.transfer=False."
        )
    return METHODS[config.optimizer]


def _form(settings: MatrixConfig) -> dict[str, Any]:
    """What rules have to know of Shampoo's settings."""
    if not isinstance(settings, ShampooConfig):
        return {}
    blocking = shampoo_jax.Blocking(settings.block_size)
    return {"exponents": settings.exponent, "blocking": blocking}


def _scaled(settings: MatrixConfig | AuxiliaryConfig, m: shampoo_jax.Multipliers) -> Any:
    """Settings with rates, eps and decay multiplied."""
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    new = {name: fields[name] * m.learning_rate for name in RATES if name in fields}
    new |= {name: fields[name] * getattr(m, key) for name, key in SCALED.items() if name in fields}
    new["weight_decay"] = settings.weight_decay * m.decay / m.learning_rate
    return dataclasses.replace(settings, **new)
