"""A run so small that it can be killed a hundred times, as real processes of the command."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from data_pipeline import write_shard

ROOT = pathlib.Path(__file__).resolve().parents[3]
VOCAB, ROWS, LENGTH = 32, 4, 8
# A model of 5,000 parameters; one of LENGTH * ROWS tokens a step, of which an epoch takes 9.3.
SETTINGS = (
    f"--model.vocab-size {VOCAB} --model.num-layers 1 --model.model-dim 16 --model.head-dim 8 "
    f"--model.mlp-dim 32 --model.sequence-length {LENGTH} --data.batch-rows {ROWS} "
    "--data.microbatch-rows 2 --data.val-tokens 128 --data.mode shuffled --output.log-every 1 "
    "--val-every 7 --val-every-final 7"
).split()
EPOCH_TOKENS = 300
# Compiling is most of what a run of this size does: without LLVM's optimizations half.
FLAGS = (
    "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=0 "
    "--xla_force_host_platform_device_count=1"
)
LONGEST_S = 600  # that a process may take here, on a busy machine too
# What differs between two runs that are the same: times and machines.
MEASURED = ("kind", "step", "loss", "grad_norm", "learning_rate", "skipped", "tokens")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its status (negative: of a signal) and all that it said."""

    code: int
    output: str

    @property
    def in_a_sentence(self) -> bool:
        """Whether it failed as a command should: with an error in words, without a traceback."""
        return self.code > 0 and "error:" in self.output and "Traceback" not in self.output

    @property
    def last(self) -> str:
        """The last line, for a report."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


class Child:
    """A process of the command, with what it says as it says it."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as told:
            self.lines.extend(iter(told.readline, ""))

    def until(self, happened: Callable[[], bool], wait_s: float = 0.001) -> bool:
        """Waits for something, in vain if the process ends before; returns whether it happened."""
        end = time.monotonic() + LONGEST_S
        while self.process.poll() is None and time.monotonic() < end:
            if happened():
                return True
            time.sleep(wait_s)
        return happened()

    def said(self, text: str) -> bool:
        """Whether it has said something."""
        return any(text in line for line in list(self.lines))

    def send(self, signum: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signum)

    def stopped(self) -> bool:
        """Waits until it stops itself (SIGSTOP); False where it ends before."""
        found = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return found is not None and found.si_code == os.CLD_STOPPED

    def frozen(self, when: Callable[[], bool]) -> bool:
        """Stops the process at a moment at which something is so, and leaves it there.

        Returns:
            Whether it is: False where it ended before.
        """
        while self.until(when, 0):
            self.send(signal.SIGSTOP)
            if not self.stopped():
                return False
            if when():
                return True
            self.send(signal.SIGCONT)
        return False

    def end(self) -> Ended:
        """Waits for its end, and ends it where that takes too long."""
        try:
            self.process.wait(LONGEST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        return Ended(self.process.returncode, "".join(self.lines))


@dataclasses.dataclass(frozen=True)
class Rig:
    """Runs of one kind: where they lie, what they train.

    Attributes:
        folder: of shards, runs and compiled programs.
        optimizer: recipe of the preset.
        preset: the recipe's.
        steps: updates of a run.
        every: updates between checkpoints.
        more: further settings.
    """

    folder: pathlib.Path
    optimizer: str = "adamw"
    preset: str = "cpu"
    steps: int = 20
    every: int = 3
    more: tuple[str, ...] = ()

    def with_shards(self) -> "Rig":
        """Writes the shards: text in which each token tends to follow its half."""
        random = np.random.default_rng(0)
        self.shards.mkdir(parents=True, exist_ok=True)
        for name, count in (("train_000001", EPOCH_TOKENS), ("val_000000", 300)):
            tokens = (np.cumsum(random.integers(0, 3, count)) % VOCAB).astype(np.uint16)
            write_shard(self.shards / f"text_{name}.bin", tokens)
        return self

    @property
    def shards(self) -> pathlib.Path:
        """The folder of tokens."""
        return self.folder / "shards"

    @property
    def runs(self) -> pathlib.Path:
        """The folder of runs."""
        return self.folder / "runs"

    def words(self, name: str, *more: str) -> list[str]:
        """The command line of a run."""
        mesh = [] if self.preset != "track3" else ["--mesh", ""]
        places = ["--data.directory", str(self.shards), "--output.directory", str(self.runs)]
        length = ["--schedule.steps", str(self.steps), "--output.checkpoint-every", str(self.every)]
        chosen = ["--preset", self.preset, "--optimizer", self.optimizer, "--name", name]
        return ["train", *chosen, *SETTINGS, *mesh, *places, *length, *self.more, *more]

    def environment(self) -> dict[str, str]:
        """Variables of a process."""
        return environment(self.folder / "compiled", os.environ.get("XLA_FLAGS") or FLAGS)

    def start(self, name: str, *more: str, accidents: Sequence[str] = ()) -> Child:
        """Starts a run as a process, with accidents of `hooked` if there are any."""
        words = self.words(name, *more)
        if accidents:
            hooked = "scripts.maintenance.faulting.hooked"
            return Child([hooked, *accidents, "--", *words], self.environment())
        return Child(["nanogpt", *words], self.environment())

    def go_on(self, name: str, resume: str = "--resume") -> Ended:
        """Goes on with a run to its end, as a launcher does: from its start where nothing is."""
        return self.start(name, *([resume] if self.holds_run(name) else [])).end()

    def holds_run(self, name: str) -> bool:
        """Whether a run left anything."""
        run = self.runs / name
        return (run / "metrics.jsonl").exists() or (run / "checkpoints").exists()

    def checkpoints(self, name: str) -> list[int]:
        """Steps of the finished checkpoints of a run."""
        names = [path.name for path in (self.runs / name / "checkpoints").glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def half_saved(self, name: str) -> list[pathlib.Path]:
        """Checkpoints that are being written, or were when the process died."""
        return list((self.runs / name / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def environment(compiled: pathlib.Path, flags: str) -> dict[str, str]:
    """Variables of a process on CPUs, which shares a folder of compiled programs with others."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def measured(run: pathlib.Path) -> list[dict[str, Any]]:
    """All that a run measured and that does not depend on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [
        {key: record[key] for key in MEASURED if key in record}
        for record in found
        if record["kind"] in ("train", "val", "end")
    ]


def arrays(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint's state by its path, on whatever devices it was saved."""
    folder = (checkpoint / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        kinds = reader.metadata(folder).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), kinds)
        found = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=plain))
    return dict(_flat("", found))


def _flat(path: str, tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(f"{path}/{key}", value)
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from _flat(f"{path}/{key}", value)
    elif tree is not None:
        yield path, np.asarray(tree)


def differences(one: pathlib.Path, other: pathlib.Path, step: int) -> list[str]:
    """What differs between two runs: entries of the state after `step` updates, and metrics.

    Returns:
        Paths of the arrays that are not equal bit for bit, and "metrics"; none if the runs are one.
    """
    left, right = (arrays(run / "checkpoints" / str(step)) for run in (one, other))
    found = sorted(set(left) ^ set(right))
    for path in sorted(set(left) & set(right)):
        a, b = left[path], right[path]
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            found.append(path)
    return found + ["metrics"] * (measured(one) != measured(other))


def stop(child: Child) -> Ended:
    """Asks a process to stop, and waits until it has."""
    child.send(signal.SIGTERM)
    return child.end()
