"""Direction of the recipe in docs/recipe.md, and of everything that its ablations vary."""

from typing import Any

import optax

import shampoo_jax
from nanogpt.config.settings import ShampooNextConfig


def scale_by_aspect() -> optax.GradientTransformation:
    """Multiplies an (in, out) kernel's update by sqrt(max(1, out / in)).

    Example:
        >>> import jax.numpy as jnp
        >>> tx = scale_by_aspect()
        >>> float(tx.update(jnp.ones((1, 4)), tx.init(None))[0][0, 0])
        2.0
    """
    return optax.stateless_with_tree_map(
        lambda update, _: update * max(1.0, update.shape[1] / update.shape[0]) ** 0.5
    )


SCALES: dict[str, Any] = {
    # The rows of the benchmark's (out, in) matrices are the columns of kernels.
    "rows": shampoo_jax.scale_to_norm(lambda kernel: kernel.shape[1] ** 0.5),
    "entries": shampoo_jax.scale_to_norm(lambda kernel: 0.2 * kernel.size**0.5),
    "aspect": scale_by_aspect(),
}
NEWTON_SCHULZ = {"steps": 12, "coefficients": (2.0, -1.5, 0.5)}  # of track 3's Muon


def two_scales(b1: float) -> optax.GradientTransformation:
    """Nesterov's average, a quarter of it of an average over five times as many steps.

    Source: Pagliardini et al. 2024 (AdEMAMix, arXiv:2409.03137) for two averages of a gradient;
    theirs are not held to the norm of the faster one.
    """
    slow = shampoo_jax.filter_gradient(1 - (1 - b1) / 5)
    mixed = shampoo_jax.blend(slow, 0.25, norm="frobenius")
    return optax.chain(shampoo_jax.nesterov_average(b1), mixed)


def shampoo_next(
    settings: ShampooNextConfig, placement: shampoo_jax.Placement | None = None
) -> optax.GradientTransformation:
    """Roots of gradients' factors around their momentum, of a Muon update's norm.

    Design of track 3's pull request 327 (two sides, pseudo-inverse, exponent 1/3, `sqrt(rows)`);
    with `exponent=None`, `orthogonalize` and `size="aspect"` it is the benchmark's Muon.
    """
    average: Any = {
        "nesterov": shampoo_jax.nesterov_average,
        "average": shampoo_jax.filter_gradient,
        "two scales": two_scales,
    }
    parts = [*_whitening(settings)]
    if settings.orthogonalize:
        parts.append(shampoo_jax.orthogonalize(**NEWTON_SCHULZ))
    direction = optax.chain(*parts)
    if settings.size == "adam":
        adam = shampoo_jax.scale_by_second_moment(settings.b2, 1e-15)
        direction = shampoo_jax.graft(adam, direction)
    framed = shampoo_jax.blocked(
        optax.chain(average[settings.momentum](settings.b1), direction),
        blocking=shampoo_jax.Blocking(settings.block_size),
        exponents=settings.exponent,
        chunk="auto",
        placement=placement,
    ).inner
    after = [SCALES[settings.size]] if settings.size in SCALES else []
    floor = [shampoo_jax.floor_update(settings.floor)] if settings.floor else []
    return optax.chain(framed, *after, *floor)


def _whitening(settings: ShampooNextConfig) -> list[optax.GradientTransformation]:
    """From the momentum to the momentum between roots of factors."""
    if settings.exponent is None:
        return []
    of = "microbatches" if settings.squares == "microbatches" else None
    factors = shampoo_jax.accumulate_factors(settings.b2, microbatches=of)
    if settings.squares == "momentum":
        factors = shampoo_jax.of_updates(factors)
    solver = shampoo_jax.Auto(settings.rtol)  # what is fastest on the device
    refresh = shampoo_jax.Refresh(stagger=settings.stagger)
    roots = shampoo_jax.invert_roots(solver, every=settings.every, refresh=refresh)
    return [factors, roots, shampoo_jax.precondition()]
