"""What the commands do alike."""

import asyncio
import sys
from types import SimpleNamespace

import pytest

from nanogpt.lab.command import command


def test_what_follows_an_error_is_not_told_beside_it(monkeypatch, capfd):
    """As of arrays that find the disk full behind the first one."""
    told = []
    hook = told.append
    for name in ("__unraisablehook__", "unraisablehook"):
        monkeypatch.setattr(sys, name, hook)
    news, follows = (
        SimpleNamespace(exc_value=RuntimeError(words)) for words in ("news", "Event loop is closed")
    )

    @command()
    def fail(words):
        loop = asyncio.new_event_loop()
        future = loop.create_future()
        future.set_exception(OSError("the disk is full"))
        loop.close()
        del future  # asyncio logs that nobody has asked for it
        for found in (news, follows):
            sys.unraisablehook(found)
        raise OSError("the disk is full")

    with pytest.raises(SystemExit, match="error: the disk is full"):
        fail([])
    assert told == [news]
    assert "never retrieved" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["gcsfs", "numpy"])
def test_a_bucket_without_its_package_is_an_error_in_a_line(name):
    @command()
    def read(words):
        raise ImportError(f"Please install {name} to access Google Storage")

    found = SystemExit if name == "gcsfs" else ImportError
    with pytest.raises(found, match=f"{name}") as raised:
        read([])
    assert ("run `pip install gcsfs" in str(raised.value)) == (name == "gcsfs")
