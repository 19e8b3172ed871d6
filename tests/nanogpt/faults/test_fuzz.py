"""Files with faults in them are refused in a sentence, and nothing that is read can execute."""

import ast
import pathlib
import random

import pytest

from scripts.maintenance.faulting.fuzz import fuzz
from scripts.maintenance.faulting.kinds import KINDS
from scripts.maintenance.faulting.mutants import KINDS as FAULTS
from scripts.maintenance.faulting.mutants import mutate
from scripts.maintenance.faulting.saved import CRAFTED

ROOT = pathlib.Path(__file__).parents[3]
PACKAGES = ("shampoo_jax", "nanogpt", "data_pipeline")
# What makes objects, or code, of bytes.
MAKERS = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("dill.load", "cloudpickle.load", "joblib.load", "yaml.unsafe_load", "yaml.full_load"),
}


# Those with digests made anew are for `make faults` alone: of arrays that cannot be read Orbax
# leaves tasks behind, whose complaints come in any later test.
@pytest.mark.parametrize("kind", [k for k in KINDS if k is not CRAFTED], ids=lambda kind: kind.name)
def test_mutants_are_refused_or_read_within_their_range(kind, tmp_path):
    trial = fuzz(kind, tmp_path / "files", 25, seed=17)
    assert (trial.survived, trial.tried) == (25, 25), trial.told


def test_mutants_differ_from_the_whole_file():
    chance, whole = random.Random(0), b'{"count": 12, "name": "text"}' * 40
    for fault in FAULTS:
        assert any(mutate(whole, chance, fault) != whole for _ in range(5)), fault


def complaints(text):
    """Calls that could execute what they read."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        if name in MAKERS:
            yield f"{node.lineno}: {name}"
        if (
            name in ("np.load", "numpy.load")
            and ast.unparse(words.get("allow_pickle", ast.Constant(None))) != "False"
        ):
            yield f"{node.lineno}: {name} without allow_pickle=False"
        if (
            name == "torch.load"
            and ast.unparse(words.get("weights_only", ast.Constant(None))) != "True"
        ):
            yield f"{node.lineno}: {name} without weights_only=True"
        if name == "yaml.load" and ast.unparse(node.args[1]) != "_PlainLoader":
            yield f"{node.lineno}: {name} with another loader"


def test_nothing_that_is_read_can_execute():
    found = {
        path: list(complaints(path.read_text(encoding="utf-8")))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert len(found) > 100 and not {path: told for path, told in found.items() if told}


@pytest.mark.parametrize(
    "text",
    ["eval(x)", "pickle.loads(x)", "np.load(f)", "torch.load(f)", "yaml.load(t, yaml.Loader)"],
)
def test_what_could_execute_is_seen(text):
    assert list(complaints(text))
