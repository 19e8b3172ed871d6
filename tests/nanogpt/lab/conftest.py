"""Commands under test keep compiled programs in a folder of the test's, not the user's."""

import os

import pytest

from nanogpt.lab.compile_cache import VARIABLE


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    before = os.environ.get(VARIABLE)
    yield
    os.environ.pop(VARIABLE, None)
    if before is not None:
        os.environ[VARIABLE] = before
