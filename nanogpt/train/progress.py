"""Everything a run says about itself, to metrics.jsonl and to the screen."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
import rich.console

from data_pipeline import Baselines
from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import eta, matrices_schedule
from nanogpt.train.clock import StepClock
from nanogpt.train.devices import seconds_at_peak
from nanogpt.train.metrics import MetricsWriter, Progress, keep_before
from nanogpt.train.provenance import peak_memory_bytes, provenance
from nanogpt.train.record_log import RecordLog
from nanogpt.train.sinks import Sink, open_sinks
from nanogpt.train.train_step import TrainState


class Report:
    """Writes the records of one process's share of a run.

    Args:
        config: the run.
        path: metrics.jsonl; records from update `resumed` on are cut, all if that is None.
        resumed: updates done by earlier processes, None for a fresh run.
        identity: what the losses are about, see `nanogpt.train.batches.RunData`.
        baselines: losses to compare with, see `nanogpt.train.batches.RunData`.
        record: the log in the benchmark's layout, where this process writes one.
        console: where progress is shown; standard output by default.
    """

    def __init__(
        self,
        config: Config,
        path: pathlib.Path,
        resumed: int | None,
        *,
        identity: Mapping[str, str | None],
        baselines: Baselines | None,
        record: RecordLog | None = None,
        console: rich.console.Console | None = None,
    ):
        self._config, self._baselines, self._resumed = config, baselines, resumed
        self._record, self._identity = record, identity
        self._tokens = config.data.batch_rows * config.model.sequence_length
        self._val_loss, self._skipped = math.nan, 0
        if resumed is None:
            path.unlink(missing_ok=True)
        else:
            keep_before(path, resumed, dataclasses.asdict(config))
        self._sinks: list[Sink] = [MetricsWriter(path)]
        if jax.process_index() == 0:
            self._sinks += open_sinks(config, resumed)
        steps, rate = np.arange(config.schedule.steps), config.matrices.learning_rate
        self._rates = rate * np.asarray(eta(steps, matrices_schedule(config), rate))
        device = jax.devices()[0]
        self._at_peak = seconds_at_peak(config, device.device_kind, jax.device_count())
        self._progress = Progress(config.name, config.schedule.steps, resumed or 0, console)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(*exception)
        for sink in self._sinks:
            sink.close()

    def start(self, state: TrainState) -> None:
        """Writes what the run is: the record "start", or "resume" for a later process."""
        if self._resumed is not None:
            self._write("resume", step=self._resumed, **provenance())
            return
        self._write(
            "start",
            config=dataclasses.asdict(self._config),
            fingerprint=dict(self._identity),
            **provenance(),
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            optimizer_state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
            baselines=dataclasses.asdict(self._baselines) if self._baselines else {},
        )

    def note(self, message: str) -> None:
        """Shows a line that is about the whole run."""
        self._progress.note(message)

    def compiled(self, seconds: float) -> None:
        """Shows the seconds spent on compiling, which no other figure includes."""
        self._progress.note(f"compiled in {seconds:.1f} s")

    def step(self, step: int, metrics: dict[str, jax.Array], clock: StepClock) -> None:
        """Reports a finished step; writes a record every log_every steps.

        Args:
            step: updates before this one.
            metrics: the step's, see `nanogpt.train.train_step.make_train_step`.
            clock: its last lap is this step.
        """
        last, every = clock.recent(1), self._config.output.log_every
        self._skipped = int(metrics["skipped"])
        self._progress.advance(step, self._figures(step, metrics, last))
        if step % every == 0 or step + 1 == self._config.schedule.steps:
            figures = self._figures(step, metrics, clock.recent(every))
            self._write("train", step=step, grad_norm=float(metrics["grad_norm"]), **figures)
            self._progress.log(step, figures)

    def _figures(self, step: int, metrics: dict[str, jax.Array], seconds: float) -> dict[str, Any]:
        """What is shown and recorded of a step that took so many seconds."""
        return {
            "loss": float(metrics["loss"]),
            "learning_rate": float(self._rates[step]),
            "tokens_per_s": self._tokens / seconds,
            "step_time_s": seconds,
            "mfu": self._at_peak and self._at_peak / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped": self._skipped,
            "eta_s": (self._config.schedule.steps - step - 1) * seconds,
        }

    def validation(self, step: int, loss: float, clock: StepClock) -> None:
        """Writes the validation loss (nats per token) before update `step`."""
        self._val_loss = loss
        bits = self._bits_per_byte(loss)
        self._write("val", step=step, loss=loss, train_time_s=clock.elapsed, **bits)
        if self._record is not None:
            self._record.validation(step, loss, clock.elapsed)
        shown = f", {bits['bits_per_byte']:.4f} bits per byte" if bits else ""
        self._progress.note(f"step {step}: validation loss {loss:.5f} nats per token{shown}")

    def end(self, compile_s: float, clock: StepClock) -> None:
        """Writes the last record; `train_time_s` counts earlier processes, the rest this one."""
        median = clock.median()
        self._write(
            "end",
            step=self._config.schedule.steps,
            loss=self._val_loss,
            **self._bits_per_byte(self._val_loss),
            train_time_s=clock.elapsed,
            skipped=self._skipped,
            median_step_time_s=median,
            tokens_per_s=median and self._tokens / median,
            compile_s=compile_s,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _write(self, kind: str, **fields: Any) -> None:
        for sink in self._sinks:
            sink.write(kind, **fields)

    def _bits_per_byte(self, loss: float) -> dict[str, Any]:
        """The same loss in the unit that does not depend on the tokenizer, where it is known."""
        return {"bits_per_byte": self._baselines.bits_per_byte(loss)} if self._baselines else {}
