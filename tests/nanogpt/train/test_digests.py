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
        (json.dumps({"../a": 0}), r"\.\./a is missing"),
    ],
)
def test_digests_that_were_changed_themselves(folder, text, complaint):
    (folder / "digests.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DamagedError, match=complaint):
        check_digests(folder)
