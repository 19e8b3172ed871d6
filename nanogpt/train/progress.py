"""Everything a run says about itself, to metrics.jsonl, to the screen and wherever else."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import numpy as np
import rich.console

from nanogpt.config.run import Config
from nanogpt.optimizers.schedules import eta, matrices_schedule
from nanogpt.train.batches import RunData
from nanogpt.train.clock import StepClock
from nanogpt.train.devices import seconds_at_peak
from nanogpt.train.metrics import MetricsWriter, Progress, keep_before
from nanogpt.train.provenance import peak_memory_bytes, provenance
from nanogpt.train.record_log import RecordLog
from nanogpt.train.run_folder import RunFolder
from nanogpt.train.sinks import Sink, open_sinks
from nanogpt.train.train_step import TrainState


class Report:
    """Writes the records of one process's share of a run.

    Args:
        config: the run.
        data: what it reads.
        folder: where it writes; records from update `resumed` on are cut, all if that is None.
        resumed: updates done by earlier processes, None for a fresh run.
        source: the code as it was when the run started, see `nanogpt.train.record_log`.
        console: where progress is shown.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        folder: RunFolder,
        resumed: int | None,
        source: str,
        console: rich.console.Console,
    ):
        self._config, self._data, self._resumed = config, data, resumed
        self._tokens = config.data.batch_rows * config.model.sequence_length
        self._val_loss, self._skipped = math.nan, 0
        if resumed is None:
            folder.metrics.unlink(missing_ok=True)
        else:
            keep_before(folder.metrics, resumed, dataclasses.asdict(config))
        self._sinks: list[Sink] = [MetricsWriter(folder.metrics)]
        if jax.process_index() == 0:
            self._sinks += [RecordLog(folder.record, config, source, resumed)]
            self._sinks += open_sinks(config, resumed)
        steps, rate = np.arange(config.schedule.steps), config.matrices.learning_rate
        self._rates = rate * np.asarray(eta(steps, matrices_schedule(config), rate))
        device = jax.devices()[0]
        self._refreshed: int | None = None
        self._at_peak = seconds_at_peak(config, device.device_kind, jax.device_count())
        self._progress = Progress(config.name, config.schedule.steps, resumed or 0, console)
        self._sinks += [self._progress]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for sink in reversed(self._sinks):
            sink.close()

    def start(self, state: TrainState, compile_s: float, damaged: Sequence[str] = ()) -> None:
        """Writes what the run is: the record "start", or "resume" for a later process.

        Args:
            state: before the first step.
            compile_s: seconds spent on compiling, which no other figure includes.
            damaged: what was wrong with newer checkpoints that a resume has passed over.
        """
        self._skipped = int(state.opt_state.total_notfinite)
        if self._resumed is not None:
            self._write("resume", step=self._resumed, damaged=list(damaged), **provenance())
        else:
            baselines = self._data.baselines
            self._write(
                "start",
                config=dataclasses.asdict(self._config),
                fingerprint=dict(self._data.identity),
                **provenance(),
                parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                optimizer_state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
                baselines=dataclasses.asdict(baselines) if baselines else {},
            )
        for note in (*self._data.notes, f"compiled in {compile_s:.1f} s"):
            self._progress.note(note)

    def step(self, step: int, metrics: dict[str, jax.Array], clock: StepClock) -> None:
        """Reports a finished step; writes a record every log_every steps.

        Args:
            step: updates before this one.
            metrics: the step's, see `nanogpt.train.train_step.make_train_step`.
            clock: its last lap is this step.
        """
        every, steps = self._config.output.log_every, self._config.schedule.steps
        seconds, self._skipped = clock.recent(every), int(metrics["skipped"])
        figures = {
            "loss": float(metrics["loss"]),
            "learning_rate": float(self._rates[step]),
            "tokens_per_s": self._tokens / seconds,
            "step_time_s": seconds,
            "mfu": self._at_peak and self._at_peak / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped": self._skipped,
            "eta_s": (steps - step - 1) * seconds,
        }
        if "refreshed" in metrics:
            figures["refreshed"] = self._refreshed = int(metrics["refreshed"])
        self._progress.advance(step, figures)
        if step % every == 0 or step + 1 == steps:
            self._write("train", step=step, grad_norm=float(metrics["grad_norm"]), **figures)
        if int(metrics["skipped_in_a_row"]) >= self._config.nonfinite_limit:
            self._write("diverged", step=step, skipped=self._skipped)

    def spectra(self, step: int, matrices: dict[str, Any]) -> None:
        """Writes what `nanogpt.train.spectra` read after update `step`."""
        self._write("spectra", step=step, matrices=matrices)

    def validation(self, step: int, loss: float, clock: StepClock) -> None:
        """Writes the validation loss (nats per token) before update `step`."""
        self._val_loss = loss
        self._write("val", step=step, loss=loss, train_time_s=clock.elapsed, **self._bits(loss))

    def saved(self, step: int, seconds: float) -> None:
        """Writes how long training waited for a checkpoint of `step` updates to be begun."""
        self._write("save", step=step, save_blocked_s=seconds)

    def end(self, compile_s: float, clock: StepClock) -> None:
        """Writes the last record; `train_time_s` counts earlier processes, the rest this one."""
        median = clock.median()
        self._write(
            "end",
            step=self._config.schedule.steps,
            loss=self._val_loss,
            **self._bits(self._val_loss),
            train_time_s=clock.elapsed,
            skipped=self._skipped,
            median_step_time_s=median,
            tokens_per_s=median and self._tokens / median,
            compile_s=compile_s,
            peak_memory_bytes=peak_memory_bytes(),
            **({} if self._refreshed is None else {"refreshed": self._refreshed}),
        )

    def _write(self, kind: str, **fields: Any) -> None:
        for sink in self._sinks:
            sink.write(kind, **fields)

    def _bits(self, loss: float) -> dict[str, Any]:
        """The same loss in the unit that does not depend on the tokenizer, where it is known."""
        baselines = self._data.baselines
        return {"bits_per_byte": baselines.bits_per_byte(loss)} if baselines else {}
