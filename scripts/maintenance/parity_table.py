"""Measures how far we are from the data recorded from the benchmark's script.

    python -m scripts.maintenance.parity_table --page docs/parity.md

prints every comparison of `scripts.maintenance.parity`, the ones that the test suite makes and
some longer ones, and writes them as a table between two marks of the page. Exits 1 if one does not
hold. It takes about two minutes of a CPU.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from nanogpt.train.provenance import provenance
from scripts.maintenance.parity import inputs, model, optimizers, trajectories
from scripts.maintenance.parity.measurement import Measurement, misses

BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->\n"


def measurements() -> Iterator[Measurement]:
    """Every comparison, the quick ones first."""
    for world, rank in [(1, 0), *((4, rank) for rank in range(4))]:
        yield from inputs.loader(rank, world)
    yield from inputs.schedule()
    yield from inputs.warmups()
    yield from inputs.validation_steps()
    yield from model.normalization()
    yield from model.rotary()
    yield from model.float32()
    yield from model.bfloat16()
    for recipe in optimizers.ADAMW_RECIPES:
        yield from optimizers.adamw(recipe)
    yield from optimizers.newton_schulz()
    for dtype in ("float32", "bfloat16"):
        yield from optimizers.muon(dtype)
    for kind in trajectories.KINDS:
        yield from trajectories.trajectory(kind)
    for kind in trajectories.KINDS:
        if kind != "muon_f32ns":  # the script in its own precisions iterates in bfloat16
            yield from trajectories.trajectory_in_bfloat16(kind)


def table(found: Iterable[Measurement]) -> str:
    """Markdown table of comparisons, with the machine and versions that gave them.

    Args:
        found: The comparisons.
    """
    facts = provenance()
    versions = ", ".join(f"{k} {facts['versions'][k]}" for k in ("python", "jax", "optax", "flax"))
    lines = [
        f"Written by `python -m scripts.maintenance.parity_table --page docs/parity.md` with "
        f"{versions} on "
        f"{facts['device']['kind']}.",
        "",
        "| recorded | compared | error | tolerance | spread |",
        "| --- | --- | ---: | ---: | ---: |",
        *(
            f"| {m.golden} | {m.what} | {m.error:.1e} | {m.tolerance:.1e} | "
            f"{'' if m.spread is None else f'{m.spread:.1e}'} |"
            for m in found
        ),
    ]
    return "\n".join(lines) + "\n"


def write(page: Path, text: str) -> None:
    """Replaces what stands between the two marks of a page.

    Args:
        page: Markdown file.
        text: What will stand there.

    Raises:
        ValueError: The page does not have both marks, once each and in order.
    """
    content = page.read_text(encoding="utf-8")
    head, begin, rest = content.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(
            f"{page}: must have the lines {BEGIN.strip()!r} and {END.strip()!r} once each, in this "
            "order: add them where the table belongs."
        )
    page.write_text(head + begin + text + end + tail, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Prints all comparisons; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="Markdown file to write the table into")
    options = parser.parse_args(argv)
    found = []
    for measurement in measurements():
        found.append(measurement)
        verdict = "MISS" if misses([measurement]) else ""
        print(
            f"{measurement.golden:34s} {measurement.what:50s} {measurement.error:8.1e} of "
            f"{measurement.tolerance:8.1e} {verdict}",
            flush=True,
        )
    if options.page:
        write(options.page, table(found))
    return 1 if misses(found) else 0


if __name__ == "__main__":
    sys.exit(main())
