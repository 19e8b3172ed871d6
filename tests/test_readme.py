"""README.md and the pages that go on from it do what they say.

Python blocks run, each in its own namespace and an empty directory. Of shell blocks every command
is checked against what it calls: the make target, the command and its flags, the extra. The two
long commands (`make speedrun`, `make test`) are thus known to exist but not run here.
"""

import contextlib
import functools
import io
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest

from nanogpt import cli
from scripts.maintenance.site.blocks import Block, fenced_blocks, run

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/library.md",
    "docs/gallery/README.md",
    "docs/extending.md",
    "docs/meshes.md",
    "docs/methods/transfer.md",
    "docs/speedrun.md",
    "docs/running.md",
    "docs/using.md",
    "docs/spectra.md",
    "docs/rig.md",
    "docs/methods/bias_correction.md",
    "docs/methods/purifying.md",
    "docs/methods/asgo.md",
)
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
LONGEST = 180  # lines of README.md
SHELLS = {"bash", "sh", "console"}


def commands(block: Block) -> list[list[str]]:
    """Returns the words of each command of a shell block; of console blocks, the `$` lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        command: list[str] = []
        for word in words:
            if set(word) <= set("&|;"):
                found.append(command)
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=.*", word):  # leading variable settings
                command.append(word)
        found.append(command)
    return [command for command in found if command]


def check_make(*arguments: str) -> None:
    """Every word that is no flag is a target, or sets a variable that the Makefile has."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.M)
    variables = re.findall(r"^([A-Z_]+) \?=", makefile, re.M)
    for argument in arguments:
        if "=" in argument:
            name = argument.split("=")[0]
            assert name in variables, f"make has no variable {name!r}; it has {variables}"
        elif not argument.startswith("-"):
            assert argument in targets, f"make has no target {argument!r}; it has {targets}"


@functools.cache
def help_text(*command: str) -> str:
    """Returns what `nanogpt COMMAND --help` prints, without another process's imports."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*command, "--help"])
    assert "usage: nanogpt" in printed.getvalue(), f"{command} failed:\n{printed.getvalue()}"
    return printed.getvalue()


def check_nanogpt(*arguments: str) -> None:
    """The command exists, and its help names every flag."""
    known = [name for group in cli.COMMANDS.values() for name in group]
    assert arguments[0] in known, f"nanogpt has no command {arguments[0]!r}, only {known}"
    words = [a for a in arguments if not a.startswith("-")] if arguments[0] == "data" else []
    flags = [a.split("=")[0] for a in arguments[1:] if a.startswith("-")]
    # Settings are those of the optimizer that is named.
    pairs = list(itertools.pairwise(arguments))
    named = [w for pair in pairs if pair[0] in ("--preset", "--optimizer") for w in pair]
    text = help_text(*(words[:2] or (arguments[0], *named)))
    found = re.findall(r"(?<![\w-])--?[a-z][\w.-]*", text)
    for flag in flags:
        assert flag in found, f"nanogpt {arguments[0]} knows no flag {flag!r}, only {found}"


def check_pip(*arguments: str) -> None:
    """Every extra in brackets is one of pyproject.toml's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
        for extra in extras.split(","):
            assert extra in project["optional-dependencies"], f"there is no extra {extra!r}"


def check_sbatch(*arguments: str) -> None:
    """Sbatch's own options, then one of our scripts with the flags of a run."""
    script = next(k for k, word in enumerate(arguments) if word.startswith("scripts/launch/"))
    check(list(arguments[script:]))


CHECKS = {"make": check_make, "nanogpt": check_nanogpt, "pip": check_pip, "sbatch": check_sbatch}
UNCHECKED = {"git", "cd", "source", "export"}


def check(command: list[str]) -> None:
    """Checks one command against the tree."""
    if command[0].startswith("scripts/launch/"):
        assert (ROOT / command[0]).exists(), f"there is no {command[0]}"
        check_nanogpt("train", *command[1:])
        return
    program = Path(command[0]).name
    assert program in CHECKS or program in UNCHECKED, (
        f"a page uses {program!r}; teach tests/test_readme.py how to check it"
    )
    if program in CHECKS:
        CHECKS[program](*command[1:])


def every_block() -> list[Block]:
    """The blocks of all pages."""
    return [block for page, text in TEXTS.items() for block in fenced_blocks(text, page)]


def blocks_in(*languages: str) -> list:
    """Blocks of these languages, as parameters of a test."""
    found = [block for block in every_block() if block.language in languages]
    return [pytest.param(block, id=f"{block.page}:{block.line}") for block in found]


@pytest.mark.parametrize("block", blocks_in("python"))
def test_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block, ROOT / block.page, {"__name__": "__main__"})


@pytest.mark.parametrize("block", blocks_in(*SHELLS))
def test_shell_block_names_what_exists(block):
    found = commands(block)
    assert found
    for command in found:
        check(command)


TINY = """
--model.num-layers 1 --model.model-dim 16 --model.head-dim 8 --model.mlp-dim 32 --schedule.steps 6
--output.log-every 1 --optimizer adamw
""".split()


def test_own_text_becomes_a_run_and_a_picture(tmp_path, monkeypatch, capsys):
    """The pages' commands on a folder of 3 MB, with a tiny model and nothing else changed."""
    words = "the people of these States and their government shall keep peace with all nations"
    picked = np.random.default_rng(0).choice(words.split(), 560_000)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "all.txt").write_text(" ".join(picked), encoding="utf-8")
    blocks = [block for block in every_block() if block.language in SHELLS]
    found = [command for block in blocks for command in commands(block)]
    prepare, train = (
        next(c for c in found if c[:2] == ["nanogpt", name] and "my_texts" in " ".join(c))
        for name in ("data", "demo")
    )

    def run(*command: str) -> str:
        cli.main(command)
        return "".join(capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    run(*prepare[1:])
    trained = run(*train[1:], *TINY)
    assert "warning" not in trained and "bits per byte" in trained
    (metrics,) = (tmp_path / "runs").rglob("metrics.jsonl")
    compared = run("compare", str(metrics.parent))
    assert "| AdamW | 6 |" in compared and "bigram" in compared
    assert (tmp_path / "runs" / "comparison.png").exists()


def test_every_block_is_executed_or_checked():
    blocks = every_block()
    assert sum(text.count("```") for text in TEXTS.values()) == 2 * len(blocks)
    assert {"python", "bash"} <= {block.language for block in blocks} <= SHELLS | {"python", "text"}


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page):
    shown = re.sub(r"<!--.*?-->", "", TEXTS[page], flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", shown)
    assert targets
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing, f"{page} links to {missing}"


def test_readme_is_short_and_leads_to_every_page():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= LONGEST
    assert [page for page in PAGES[1:] if f"]({page})" not in readme] == []


def test_commands_are_found():
    block = Block("bash", 1, "cd x && make test  # why\nA=1 python -m a.b \\\n  --c 'd e'\n")
    assert commands(block) == [
        ["cd", "x"],
        ["make", "test"],
        ["python", "-m", "a.b", "--c", "d e"],
    ]
    block = Block("console", 1, "$ make help\n  make test\n")
    assert commands(block) == [["make", "help"]]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make speedrunn", "no target 'speedrunn'"),
        ("make speedrun ARG=--resume", "no variable 'ARG'"),
        ("nanogpt nothing", "no command 'nothing'"),
        ("nanogpt demo --no-such-flag 3", "no flag '--no-such-flag'"),
        ("pip install '.[cuda99]'", "no extra 'cuda99'"),
        ("curl x", "teach"),
    ],
)
def test_a_wrong_command_is_reported(command, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check(commands(Block("bash", 1, command))[0])
