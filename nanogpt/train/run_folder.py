"""The folder of a run: what lies where, and the rule that no run is overwritten by accident."""

import fcntl
import importlib
import os
import tempfile
import zlib

from nanogpt.config.run import Config
from nanogpt.train.paths import Path, absolute, delete, is_remote, path_of


class RunFolder:
    """Paths of a run: metrics.jsonl, record.txt, checkpoints/ and more under output.directory/name.

    Args:
        config: the run.
        process: number of this process; the later ones write metrics-1.jsonl and so on.
    """

    def __init__(self, config: Config, process: int = 0):
        self.path = path_of(config.output.directory) / config.name
        self.first_metrics = self.path / "metrics.jsonl"
        self.metrics = self.path / (f"metrics-{process}.jsonl" if process else "metrics.jsonl")
        self.record = self.path / "record.txt"  # of the first process, see `RecordLog`
        self.checkpoints = self.path / "checkpoints"
        self.damaged = self.path / "damaged"  # checkpoints, see `Checkpoints.set_aside`
        self.events, self.profile = self.path / "tensorboard", self.path / "profile"
        self.wandb = self.path / "wandb.id"  # the run's id there
        self._sources = [name for name in (config.init_from, config.go_on_from) if name]
        self._first = process == 0
        self._lock: int | None = None  # file descriptor

    def holds_run(self) -> bool:
        """Returns whether an earlier run left anything here."""
        return self.first_metrics.exists() or self.checkpoints.exists()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuses to start where a run would be lost or none can be resumed; changes nothing.

        Args:
            resume: go on with the run that lies here.
            overwrite: delete the run that lies here.

        Raises:
            ValueError: both are asked for, or nothing can be written here.
            FileNotFoundError: nothing to resume, or checkpoints without their metrics.jsonl.
            FileExistsError: a run lies here and neither is asked for.
        """
        check_writable("output.directory", self.path)
        check_writable("output.directory", self.checkpoints)  # perhaps on a disk of its own
        if overwrite and any(_same(self.path, source) for source in self._sources):
            raise ValueError(
                f"{self.path} holds the run to begin with, which --overwrite would delete: give "
                "this one another --name."
            )
        if resume and overwrite:
            raise ValueError("--resume and --overwrite exclude each other: choose one.")
        if resume and not self.holds_run():
            raise FileNotFoundError(
                f"nothing to resume in {self.path}: start without --resume, or correct "
                "--name or --output.directory."
            )
        if self.holds_run() and not (resume or overwrite):
            raise FileExistsError(
                f"{self.path} already holds a run: go on with --resume, replace it with "
                "--overwrite, or choose another --name; with make: make speedrun ARGS=--resume."
            )
        recorded = self.first_metrics.is_file() and self.first_metrics.read_bytes()
        if resume and not recorded and any(self.checkpoints.glob("*")):
            raise FileNotFoundError(
                f"{self.metrics} is missing or empty, but checkpoints lie beside it: put the file "
                "back, or start anew with --overwrite or another --name."
            )

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Makes the folder ready for a run; arguments and errors as in `check`.

        Of several processes the first one does it, and the others wait for it after this.
        """
        if not self._first:
            return
        self.check(resume=resume, overwrite=overwrite)
        if overwrite:
            self.clear()
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()

    def lock(self) -> None:
        """Keeps other processes from this run until `close`, if the folder is there.

        A run may outlive the terminal or the parent process that it was started from; another one
        in the same folder would cut its records and delete its checkpoints. File systems without
        locks give no protection.

        Raises:
            ValueError: another process is at it.
        """
        if not self._first or self._lock is not None or not self.path.exists():
            return
        if is_remote(self.path):  # without locks; see `nanogpt.train.paths.Lines`
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(folder)
            raise ValueError(
                f"{self.path}: another process is training this run: wait until it has ended, or "
                "stop it, then repeat the command."
            ) from error
        except OSError:
            os.close(folder)
        else:
            self._lock = folder

    def close(self) -> None:
        """Gives up the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Deletes the run that lies here, and nothing else."""
        for file in (*self.path.glob("metrics*.jsonl"), self.record, self.wandb):
            file.unlink(missing_ok=True)  # another process of the job may be at it, too
        for folder in (self.checkpoints, self.damaged, self.events, self.profile):
            delete(folder)

    def changed(self) -> int | None:
        """Returns a number that is another one when metrics.jsonl is, None if there is none."""
        if not self.metrics.exists():
            return None
        if is_remote(self.metrics):  # the time is not told of every store
            return zlib.crc32(self.metrics.read_bytes())
        return os.stat(self.metrics).st_mtime_ns


def check_writable(name: str, folder: Path) -> None:
    """Refuses a folder that cannot be made or written, before any work.

    Args:
        name: of the setting that says so.
        folder: need not be there yet.

    Raises:
        ValueError: names the setting, the folder and the cause.
    """
    if is_remote(folder):
        _check_store(name, folder)
        return
    there = next(p for p in (folder, *absolute(folder).parents) if os.path.exists(p))
    try:  # permissions do not tell of read-only file systems and quotas
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"{name}: {folder} cannot be written, since {there} cannot ({error.strerror}): set "
            f"--{name} to a folder where you can."
        ) from None


def _check_store(name: str, folder: Path) -> None:
    probe = folder / f"writable-{os.getpid()}"
    try:
        importlib.import_module("google.cloud.storage")  # which Orbax needs to delete
        probe.write_bytes(b"?")
        probe.unlink()
    except ImportError as error:
        raise ValueError(
            f"{name}: {folder} needs a package ({error}): run `pip install gcsfs "
            "google-cloud-storage`."
        ) from error
    except Exception as error:  # of the store, the network or the login, each with its classes
        told = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name}: {folder} cannot be written ({type(error).__name__}: {told}): see whether the "
            "bucket is there and `gcloud auth application-default login` was done."
        ) from error


def _same(folder: Path, other: str) -> bool:
    if is_remote(folder):
        return folder == path_of(other)
    return folder.exists() and os.path.exists(other) and os.path.samefile(folder, other)
