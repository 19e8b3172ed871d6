"""The training loop: data in, metrics and checkpoints out."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import rich.console

from nanogpt.config.run import Config
from nanogpt.optimizers.build import build_optimizer
from nanogpt.train.ancestors import common_checkpoint, copy_run, read_params
from nanogpt.train.batches import RunData, batch_pattern, open_data, to_device
from nanogpt.train.checkpoint import Checkpoints
from nanogpt.train.clock import StepClock
from nanogpt.train.devices import check_attention
from nanogpt.train.distributed import agreed, largest_of_all
from nanogpt.train.interrupt import Interrupted, StopRequest, StopSignal, stop_request
from nanogpt.train.mesh import Layout, make_layout
from nanogpt.train.metrics import plain_console, read_records
from nanogpt.train.nonfinite import check_row
from nanogpt.train.paths import path_of
from nanogpt.train.progress import Report
from nanogpt.train.record_log import source_text
from nanogpt.train.run_folder import RunFolder
from nanogpt.train.sinks import check_sinks
from nanogpt.train.spectra import spectra_reader
from nanogpt.train.train_step import abstract_params, init_state, make_eval_step, make_train_step
from shampoo_jax import eval_params

TRACED = 3  # steps


def fit(
    config: Config,
    *,
    resume: bool | Literal["previous-good"] = False,
    overwrite: bool = False,
    console: rich.console.Console | None = None,
) -> dict[str, Any]:
    """Trains one model and leaves metrics.jsonl, record.txt and a checkpoint in its run folder.

    SIGINT, SIGTERM and SIGHUP stop it after the current step, with a checkpoint. Main thread only.

    Args:
        config: everything that decides the run's numbers.
        resume: go on from the newest checkpoint, with the same numbers as if never stopped;
            "previous-good": from the newest one whose files are what was saved.
        overwrite: delete an earlier run of the same name.
        console: where progress is shown; standard output by default.

    Returns:
        The last record of metrics.jsonl: final loss, times, memory.

    Raises:
        ShardError: bad shards, or fewer tokens than the run needs.
        FileExistsError: the folder holds a run, and neither resume nor overwrite is given.
        FileNotFoundError: resume, and the folder holds no run, or one without metrics.jsonl.
        ValueError: resume, and the saved run had other settings or data; or another process is at
            the same run.
        Interrupted: a signal stopped the run; its state is saved.
        StopSignal: a signal stopped it before its first step; nothing is written.
        DivergedError: too many steps in a row had a gradient that is not finite.
        JobFailedError: with several processes, instead of the others where one cannot start.
    """
    source = source_text()  # now: files may be edited while the run compiles
    with agreed("opening the data and the run's folder"):
        check_sinks(config)
        check_attention(config)
        data, folder = open_data(config), RunFolder(config, jax.process_index())
        folder.check(resume=bool(resume), overwrite=overwrite)
        layout = make_layout(config)
        folder.lock()
    if jax.process_index():
        console = rich.console.Console(quiet=True)
    console = console or plain_console()
    with contextlib.ExitStack() as resources:
        resources.enter_context(contextlib.closing(folder))
        stop = resources.enter_context(stop_request())
        # Not before signals are heard: who reads this may send one.
        console.print(f"{config.name}: {'resuming' if resume else 'compiling'} ...", markup=False)
        run = _Run(config, data, folder, layout, stop)
        resources.enter_context(contextlib.closing(run))
        if resume:
            for fault in run.go_to_newest(go_back=resume == "previous-good"):
                told = f"{config.name}: passed over, and moved to damaged/: {fault}"
                console.print(told, markup=False)
        if not (resume and run.finished()):
            if resume:
                console.print(f"{config.name}: compiling ...", markup=False)
            run.begin(resume=bool(resume), overwrite=overwrite)
            with Report(config, run.data, folder, run.saved, source, console) as report:
                run.train(report)
        return read_records(folder.metrics if folder.metrics.exists() else folder.first_metrics)[-1]


def validation_due(step: int, config: Config) -> bool:
    """Tells whether the loss is measured before update `step`; `steps` stands for the end.

    Every val_every steps while step / steps < 0.9, every val_every_final afterwards, at the end.
    """
    steps = config.schedule.steps
    every = config.val_every if step / steps < 0.9 else config.val_every_final
    return step == steps or step % every == 0


def _compiled(function: Callable, *arguments: Any) -> jax.stages.Compiled:
    return cast(jax.stages.Wrapped, function).lower(*arguments).compile()


def _seconds() -> float:
    """A clock that nobody sets."""
    return time.monotonic()


class _Run:
    """A run in this process: the training state and what reads and saves it."""

    def __init__(
        self,
        config: Config,
        data: RunData,
        folder: RunFolder,
        layout: Layout | None,
        stop: StopRequest,
    ):
        self.config, self.data, self.folder, self.stop = config, data, folder, stop
        self.layout = layout
        placement = None if layout is None else layout.placement
        self.optimizer = build_optimizer(config, abstract_params(config.model), placement)
        self.graphdef, self.state = init_state(config, self.optimizer, self.layout)
        self.checkpoints = Checkpoints(folder.checkpoints, config, data.fingerprint)
        self.saved: int | None = None
        self.damaged: list[str] = []
        self.validated: tuple[int, float] | None = None  # step and loss
        self.skipped = 0  # steps up to the last one that was settled
        self.common: int | None = None  # step of another run's checkpoint to go on from
        self.clock = StepClock(0.0)
        self.in_flight: tuple[int, dict[str, jax.Array]] | None = None
        self.trace, self.resources = contextlib.ExitStack(), contextlib.ExitStack()
        self.resources.callback(data.training.close)
        self.resources.callback(self.checkpoints.close)

    def go_to_newest(self, *, go_back: bool = False) -> list[str]:
        """Goes to the newest checkpoint, if there is one.

        Args:
            go_back: pass over those that are damaged, and move them aside.

        Returns:
            What is wrong with these.
        """
        self.saved, self.damaged = self.checkpoints.newest(go_back=go_back)
        if self.saved is not None:
            restored = self.checkpoints.restore(self.saved, self.state, self.data.training)
            self.state, seconds = restored
            self.clock = StepClock(seconds)
        if self.damaged:
            with agreed("moving damaged checkpoints aside"):
                if jax.process_index() == 0:
                    self.checkpoints.set_aside(self.saved)
        return self.damaged

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Compiles, and then makes the folder of a run that has no checkpoint yet.

        Not before: a run that is impossible, or stopped, must not cost an earlier one.
        """
        if self.saved is None:
            self._inherit()
        with agreed("compiling"):
            self.compile()
        if self.saved is not None:
            return
        if self.stopped(0):
            raise StopSignal(self.stop.signum or 0)
        with agreed("making the run's folder"):
            self.folder.claim(resume=resume, overwrite=overwrite)
            if self.common is not None and jax.process_index() == 0:
                copy_run(self.config, self.common)
        self.go_to_newest()

    def _inherit(self) -> None:
        """Takes over what another run leaves to this one; changes nothing on disk."""
        if self.config.init_from:
            params, digest = read_params(self.config, self.state.params)
            self.state = self.state._replace(params=params)
            self.data = self.data.begun_with(digest)
        if self.config.go_on_from:
            self.common = common_checkpoint(self.config)
            source = path_of(self.config.go_on_from) / "checkpoints" / str(self.common)
            self.checkpoints.check(source, self.state)

    def finished(self) -> bool:
        """Tells whether an earlier process has done everything; that outlives its checkpoints.

        Raises:
            ValueError: only the records are left, and of another run than this one.
        """
        metrics = self.folder.first_metrics
        records = read_records(metrics) if metrics.exists() else []
        if not records:
            return False
        if self.saved is None:
            self.checkpoints.check_start(metrics, self.data.identity)
        return records[-1].get("kind") == "end" and self.saved in (None, self.config.schedule.steps)

    def train(self, report: Report) -> None:
        """Takes all steps that are left, one always in flight behind the bookkeeping."""
        self.checkpoints.open(self.state)
        report.start(self.state, self.compile_s, self.damaged)
        self.skipped = int(self.state.opt_state.total_notfinite)
        self.last_save = _seconds()
        self.clock.start()
        for step in range(self.saved or 0, self.config.schedule.steps):
            self._validate_if_due(step, report)
            if self.stopped(step):
                self._stop(step, report)
            if self._save_due(step):
                self._save(step, report)
            self._trace_if_due(step, report)
            batch = to_device(next(self.data.training), self.layout)
            self.state, metrics = self.train_step(self.state, batch)
            self._settle(report)
            self.in_flight = (step, metrics)
            self._record_spectra_if_due(step, report)
        self._finish(report)

    def close(self) -> None:
        """Ends a trace, finishes saving and ends the reader's thread."""
        self.trace.close()
        self.resources.close()

    def compile(self) -> None:
        """Compiles ahead of time: a compiled step refuses other shapes, so it never recompiles."""
        begin = time.perf_counter()
        sizes = self.config.data
        # A compiled step takes its own result, so that has to lie where the first state does.
        shardings = self.layout and jax.tree.map(lambda x: x.sharding, self.state)
        # Restored arrays are bound to their device and fresh ones are not: for patterns of either
        # the program is the same, and a resumed run finds it in the cache.
        patterns = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=x.sharding if self.layout else None
            ),
            self.state,
        )
        step = make_train_step(self.graphdef, self.optimizer, self.config, self.layout, shardings)
        batch = batch_pattern(sizes.batch_rows, self.config, self.layout)
        self.train_step = _compiled(step, patterns, batch)
        evaluate = make_eval_step(self.graphdef, self.config, self.layout)
        batch = batch_pattern(
            sizes.microbatch_rows, self.config, self.layout, length=sizes.val_length
        )
        self.evaluate = _compiled(evaluate, patterns.params, batch, patterns.step)
        self.read_spectra = spectra_reader(self.layout)
        self.weights = lambda state: state.params
        if self.config.tail or self.config.lookahead:
            average = jax.jit(lambda state: eval_params(state.opt_state, state.params))
            self.weights = _compiled(average, patterns)
        self.compile_s = time.perf_counter() - begin

    def _settle(self, report: Report) -> None:
        """Waits for the step in flight and reports it."""
        if self.in_flight is not None:
            (step, metrics), self.in_flight = self.in_flight, None
            jax.block_until_ready(metrics)
            self.clock.lap()
            report.step(step, metrics, self.clock)
            self.skipped = int(metrics["skipped"])
            check_row(step, int(metrics["skipped_in_a_row"]), self.config.nonfinite_limit)

    def _trace_if_due(self, step: int, report: Report) -> None:
        """Starts or ends the trace of a few steps; the first of a process are not like others."""
        begin = (self.saved or 0) + 2
        if not self.config.profile or jax.process_index() or step not in (begin, begin + TRACED):
            return
        self._settle(report)
        if step == begin:
            self.trace.enter_context(jax.profiler.trace(str(self.folder.profile)))
        else:
            self.trace.close()
        self.clock.start()

    def _record_spectra_if_due(self, step: int, report: Report) -> None:
        """Records the factors' spectra, off the clock, after a step whose figures are kept.

        These are the first update and every N-th: a step that was skipped is none.
        """
        every, before = getattr(self.config.matrices, "monitor", None), self.skipped
        update = step + 1 - before
        if every and (update == 1 or update % every == 0):
            self._settle(report)
            if self.skipped != before:
                return
            report.spectra(step, self.read_spectra(self.state))
            self.clock.start()

    def _validate_if_due(self, step: int, report: Report) -> None:
        """Measures the loss before update `step`, off the clock; gives up when asked to stop."""
        if not validation_due(step, self.config):
            return
        self._settle(report)
        total, tokens, weights = 0.0, 0, self.weights(self.state)
        for batch in self.data.validation():
            if self.stopped(step):
                return
            batch_there = to_device(batch, self.layout)
            total += float(self.evaluate(weights, batch_there, self.state.step))
            tokens += batch["targets"].size * jax.process_count()
        self.validated = step, total / tokens
        report.validation(*self.validated, self.clock)
        self.clock.start()

    def _save_due(self, step: int) -> bool:
        """Whether a checkpoint is to be made before update `step`; all processes answer alike."""
        output = self.config.output
        if step == (self.saved or 0):
            return False
        if output.checkpoint_every and step % output.checkpoint_every == 0:
            return True
        if output.keep_best and self.validated and self.validated[0] == step:
            return True
        if not output.checkpoint_minutes:
            return False
        late = _seconds() - self.last_save >= 60 * output.checkpoint_minutes
        if jax.process_count() == 1:
            return late
        return step % output.log_every == 0 and bool(largest_of_all(late))

    def _save(self, step: int, report: Report) -> None:
        """Saves the state after `step` updates, off the clock."""
        self._settle(report)
        validated, loss = self.validated or (None, math.inf)
        told = loss if validated == step and math.isfinite(loss) else math.inf
        begin, self.last_save = time.perf_counter(), _seconds()
        self.checkpoints.save(step, self.state, self.data.training, self.clock.elapsed, told)
        report.saved(step, time.perf_counter() - begin)
        self.clock.start()

    def stopped(self, step: int) -> bool:
        """Whether a signal asks to stop; several processes ask each other every few steps."""
        if jax.process_count() == 1:
            return self.stop.signum is not None
        # A signal that comes after this is for the next time.
        due = step % self.config.output.log_every == 0
        signum = largest_of_all(self.stop.signum or 0) if due else 0
        self.stop.signum = signum or self.stop.signum
        return bool(signum)

    def _stop(self, step: int, report: Report) -> None:
        self._save(step, report)
        self.checkpoints.wait()
        raise Interrupted(self.stop.signum or 0, step, str(self.folder.path))

    def _finish(self, report: Report) -> None:
        """Measures and saves the end; a stop request during the last validation is honoured."""
        steps = self.config.schedule.steps
        self._validate_if_due(steps, report)
        if self.stopped(steps):
            self._stop(steps, report)
        self._save(steps, report)
        self.checkpoints.wait()
        report.end(self.compile_s, self.clock)
