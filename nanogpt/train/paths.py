"""Where runs lie: folders of this machine, or of an object store that all machines see (gs://).

An object store knows no folders, no renaming, no appending and no locks; what a run needs of these
is here, so that nothing else asks which one it is.
"""

import os
import pathlib
import shutil
from collections.abc import Iterator

import fsspec
from etils import epath

Path = pathlib.Path | epath.Path
COMMITTED = "commit_success.txt"  # Orbax's last object of a checkpoint that cannot be renamed


def path_of(name: str) -> Path:
    """The folder that a setting names.

    >>> path_of("runs/cpu"), str(path_of("gs://bucket/runs") / "cpu")
    (PosixPath('runs/cpu'), 'gs://bucket/runs/cpu')
    """
    if not name.startswith("gs://"):
        return pathlib.Path(name)
    # TensorStore and other processes write, too, and gcsfs would not look again.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return epath.Path(name)


def is_remote(path: Path) -> bool:
    """Whether it lies in an object store."""
    return os.fspath(path).startswith("gs://")


def absolute(path: Path) -> Path:
    """The path from the root on, as Orbax wants it; epath would put gs:// below this folder."""
    return path if is_remote(path) else path.absolute()


def files_of(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, in their order; what is no folder is."""
    paths = _below(folder) if folder.exists() else ()
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _below(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and not os.path.islink(path):
            yield from _below(path)
        else:
            yield path


def delete(folder: Path) -> None:
    """Deletes a folder and all that it holds, if it is there; of a link to one, what that holds."""
    if is_remote(folder):
        for name in files_of(folder):
            (folder / name).unlink(missing_ok=True)
    elif os.path.islink(folder) and folder.is_dir():
        for path in folder.iterdir():
            whole = path.is_dir() and not os.path.islink(path)
            shutil.rmtree(path) if whole else path.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def copy(source: Path, target: Path) -> None:
    """Copies a checkpoint to a place where none is; half a copy is not taken for one."""
    begun = target if is_remote(target) else target.parent.with_name("copying")
    delete(begun)
    names = files_of(source)
    for name in sorted(names, key=lambda name: name == COMMITTED):
        (begun / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as read, (begun / name).open("wb") as written:
            shutil.copyfileobj(read, written)
    if not is_remote(target):
        target.parent.mkdir(exist_ok=True)
        begun.rename(target)


def move(source: Path, target: Path) -> None:
    """Moves a checkpoint, in the place of one that may be there."""
    delete(target)
    if is_remote(source):
        copy(source, target)
        delete(source)
    else:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew, at once: a full disk must not cost what there is."""
    if is_remote(path):
        path.write_bytes(text.encode())
        return
    partial = path.with_suffix(".tmp")
    partial.unlink(missing_ok=True)
    with open(partial, "x", encoding="utf-8") as file:  # through no link that somebody put there
        file.write(text)
    partial.replace(path)


class Lines:
    """A text file that grows; whatever is written is stored when `write` returns.

    Objects cannot grow: in an object store all of it is written anew. There are no locks either, so
    a file that is not what this process left there tells of another process.

    Args:
        path: the file; its folder exists. What it holds stays.
    """

    def __init__(self, path: Path):
        self._path = path
        self._stored = path.read_bytes() if is_remote(path) and path.exists() else b""

    def write(self, text: str) -> None:
        """Appends a text.

        Raises:
            ValueError: another process writes this file.
        """
        if not is_remote(self._path):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text)
            return
        if self._stored and self._path.read_bytes() != self._stored:
            raise ValueError(
                f"{self._path}: another process is training this run, too, so this one ends: see "
                "to it that one is left, and repeat its command with --resume if none is."
            )
        self._stored += text.encode()
        self._path.write_bytes(self._stored)
