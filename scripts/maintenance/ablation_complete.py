"""Complete optimizers that `scripts.maintenance.ablations` trains, as users call them."""

import functools
from typing import Any, NamedTuple

import jax
import optax

import shampoo_jax
from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import learning_rate


def _hidden(params: Any) -> Any:
    """Of Optax's Muon: matrices that are no embedding and no head, as the others have it."""
    numbers = optax.contrib.MuonDimensionNumbers()
    chosen = lambda path, leaf: numbers if shampoo_jax.is_hidden_matrix(path, leaf) else None  # noqa: E731
    return jax.tree_util.tree_map_with_path(chosen, params)


def recipe(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
    """The recipe as a complete optimizer: the code of docs/howto/muon.md."""
    whole = shampoo_jax.Blocking(None)
    shampoo = shampoo_jax.scale_by_shampoo(
        b1=0.95, b2=0.9, b3=0.95**2, exponents=1 / 3, graft=None, blocking=whole
    )
    norm = shampoo_jax.scale_to_norm(lambda kernel: kernel.shape[1] ** 0.5)
    direction = optax.chain(shampoo, norm)
    return shampoo_jax.as_optimizer(direction, learning_rate, others_rate=4.0)


MEAN = ", mean loss"  # gradients divided by the tokens, as most programs have them
PLAIN = ", AdamW"  # with AdamW for the other parameters, which does not look ahead


class Complete(NamedTuple):
    """An optimizer of one rate, as users call it.

    Attributes:
        build: makes it of a rate or a schedule.
        start: rate where its search begins.
        mean: whether its gradients are divided by the tokens.
        plain: whether the other parameters have AdamW.
    """

    build: Any
    start: float = 0.008
    mean: bool = False
    plain: bool = False


def _own(optimizer: Any, **options: Any) -> Complete:
    return Complete(functools.partial(optimizer, **options))


def _plain(optimizer: Any, times: float = 4.0, **options: Any) -> Complete:
    """One with AdamW for the other parameters."""

    def build(rate: Any) -> optax.GradientTransformationExtraArgs:
        others = optax.adamw(
            lambda count: times * rate(count), b2=0.95, eps=1e-15, weight_decay=0.0
        )
        return optimizer(rate, others=others, **options)

    return Complete(build, plain=True)


def _faster_elsewhere(rate: Any) -> optax.GradientTransformationExtraArgs:
    """Optax's Muon of hidden matrices, whose others' rate is four times its own."""
    four = lambda count: 4.0 * rate(count)  # noqa: E731
    return optax.contrib.muon(rate, muon_weight_dimension_numbers=_hidden, adam_learning_rate=four)


# With nothing else set but what is named.
COMPLETE: dict[str, Complete] = {
    "shampoo()": _own(shampoo_jax.shampoo),
    "shampoo(b3=.81)": _own(shampoo_jax.shampoo, b3=0.9**2),
    "shampoo(b1=.95, b3=.9025)": _own(shampoo_jax.shampoo, b1=0.95, b3=0.95**2),
    "shampoo(b1=.95)": _own(shampoo_jax.shampoo, b1=0.95),
    "shampoo(exponents=1/4)": _own(shampoo_jax.shampoo, exponents=1 / 4),
    "shampoo(exponents=1/2)": _own(shampoo_jax.shampoo, exponents=1 / 2),
    "shampoo(others_rate=2)": _own(shampoo_jax.shampoo, others_rate=2.0),
    "shampoo(others_rate=8)": _own(shampoo_jax.shampoo, others_rate=8.0),
    "soap()": _own(shampoo_jax.soap),
    "kl_shampoo()": _own(shampoo_jax.kl_shampoo),
    "kl_soap()": _own(shampoo_jax.kl_soap),
    "soap(every=5)": _own(shampoo_jax.soap, every=5),
    "soap(every=1)": _own(shampoo_jax.soap, every=1),
    "kl_soap()" + MEAN: _own(shampoo_jax.kl_soap)._replace(mean=True),
    "kl_soap(max_scale=relative)" + MEAN: _own(shampoo_jax.kl_soap, max_scale="relative")._replace(
        mean=True
    ),
    "recipe, muon's norms": Complete(recipe, 0.02),
    "optax muon()": Complete(optax.contrib.muon, 0.02),
    "optax adamw()": _own(optax.adamw, weight_decay=0.0),
    "optax muon(), hidden matrices": Complete(
        functools.partial(optax.contrib.muon, muon_weight_dimension_numbers=_hidden), 0.02
    ),
    "optax muon(), hidden, others times 4": Complete(_faster_elsewhere, 0.02),
    "adamw, others times 4": _plain(
        lambda rate, others: shampoo_jax.as_optimizer(optax.scale_by_adam(), rate, others=others)
    ),
    "shampoo()" + PLAIN: _plain(shampoo_jax.shampoo),
    "shampoo(others_rate=1)" + PLAIN: _plain(shampoo_jax.shampoo, 1.0),
    "shampoo(others_rate=16)" + PLAIN: _plain(shampoo_jax.shampoo, 16.0),
    "shampoo(exponents=1/4)" + PLAIN: _plain(shampoo_jax.shampoo, exponents=1 / 4),
    "shampoo(exponents=1/2)" + PLAIN: _plain(shampoo_jax.shampoo, exponents=1 / 2),
    "shampoo(b1=.95)" + PLAIN: _plain(shampoo_jax.shampoo, b1=0.95),
    "soap()" + PLAIN: _plain(shampoo_jax.soap),
    "soap(others_rate=1)" + PLAIN: _plain(shampoo_jax.soap, 1.0),
    "kl_shampoo()" + PLAIN: _plain(shampoo_jax.kl_shampoo),
    "kl_shampoo(others_rate=1)" + PLAIN: _plain(shampoo_jax.kl_shampoo, 1.0),
    "kl_soap()" + PLAIN: _plain(shampoo_jax.kl_soap),
    "kl_soap(others_rate=1)" + PLAIN: _plain(shampoo_jax.kl_soap, 1.0),
    "kl_soap(max_scale=relative)" + PLAIN: _plain(shampoo_jax.kl_soap, max_scale="relative"),
}


def build_complete(
    config: Config, params: Any, placement: Any = None, factors: Any = (1.0, 1.0)
) -> optax.GradientTransformationExtraArgs:
    """What `build_optimizer` is for others: one of `COMPLETE`, at the rate of the matrices."""
    del params, placement
    rate = learning_rate(config.matrices.learning_rate * factors[0], config.schedule)
    return shampoo_jax.guard(COMPLETE[config.optimizer].build(rate))
