"""Folders of this machine and objects of a store are read, written, copied and moved alike."""

import pytest

from nanogpt.train import paths
from nanogpt.train.paths import COMMITTED, Lines, path_of
from scripts.maintenance.faulting import bucket


@pytest.fixture(params=["here", "gs"])
def folder(request, tmp_path, monkeypatch):
    """One of each kind."""
    if request.param == "here":
        return tmp_path / "here"
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv(bucket.FOLDER, str(tmp_path / "objects"))
    bucket.join()
    return path_of(bucket.NAME) / "here"


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_files_are_found_copied_moved_and_deleted(folder):
    assert paths.files_of(folder) == []
    write(folder / "one", COMMITTED, "z/deep/a", "b")
    assert paths.files_of(folder / "one") == ["b", COMMITTED, "z/deep/a"]
    paths.copy(folder / "one", folder / "more" / "two")
    write(folder / "three", "old")
    paths.move(folder / "one", folder / "three")
    assert paths.files_of(folder) == [
        f"{where}/{name}"
        for where in ("more/two", "three")
        for name in ("b", COMMITTED, "z/deep/a")
    ]
    assert (folder / "three" / "z" / "deep" / "a").read_bytes() == b"z/deep/a"
    paths.delete(folder)
    paths.delete(folder)
    assert not folder.exists()


def test_of_a_link_to_a_folder_the_content_is_deleted(tmp_path):
    write(tmp_path / "large", "a", "deep/b")
    write(tmp_path / "other", "c")
    (tmp_path / "large" / "outside").symlink_to(tmp_path / "other")
    (tmp_path / "link").symlink_to(tmp_path / "large")
    paths.delete(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and paths.files_of(tmp_path) == ["link", "other/c"]


def test_nothing_is_written_through_a_link(tmp_path):
    write(tmp_path, "precious")
    (tmp_path / "metrics.tmp").symlink_to(tmp_path / "precious")
    paths.replace_text(tmp_path / "metrics.jsonl", "x")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "metrics.jsonl").read_text() == "x"


def test_half_a_copy_is_not_taken_for_one(folder, monkeypatch):
    write(folder / "one", "a", COMMITTED, "z")
    real = paths.shutil.copyfileobj
    copied = []

    def fail_at_second(read, written):
        if copied:
            raise OSError("no room")
        copied.append(read)
        real(read, written)

    monkeypatch.setattr(paths.shutil, "copyfileobj", fail_at_second)
    with pytest.raises(OSError, match="no room"):
        paths.copy(folder / "one", folder / "two")
    assert COMMITTED not in paths.files_of(folder / "two")


def test_lines_are_stored_as_they_come_and_stay(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for text in ("one\n", "zwölf\n"):
        Lines(folder / "lines").write(text)
    assert (folder / "lines").read_bytes().decode() == "one\nzwölf\n"
    paths.replace_text(folder / "lines", "ä")
    assert (folder / "lines").read_bytes() == "ä".encode()


def test_a_store_has_no_locks_so_the_first_of_two_processes_ends(tmp_path, monkeypatch):
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv(bucket.FOLDER, str(tmp_path / "objects"))
    bucket.join()
    file = path_of(bucket.NAME) / "metrics.jsonl"
    first = Lines(file)
    first.write("1\n")
    second = Lines(file)
    second.write("2\n")
    with pytest.raises(ValueError, match="another process is training this run, too"):
        first.write("2\n")
    second.write("3\n")
    assert file.read_bytes() == b"1\n2\n3\n"
