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

For a TPU, whose compiler takes seconds for each product, equal steps are a loop in the program.

Sources: Gawlik and Nakatsukasa, arXiv:1906.11326 (composed roots); Amsel et al., arXiv:2505.16932
(composed signs, precision); Su, kexue.fm/archives/11175 (coupled form for any root).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import POSITIVE, check_kind, check_options, refuse
from shampoo_jax.matrix import schedules
from shampoo_jax.matrix.eigh import Roots, finite, power_of_two_scale, relative_cutoff
from shampoo_jax.matrix.products import by_three, matmul, repeat
from shampoo_jax.matrix.turns import (
    Combination,
    Product,
    Turn,
    combine,
    run_turns,
    symmetric_part,
)

Array = jax.Array
Semantics = Literal["cut", "clip"]
Precision = jax.lax.DotAlgorithmPreset | jax.lax.Precision
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
    options = {"semantics": semantics, "rtol": rtol, "sign_steps": sign_steps}
    check_options(options)
    check_precision(precision)
    cpu, gpu, tpu = (
        functools.partial(root_on, backend, exponent=exponent, precision=precision, **options)
        for backend in ("cpu", "gpu", "tpu")
    )
    return jax.lax.platform_dependent(factor, cpu=cpu, tpu=tpu, default=gpu)


def root_on(
    backend: str,
    factor: Array,
    exponent: float,
    *,
    semantics: Semantics,
    rtol: float | None,
    sign_steps: int,
    precision: PrecisionPolicy | None,
) -> Roots:
    """`polynomial_root` as it is on `"cpu"`, `"gpu"` or `"tpu"`."""
    d, dtype = factor.shape[-1], factor.dtype
    schedule = root_schedule(d, dtype, exponent, semantics, rtol, sign_steps)
    policy = choose_policy(backend, dtype, schedule.rtol, precision)
    solve = functools.partial(_root, schedule=schedule, how=_arithmetic(policy, backend))
    if backend == "cpu" and precision is None and dtype == jnp.float32:
        solve = functools.partial(_one_at_a_time, solve)
    return solve(factor)


# Of the sign: negative eigenvalues keep a quarter of its square, positive ones lose as much as it.
SIGN_ERROR = 1e-3


def positive_part(matrices: Array, resolved: float) -> Array:
    """`(A + |A|) / 2`: negative eigenvalues become 0. By products only, in a loop.

    As `P A P` with `P = (I + sign(A)) / 2` by composed polynomials, so that errors of the sign
    count twice.

    Args:
      matrices: Symmetric and finite, `[..., d, d]`.
      resolved: Eigenvalues below this, relative to the norm, may get less than their part. Static.

    Returns:
      `[..., d, d]`, symmetric. What is within rounding of 0 is 0.

    >>> positive_part(jnp.diag(jnp.array([4.0, -2.0])), 1e-3).round(3).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    d, eps = matrices.shape[-1], float(jnp.finfo(matrices.dtype).eps)
    scale = power_of_two_scale(matrices)
    a = symmetric_part(matrices / scale)
    size = norm(a, keepdims=True)
    signs = schedules.wide_sign_schedule(max(resolved, eps) / math.sqrt(d), SIGN_ERROR)
    turns = [turn for c in signs for turn in (Turn("T", M, M), *_signed(c))]
    ends = Turn("T", {"A": 1.0}, PROJECTOR), Turn("A", PROJECTOR, {"T": 1.0}, symmetric=True)
    start = {"A": a, "M": a / jnp.where(size == 0, 1.0, size)}
    part = run_turns((*turns, *ends), start, _apart(matmul), loop=True)["A"]
    rounding = norm(part, keepdims=True) <= d * eps * size
    return jnp.where(rounding, 0.0, part * scale)


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
    cutoff = 0.5 if schedule.polish else None
    return 2 + len(list(_turns(schedule, cutoff)))  # two of the bound


def _one_at_a_time(solve: Callable[[Array], Roots], factor: Array) -> Roots:
    root, ok = jax.lax.map(solve, factor.reshape(-1, *factor.shape[-2:]))
    return root.reshape(factor.shape), ok.reshape(factor.shape[:-2])


class _Arithmetic(NamedTuple):
    """How products are computed.

    Attributes:
      first: Product of whole matrices while they hold the cutoff in the last bits.
      rest: Of all others.
      full: Of thin matrices.
      loop: Whether the program has each of these once, in a loop.
    """

    first: Product
    rest: Product
    full: Product
    loop: bool


def _arithmetic(policy: PrecisionPolicy, backend: str) -> _Arithmetic:
    first, rest = map(_product, policy)
    if backend != "tpu":
        return _Arithmetic(first, rest, matmul, loop=False)
    return _Arithmetic(_apart(first), _apart(rest), _apart(matmul), loop=True)


def _root(factor: Array, schedule: schedules.RootSchedule, how: _Arithmetic) -> Roots:
    p = schedule.p
    scale = power_of_two_scale(factor)
    sound = finite(factor)
    a = jnp.where(sound[..., None, None], factor / scale, 0.0)
    square, fourth = (Turn(n, {x: 1.0}, {x: 1.0}) for n, x in (("A2", "A"), ("A4", "A2")))
    powers = run_turns((square, fourth), {"A": a}, how.first, loop=how.loop)
    # |A^4|_F^(1/4) = (sum of the eighth powers)^(1/8) is no less than the largest eigenvalue; an
    # estimate from below, by power iterations, lets an eigenvalue above 1 through, which diverges.
    bound = 1.001 * norm(powers["A4"], keepdims=True) ** 0.25
    zero = bound == 0
    bound = jnp.where(zero, 1.0, bound)
    m = a / bound
    of_m = {"M": m, "T": powers["A2"] / bound**2, "F": powers["A4"] / bound**4}
    start = {"M": m, "Z": combine(_terms(schedule.steps[0], "IMTF", schedules.FIRST), of_m)}
    cutoff = _image(schedule, _largest(m, of_m["F"], how)) if schedule.polish else None
    for precise, turns in itertools.groupby(_turns(schedule, cutoff), lambda pair: pair[0]):
        product = how.first if precise else how.rest
        start = run_turns([turn for _, turn in turns], start, product, loop=how.loop)
    unit = symmetric_part(start["Z"])
    if schedule.polish:
        ok = _cut_residuals(m, unit, combine(PROJECTOR, start), p, how)
    else:
        ok = _clip_residuals(m, unit, p, (1 + schedule.error) ** p, how)
    zero = zero | ~sound[..., None, None]
    root = jnp.where(zero, 0.0, unit * bound ** (-1 / p) * scale ** (-1 / p))
    return root, sound & finite(root) & (ok | zero[..., 0, 0])


def _product(precision: Precision) -> Product:
    # XLA's partitioner forgets the algorithm of a product of single matrices (seen in programs of
    # jax 0.12.0.1 for 8 H100, one matrix a device): it would be the platform's default.
    presets = jax.lax.DotAlgorithmPreset
    high = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGH)
    ways: dict[Any, Product] = {presets.TF32_TF32_F32: high, presets.BF16_BF16_F32_X3: by_three}
    single = ways.get(precision)
    several = functools.partial(jnp.matmul, precision=precision)

    def product(a: Array, b: Array) -> Array:
        alone = math.prod(a.shape[:-2]) == 1 and single is not None
        return single(a, b) if alone else several(a, b)

    return product


def _apart(product: Product) -> Product:
    """Not fused with what comes before it or after: a TPU's compiler then takes a third as long."""
    barrier = jax.lax.optimization_barrier
    return lambda a, b: barrier(product(*barrier((a, b))))


def _terms(
    coefficients: Sequence[Array | float], names: str, exponents: Sequence[int]
) -> Combination:
    return dict(zip(names, (coefficients[e] for e in exponents), strict=True))


def _turns(
    schedule: schedules.RootSchedule, cutoff: Array | float | None
) -> Iterator[tuple[bool, Turn]]:
    """All products after the bound, and whether each is to be precise.

    Of `M` and `Z`, which is q_0(M) at first: the steps `Z <- Z q(M)`, `M <- M q(M)^p`, then for
    "cut" the projector as `(I + M) / 2` and `Z polish(M)` between two of it.

    Args:
      schedule: Of what.
      cutoff: Where it is in M after the steps, `[..., 1, 1]`; for "clip" None.
    """
    resolved = CUT_RESOLVED if schedule.polish else CLIP_RESOLVED
    last = len(schedule.steps) - 1
    line = None if cutoff is None else _sign_argument(schedule, cutoff)
    affine = None if line is None else (-line[0] * line[1], line[1])
    for k, coefficients in enumerate(schedule.steps):
        precise = k == 0 or schedule.images[k - 1] < resolved
        q: Combination = {"Z": 1.0}
        if k > 0:
            q = _terms(coefficients, "IMT", schedules.OTHERS)
            yield precise, Turn("T", M, M)
            yield precise, Turn("Z", {"Z": 1.0}, q)
        if schedule.polish or k < last:  # "clip" has no use for the last M
            *turns, end = _times_power(q, schedule.p)
            yield from ((precise, turn) for turn in turns)
            yield precise, end._replace(affine=affine if k == last else None)
    if line is not None:
        yield from ((False, turn) for turn in _projector(schedule, *line))


M: Combination = {"M": 1.0}
PROJECTOR: Combination = {"I": 0.5, "M": 0.5}


def _times_power(q: Combination, p: int) -> Iterator[Turn]:
    """`M <- q^p M` with few products of moderate range; q is of M, T or Z, and not of H."""
    between, m = "H", "M"
    if p >= 4:
        half: Combination = {"H": 1.0}
        yield Turn("H", q, q)
        yield from (Turn("H", q, half) for _ in range(p // 2 - 2))
        between = "T"
        if p % 2:
            yield Turn("T", q, M)
            m = "T"
        q, p = half, 2
    for _ in range(p - 1):
        yield Turn(between, q, {m: 1.0})
        m = between
    yield Turn("M", q, {m: 1.0}, symmetric=True)


def _sign_argument(
    schedule: schedules.RootSchedule, cutoff: Array | float
) -> tuple[Array | float, Array | float]:
    """(a, b) with `S = b (M - a I)` within [-1, 1], and 0 near the cutoff in M."""
    width = jnp.maximum(cutoff, schedule.largest - cutoff)
    # The square of the projector is 1/2 where S is sqrt(2) - 1, which the sign steps reach at this.
    zero = cutoff - width * (math.sqrt(2) - 1) / math.prod(a for a, _, _ in schedule.signs)
    return zero, 1 / width


def _projector(
    schedule: schedules.RootSchedule, zero: Array | float, slope: Array | float
) -> Iterator[Turn]:
    """M, which is S at first, becomes its sign, and Z becomes `P Z polish P`."""
    yield Turn("T", M, M)
    # polish(M) by powers of S: M = S / slope + zero.
    c0, c1, c2 = schedule.polish
    shifted = (c0 + (c1 + c2 * zero) * zero, (c1 + 2 * c2 * zero) / slope, c2 / slope**2)
    yield Turn("Z", {"Z": 1.0}, _terms(shifted, "IMT", range(3)))
    for k, coefficients in enumerate(schedule.signs):
        if k > 0:
            yield Turn("T", M, M)
        yield from _signed(coefficients)
    # Twice: Z is largest on what is dropped, where a projector within 1 % would leave 1 % of it. On
    # either side: rounding in Z mixes kept and dropped directions, and the last factor decides.
    yield Turn("T", {"Z": 1.0}, PROJECTOR)
    yield Turn("Z", PROJECTOR, {"T": 1.0})


def _signed(coefficients: Sequence[float]) -> Iterator[Turn]:
    """`M <- a M + b M^3 + c M^5`, with `T = M^2`."""
    yield Turn("H", {"T": 1.0}, {"T": 1.0})
    yield Turn("M", M, _terms(coefficients, "ITH", range(3)), symmetric=True)


def _largest(m: Array, fourth: Array, how: _Arithmetic) -> Array:
    """The largest eigenvalue of M in units of the bound, by power iterations on the probe."""
    v = repeat(functools.partial(how.full, fourth), _probe(m), 2, how.loop)
    quotients = jnp.sum(v * how.full(m, v), axis=-2) / jnp.sum(v * v, axis=-2)
    largest = jnp.max(jnp.nan_to_num(quotients), axis=-1)[..., None, None]
    return jnp.clip(largest, m.shape[-1] ** -0.125 / 1.1, 1.0)


def _probe(m: Array) -> Array:
    """The same Gaussian vectors `[..., d, 8]` at every call."""
    shape = (m.shape[-1], PROBES)
    vectors = jnp.asarray(np.random.default_rng(0).standard_normal(shape), m.dtype)
    # The zeros carry the sharding type of their argument, which shard_map demands of loop state.
    return jnp.broadcast_to(vectors, (*m.shape[:-2], *shape)) + jnp.zeros_like(m[..., :1])


def _image(schedule: schedules.RootSchedule, largest: Array) -> Array:
    """Where the cutoff, rtol times the largest eigenvalue, lies after the steps."""
    x = schedule.rtol * largest
    for coefficients in schedule.steps:
        x = x * jnp.polyval(jnp.asarray(coefficients[::-1], x.dtype), x) ** schedule.p
    return x


def _cut_residuals(m: Array, root: Array, projector: Array, p: int, how: _Arithmetic) -> Array:
    """Whether `X^p M = H` where H keeps, and `H^2 = H`, on the probe; false for NaN."""
    w = _probe(m)
    kept = how.full(projector, w)
    twice = how.full(projector, kept)
    accurate = norm(_inverted(m, root, kept, p, how) - twice) <= TOLERANCE * norm(kept)
    return accurate & (norm(twice - kept) <= TOLERANCE * norm(w))


def _clip_residuals(m: Array, root: Array, p: int, largest: float, how: _Arithmetic) -> Array:
    """Whether `X^p M` is near I where M is large, and bounded, on the probe; false for NaN."""
    w = _probe(m)
    weighted = how.full(m, w)
    # M on either side takes off what rounding mixes between large and small eigenvalues.
    error = how.full(m, _inverted(m, root, weighted, p, how) - weighted)
    accurate = norm(error) <= (largest - 1 + TOLERANCE) * norm(how.full(m, weighted))
    return accurate & (norm(_inverted(m, root, w, p, how)) <= BOUNDED * norm(w))


def _inverted(m: Array, root: Array, w: Array, p: int, how: _Arithmetic) -> Array:
    """`X^p M W` with half of X on either side of M, which rounding amplifies least."""
    rooted = functools.partial(how.full, root)
    half = repeat(rooted, w, p // 2, how.loop)
    return repeat(rooted, how.full(m, half), p - p // 2, how.loop)
