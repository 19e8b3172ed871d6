"""Inverse roots of whole stacks at every step: those of GPT-2 124M, and those of DASH's model."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from scripts.benchmarking.gradients import coloured_factors
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
from scripts.maintenance.device.step import complete, timed

# Different factors of an edge; a stack repeats them, since no solver here shares work among them.
DIFFERENT = 4
STACKS = {"GPT-2 124M": "stacks", "DASH": "dash_factors"}


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Measures the part."""
    del part, carried
    stacks = {"GPT-2 124M": sizes.stacks, "DASH": sizes.dash_factors()}
    edges = sorted({edge for shapes in stacks.values() for _, edge in shapes})
    factors = {edge: coloured_factors(DIFFERENT, edge) for edge in edges}
    solvers = candidates.solvers()
    programs: dict[str, Program] = {}
    for name, roots in solvers.items():
        for model, shapes in stacks.items():
            structs = [jax.ShapeDtypeStruct((n, d, d), jnp.float32) for n, d in shapes]
            # Thousands of milliseconds a call, and no figure to compare it with.
            if name != "eigh" or model != "DASH":
                programs[f"{name}, {model}"] = Program(_all_roots(roots), (structs,))
    steps = {name: complete(candidates.dash_step(sizes, name)) for name in list(solvers)[:2]}
    params = {
        str(i): jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(sizes.dash)
    }
    programs |= {
        f"step, {name}": Program(step, (params, jax.eval_shape(init, params), params), (0, 1))
        for name, (init, step) in steps.items()
    }
    compiled = compile_all(programs, recorder.left())
    _record_roots(recorder, sizes, stacks, factors, compiled)
    for name, (init, _) in steps.items():
        arguments = (compiled[f"step, {name}"], init, params)
        recorder.attempt("dash_step", name, lambda a=arguments: _dash(sizes, *a))


def _record_roots(
    recorder: Recorder, sizes: Sizes, stacks: Any, factors: Any, compiled: dict[str, Compiled]
) -> None:
    for model, shapes in stacks.items():
        repeats = [(jnp.tile(factors[d], (-(-n // DIFFERENT), 1, 1))[:n]) for n, d in shapes]
        for name in candidates.solvers():
            label = f"{name}, {model}"
            if label in compiled:

                def measure(label: str = label, repeats: Any = repeats) -> dict[str, Any]:
                    return _time(compiled[label], repeats, sizes, slow=label.startswith("eigh"))

                recorder.attempt("roots", label, measure)


def _all_roots(roots: candidates.Roots) -> Any:
    def every(stacks: list[Any]) -> Any:
        return [roots(stack, candidates.EXPONENT) for stack in stacks]

    return every


def _time(compiled: Compiled, stacks: list[Any], sizes: Sizes, *, slow: bool) -> dict[str, Any]:
    call = ready(compiled)
    good = [int(jnp.sum(good)) for _, good in call(stacks)]
    times = 1 if slow else sizes.rounds
    seconds = seconds_per_call(
        lambda _: call(stacks),
        rounds=times,
        calls=1 if slow else sizes.calls,
        warmup=0 if slow else 2,
    )
    return {
        "seconds": seconds,
        "stacks": [f"{len(s)} x {s.shape[-1]}^2" for s in stacks],
        "good": sum(good),
        "factors": sum(len(s) for s in stacks),
        **compiled.costs,
    }


def _dash(sizes: Sizes, compiled: Compiled, init: Any, params: Any) -> dict[str, float]:
    """The whole step on the first device's blocks; DASH's exchanges have no counterpart here."""
    key = jax.random.key(0, impl="rbg")
    gradients = [
        {
            name: jax.random.normal(jax.random.fold_in(key, 10 * i + j), s.shape, s.dtype)
            for j, (name, s) in enumerate(params.items())
        }
        for i in range(2)
    ]
    return {"seconds": timed(compiled, init, params, gradients, sizes), **compiled.costs}
