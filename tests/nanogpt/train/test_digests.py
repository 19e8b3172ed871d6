"""Digests tell of every change of a folder, and name the file."""

import json

import pytest

from nanogpt.train.digests import DamagedError, check_digests, write_digests


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a", "d/b", "d/c"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    (tmp_path / "commit_success.txt").touch()
    write_digests(tmp_path)
    return tmp_path


def test_what_was_saved_is_accepted(folder):
    check_digests(folder)
    (folder / "commit_success.txt").write_text("later")
    (folder / "_CHECKPOINT_METADATA").write_text("later")
    check_digests(folder)


@pytest.mark.parametrize("position", [0, 150, 299])
def test_a_flipped_bit_is_found_by_the_process_that_reads_it(folder, position):
    text = bytearray((folder / "d/b").read_bytes())
    text[position] ^= 4
    (folder / "d/b").write_bytes(text)
    check_digests(folder, (0, 2))  # reads a and d/c
    for share in ((0, 1), (1, 2)):
        with pytest.raises(DamagedError, match="d/b is not what was saved"):
            check_digests(folder, share)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (b"\xff", "cannot be read"),
        (json.dumps({"a": 0, "d/b": 0, "d/c": 0}), "a is not what was saved"),
        ("{}", "a does not belong to it"),
        ('{"a":' + "[" * 100_000, "cannot be read"),
        (json.dumps({"../a": 0}), r"\.\./a is missing"),
    ],
)
def test_digests_that_were_changed_themselves(folder, text, complaint):
    (folder / "digests.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedError, match=complaint):
        check_digests(folder)


def damaged(folder):
    with pytest.raises(DamagedError) as told:
        check_digests(folder)
    print(told.value)  # a terminal takes it
    return str(told.value).partition(" is damaged: ")[2]


def test_pieces_that_are_renamed_exchanged_or_folders_are_told(folder):
    (folder / "a").rename(folder / "b")
    assert damaged(folder) == "a is missing."
    (folder / "a").mkdir()
    assert damaged(folder) == "a is missing."
    (folder / "a").rmdir()
    (folder / "b").rename(folder / "a")
    (folder / "d/b").rename(folder / "d/x")
    (folder / "d/c").rename(folder / "d/b")
    (folder / "d/x").rename(folder / "d/c")
    assert damaged(folder) == "d/b is not what was saved."
    (folder / "digests.json").unlink()
    (folder / "digests.json").mkdir()
    assert damaged(folder) == "digests.json cannot be read."


def test_names_that_are_no_text_and_files_that_cannot_be_read_are_told(folder):
    (folder / "a").unlink()
    (folder / "a").symlink_to(folder / "nowhere")
    assert damaged(folder) == "a cannot be read (No such file or directory)."
    (folder / "a").unlink()
    (folder / "a").write_bytes(b"a" * 100)
    (folder / "\udcff").touch()
    assert damaged(folder) == r"\udcff does not belong to it."


def test_a_file_in_a_checkpoints_place_is_damaged(folder):
    assert damaged(folder / "a") == "digests.json is missing."
