"""Digests of a checkpoint's files, written before it counts, verified before it is read.

TensorStore checks nothing of what Orbax stores. The digests lie in the checkpoint itself, so they
travel with it; a checkpoint without them was not saved whole.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from nanogpt.train.paths import COMMITTED, Path, files_of

NAME = "digests.json"
# Orbax writes these when the digests are there already. They hold times and names of classes, and
# a resume does not read them.
_LATER = (COMMITTED, "_CHECKPOINT_METADATA")


class DamagedError(ValueError):
    """A checkpoint is not what was saved; the message names the file."""


def write_digests(folder: Path) -> None:
    """Writes `digests.json`: SHA-256 by file; the folder is otherwise complete."""
    (folder / NAME).write_text(json.dumps(_digests(folder, _names(folder)), indent=0))


def check_digests(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Refuses a checkpoint that is not what was saved; reads its files and nothing else.

    Args:
        folder: a checkpoint's.
        share: number of this process, and of all: each reads its part of the files.

    Raises:
        DamagedError: a file was changed, cut, deleted or added; names the first.
    """
    wanted, names = _read(folder), _names(folder)
    for name in sorted(wanted.keys() ^ set(names)):
        raise _damaged(folder, name, "is missing" if name in wanted else "does not belong to it")
    rank, world = share
    for name, found in _digests(folder, names[rank::world]).items():
        if found != wanted[name]:
            raise _damaged(folder, name, "is not what was saved")


def _read(folder: Path) -> Mapping[str, str]:
    try:
        wanted = json.loads((folder / NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise _damaged(folder, NAME, "is missing") from None
    except (ValueError, OSError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict):
        raise _damaged(folder, NAME, "cannot be read")
    return wanted


def _damaged(folder: Path, name: str, what: str) -> DamagedError:
    # Names of files are bytes: those that are no text must not keep the rest from being said.
    shown = name.encode(errors="backslashreplace").decode()
    return DamagedError(f"checkpoint {folder} is damaged: {shown} {what}.")


def _names(folder: Path) -> list[str]:
    return [name for name in files_of(folder) if name not in (NAME, *_LATER)]


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        path = folder / name
        if path.exists() and not path.is_file():  # a pipe or a device: reading them has no end
            raise _damaged(folder, name, "is no file")
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
        except OSError as error:
            raise _damaged(folder, name, f"cannot be read ({error.strerror})") from error

    with concurrent.futures.ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))
