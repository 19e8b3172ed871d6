"""What the device computes: recordings, roots and attention against references."""

import concurrent.futures
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanogpt.model.gpt import ATTENTION_SCALE
from scripts.maintenance.device import candidates
from scripts.maintenance.device.measure import Program, compile_all, ready
from scripts.maintenance.device.records import Recorder
from scripts.maintenance.device.sizes import Sizes

# An eigenvalue so close to the cutoff, up or down, may be kept or dropped: there is none.
DOUBT = 2.0


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Measures the part."""
    del part, carried
    for edge in sizes.numerics:
        _roots(recorder, edge)
    _attention(recorder, sizes)
    _recordings(recorder, sizes)


def _recordings(recorder: Recorder, sizes: Sizes) -> None:
    """Replays trajectories, many at a time: what they take is compiling."""
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    futures = {name: pool.submit(candidates.replay, name) for name in sizes.recordings}
    for name, future in futures.items():

        def wait(future: Any = future) -> dict[str, float]:
            return {"error_over_tolerance": future.result(max(recorder.left(), 0.0))}

        recorder.attempt("recordings", name, wait)
    pool.shutdown(wait=False, cancel_futures=True)


def spectra(edge: int) -> dict[str, np.ndarray]:
    """Eigenvalues from 1 down; none is near the default cutoff, `edge` times eps.

    Two have half of their eigenvalues exactly 0, as the factor of a gradient of low rank.
    """
    i = np.arange(1, edge + 1)
    half = i <= max(1, edge // 2)
    cutoff = edge * float(np.finfo(np.float32).eps)
    found = {
        "i^-1.5": i**-1.5,
        "half zero, log-spaced": np.where(half, 10.0 ** (-10 * (i - 1) / edge), 0.0),
        "half zero, flat": half.astype(float),
    }

    def apart(values: np.ndarray) -> np.ndarray:
        near = (values > cutoff / DOUBT) & (values < cutoff * DOUBT)
        return np.where(near, cutoff * DOUBT, values)

    return {name: apart(values) for name, values in found.items()}


def _roots(recorder: Recorder, edge: int) -> None:
    """Roots of factors of known eigenvalues against the same in float64."""
    names, factors, expected, gradients = _cases(edge)
    stack = jnp.asarray(factors, jnp.float32)
    programs = {
        name: Program(lambda a, roots=roots: roots(a, candidates.EXPONENT), (stack,))
        for name, roots in candidates.solvers().items()
    }
    compiled = compile_all(programs, recorder.left())
    for name in programs:

        def compare(name: str = name) -> dict[str, Any]:
            roots, good = (np.asarray(x, np.float64) for x in ready(compiled[name])(stack))
            updates, wanted = roots @ gradients, expected @ gradients
            return {
                spectrum: {
                    "cosine": _cosine(updates[i], wanted[i]),
                    "error": float(
                        np.linalg.norm(roots[i] - expected[i]) / np.linalg.norm(expected[i])
                    ),
                    "passed": bool(good[i]),
                }
                for i, spectrum in enumerate(names)
            }

        recorder.attempt("roots", f"{name}, {edge}", compare)


def _cases(edge: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names, factors, their truncated roots, and matrices in the factors' range, float64."""
    random = np.random.default_rng(0)
    basis, _ = np.linalg.qr(random.normal(size=(edge, edge)))
    values = np.stack(list(spectra(edge).values()))
    cutoff = edge * float(np.finfo(np.float32).eps)
    kept = values > cutoff
    powers = np.where(kept, np.where(kept, values, 1.0) ** -candidates.EXPONENT, 0.0)

    def matrices(diagonals: np.ndarray) -> np.ndarray:
        return (basis * diagonals[:, None, :]) @ basis.T

    noise = random.normal(size=(edge, edge))
    return list(spectra(edge)), matrices(values), matrices(powers), matrices(values**0.5) @ noise


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def _attention(recorder: Recorder, sizes: Sizes) -> None:
    """Both attention kernels in bfloat16, forward and backward, against float32."""
    rows, tokens, heads, width = sizes.attention
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)
    shape = (rows, tokens, heads, width)
    q, k, v, weight = (jax.random.normal(key, shape).astype(jnp.bfloat16) for key in keys)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(_attend("xla"))(*wide, weight.astype(jnp.float32))
    for name in ("xla", "cudnn"):

        def compare(name: Any = name) -> dict[str, float]:
            found = jax.jit(_attend(name))(q, k, v, weight)
            errors = [
                np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))
                / np.linalg.norm(np.asarray(y, np.float64))
                for x, y in zip(found, exact, strict=True)
            ]
            return dict(zip(("output", "dq", "dk", "dv"), map(float, errors), strict=True))

        recorder.attempt("attention", name, compare)


def _attend(implementation: Any) -> Any:
    """Output, and the gradients of its product with given weights."""

    def outputs(q: Any, k: Any, v: Any, weight: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(
                q, k, v, scale=ATTENTION_SCALE, is_causal=True, implementation=implementation
            )

        result, pull = jax.vjp(attend, q, k, v)
        return result, *pull(weight)

    return outputs
