"""Trials that share one compiled program: those that differ in seed and in rates.

Rates are two numbers: that of the matrices, and a factor of all others.

A run of a second or two costs ten times as much when every learning rate is a program of its own.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanogpt.config.run import Config
from nanogpt.lab.trials import Trial
from nanogpt.optimizers.build import build_optimizer
from nanogpt.optimizers.transfer import RATES
from nanogpt.train.batches import open_data
from nanogpt.train.metrics import Record
from nanogpt.train.provenance import provenance
from nanogpt.train.train_step import (
    TrainState,
    abstract_params,
    draw_params,
    make_eval_step,
    make_train_step,
    model_structure,
)
from shampoo_jax import eval_params

Build = Callable[..., optax.GradientTransformationExtraArgs]


def run_shared(trial: Trial, build: Build = build_optimizer) -> Record:
    """Trains one trial whole in one call on the device; `nanogpt.lab.trials.run_trials` takes it.

    Numbers are those of `nanogpt train` but for rounding. No checkpoints and no curve; a trial that
    was stopped starts again.

    Args:
        trial: the run.
        build: makes the optimizer, as `build_optimizer` does.

    Returns:
        A record like that of `nanogpt.lab.trials.run_trial`, without curve. Its time of a step
        holds the one validation, and compiling where the trial is the first of its program.
    """
    config = trial.config
    rates = config.matrices.learning_rate, config.auxiliary.embed_learning_rate
    program, batches = _program(_at_rate_one(config), build), _batches(config)
    begin = time.perf_counter()
    told = program(jax.random.key(config.seed), *batches, rates)
    first, last, skipped = (float(told[name]) for name in ("first", "last", "skipped_in_a_row"))
    seconds = time.perf_counter() - begin
    diverged = not last <= first or skipped >= config.nonfinite_limit
    return {
        "name": config.name,
        "settings": trial.settings,
        "seed": config.seed,
        "status": "diverged" if diverged else "finished",
        "loss": last if math.isfinite(last) else None,
        "step_time_s": seconds / config.schedule.steps,
        "start": _start(_at_rate_one(config), build),
        "end": {"refreshed": int(told["refreshed"])} if "refreshed" in told else {},
    }


@functools.lru_cache(maxsize=1)
def _start(config: Config, build: Build) -> dict[str, Any]:
    """What tables ask of a run's first record."""
    data = open_data(config)
    data.training.close()
    params = abstract_params(config.model)
    state = jax.eval_shape(build(config, params).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    told = provenance()
    return {
        "host": told["host"],
        "device": told["device"],
        "fingerprint": data.identity,
        "optimizer_state_bytes": size,
    }


def _at_rate_one(config: Config) -> Config:
    """The run with rates over those of `run_shared`; what no number depends on is left out."""

    def over(settings: Any, own: str) -> Any:
        names = [name for name in RATES if hasattr(settings, name)]
        rates = {n: getattr(settings, n) / getattr(settings, own) for n in names}
        return dataclasses.replace(settings, **{n: float(f"{x:.12g}") for n, x in rates.items()})

    return dataclasses.replace(
        config,
        name="shared",
        seed=0,
        data=dataclasses.replace(config.data, seed=0),
        matrices=over(config.matrices, "learning_rate"),
        auxiliary=over(config.auxiliary, "embed_learning_rate"),
    )


@functools.lru_cache(maxsize=4)  # as many may take turns
def _program(config: Config, build: Build) -> Callable[..., dict[str, jax.Array]]:
    """Function (key, batches, validation batches, rates) -> first and last loss, and metrics."""
    structure = model_structure(config.model)
    evaluate = make_eval_step(structure, config)

    @jax.jit
    def run(key, batches, scored, rates):
        tx = build(config, abstract_params(config.model), factors=rates)
        params = draw_params(config.model, key)
        state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
        state, told = jax.lax.scan(make_train_step(structure, tx, config), state, batches)
        averaged = config.tail or config.lookahead
        weights = eval_params(state.opt_state, state.params) if averaged else state.params
        sums = jax.lax.map(lambda batch: evaluate(weights, batch, state.step), scored)
        loss = sums.sum() / scored["targets"].size
        counts = {name: x.max() for name, x in told.items() if name not in ("loss", "grad_norm")}
        return counts | {"first": told["loss"][0], "last": loss}

    return run


@functools.lru_cache(maxsize=4)
def _read(config: Config) -> tuple[Any, Any]:
    data = open_data(config)
    training = [batch for _, batch in zip(range(config.schedule.steps), data.training)]  # noqa: B905
    data.training.close()
    stack = lambda found: jax.tree.map(lambda *x: np.stack(x), *found)  # noqa: E731
    return stack(training), stack(list(data.validation()))


def _batches(config: Config) -> tuple[Any, Any]:
    """All training and all validation batches of a run, stacked."""
    plain = _at_rate_one(config)
    return _read(dataclasses.replace(plain, data=config.data))
