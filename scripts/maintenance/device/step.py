"""The optimizer's step on the matrices of a GPT, split into parts, beside the model's own step."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.optimizers.flops import model_flops
from nanogpt.train.train_step import init_state, make_train_step, model_structure
from scripts.maintenance.benchmarking.candidates import Candidate
from scripts.maintenance.benchmarking.gradients import coloured_gradients
from scripts.maintenance.compile_size import gpt2_matrices
from scripts.maintenance.device import candidates
from scripts.maintenance.device.measure import (
    Compiled,
    Program,
    compile_all,
    on_gpu,
    ready,
    seconds_per_call,
)
from scripts.maintenance.device.records import Recorder
from scripts.maintenance.device.sizes import Sizes

# Different gradients that take turns; each is as large as the matrices.
GRADIENTS = 3
MODEL = "forward and backward"


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Measures the part."""
    del part, carried
    params = gpt2_matrices(sizes.layers, sizes.width)
    steps = Steps(recorder, sizes, params)
    first, *others = candidates.step_groups(sizes)
    steps.measure(first, with_model=True)
    for group in others:
        steps.measure(group)


class Stepping(NamedTuple):
    """Two programs: parameters and state to begin with, and a step that consumes them."""

    init: Program
    step: Program


def stepping(tx: optax.GradientTransformation, params: Any) -> Stepping:
    """Programs of a whole step of the matrices: the direction, decay, rate, and the sum."""
    whole = optax.chain(tx, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))

    def init() -> tuple[Any, Any]:
        start = jax.tree.map(lambda s: jnp.full(s.shape, 0.02, s.dtype), params)
        return start, whole.init(start)

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = whole.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return Stepping(Program(init, ()), Program(step, (*jax.eval_shape(init), params), (0, 1)))


def time_step(
    compiled: dict[str, Compiled], key: str, gradients: list[Any], sizes: Sizes, every: int = 1
) -> dict[str, float]:
    """Seconds of a step on gradients that take turns, and XLA's accounts of it.

    Args:
        compiled: Its programs as `key` and as "init of `key`".
        key: Of the step.
        gradients: Trees of arrays.
        sizes: For how often.
        every: Steps between refreshes.
    """
    held = list(ready(compiled[f"init of {key}"])())
    step = ready(compiled[key])

    def once(i: int) -> Any:
        held[:] = step(*held, gradients[i % len(gradients)])
        return held

    times = {"rounds": sizes.rounds, "calls": sizes.calls, "period": every}
    return {"step_s": seconds_per_call(once, **times), **compiled[key].costs}


def programs_of(steppings: dict[str, Stepping]) -> dict[str, Program]:
    """All programs by name, as `time_step` looks them up."""
    inits = {f"init of {key}": both.init for key, both in steppings.items()}
    return inits | {key: both.step for key, both in steppings.items()}


class Steps:
    """Times candidates on one set of matrices; a stage that several share is timed once.

    Args:
        recorder: Of the part.
        sizes: Of the measurement.
        params: Shape structs of the matrices.
    """

    def __init__(self, recorder: Recorder, sizes: Sizes, params: Any):
        self._recorder, self._sizes, self._params = recorder, sizes, params
        make = coloured_gradients(params)
        self._gradients = [make(i) for i in range(GRADIENTS)]
        self._known: dict[str, dict[str, float]] = {}

    def measure(self, group: tuple[Candidate, ...], *, with_model: bool = False) -> None:
        """Compiles all new stages of a group, and records its candidates."""
        if self._recorder.left() <= 0:
            for candidate in group:
                self._recorder.add("steps", name=candidate.name, error="the part's time was over")
            return
        stages = {s.key: s for c in group for s in c.stages if s.key not in self._known}
        new = {key: stepping(stage.build(), self._params) for key, stage in stages.items()}
        programs = programs_of(new) | (model_programs(self._sizes) if with_model else {})
        compiled = compile_all(programs, self._recorder.left())
        if with_model:
            self._recorder.attempt("model", MODEL, lambda: time_model(compiled, self._sizes))
        for candidate in group:
            self._recorder.attempt(
                "steps", candidate.name, lambda c=candidate: self._record(c, compiled)
            )

    def _record(self, candidate: Candidate, compiled: dict[str, Compiled]) -> dict[str, Any]:
        """Times the stages that are new; the parts are differences of neighbouring ones."""
        record: dict[str, Any] = {"every": candidate.every}
        before = 0.0
        for stage in candidate.stages:
            if stage.key not in self._known:
                arguments = (compiled, stage.key, self._gradients, self._sizes, candidate.every)
                self._known[stage.key] = time_step(*arguments)
            seconds = self._known[stage.key]["step_s"]
            record[stage.part] = seconds - before
            before = seconds
        return record | self._known[candidate.stages[-1].key]


def model_programs(sizes: Sizes) -> dict[str, Program]:
    """Forward and backward pass of a step's tokens; gradients are averaged and thrown away."""
    config = candidates.timed_config(sizes, bfloat16=on_gpu())
    tx = optax.set_to_zero()
    step = make_train_step(model_structure(config.model), tx, config)

    def init() -> Any:
        return init_state(config, tx)[1]

    rows = jax.ShapeDtypeStruct((sizes.rows, sizes.length), jnp.int32)
    batch = {"inputs": rows, "targets": rows}
    state = jax.eval_shape(init)
    return {f"init of {MODEL}": Program(init, ()), MODEL: Program(step, (state, batch), (0,))}


def time_model(compiled: dict[str, Compiled], sizes: Sizes) -> dict[str, float]:
    """Seconds of forward and backward pass, and its operations by formula."""
    held, step = [ready(compiled[f"init of {MODEL}"])()], ready(compiled[MODEL])
    shape = (sizes.rows, sizes.length)
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, shape).astype(np.int32)
    batch = jax.device_put({"inputs": tokens, "targets": tokens})

    def once(_: int) -> Any:
        held[0], metrics = step(held[0], batch)
        return metrics

    seconds = seconds_per_call(once, rounds=sizes.rounds, calls=2)
    config = candidates.timed_config(sizes, bfloat16=on_gpu())
    return {
        "tokens": tokens.size,
        "seconds": seconds,
        "flops": model_flops(config.model, tokens.size),
        **compiled[MODEL].costs,
    }
