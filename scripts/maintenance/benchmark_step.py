"""Times optimizer steps on the matrices of a GPT: Shampoo by solver and interval, and the others.

    python -m scripts.maintenance.benchmark_step --preset tiny

Every optimizer takes the same gradients, new at every step, and also decays and applies its
updates. A step is timed to its end, with its state donated; its figure is the median over rounds of
the mean over one refresh interval. The split into parts is by differences of programs, see
`scripts.maintenance.benchmarking.candidates`; Muon's "roots" are its orthogonalization, SOAP's its
bases. An optimizer that fails is recorded with its error. results.json is written after every
optimizer, table.md and steps.png at the end.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from nanogpt.config.presets import preset
from nanogpt.config.run import ModelConfig
from nanogpt.optimizers.build import route
from nanogpt.train.provenance import provenance
from nanogpt.train.train_step import abstract_params, init_state, make_train_step
from scripts.maintenance.benchmarking import report
from scripts.maintenance.benchmarking.candidates import Candidate, Stage, candidates, solver_names
from scripts.maintenance.benchmarking.costs import compile_function
from scripts.maintenance.benchmarking.gradients import coloured_gradients
from scripts.maintenance.benchmarking.reference import measure_reference
from scripts.maintenance.benchmarking.timing import time_calls
from scripts.maintenance.compile_size import gpt2_matrices

# Layers, width, head width, vocabulary, tokens in a row.
MODELS = {
    "track3": (12, 768, 128, 50304, 1024),
    "medium": (24, 1024, 128, 50304, 1024),  # 302M of 350M parameters in block matrices
    "1b": (20, 2048, 128, 50304, 1024),  # 1.0B in block matrices
    "layer": (1, 768, 128, 50304, 1024),  # one layer of track3
    "tiny": (1, 16, 8, 64, 8),  # to rehearse
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Times optimizer steps on the matrices of a GPT."""

    preset: Literal["track3", "medium", "1b", "layer", "tiny"] = "track3"  # whose matrices
    device: Literal["default", "cpu", "gpu", "tpu"] = "default"  # where; default: what jax prefers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and gradients
    optimizers: tuple[str, ...] = ()  # beginnings of names, as in: muon shampoo_eigh_1; (): all
    solvers: tuple[str, ...] = solver_names()  # of Shampoo's inverse roots
    intervals: tuple[int, ...] = (1, 5, 10)  # steps between refreshes
    block_size: int | None = 1024  # largest edge of a block; None: whole matrices
    tokens: int = 65536  # of a train step; 0: time the optimizers alone
    microbatch_rows: int = 16  # rows of a forward-backward pass of the train step
    rounds: int = 5  # measured refresh intervals; the figure is their median
    out: pathlib.Path = pathlib.Path("runs/benchmark_step")  # folder of the results
    against: str | None = None  # folder that holds Meta's distributed_shampoo, timed as well

    def __post_init__(self):
        unknown = set(self.solvers) - set(solver_names())
        if unknown:
            raise ValueError(f"solvers={sorted(unknown)}: choose from {', '.join(solver_names())}.")
        least = {"rounds": 1, "microbatch_rows": 1, "tokens": 0, "intervals": 1}
        for name, low in least.items():
            if np.min(getattr(self, name)) < low:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {low}.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    try:
        options = tyro.cli(
            Options,
            prog="python -m scripts.maintenance.benchmark_step",
            description=__doc__,
            args=arguments,
        )
        platform = None if options.device == "default" else options.device
        with jax.default_device(jax.devices(platform)[0]):
            result = run(options)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    table = report.table(result["optimizers"], report.COLUMNS)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    title = f"{options.preset}, {result['device']['kind']}, {options.dtype}"
    report.draw(options.out / "steps.png", result["optimizers"], title)
    print(f"{table}\n\nresults: {options.out}")


def run(options: Options) -> dict[str, Any]:
    """Measures everything that is asked for and writes results.json as it comes.

    Returns:
        {"options", "matrices", "model_s", "optimizers": [record, ...], "device", "versions", ...};
        a record has seconds ("step_s", "slowest_s", parts ...), XLA's accounts and ratios, or
        "error".
    """
    layers, width, *_ = MODELS[options.preset]
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, options.dtype), gpt2_matrices(layers, width)
    )
    # Folders of this machine tell a reader nothing.
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "against")}
    shapes = sorted({f"{x.shape[0]}x{x.shape[1]}" for x in jax.tree.leaves(params)})
    result = {"options": settings, "matrices": shapes, **provenance()}
    records: list[dict[str, Any]] = []
    if options.against is not None:
        records += [_reference(options, every) for every in options.intervals]
    result["model_s"] = model_s = _model_seconds(options) if options.tokens else None
    measure = Measure(params, options.rounds)
    for candidate in _chosen(options):
        print(candidate.name, flush=True)
        records.append(measure(candidate))
        result["optimizers"] = report.with_ratios(records, model_s)
        report.write_json(options.out / "results.json", result)
    return result


def _chosen(options: Options) -> list[Candidate]:
    every = list(candidates(options.solvers, options.intervals, options.block_size))
    names = [c.name for c in every]
    for start in options.optimizers:
        if not any(name.startswith(start) for name in names):
            raise ValueError(f"optimizers={start!r} begins none of {', '.join(names)}.")
    starts = options.optimizers or ("",)
    return [c for c in every if c.name.startswith(starts)]


def _reference(options: Options, every: int) -> dict[str, Any]:
    layers, width, *_ = MODELS[options.preset]
    gpu = jax.devices()[0].platform == "gpu" and options.device != "cpu"
    return measure_reference(
        str(options.against),
        {
            "layers": layers,
            "width": width,
            "every": every,
            "block_size": options.block_size,
            "rounds": options.rounds,
            "device": "cuda" if gpu else "cpu",
        },
    )


class Measure:
    """Times candidates on one set of matrices; a stage that several share is timed once.

    Args:
        params: Tree of shape structs.
        rounds: Refresh intervals that are measured.
    """

    def __init__(self, params: Any, rounds: int):
        self.params, self.rounds = params, rounds
        self.gradients = coloured_gradients(params)
        self.known: dict[str, dict[str, float]] = {}

    def __call__(self, candidate: Candidate) -> dict[str, Any]:
        """Returns the candidate's record."""
        record: dict[str, Any] = {"name": candidate.name, "every": candidate.every}
        try:
            figures = [self._stage(s, candidate) for s in candidate.stages]
        except Exception as error:  # one optimizer's failure must not cost the others' figures
            return record | {"error": str(error) or type(error).__name__}
        before = 0.0
        for stage, figure in zip(candidate.stages, figures, strict=True):
            record[stage.part] = figure["step_s"] - before
            before = figure["step_s"]
        return record | figures[-1]

    def _stage(self, stage: Stage, candidate: Candidate) -> dict[str, float]:
        if stage.key not in self.known:
            calls = candidate.every if stage is candidate.stages[-1] else 1
            self.known[stage.key] = self._time(stage.build(), calls)
        return self.known[stage.key]

    def _time(self, tx: optax.GradientTransformation, calls: int) -> dict[str, float]:
        tx = optax.chain(tx, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3))
        params = jax.tree.map(lambda s: jnp.full(s.shape, 0.02, s.dtype), self.params)
        state = jax.jit(tx.init)(params)
        held = [params, state]

        def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        compiled, costs = compile_function(step, *held, self.params, donate=(0, 1))

        def call(gradients: Any) -> None:
            held[:] = jax.block_until_ready(compiled(*held, gradients))

        del params, state  # the step consumes them
        times = time_calls(
            call, self.gradients, rounds=self.rounds, calls=calls, warmup=max(2, calls)
        )
        size = sum(x.nbytes for x in jax.tree.leaves(held[1]))
        return {**times.summary(), **costs, "state_bytes": size}


def _model_seconds(options: Options) -> float:
    """Seconds of a train step without the block matrices' optimizer: model, AdamW on the rest."""
    layers, width, head, vocabulary, length = MODELS[options.preset]
    default = preset("track3", "adamw")
    on_cpu = options.device == "cpu" or jax.default_backend() == "cpu"
    model = ModelConfig(
        vocabulary, layers, width, head, 4 * width, length, "float32" if on_cpu else "bfloat16"
    )
    rows = max(1, options.tokens // length)
    piece = max(d for d in range(1, min(rows, options.microbatch_rows) + 1) if rows % d == 0)
    data = dataclasses.replace(default.data, batch_rows=rows, microbatch_rows=piece)
    config = dataclasses.replace(default, model=model, data=data)
    groups = {name: optax.adamw(1e-3) for name in ("embed", "head", "vectors")}
    tx = optax.partition(groups | {"matrices": optax.set_to_zero()}, route(abstract_params(model)))
    graphdef, state = init_state(config, tx)
    held, step = [state], make_train_step(graphdef, tx, config)

    def prepare(i: int) -> Any:
        tokens = np.random.default_rng(i).integers(0, vocabulary, (rows, length)).astype(np.int32)
        return jax.device_put({"inputs": tokens, "targets": tokens})

    def call(batch: Any) -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held, metrics))

    del state
    return time_calls(call, prepare, rounds=options.rounds, warmup=2).summary()["step_s"]


if __name__ == "__main__":
    main()
