"""What `pip install .` gives: read from a wheel and an sdist built here, without network."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("shampoo_jax", "nanogpt", "data_pipeline")
TINY = """
--model.vocab-size 300 --model.num-layers 1 --model.model-dim 16 --model.head-dim 8
--model.mlp-dim 32 --model.sequence-length 8 --data.val-tokens 64 --schedule.steps 3
--val-every 2 --output.log-every 1 --data.directory mine
""".split()


BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


def files_of(*folders: str) -> list[str]:
    """Every file in these folders, relative to the root."""
    return [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with wheel and sdist of a copy of this tree: building leaves files behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    loose = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
    tests = ("tests/conftest.py", "tests/test_packaging.py")
    for name in (*loose, *tests, *files_of(*PACKAGES, "scripts")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", BUILD, str(built)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return built


@pytest.fixture(scope="module")
def wheel(built):
    """The wheel, opened."""
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
        *("huggingface_hub", "sotu", "PyYAML", "jax", "optax", "etils", "safetensors"),
    }
    assert names(requirements, "gcs") == {"gcsfs", "google-cloud-storage"}
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


def test_the_sdist_holds_the_same_and_what_builds_it(built):
    (path,) = built.glob("shampoo_jax-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.partition("/")[2] for m in archive if m.isfile()}
    assert {"pyproject.toml", "README.md", *files_of(*PACKAGES)} <= names
    tops = {name.split("/")[0] for name in names if "/" in name}
    assert tops == {*PACKAGES, "shampoo_jax.egg-info"}


def test_wheel_and_sdist_are_small_and_carry_the_licence(built, wheel):
    assert all(path.stat().st_size < 2e6 for path in built.iterdir())
    licences = {name.rpartition("/")[2] for name in wheel.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_one_version_everywhere():
    """In the metadata, in the citation and on top of what the changelog has released."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.*)\]", changelog, re.MULTILINE)
    assert headings[:2] == ["Unreleased", project["version"]]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids) and all(part["attributes"]["label"] for part in form["body"])
    assert path.stem != "bug" or {"explain", "versions"} <= set(ids)


PYTHONS = ("3.11", "3.12", "3.13")


def holds(requirement: Requirement, python: str) -> bool:
    """Whether a requirement is one of some extra or of none, on a Python."""
    extras = re.findall(r'extra == "(\w+)"', str(requirement.marker)) or [""]
    environment = {"extra": extras[0], "python_version": python, "python_full_version": python}
    return requirement.marker is None or requirement.marker.evaluate(environment)


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_satisfy_every_requirement(requirements, python):
    """Constraints are exact, and within the bounds that pyproject.toml promises."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [pin for pin in map(Requirement, lines) if holds(pin, python)]
    assert all(str(pin.specifier).startswith("==") for pin in exact)
    pins = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in exact}
    assert len(pins) == len(exact)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    for requirement in [*requirements, *map(Requirement, build["requires"])]:
        name = canonicalize_name(requirement.name)
        if name == "shampoo-jax" or not holds(requirement, python):
            continue
        assert name in pins, f"constraints.txt pins no {requirement.name}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes {pins[name]}"


def test_lower_bounds_are_what_the_oldest_versions_are_tested_with(requirements):
    """Of the library those of `make test-oldest`, of the extras those of `make test`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (oldest,) = re.findall("^OLDEST := (.*)$", makefile, re.MULTILINE)
    core = [str(r).replace(">=", "==") for r in requirements if r.marker is None]
    assert set(core) <= set(oldest.split())
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lowest = {}
    for pin in map(Requirement, lines):
        lowest.setdefault(canonicalize_name(pin.name), pin.specifier)
    for requirement in requirements:
        if requirement.marker and requirement.name in ("jax", "optax") and not requirement.extras:
            assert str(requirement.specifier).replace(">=", "==") == str(lowest[requirement.name])


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the installed command in an empty folder, where nothing of the repository is in reach.

    The environment is a fresh one that holds the wheel alone; it finds dependencies where those of
    the tests are, so that nothing is downloaded.
    """
    place, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    command += ["--no-index", "--quiet", str(wheel.filename)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (packages,) = place.glob("lib/python*/site-packages")
    # A folder that a .pth file names is searched, but its own .pth files, such as that of an
    # editable install of this tree, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["XDG_CACHE_HOME"] = str(place / "cache")

    def run(*words: str) -> str:
        done = subprocess.run(
            [place / "bin" / "nanogpt", *words],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, f"nanogpt {' '.join(words)}:\n{done.stderr}"
        return done.stdout

    run.folder, run.python, run.environment = folder, python, environment
    return run


@pytest.mark.parametrize("name", [(), ("train",), ("data", "sotu")])
def test_the_installed_command_explains_itself(installed, name):
    assert "usage: nanogpt" in installed(*name, "--help")


def test_the_installed_command_is_the_wheels(installed):
    code = "import nanogpt, shampoo_jax; print(nanogpt.__file__, shampoo_jax.__file__)"
    done = subprocess.run(
        [installed.python, "-c", code],
        cwd=installed.folder, env=installed.environment, capture_output=True, text=True,
    )  # fmt: skip
    root = str(installed.python.parents[1])
    assert done.stdout.count(root) == 2 and str(ROOT) not in done.stdout


def test_from_text_to_a_picture_with_the_installed_command(installed):
    folder = installed.folder
    (folder / "texts").mkdir()
    for name in range(20):
        (folder / "texts" / f"{name}.txt").write_text("We the people of these States. " * 200)
    words = ("--directory", "mine", "--vocab-size", "300", "--val-tokens", "64")
    assert "bigram" in installed("data", "folder", "texts", *words)
    installed("train", "--optimizer", "shampoo", *TINY)
    assert "| Shampoo | 3 |" in installed("compare", "runs/cpu/shampoo")
    assert (folder / "runs" / "comparison.png").exists()
    # The curve is the package's own.
    assert "accepted" in installed("verdict", "t3_36_muon_tuned_3250.csv")
    installed("records", "--out", "published")
    assert (folder / "published" / "track3.png").exists()
