"""Truncated inverse roots by matrix products only: composed minimax polynomials.

Products are what accelerators do best, and they batch; eigendecompositions do neither. The
spectrum of a factor is first brought into [0, 1] by a guaranteed upper bound. Then

    Z <- Z q_t(M),   M <- M q_t(M)^p

lifts it towards 1 and leaves `Z = A^(-1/p)` on what was above the cutoff. Eigenvalues below it are
lifted by a bounded factor only, so that Z is `max(A, cutoff)^(-1/p)`: the semantics "clip". "cut",
the pseudo-inverse, goes on: in M the cutoff now lies in the middle of [0, 1], polynomials of
`S = M - cutoff` tend to its sign, and `(I + S) / 2` projects onto what is kept.

Early iterations hold eigenvalues near the cutoff in a few last bits, later ones do not; so only the
early products need all of float32 (see `PrecisionPolicy`).

Sources: Gawlik and Nakatsukasa, arXiv:1906.11326 (composed roots); Amsel et al., arXiv:2505.16932
(composed signs, precision); Su, kexue.fm/archives/11175 (coupled form for any root).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import POSITIVE, check_kind, check_options, refuse
from shampoo_jax.matrix import schedules
from shampoo_jax.matrix.eigh import Roots, finite, power_of_two_scale, relative_cutoff
from shampoo_jax.matrix.products import identity_like, matmul

Array = jax.Array
Semantics = Literal["cut", "clip"]
Precision = jax.lax.DotAlgorithmPreset | jax.lax.Precision
Product = Callable[[Array, Array], Array]
norm = functools.partial(jnp.linalg.norm, axis=(-2, -1))

MAX_ROOT = 8
MAX_RTOL = 0.1
SIGN_STEPS = 3
PROBES = 8
# Products are precise until the image of the cutoff is above this; then TF32's 2^-11 is enough.
CUT_RESOLVED = 0.1
CLIP_RESOLVED = 0.002
# Accepted relative residuals on the probe.
TOLERANCE = 0.2
# "clip" has no projector that takes rounding off small eigenvalues; divergence is beyond this.
BOUNDED = 3.0


class PrecisionPolicy(NamedTuple):
    """Arithmetic of the products of float32 matrices; float64 is never rounded.

    Attributes:
      first: Of the bound and the iterations that still hold the cutoff in the last bits.
      rest: Of all others.

    Example:
      >>> import jax, shampoo_jax
      >>> highest = jax.lax.Precision.HIGHEST
      >>> solver = shampoo_jax.Polynomial(precision=shampoo_jax.PrecisionPolicy(highest, highest))
      >>> tx = shampoo_jax.scale_by_shampoo(solver=solver)
    """

    first: Precision
    rest: Precision


def check_precision(precision: PrecisionPolicy | None) -> None:
    """Raises ValueError for what is no policy, or one of something else."""
    check_kind("precision", precision, PrecisionPolicy, "PrecisionPolicy(HIGHEST, HIGHEST)")
    for choice in precision or ():
        if not isinstance(choice, Precision):
            refuse("precision", choice, ": give a jax.lax.Precision or DotAlgorithmPreset")


HIGHEST = jax.lax.Precision.HIGHEST
FULL = PrecisionPolicy(HIGHEST, HIGHEST)
# bf16x3 rounds at 2^-17 of the largest eigenvalue, too close to smaller cutoffs than this.
X3_RTOL = 2.0**-14


def choose_policy(
    backend: str, dtype: Any, rtol: float, precision: PrecisionPolicy | None = None
) -> PrecisionPolicy:
    """Arithmetic of the products on `"cpu"`, `"gpu"` or `"tpu"`.

    CPU computes all in full float32, a TPU the first in full and the rest in bf16x3, a GPU the
    first in bf16x3 and the rest in TF32; but in full where the cutoff is below 2^-14: d < 512.

    Args:
      backend: Where the products run.
      dtype: Of the factors; what is not float32 is never rounded.
      rtol: The relative cutoff.
      precision: A choice of one's own for float32.
    """
    if jnp.dtype(dtype) != jnp.float32 or (precision is None and backend == "cpu"):
        return FULL
    presets = jax.lax.DotAlgorithmPreset
    three = presets.BF16_BF16_F32_X3
    first = three if rtol >= X3_RTOL else HIGHEST
    tpu, gpu = PrecisionPolicy(HIGHEST, three), PrecisionPolicy(first, presets.TF32_TF32_F32)
    return precision or (tpu if backend == "tpu" else gpu)


def polynomial_root(
    factor: Array,
    exponent: float,
    *,
    semantics: Semantics = "cut",
    rtol: float | None = None,
    sign_steps: int = SIGN_STEPS,
    precision: PrecisionPolicy | None = None,
) -> Roots:
    """Inverse root `A^(-exponent)`, truncated ("cut") or bounded ("clip"), by products only.

    The cutoff is `rtol` times the largest eigenvalue: "cut" gives 0 below it, "clip" what the
    cutoff itself gives. An eigenvalue within 5 % of it may get either, or something between.

    Args:
      factor: Symmetric positive semi-definite stack, `[..., d, d]`, float32 or float64.
      exponent: 1/p with p <= 8. Static.
      semantics: `"cut"` or `"clip"`. Static.
      rtol: Relative cutoff, at least eps of the dtype; None means `d * eps`. Static.
      sign_steps: Of the projector of "cut": 3 products each. Static.
      precision: Of the products; None chooses by the backend that runs them, see `choose_policy`.
        Static.

    Returns:
      Roots `[..., d, d]`, and `bool[...]`: finite, and accurate on a random probe. The factor must
      be positive semi-definite up to a fraction of the cutoff; where it is not, this is false. A
      zero matrix has root zero.

    Raises:
      ValueError: An exponent or rtol out of range, naming the remedy.
    """
    check_options({"semantics": semantics, "sign_steps": sign_steps, "rtol": rtol})
    check_precision(precision)
    d, dtype = factor.shape[-1], factor.dtype
    schedule = root_schedule(d, dtype, exponent, semantics, rtol, sign_steps)

    def on(backend: str) -> Callable[[Array], Roots]:
        policy = choose_policy(backend, dtype, schedule.rtol, precision)
        return functools.partial(_root, schedule=schedule, policy=policy)

    if precision is not None or dtype != jnp.float32:
        return on("any")(factor)
    one_at_a_time = functools.partial(_one_at_a_time, on("cpu"))
    return jax.lax.platform_dependent(factor, cpu=one_at_a_time, tpu=on("tpu"), default=on("gpu"))


def integer_root(exponent: float) -> int:
    """The p of an exponent 1/p; raises ValueError for other exponents."""
    check_static({"exponent": exponent})
    POSITIVE("exponent", exponent)
    p = round(1 / exponent)
    if 1 <= p <= MAX_ROOT and math.isclose(1 / p, exponent, rel_tol=1e-9):
        return p
    raise ValueError(
        f"exponent={exponent} is not 1/p with p <= {MAX_ROOT}, which polynomial roots need: use "
        "solver='eigh' for it."
    )


def root_schedule(
    d: int, dtype: Any, exponent: float, semantics: Semantics, rtol: float | None, sign_steps: int
) -> schedules.RootSchedule:
    """The schedule for factors `[d, d]`; raises ValueError where it cannot meet these options."""
    p = integer_root(exponent)
    if isinstance(rtol, Array):
        raise ValueError(
            f"rtol={rtol} is an array, but polynomials are designed for a cutoff that is known "
            "before any step: give a Python number, or use solver='eigh'."
        )
    dtype = jnp.dtype(dtype)
    eps, rtol = float(jnp.finfo(dtype).eps), float(relative_cutoff(rtol, d, dtype))
    if not eps <= rtol <= MAX_RTOL:
        raise ValueError(
            f"rtol={rtol} is outside [{eps:.3g}, {MAX_RTOL}], what polynomial roots resolve in "
            f"{dtype}: use solver='eigh', or float64 statistics for a smaller one."
        )
    if semantics == "cut":
        return schedules.cut_schedule(p, rtol, sign_steps)
    return schedules.clip_schedule(p, rtol)


def count_products(schedule: schedules.RootSchedule) -> int:
    """Number of products of d x d matrices in one root, thin ones of the checks aside."""

    def power(p: int) -> int:  # see _times_power
        return p if p < 4 else 2 + p % 2 + power(p // 2 - 1)

    p, steps, signs = schedule.p, len(schedule.steps), len(schedule.signs)
    # The bound; M^2 and Z after the first step; M in every step.
    count = 2 + 2 * (steps - 1) + power(p) * (steps - 1)
    # S^2 once and polish; two products a sign step and its square; the projector, twice.
    return count + (power(p) + 2 + 3 * signs - 1 + 2 if schedule.polish else 0)


def _one_at_a_time(solve: Callable[[Array], Roots], factor: Array) -> Roots:
    root, ok = jax.lax.map(solve, factor.reshape(-1, *factor.shape[-2:]))
    return root.reshape(factor.shape), ok.reshape(factor.shape[:-2])


def _root(factor: Array, schedule: schedules.RootSchedule, policy: PrecisionPolicy) -> Roots:
    p = schedule.p
    scale = power_of_two_scale(factor)
    sound = finite(factor)
    a = jnp.where(sound[..., None, None], factor / scale, 0.0)
    first = _product(policy.first)
    squared = first(a, a)
    fourth = first(squared, squared)
    # |A^4|_F^(1/4) = (sum of the eighth powers)^(1/8) is no less than the largest eigenvalue; an
    # estimate from below, by power iterations, lets an eigenvalue above 1 through, which diverges.
    bound = 1.001 * norm(fourth, keepdims=True) ** 0.25
    zero = bound == 0
    bound = jnp.where(zero, 1.0, bound)
    m = a / bound
    powers = (m, squared / bound**2, fourth / bound**4)
    z, lifted = _lift(powers, schedule, policy)
    if schedule.polish:
        cutoff = _image(schedule, _largest(m, powers[2]))
        projector, unit = _projector(z, lifted, cutoff, schedule, _product(policy.rest))
        unit = _symmetric(unit)
        ok = _cut_residuals(m, unit, projector, p)
    else:
        unit = _symmetric(z)
        ok = _clip_residuals(m, unit, p, (1 + schedule.error) ** p)
    zero = zero | ~sound[..., None, None]
    root = jnp.where(zero, 0.0, unit * bound ** (-1 / p) * scale ** (-1 / p))
    return root, sound & finite(root) & (ok | zero[..., 0, 0])


def _product(precision: Precision) -> Product:
    return functools.partial(jnp.matmul, precision=precision)


def _symmetric(x: Array) -> Array:
    return (x + x.swapaxes(-1, -2)) / 2


def _polynomial(coefficients: Sequence[Array | float], *powers: Array) -> Array:
    """`c_0 I + c_1 P_1 + c_2 P_2 + ...` of given powers of one matrix."""
    total = coefficients[0] * identity_like(powers[0])
    for coefficient, power in zip(coefficients[1:], powers, strict=True):
        total = total + coefficient * power
    return total


def _lift(
    powers: tuple[Array, ...], schedule: schedules.RootSchedule, policy: PrecisionPolicy
) -> tuple[Array, Array]:
    """All steps `Z <- Z q(M)`, `M <- M q(M)^p`; "clip" has no use for the last M."""
    m, exponents, image = powers[0], schedules.FIRST, 0.0
    resolved = CUT_RESOLVED if schedule.polish else CLIP_RESOLVED
    z = None
    for k, coefficients in enumerate(schedule.steps):
        product = _product(policy.first if image < resolved else policy.rest)
        if k > 0:
            powers, exponents = (m, product(m, m)), schedules.OTHERS
        q = _polynomial([coefficients[e] for e in exponents], *powers)
        z = q if z is None else product(z, q)
        if schedule.polish or k + 1 < len(schedule.steps):
            m = _symmetric(_times_power(product, q, schedule.p, m))
        image = schedule.images[k]
    assert z is not None  # a schedule has a step
    return z, m


def _times_power(product: Product, q: Array, p: int, m: Array) -> Array:
    """`q^p m` with few products of moderate range."""
    if p >= 4:
        half = _times_power(product, q, p // 2 - 1, q)
        for _ in range(p % 2):
            m = product(q, m)
        return product(half, product(half, m))
    for _ in range(p):
        m = product(q, m)
    return m


def _largest(m: Array, fourth: Array) -> Array:
    """The largest eigenvalue of M in units of the bound, by power iterations on the probe."""
    v = matmul(fourth, matmul(fourth, _probe(m)))
    quotients = jnp.sum(v * matmul(m, v), axis=-2) / jnp.sum(v * v, axis=-2)
    largest = jnp.max(jnp.nan_to_num(quotients), axis=-1)[..., None, None]
    return jnp.clip(largest, m.shape[-1] ** -0.125 / 1.1, 1.0)


def _probe(m: Array) -> Array:
    """The same Gaussian vectors `[d, 8]` at every call."""
    shape = (m.shape[-1], PROBES)
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), m.dtype)


def _image(schedule: schedules.RootSchedule, largest: Array) -> Array:
    """Where the cutoff, rtol times the largest eigenvalue, lies after the steps."""
    x = schedule.rtol * largest
    for coefficients in schedule.steps:
        x = x * jnp.polyval(jnp.asarray(coefficients[::-1], x.dtype), x) ** schedule.p
    return x


def _projector(
    z: Array, m: Array, cutoff: Array, schedule: schedules.RootSchedule, product: Product
) -> tuple[Array, Array]:
    """The projector onto what lies above the cutoff, and `Z polish(M)` between two of it."""
    width = jnp.maximum(cutoff, schedule.largest - cutoff)
    # The square of the projector is 1/2 where S is sqrt(2) - 1, which the sign steps reach at this.
    cutoff = cutoff - width * (math.sqrt(2) - 1) / math.prod(a for a, _, _ in schedule.signs)
    slope = 1 / width
    s = _polynomial((-cutoff * slope, slope), m)
    squared = product(s, s)
    # polish(M) by powers of S: M = S / slope + cutoff.
    c0, c1, c2 = schedule.polish
    shifted = (c0 + (c1 + c2 * cutoff) * cutoff, (c1 + 2 * c2 * cutoff) / slope, c2 / slope**2)
    z = product(z, _polynomial(shifted, s, squared))
    for k, coefficients in enumerate(schedule.signs):
        squared = squared if k == 0 else product(s, s)
        q = _polynomial(coefficients, squared, product(squared, squared))
        s = _symmetric(product(s, q))
    projector = _polynomial((0.5, 0.5), s)
    # Twice: Z is largest on what is dropped, where a projector within 1 % would leave 1 % of it. On
    # either side: rounding in Z mixes kept and dropped directions, and the last factor decides.
    return projector, product(projector, product(z, projector))


def _cut_residuals(m: Array, root: Array, projector: Array, p: int) -> Array:
    """Whether `X^p M = H` where H keeps, and `H^2 = H`, on the probe; false for NaN."""
    w = _probe(m)
    kept = matmul(projector, w)
    twice = matmul(projector, kept)
    accurate = norm(_inverted(m, root, kept, p) - twice) <= TOLERANCE * norm(kept)
    return accurate & (norm(twice - kept) <= TOLERANCE * norm(w))


def _clip_residuals(m: Array, root: Array, p: int, largest: float) -> Array:
    """Whether `X^p M` is near I where M is large, and bounded, on the probe; false for NaN."""
    w = _probe(m)
    weighted = matmul(m, w)
    # M on either side takes off what rounding mixes between large and small eigenvalues.
    error = matmul(m, _inverted(m, root, weighted, p) - weighted)
    accurate = norm(error) <= (largest - 1 + TOLERANCE) * norm(matmul(m, weighted))
    return accurate & (norm(_inverted(m, root, w, p)) <= BOUNDED * norm(w))


def _inverted(m: Array, root: Array, w: Array, p: int) -> Array:
    """`X^p M W` with half of X on either side of M, which rounding amplifies least."""
    for matrix in [root] * (p // 2) + [m] + [root] * (p - p // 2):
        w = matmul(matrix, w)
    return w
