"""Shampoo's directions: the whole walk from gradients to grafted, preconditioned updates."""

from typing import Any, Literal

import optax
from jax.typing import DTypeLike

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import Scalar, Whole, check_choice, check_options
from shampoo_jax.base.signatures import suggests
from shampoo_jax.blocks.blocking import Blocking
from shampoo_jax.blocks.blocks import Part
from shampoo_jax.blocks.exponents import (
    SIDES,
    AutoExponents,
    ExponentOption,
    Side,
    chosen_exponents,
    given_exponents,
)
from shampoo_jax.directions.walk import walk
from shampoo_jax.parts.factors import accumulate_factors, filled
from shampoo_jax.parts.filtering import filter_gradient
from shampoo_jax.parts.grafting import make_magnitude
from shampoo_jax.parts.kl_factors import accumulate_kl_factors
from shampoo_jax.parts.refresh import Refresh
from shampoo_jax.parts.roots import invert_roots, precondition
from shampoo_jax.solvers.registry import make_solver
from shampoo_jax.solvers.solver import Solver
from shampoo_jax.stacks.guard import Guarded
from shampoo_jax.stacks.placement import Placement


@suggests
def scale_by_shampoo(
    b1: Scalar = 0.9,
    b2: Scalar = 0.9,
    *,
    b3: Scalar | None = None,
    bias_correction: bool = True,
    weighted: bool = True,
    blocking: Blocking | None = None,
    exponents: AutoExponents = "auto",
    statistics: Literal["gradients", "kl"] | optax.GradientTransformation = "gradients",
    solver: str | Solver = "eigh",
    every: Whole = 1,
    refresh: Refresh | None = None,
    mu_dtype: DTypeLike | None = None,
    root_dtype: DTypeLike | None = None,
    graft: str | optax.GradientTransformation | None = "adam",
    monitor: int | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """Rescales updates by Shampoo: Kronecker-factored preconditioning, Adam's magnitude per block.

    For a matrix block `G` with `M` its moving average (b1), `L = EMA_b2(G G^T)` and
    `R = EMA_b2(G^T G)`, all bias-corrected, the update is

      `U = L^(-1/3) M R^(-1/3)`, scaled to `|U|_F = |M / (sqrt(EMA(G^2)) + eps)|_F`.

    Inverse roots are *truncated*: eigenvalues below `d * eps_float32 * largest` map to 0, since the
    factors are rank deficient and their noise eigenvalues would otherwise be amplified most.
    Without a graft the exponents are 1/4. Multiplying every gradient by a constant changes nothing
    beyond rounding, but for absolute cutoffs and damping of solvers, the graft's eps where it
    matters, `statistics="kl"`, and polynomial solvers, whose error of about a percent varies with
    the scale.

    Sources: Gupta et al. 2018 (arXiv:1802.09568); Shi et al. 2023 (arXiv:2309.06497) for grafting
    and blocking; track-3 result 35 of modded-nanogpt for the truncation.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the factors, in [0, 1]; 1 sums them.
      b3: Decay of the emitted first moment, see `filter_gradient`; None means `b1`.
      bias_correction: Whether first moment and factors are divided by the sum of their weights.
      weighted: Whether new statistics have weight `1 - b2`; False adds them with weight 1.
      blocking: How parameters are read and cut into blocks; None means `Blocking()`, blocks of up
        to 1024 x 1024.
      exponents: `e` of `S^(-e)`: None for `1 / (2 * ndim)`, a number for every dimension, a
        mapping from the number of dimensions of a block to a number or to a mapping from dimension
        to number, or a function of a block's shape. Exponent 0 leaves a dimension alone. `"left"`,
        `"right"` and `"smaller"` are one-sided Shampoo, see `scale_by_one_sided_shampoo`. `"auto"`
        is `{2: 1 / 3}`, and None for `statistics="kl"` and without a graft, where any other makes
        the scale of gradients matter.
      statistics: `"gradients"`, or `"kl"` for factors of the gradient preconditioned by the other
        dimensions' roots, see `accumulate_kl_factors`: KL-Shampoo with full factors, as Meta's
        package has it; with `exponents=0.5` the paper's iteration. It depends on the scale of the
        gradients. With a truncating solver, directions that no side has seen by the first refresh
        are never learned: use `solver="shifted_eigh"`, or `kl_shampoo(rtol=None)`, where supports
        may grow. Or a part, or chain of parts, that fills `Blocks.matrices` with factors, without
        `b2`, `bias_correction` and `weighted`, which are then its own.
      solver: A `Solver`, which carries cutoffs and damping, or the name of one with its defaults:
        `"eigh"` is `TruncatedEigh()`; `"polynomial"`, the same truncated root by matrix products,
        and the cheaper `"polynomial_clip"`; `"auto"`, the faster one of eigh and polynomial for
        backend and size, see `Auto`; `"shifted_eigh"`, `"coupled_newton"`,
        `"higher_order_newton"`; or one of `register_solver`. `TruncatedEigh(rtol=0.0)` is the
        literal rule of result 35.
      every: Steps between refreshes of the roots.
      refresh: First step that preconditions, and how refreshes are spread over steps and memory;
        None means `Refresh()`, from step `every` on.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it. Or a form of one's own: a
        `NamedTuple` of arrays `[N, ...]` with a class method `encode(x)` and `decode(dtype)`.
      root_dtype: Of the stored roots; `jnp.bfloat16` halves them, or a form likewise. Factors stay
        in float32.
      graft: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"`, None, a part such as
        `scale_by_second_moment(b2, eps)`, or a stock Optax transformation without learning rate,
        `optax.scale_by_adam()` say, which then sees raw gradients. Named ones use `b2`, or 0.999
        where `b2` is 1, and eps 1e-15.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      placement: Mesh and axes over which blocks, their state and all arithmetic on them are split.

    Returns:
      A transformation without learning rate and weight decay. Its state holds stacks of blocks,
      float32 where no other dtype is asked for: first moment, factors, roots and graft moment; a
      step with a gradient that is not finite leaves it as it was and is counted, see `blocked`.

    Raises:
      ValueError: An option out of range, or options that contradict each other.

    Example:
      >>> import jax.numpy as jnp, optax, shampoo_jax
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     shampoo_jax.scale_by_shampoo(b1=0.9, b2=0.95),
      ...     optax.add_decayed_weights(0.1),
      ...     optax.scale_by_learning_rate(0.01),
      ... )
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.eye(3, 2), "b": jnp.ones(2)}
      >>> updates, state = tx.update(grads, state, params)
      >>> bool(updates["w"][0, 0] < 0)
      True
    """
    exponents = chosen_exponents(exponents, None if statistics == "kl" else graft)
    options = locals()
    check_static(options)
    chosen = make_solver(solver)
    check_options({**options, "solver": chosen})
    for exponent in given_exponents(exponents):
        chosen.check(exponent)
    roots = invert_roots(chosen, every=every, refresh=refresh, root_dtype=root_dtype)
    form: Any = dict(bias_correction=bias_correction, weighted=weighted)
    swift = _swift(chosen, exponents, statistics)
    return walk(
        optax.chain(*_roots_of(statistics, roots, b2, form, swift), precondition(swift)),
        options,
        scale_by_shampoo,
        chosen,
        first_moment=filter_gradient(b1, b3, bias_correction=bias_correction, mu_dtype=mu_dtype),
        magnitude=make_magnitude(graft, b2),
        whitened=statistics == "kl",
    )


def _swift(solver: Solver, exponents: ExponentOption, statistics: Any) -> bool:
    """Whether products may be as fast as was measured to be safe, see docs/hardware.md."""
    mild = not callable(exponents) and max(given_exponents(exponents), default=0.0) <= 0.5
    return solver.swift and mild and statistics != "kl"


def _roots_of(
    statistics: Any, roots: Part, b2: Any, form: dict[str, Any], swift: bool
) -> list[optax.GradientTransformation]:
    """Statistics by name, or what is given as such, and the roots of them."""
    if statistics == "kl":
        return [accumulate_kl_factors(roots, b2, **form)]
    if isinstance(statistics, str):
        check_choice("statistics", statistics, ("gradients", "kl"))
        return [accumulate_factors(b2, **form, swift=swift), roots]
    if not isinstance(statistics, optax.GradientTransformation) or isinstance(statistics, Guarded):
        raise ValueError(
            f"statistics={statistics!r}: use 'gradients', 'kl', or a part of stacks that fills "
            "Blocks.matrices, such as accumulate_factors(0.95)."
        )
    return [filled(statistics), roots]


@suggests
def scale_by_one_sided_shampoo(
    b1: Scalar = 0.9,
    b2: Scalar = 0.95,
    *,
    side: Side = "right",
    bias_correction: bool = True,
    blocking: Blocking | None = None,
    solver: str | Solver = "eigh",
    every: Whole = 1,
    refresh: Refresh | None = None,
    mu_dtype: DTypeLike | None = None,
    root_dtype: DTypeLike | None = None,
    graft: str | optax.GradientTransformation | None = None,
    monitor: int | None = None,
    placement: Placement | None = None,
) -> Guarded:
    """Rescales updates by one-sided Shampoo: `U = M R^(-1/2)` with `R = EMA(G^T G)`.

    Sources: An et al. 2025 (ASGO, arXiv:2503.20762), Xie et al. 2025 (arXiv:2503.10537). The root
    is truncated where the paper adds eps to it; the paper has neither grafting nor bias correction.

    Args:
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the factor, in [0, 1]; 1 sums.
      side: `"right"` preconditions the last dimension of a matrix, or of a block of however many,
        `"left"` the first, `"smaller"` the smallest of each block, the last one of a square: the
        cheapest. With `"smaller"` the other dimensions, without factors, are not cut.
      bias_correction: Whether first moment and factor are divided by the sum of their weights.
      blocking: How parameters are read and cut into blocks; None means `Blocking()`.
      solver: A `Solver` or the name of one, for an exponent of 1/2; `"eigh"` truncates.
      every: Steps between refreshes of the roots.
      refresh: First step that preconditions, and how refreshes are spread; None means `Refresh()`.
      mu_dtype: Of the stored first moment; `jnp.bfloat16` halves it.
      root_dtype: Of the stored roots; `jnp.bfloat16` halves them.
      graft: Magnitude of every block, `"adam"` say; None leaves that of the direction.
      monitor: Steps between records of the factors' spectra, see `read_monitor`; None for none.
      placement: Mesh and axes over which blocks are split; None means one device.

    Returns:
      A transformation without learning rate and weight decay.

    Raises:
      ValueError: An unknown side, or an option out of range.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.scale_by_one_sided_shampoo(side="left")
      >>> params = {"w": jnp.ones((2, 3))}
      >>> updates, state = tx.update({"w": 5 * jnp.eye(2, 3)}, tx.init(params))
      >>> updates["w"].round(2).tolist()  # (G G^T)^(-1/2) G
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    options = locals()
    check_static(options)
    check_choice("side", options.pop("side"), tuple(SIDES))
    return scale_by_shampoo(**options, exponents=side)
