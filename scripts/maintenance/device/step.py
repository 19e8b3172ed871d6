"""The optimizer's step on the matrices of a GPT, split into parts, beside the model's own step."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.flops import model_flops
from nanogpt.train_step import init_state, make_train_step
from scripts.benchmarking.candidates import Candidate
from scripts.benchmarking.gradients import coloured_gradients
from scripts.compile_size import gpt2_matrices
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


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Measures the part."""
    del part, carried
    recorder.attempt("model", "forward and backward", lambda: _model(sizes))
    params = gpt2_matrices(sizes.layers, sizes.width)
    make = coloured_gradients(params)
    gradients = [make(i) for i in range(GRADIENTS)]
    steps = Steps(recorder, sizes, params, gradients)
    for group in candidates.step_groups(sizes):
        steps.measure(group)


def complete(tx: optax.GradientTransformation) -> Any:
    """A step of the matrices: the direction, decay, rate, and the sum."""
    whole = optax.chain(tx, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = whole.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return whole.init, step


def timed(compiled: Compiled, init: Any, params: Any, gradients: list[Any], sizes: Sizes) -> float:
    """Seconds of a compiled step, its state donated, on gradients that take turns."""
    call = ready(compiled)
    start = jax.tree.map(lambda s: jnp.full(s.shape, 0.02, s.dtype), params)
    held = [start, jax.jit(init)(start)]
    del start

    def once(i: int) -> Any:
        held[:] = call(*held, gradients[i % len(gradients)])
        return held

    return seconds_per_call(once, rounds=sizes.rounds, calls=sizes.calls)


class Steps:
    """Times candidates on one set of matrices; a stage that several share is timed once."""

    def __init__(self, recorder: Recorder, sizes: Sizes, params: Any, gradients: list[Any]):
        self.recorder, self.sizes = recorder, sizes
        self.params, self.gradients = params, gradients
        self.known: dict[str, dict[str, float]] = {}

    def measure(self, group: tuple[Candidate, ...]) -> None:
        """Compiles all new stages of a group, and records its candidates."""
        if self.recorder.left() <= 0:
            for candidate in group:
                self.recorder.add("steps", name=candidate.name, error="the part's time was over")
            return
        stages = {s.key: s for c in group for s in c.stages if s.key not in self.known}
        pairs = {key: complete(stage.build()) for key, stage in stages.items()}
        programs = {
            key: Program(
                step, (self.params, jax.eval_shape(init, self.params), self.params), (0, 1)
            )
            for key, (init, step) in pairs.items()
        }
        compiled = compile_all(programs, self.recorder.left())
        for candidate in group:
            self.recorder.attempt(
                "steps", candidate.name, lambda c=candidate: self._record(c, compiled, pairs)
            )

    def _record(self, candidate: Candidate, compiled: Any, pairs: Any) -> dict[str, Any]:
        """Times the stages that are new; the parts are differences of neighbouring ones."""
        before, record = 0.0, {"every": candidate.every}
        for stage in candidate.stages:
            if stage.key not in self.known:
                new = compiled[stage.key]
                arguments = (pairs[stage.key][0], self.params, self.gradients, self.sizes)
                self.known[stage.key] = {"step_s": timed(new, *arguments), **new.costs}
            figures = self.known[stage.key]
            record[stage.part] = figures["step_s"] - before
            before = figures["step_s"]
        return record | figures


def _model(sizes: Sizes) -> dict[str, float]:
    """Forward and backward pass of a step's tokens; gradients are averaged and thrown away."""
    config = candidates.timed_config(sizes, bfloat16=on_gpu())
    tx = optax.set_to_zero()
    graphdef, state = init_state(config, tx)
    step = make_train_step(graphdef, tx, config)
    shape = (sizes.rows, sizes.length)
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, shape).astype(np.int32)
    batch = jax.device_put({"inputs": tokens, "targets": tokens})
    held = [state]
    del state

    def once(_: int) -> Any:
        held[0], metrics = step(held[0], batch)
        return metrics

    seconds = seconds_per_call(once, rounds=sizes.rounds, calls=2)
    flops = model_flops(config.model, tokens.size)
    return {"tokens": tokens.size, "seconds": seconds, "flops": flops}
