"""A stand-in for Google's object store, on this machine: `gs://` without a network.

Objects are files of one folder, named by their whole key: like the real store it knows no folders,
no renaming and no appending. TensorStore speaks to it over HTTP, epath through fsspec; both see
the same objects, and so do the processes of a run.
"""

import contextlib
import http.server
import io
import json
import os
import pathlib
import sys
import threading
import types
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec

NAME = "gs://bucket"
FOLDER = "STAND_IN_BUCKET"  # variable of the environment


class Objects:
    """Bytes by key.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    def _file(self, key: str) -> pathlib.Path:
        return self._folder / urllib.parse.quote(key, safe="")

    def keys(self, prefix: str = "") -> list[str]:
        """Keys that begin so, in their order."""
        files = (name for name in os.listdir(self._folder) if not name.startswith("."))
        found = map(urllib.parse.unquote, files)
        return sorted(key for key in found if key.startswith(prefix))

    def get(self, key: str) -> tuple[bytes, int]:
        """Content and generation; FileNotFoundError where there is none."""
        file = self._file(key)
        return file.read_bytes(), file.stat().st_mtime_ns

    def put(self, key: str, content: bytes) -> int:
        """Stores the whole of it at once; returns its generation."""
        partial = self._folder / f".{os.getpid()}-{threading.get_ident()}"
        partial.write_bytes(content)
        partial.replace(self._file(key))
        return self._file(key).stat().st_mtime_ns

    def delete(self, key: str) -> None:
        """FileNotFoundError where there is none."""
        self._file(key).unlink()

    def copy_to(self, folder: pathlib.Path, prefix: str) -> None:
        """Copies what begins so into a folder, as files."""
        for key in self.keys(prefix):
            file = folder / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.get(key)[0])


class _Written(io.BytesIO):
    """What is written counts when it is closed."""

    def __init__(self, objects: Objects, key: str):
        super().__init__()
        self._objects, self._key = objects, key

    def close(self) -> None:
        if not self.closed:
            self._objects.put(self._key, self.getvalue())
        super().close()


class FileSystem(fsspec.AbstractFileSystem):
    """What epath sees of the bucket."""

    protocol = ("gcs", "gs")
    cachable = False

    @property
    def _objects(self) -> Objects:
        return Objects(pathlib.Path(os.environ[FOLDER]))

    def _key(self, path: str) -> str:
        return str(self._strip_protocol(path)).partition("/")[2]

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """Objects right below a path, and what looks like folders."""
        path = str(self._strip_protocol(path)).rstrip("/")
        bucket, _, key = path.partition("/")
        prefix = f"{key}/" if key else ""
        found: dict[str, dict[str, Any]] = {}
        for one in self._objects.keys(prefix):
            name, deeper, _ = one.removeprefix(prefix).partition("/")
            whole = f"{bucket}/{prefix}{name}"
            size = None if deeper else len(self._objects.get(one)[0])
            kind = "directory" if deeper else "file"
            found.setdefault(whole, {"name": whole, "size": size, "type": kind})
        if not found and key:
            content = self._objects.get(key)[0]  # FileNotFoundError where nothing is
            found[path] = {"name": path, "size": len(content), "type": "file"}
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", *_: Any, **options: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self._objects.get(self._key(path))[0])
        if mode == "wb":
            return _Written(self._objects, self._key(path))
        raise ValueError(f"mode={mode!r}: objects are read and written whole, use 'rb' or 'wb'")

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        """Copies an object."""
        self._objects.put(self._key(path2), self._objects.get(self._key(path1))[0])

    def _rm(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # what looks like a folder
            self._objects.delete(self._key(path))

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        """There are no folders."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders."""


class _Handler(http.server.BaseHTTPRequestHandler):
    """The few requests of the JSON API that TensorStore makes."""

    protocol_version = "HTTP/1.1"

    def _answer(self, code: int, content: bytes = b"", told: Mapping[str, Any] = {}) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **told}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def _asked(self) -> tuple[str, dict[str, str]]:
        """Key of the object, and what stands behind the question mark."""
        parts = urllib.parse.urlsplit(self.path)
        key = urllib.parse.unquote(parts.path.partition("/o")[2].removeprefix("/"))
        return key, dict(urllib.parse.parse_qsl(parts.query))

    def _objects(self) -> Objects:
        return self.server.objects  # pyrefly: ignore[missing-attribute]

    def _generation(self, key: str) -> int:
        try:
            return self._objects().get(key)[1]
        except FileNotFoundError:
            return 0

    def do_GET(self) -> None:
        """An object, or a list of them."""
        key, asked = self._asked()
        if not key:
            items = [{"name": one} for one in self._objects().keys(asked.get("prefix", ""))]
            self._answer(200, json.dumps({"items": items}).encode())
            return
        try:
            content, generation = self._objects().get(key)
        except FileNotFoundError:
            self._answer(404)
            return
        told: dict[str, Any] = {"x-goog-generation": generation}
        if asked.get("ifGenerationNotMatch") == str(generation):
            self._answer(304)
        elif span := self.headers.get("Range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin = int(first) if first else max(0, len(content) - int(last))
            end = int(last) + 1 if first and last else len(content)
            part = content[begin:end]
            told["Content-Range"] = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
            self._answer(206, part, told)
        else:
            self._answer(200, content, told)

    def do_POST(self) -> None:
        """A new object."""
        _, asked = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        key, wanted = asked["name"], asked.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self._generation(key):
            self._answer(412)
            return
        generation = self._objects().put(key, content)
        told = {"name": key, "generation": str(generation), "size": str(len(content))}
        self._answer(200, json.dumps(told).encode())

    def do_DELETE(self) -> None:
        """An object less."""
        try:
            self._objects().delete(self._asked()[0])
            self._answer(204)
        except FileNotFoundError:
            self._answer(404)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def stand_in(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Serves a folder as the bucket while the block runs.

    Yields:
        Variables of the environment of processes that are to see it, see `join`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.objects = Objects(folder)  # pyrefly: ignore[missing-attribute]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            FOLDER: str(folder),
        }
    finally:
        server.shutdown()
        server.server_close()


def join() -> None:
    """Lets epath of this process see the bucket that the environment names.

    Orbax asks Google's own package one thing: whether a bucket has folders after all.
    """
    fsspec.register_implementation("gcs", FileSystem, clobber=True)
    flat = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    google = types.ModuleType("google.cloud.storage")
    google.__dict__["Client"] = lambda: types.SimpleNamespace(get_bucket=lambda name: flat)
    sys.modules["google.cloud.storage"] = google
