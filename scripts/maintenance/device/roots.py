"""Inverse roots of whole stacks at every step: those of GPT-2 124M, and those of DASH's model."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts.maintenance.device import candidates
from scripts.maintenance.device.measure import (
    Compiled,
    Program,
    compile_all,
    ready,
    seconds_per_call,
)
from scripts.maintenance.device.records import Recorder
from scripts.maintenance.device.sizes import Sizes
from scripts.maintenance.device.step import programs_of, stepping, time_step

Stacks = tuple[tuple[int, int], ...]
# Different factors of an edge; a stack repeats them, since no solver here shares work among them.
DIFFERENT = 4


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Measures the part."""
    del part, carried
    stacks = {"GPT-2 124M": sizes.stacks, "DASH": sizes.dash_factors()}
    compiled = compile_all(_root_programs(stacks), recorder.left())
    for model, shapes in stacks.items():
        factors = [repeated_factors(count, edge) for count, edge in shapes]
        for name in candidates.solvers():
            label = f"{name}, {model}"
            if label in compiled:
                recorder.attempt(
                    "roots", label, lambda x=label, f=factors: _time(compiled[x], f, sizes)
                )
    _record_dash(recorder, sizes)


def _record_dash(recorder: Recorder, sizes: Sizes) -> None:
    """Whole steps on DASH's blocks; compiled after the roots are timed, since it takes longest."""
    steps = {
        f"step by {name}": stepping(candidates.dash_step(sizes, name), _dash_params(sizes))
        for name in ("polynomial", "polynomial_clip")
    }
    compiled = compile_all(programs_of(steps), recorder.left())
    gradients = _dash_gradients(sizes)
    for key in steps:
        recorder.attempt("dash_step", key, lambda k=key: time_step(compiled, k, gradients, sizes))


def repeated_factors(count: int, edge: int) -> jax.Array:
    """Averages of Gram matrices with spectra that fall like `i^-1.5`, `[count, edge, edge]`."""
    random = np.random.default_rng(edge)
    strength = np.arange(1, edge + 1) ** -0.75
    frames = random.normal(size=(DIFFERENT, edge, edge)).astype(np.float32) * strength
    grams = (frames @ frames.swapaxes(1, 2)).astype(np.float32)
    return jnp.tile(grams, (-(-count // DIFFERENT), 1, 1))[:count]


def _root_programs(stacks: dict[str, Stacks]) -> dict[str, Program]:
    programs = {}
    for name, roots in candidates.solvers().items():
        for model, shapes in stacks.items():
            structs = [jax.ShapeDtypeStruct((n, d, d), jnp.float32) for n, d in shapes]
            # eigh of DASH's stack takes seconds, and there is no figure to compare it with.
            if name != "eigh" or model != "DASH":
                programs[f"{name}, {model}"] = Program(_all_roots(roots), (structs,))
    return programs


def _all_roots(roots: candidates.Roots) -> Any:
    def every(stacks: list[Any]) -> Any:
        return [roots(stack, candidates.EXPONENT) for stack in stacks]

    return every


def _time(compiled: Compiled, stacks: list[Any], sizes: Sizes) -> dict[str, Any]:
    call = ready(compiled)
    seconds = seconds_per_call(lambda _: call(stacks), rounds=sizes.rounds, calls=sizes.calls)
    return {
        "seconds": seconds,
        "stacks": [f"{len(s)} x {s.shape[-1]}^2" for s in stacks],
        "passed": sum(int(jnp.sum(good)) for _, good in call(stacks)),
        "factors": sum(len(s) for s in stacks),
        **compiled.costs,
    }


def _dash_params(sizes: Sizes) -> dict[str, Any]:
    """The first device's gradients, stacked by shape; the exchanges have no counterpart here."""
    return {str(i): jax.ShapeDtypeStruct(s, jnp.float32) for i, s in enumerate(sizes.dash)}


def _dash_gradients(sizes: Sizes) -> list[dict[str, jax.Array]]:
    key = jax.random.key(0, impl="rbg")
    return [
        {
            name: jax.random.normal(jax.random.fold_in(key, 10 * i + j), s.shape, s.dtype)
            for j, (name, s) in enumerate(_dash_params(sizes).items())
        }
        for i in range(2)
    ]
