"""Trials of narrower products: what each saves, and how far it turns the update."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts.maintenance.benchmarking.fidelity import update_cosines
from scripts.maintenance.benchmarking.gradients import coloured_gradients
from scripts.maintenance.device import candidates
from scripts.maintenance.device.candidates import EXPONENT, PRECISIONS, Roots, product
from scripts.maintenance.device.measure import Program, compile_all, ready, seconds_per_call
from scripts.maintenance.device.records import Recorder
from scripts.maintenance.device.roots import repeated_factors
from scripts.maintenance.device.sizes import Sizes

BASE = "float32"
DECAY = 0.9
# Matrices and steps of the averages whose update is compared.
MATRICES, HISTORY = 4, 12


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Measures the part."""
    del part, carried
    count, edge = sizes.precision
    matrices = [jax.ShapeDtypeStruct((edge, edge), jnp.float32)] * MATRICES
    make = coloured_gradients(matrices)
    gradients = jnp.stack([jnp.stack(make(i)) for i in range(HISTORY)])
    stack = repeated_factors(count, edge)
    timed = timed_programs(stack)
    updates = update_programs(gradients)
    compiled = compile_all(timed | updates, recorder.left())

    @functools.cache
    def update(label: str) -> np.ndarray:
        return np.asarray(ready(compiled[label])(gradients), np.float64)

    for label in updates:
        stage, _, name = label.removeprefix("update ").partition(" in ")

        def measure(label: str = label, stage: str = stage, name: str = name) -> dict[str, Any]:
            program = ready(compiled[f"{stage} in {name}"])
            seconds = seconds_per_call(
                lambda _: program(stack), rounds=sizes.rounds, calls=sizes.calls
            )
            cosine = _least_cosine(update(label), update(f"update {stage} in {BASE}"))
            figures = {"stage": stage, "precision": name, "seconds": seconds, "cosine": cosine}
            if stage == "roots":
                figures |= {"passed": int(jnp.sum(program(stack)[1])), "of": len(stack)}
            return figures

        recorder.attempt("trials", label.removeprefix("update "), measure)
    recorder.attempt("reference", BASE, lambda: _against_float64(gradients))


def timed_programs(stack: jax.Array) -> dict[str, Program]:
    """Statistics, application and roots of a whole stack in every arithmetic."""
    programs = {}
    for name in PRECISIONS:
        times = product(name)
        programs[f"statistics in {name}"] = Program(lambda g, t=times: _grams(g, t), (stack,))
        programs[f"application in {name}"] = Program(lambda g, t=times: t(t(g, g), g), (stack,))
    for name, roots in candidates.precise_roots().items():
        programs[f"roots in {name}"] = Program(lambda a, r=roots: r(a, EXPONENT), (stack,))
    return programs


def update_programs(gradients: jax.Array) -> dict[str, Program]:
    """The update of Shampoo with one stage in each arithmetic and the others in float32."""
    full, roots = product(BASE), candidates.precise_roots()
    struct = (jax.ShapeDtypeStruct(gradients.shape, gradients.dtype),)
    programs = {}
    for name in PRECISIONS:
        other = product(name)
        programs[f"update statistics in {name}"] = (other, roots[BASE], full)
        programs[f"update application in {name}"] = (full, roots[BASE], other)
    for name in roots:
        programs[f"update roots in {name}"] = (full, roots[name], full)
    return {
        label: Program(lambda g, p=parts: shampoo_update(g, *p), struct)
        for label, parts in programs.items()
    }


def shampoo_update(gradients: jax.Array, grams: Any, roots: Roots, apply: Any) -> jax.Array:
    """`L^(-1/4) M R^(-1/4)` after all gradients `[steps, n, d, d]`, averaged with 0.9.

    Args:
        gradients: In order.
        grams: Product for the statistics.
        roots: Solver.
        apply: Product for the application.
    """

    def add(averages: Any, g: jax.Array) -> tuple[Any, None]:
        new = (g, *_grams(g, grams))
        return [DECAY * a + (1 - DECAY) * b for a, b in zip(averages, new, strict=True)], None

    start = [jnp.zeros(gradients.shape[1:])] * 3
    (momentum, left, right), _ = jax.lax.scan(add, start, gradients)
    both = roots(jnp.concatenate([left, right]), EXPONENT)[0]
    return apply(apply(both[: len(left)], momentum), both[len(left) :])


def _grams(g: jax.Array, times: Any) -> tuple[jax.Array, jax.Array]:
    turned = g.swapaxes(1, 2)
    return times(g, turned), times(turned, g)


def _least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2))
    return float(np.min(np.sum(a * b, axis=(1, 2)) / norms))


def _against_float64(gradients: jax.Array) -> dict[str, float]:
    """The float32 roots' update of the first matrix against float64 truncated roots."""
    roots = jax.jit(candidates.precise_roots()[BASE], static_argnums=1)
    cosines = update_cosines(
        np.asarray(gradients[:, 0]),
        lambda factors, exponent: np.asarray(roots(jnp.asarray(factors), exponent)[0]),
        last=1,
    )
    return {"cosine": float(cosines.min())}
