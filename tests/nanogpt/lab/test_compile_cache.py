"""Where compiled programs are kept."""

import os
import pathlib
import stat

import pytest

from nanogpt.lab import compile_cache
from nanogpt.lab.compile_cache import VARIABLE


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")  # so that it is restored, whatever `prepare` sets
    monkeypatch.delenv(VARIABLE)
    return tmp_path


def test_the_folder_is_the_users_own(home):
    compile_cache.prepare()
    folder = pathlib.Path(os.environ[VARIABLE])
    assert home in folder.parents
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_rights_of_others_are_taken_back(home):
    compile_cache.prepare()
    folder = pathlib.Path(os.environ.pop(VARIABLE))
    folder.chmod(0o777)
    compile_cache.prepare()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_not_used(home, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: -5)
    compile_cache.prepare()
    assert VARIABLE not in os.environ


def test_where_there_can_be_no_folder_nothing_is_kept(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    compile_cache.prepare()
    assert VARIABLE not in os.environ


def test_the_users_choice_stays(home, monkeypatch):
    monkeypatch.setenv(VARIABLE, "mine")
    compile_cache.prepare()
    assert os.environ[VARIABLE] == "mine"
