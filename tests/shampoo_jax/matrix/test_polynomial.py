"""Matmul-only roots against float64 eigendecompositions of the same float32 factors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix import polynomial
from shampoo_jax.matrix.polynomial import PrecisionPolicy, choose_policy, polynomial_root
from tests.oracles.gradients import recorded_gradients

EPS = 2.0**-23
PRESETS = jax.lax.DotAlgorithmPreset
X3 = PRESETS.BF16_BF16_F32_X3
polynomial_root_jit = jax.jit(
    polynomial_root, static_argnames=("exponent", "semantics", "rtol", "precision")
)


def spectrum(values, seed=0):
    values = np.asarray(values, np.float64)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return ((q * values) @ q.T).astype(np.float32)


def reference(a, root, exponent, semantics="cut", rtol=None):
    """The exact root; within 5 % of the cutoff whichever decision is nearer to the given root."""
    w, q = np.linalg.eigh(a.astype(np.float64))
    cutoff = (rtol or len(a) * EPS) * w.max()
    if semantics == "clip":
        return (q * np.maximum(w, cutoff) ** -exponent) @ q.T
    full = np.maximum(w, cutoff / 2) ** -exponent
    actual = np.einsum("ij,ij->j", q, root @ q)
    nearer = np.abs(actual - full) < np.abs(actual)
    kept = np.where(np.abs(w / cutoff - 1) < 0.05, nearer, w > cutoff)
    return (q * (full * kept)) @ q.T


def cosine(a, b):
    return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def update_cosines(cases, exponent, semantics="cut", solve=polynomial_root_jit):
    """Cosine of `L^-e M` or `L^-e M R^-e` with the reference for each ([L, R], M)."""
    factors = [a for sides, _ in cases for a in sides]
    roots = {}
    for size in {len(a) for a in factors}:  # one program per size
        stack = np.stack([a for a in factors if len(a) == size])
        root, ok = solve(stack, exponent, semantics=semantics)
        assert ok.all()
        roots[size] = iter(np.asarray(root, np.float64))
    cosines = []
    for sides, momentum in cases:
        actual = expected = momentum
        for a in sides:
            root = next(roots[len(a)])
            exact = reference(a, root, exponent, semantics)
            actual, expected = (root @ actual).T, (exact @ expected).T
        cosines.append(cosine(actual, expected))
    return cosines


def averages(gradients):
    """Yields factors and momentum with b1 = b2 = 0.9 after each gradient."""
    left, right, momentum = 0.0, 0.0, 0.0
    for g in gradients.astype(np.float64) / np.abs(gradients).max():
        left, right = 0.9 * left + 0.1 * g @ g.T, 0.9 * right + 0.1 * g.T @ g
        momentum = 0.9 * momentum + 0.1 * g
        yield [np.float32(left), np.float32(right)], momentum


RECORDED = [
    case
    for g in recorded_gradients().values()
    if g.shape[1] == g.shape[2]
    for case in list(averages(g))[5::3]
]


@pytest.mark.parametrize(("exponent", "semantics"), [(0.25, "cut"), (0.5, "cut"), (0.25, "clip")])
def test_update_direction_on_recorded_gradients(exponent, semantics):
    sides = 1 if exponent == 0.5 else 2
    cosines = update_cosines([(f[:sides], m) for f, m in RECORDED], exponent, semantics)
    assert len(cosines) >= 15
    assert min(cosines) > 0.995 and np.mean(cosines) > 0.999


def coloured(n, decay):
    """Factors and momentum of a mean and Kronecker-coloured noise, spectra i^-decay."""
    rng = np.random.default_rng(n)
    scale = np.arange(1, n + 1) ** (-decay / 2)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] * scale for _ in "LR")
    *_, last = averages(u @ (0.3 * rng.normal(size=(n, n)) + rng.normal(size=(8, n, n))) @ v.T)
    return last


COLOURED = [coloured(64, decay) for decay in (1, 1.5, 2, 2.5, 3)]
LARGE = [coloured(512, 2)]


def test_update_direction_on_coloured_noise():
    cosines = update_cosines(COLOURED, 0.25)
    assert min(cosines) > 0.995 and np.mean(cosines) > 0.999


def rounded(x, bits):
    return jax.lax.reduce_precision(x, 8, bits)


def simulated(precision):
    """Products of an accelerator on CPU, which computes all of them in float32."""

    def product(a, b):
        exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        if precision == PRESETS.TF32_TF32_F32:
            return exact(rounded(a, 10), rounded(b, 10))
        if precision == X3:
            high, other = rounded(a, 7), rounded(b, 7)
            low, rest = rounded(a - high, 7), rounded(b - other, 7)
            return exact(high, other) + (exact(high, rest) + exact(low, other))
        return exact(a, b)

    return product


@pytest.mark.parametrize(("exponent", "semantics"), [(0.25, "cut"), (0.5, "cut"), (0.25, "clip")])
def test_precision_on_gpu(exponent, semantics, monkeypatch):
    monkeypatch.setattr(polynomial, "_product", simulated)
    sides = 1 if exponent == 0.5 else 2
    for cases in ([(f[:sides], m) for f, m in RECORDED[2::6]], [(f[:1], m) for f, m in LARGE]):
        policy = choose_policy("gpu", jnp.float32, len(cases[0][0][0]) * EPS)
        solve = jax.jit(
            functools.partial(polynomial_root, precision=policy),
            static_argnames=("exponent", "semantics"),
        )
        cosines = update_cosines(cases, exponent, semantics, solve)
        assert min(cosines) > 0.995 and np.mean(cosines) > 0.998


N = 64
SPECTRA = {
    "30 decades": np.geomspace(1, 1e-30, N),
    "1/i": np.arange(1, N + 1) ** -1.0,
    "1/i^1.5": np.arange(1, N + 1) ** -1.5,
    "1/i^2": np.arange(1, N + 1) ** -2.0,
    "spike above": np.r_[1, np.full(N - 1, 1e-4)],
    "spike below": np.r_[1, np.full(N - 1, 1e-9)],
    "rank 20": np.r_[np.geomspace(1, 1e-3, 20), np.zeros(N - 20)],
    "flat rank 32": np.r_[np.ones(32), np.zeros(32)],
    # Many equal eigenvalues: the bound is 1.6 times the largest, the cutoff must not be.
    "flat top": np.r_[np.ones(32), np.full(16, 1.2 * N * EPS), np.full(16, 0.8 * N * EPS)],
    "two clusters": np.r_[np.ones(3), 0.99 * np.ones(3), np.geomspace(1e-2, 1e-12, N - 6)],
}
STACK = np.stack([spectrum(values, i) for i, values in enumerate(SPECTRA.values())])


def weighted(a):
    """Gradients lie in the range of their factor: its square root stands for them."""
    w, q = np.linalg.eigh(a.astype(np.float64))
    return q * np.sqrt(np.maximum(w, 0))


@pytest.mark.parametrize(
    ("exponent", "semantics", "least"),
    [(0.25, "cut", 0.9985), (0.5, "cut", 0.998), (1 / 3, "cut", 0.998), (0.25, "clip", 0.99)],
)
def test_spectra(exponent, semantics, least):
    roots, ok = polynomial_root_jit(STACK, exponent, semantics=semantics)
    assert ok.all() and roots.dtype == jnp.float32
    np.testing.assert_array_equal(roots, roots.swapaxes(1, 2))
    for name, a, root in zip(SPECTRA, STACK, np.asarray(roots, np.float64), strict=True):
        exact = reference(a, root, exponent, semantics)
        assert cosine(root @ weighted(a), exact @ weighted(a)) > least, name


@pytest.mark.parametrize("semantics", ["cut", "clip"])
def test_scales(semantics):
    expected, _ = polynomial_root_jit(STACK, 0.25, semantics=semantics)
    for power in (2.0**-100, 2.0**100):  # 1e-30, 1e30
        roots, ok = polynomial_root_jit(STACK * np.float32(power), 0.25, semantics=semantics)
        assert ok.all()
        np.testing.assert_allclose(roots * power**0.25, expected, rtol=1e-6)


def test_rounding_of_low_rank_factors_does_not_reach_the_update():
    """Scales that are no power of two round differently; what is dropped must stay dropped."""
    g = np.random.default_rng(0).normal(size=(16, 3)) @ np.ones((3, 5)).cumsum(1)
    u, sv, _ = np.linalg.svd(g, full_matrices=False)
    exact = u[:, 0] * sv[0] ** 0.5  # rank 1: the update along its only direction
    for scale in (1.0, 1e-6, 3.0, 1e6):
        scaled = np.float32(g * scale)
        root, ok = polynomial_root_jit((scaled @ scaled.T)[None], 0.25)
        update = root[0] @ scaled / scale**0.5
        error = np.linalg.norm(update, axis=1) - np.abs(exact)
        assert ok.all() and np.linalg.norm(error) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("semantics", ["cut", "clip"])
def test_special_matrices(semantics):
    """Zero, identities, NaN, inf; negative eigenvalues within rounding and far beyond."""
    stack, eye = STACK.copy(), np.eye(N)
    noise = np.random.default_rng(0).normal(size=(N, N)) / np.sqrt(N)
    stack[1:4] = np.array([0, 1, 16e-8])[:, None, None] * eye
    stack[4] = np.nan
    stack[5, 3, 3] = np.inf
    stack[6:9] = STACK[0] + np.array([1e-7, 1e-4, 1e-2])[:, None, None] * (noise + noise.T)
    roots, ok = polynomial_root_jit(stack, 0.25, semantics=semantics)
    assert ok.tolist() == [True] * 4 + [False] * 2 + [True] + [False] * 2 + [True]
    for root, expected in zip(roots[1:4], (0, 1, 50), strict=True):
        np.testing.assert_allclose(root, expected * eye, atol=0.06 * expected)
    exact = reference(stack[6], np.asarray(roots[6], np.float64), 0.25, semantics)
    assert cosine(roots[6] @ weighted(STACK[0]), exact @ weighted(STACK[0])) > 0.999


def test_one_by_one():
    root, ok = polynomial_root_jit(np.float32([[[81.0]], [[0.0]]]), 0.25)
    assert ok.all() and root.ravel().tolist() == pytest.approx([1 / 3, 0], rel=0.01)


def test_own_cutoff():
    roots, ok = polynomial_root_jit(STACK, 0.25, rtol=2e-3)
    assert ok.all()
    for a, root in zip(STACK, np.asarray(roots, np.float64), strict=True):
        exact = reference(a, root, 0.25, rtol=2e-3)
        assert cosine(root @ weighted(a), exact @ weighted(a)) > 0.998


@pytest.mark.parametrize(("exponent", "semantics"), [(0.25, "cut"), (0.5, "clip"), (1 / 7, "cut")])
def test_loops_compute_what_spelt_out_steps_do(exponent, semantics, monkeypatch):
    """What a TPU runs, here: the same products in the same order, coefficients in arrays."""
    expected, ok = polynomial_root_jit(STACK, exponent, semantics=semantics)
    looped = polynomial._arithmetic(polynomial.FULL, "tpu")
    monkeypatch.setattr(polynomial, "_arithmetic", lambda policy, backend: looped)
    solve = functools.partial(polynomial_root, exponent=exponent, semantics=semantics)
    roots, good = jax.jit(solve)(STACK)
    assert "while" in jax.jit(jax.vmap(solve)).lower(STACK[None]).as_text()
    np.testing.assert_array_equal(good, ok)
    for a, root, same in zip(STACK, roots, expected, strict=True):
        assert cosine(root @ weighted(a), same @ weighted(a)) > 0.9999


def test_the_positive_part_has_the_positive_eigenvalues():
    spectra = {
        "mixed": np.r_[np.geomspace(1, 1e-4, N // 2), -np.geomspace(1, 1e-4, N // 2)],
        "mostly negative": np.r_[-np.ones(N - 2), 0.5, 1e-3],
        "negative": -np.ones(N),
        "positive": np.geomspace(1, 1e-2, N),
        "zero": np.zeros(N),
    }
    stack = np.stack([spectrum(values, i) for i, values in enumerate(spectra.values())])
    resolved = N * EPS / 10
    parts = polynomial.positive_part(stack, resolved)
    np.testing.assert_array_equal(parts, parts.swapaxes(1, 2))
    np.testing.assert_array_equal(parts[-3], np.zeros((N, N)))
    for a, part in zip(stack, np.asarray(parts, np.float64), strict=True):
        w, q = np.linalg.eigh(a.astype(np.float64))
        inside = q.T @ part @ q
        off = np.abs(inside - np.diag(np.maximum(w, 0))).max()
        # Rounding, and the sign's error once on the positive side, squared on the negative one.
        assert off <= 1e-3 * max(w.max(), 0) + N * EPS and np.linalg.eigvalsh(part).min() > -N * EPS
    big = polynomial.positive_part(stack * np.float32(2.0**100), resolved)
    np.testing.assert_array_equal(big / 2.0**100, parts)


def test_float64_is_not_rounded():
    with jax.enable_x64(True):
        half = spectrum(np.geomspace(1, 1e-9, 32)).astype(np.float64)
        a = half @ half  # 18 decades
        root, ok = polynomial_root_jit(
            a, 0.25, rtol=1e-10, precision=choose_policy("gpu", jnp.float32, 1.0)
        )
        assert root.dtype == jnp.float64 and ok
        root = np.asarray(root)
        assert cosine(root @ half, reference(a, root, 0.25, rtol=1e-10) @ half) > 0.999


def lowered(platform, semantics, precision=None, size=768):
    """Products of whole matrices in the program for a platform: how many of each algorithm."""
    function = functools.partial(
        polynomial_root, exponent=0.25, semantics=semantics, precision=precision
    )
    traced = jax.jit(function).trace(jax.ShapeDtypeStruct((2, size, size), jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    whole = rf"(?:2x)?{size}x{size}xf32"
    dots = re.findall(rf"stablehlo.dot_general .*tensor<{whole}>, tensor<{whole}>\)", text)
    kinds = [
        "x3"
        if "num_primitive_operations = 3" in dot
        else "tf32"
        if "precision_type = tf32" in dot
        else "highest"
        if "HIGHEST" in dot
        else "?"
        for dot in dots
    ]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


@pytest.mark.parametrize(
    ("platform", "semantics", "precision", "counts"),
    [
        ("cpu", "cut", None, {"highest": 27}),
        ("cpu", "clip", None, {"highest": 12}),
        ("cuda", "cut", None, {"tf32": 17, "x3": 10}),
        ("cuda", "clip", None, {"tf32": 7, "x3": 5}),
        # In loops, with one product each: of the bound, and of either precision.
        ("tpu", "cut", None, {"highest": 2, "x3": 1}),
        ("tpu", "clip", None, {"highest": 2, "x3": 1}),
        ("cpu", "clip", PrecisionPolicy(X3, X3), {"x3": 12}),
    ],
)
def test_products_and_their_precision(platform, semantics, precision, counts):
    assert lowered(platform, semantics, precision) == counts


def test_no_product_of_single_matrices_relies_on_an_algorithm():
    """XLA's partitioner forgets it where a device has one matrix."""
    shape = jax.ShapeDtypeStruct((1, 768, 768), jnp.float32)
    traced = jax.jit(functools.partial(polynomial_root, exponent=0.25)).trace(shape)
    for platform, full in (("cuda", 0), ("tpu", 2)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        dots = [
            x
            for x in text.splitlines()
            if "dot_general" in x and "768x768xf32>, tensor<768x768xf32" in x
        ]
        assert not any("num_primitive_operations" in dot for dot in dots)
        assert sum("[HIGHEST, HIGHEST]" in dot for dot in dots) == full
        assert sum("[HIGH, HIGH]" in dot for dot in dots) == (17 if platform == "cuda" else 0)
        halves = [
            x
            for x in text.splitlines()
            if "dot_general" in x and "768x768xbf16>, tensor<768x768xbf16" in x
        ]
        assert len(halves) == 3 * (10 if platform == "cuda" else 1)


def test_roots_of_one_matrix_by_products_of_halves():
    a = jnp.asarray(spectrum(np.logspace(0, -2, 48)), jnp.float32)[None]
    policy = PrecisionPolicy(X3, X3)
    root, ok = jax.jit(functools.partial(polynomial_root, exponent=0.25, precision=policy))(a)
    exact, _ = jax.jit(functools.partial(polynomial_root, exponent=0.25))(a)
    assert ok.all()
    np.testing.assert_allclose(root, exact, rtol=0, atol=1e-2 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(exponent=0.4), "exponent=0.4 is not 1/p .*solver='eigh'"),
        (dict(exponent=-0.5), "exponent=-0.5"),
        (dict(exponent=0.25, rtol=1e-10), "rtol=1e-10 is outside .*float64 statistics"),
        (dict(exponent=0.25, rtol=0.0), "rtol=0.0 is outside"),
        (dict(exponent=0.25, rtol=0.5), "rtol=0.5 is outside"),
        (dict(exponent=0.25, rtol=jnp.float32(1e-3)), "rtol=.* is an array.*Python number"),
        (dict(exponent=0.25, semantics="ridge"), "semantics='ridge': use one of 'cut', 'clip'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        polynomial_root(jnp.eye(2), **options)
