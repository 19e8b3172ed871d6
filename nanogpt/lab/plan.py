"""Compiles a run for hardware that is not here: nanogpt plan --target h100:8 --help."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from nanogpt.lab.command import command
from nanogpt.lab.command_line import Choice, read_config

DESCRIPTION = """Compiles training step and evaluation of a run for hardware that is not here.

Says whether they fit, what they compute and send, and how long a step may take. Settings are those
of `nanogpt train`. GPUs and TPUs need the environment of `make compilers`.
"""
READY = "NANOGPT_PLAN"  # set in the process that has the environment of a target


@dataclasses.dataclass(frozen=True)
class Plan:
    """For which hardware, and which run."""

    target: str = (
        "h100:8"  # a100, h100, h200, b200 or cpu with a number; v5e, v5p, v6e with a shape
    )
    preset: str = "track3"  # complete set of settings
    optimizer: str = "shampoo"  # one of the preset's
    layers: int | None = None  # of so many transformer blocks; None: the preset's
    programs: tuple[Literal["train", "gradients", "update", "evaluation"], ...] = (
        *("train", "gradients", "evaluation"),  # gradients: train without optimizer; update: it
    )
    largest_microbatch: bool = False  # find the largest that fits, by more compilations
    json: bool = False  # print one line of JSON


@command(RuntimeError)
def main(words: Sequence[str]) -> None:
    """Runs the command line."""
    chosen, rest = tyro.cli(
        tyro.conf.FlagCreatePairsOff[Plan],
        prog="nanogpt plan",
        description=DESCRIPTION,
        args=words,
        return_unknown_args=True,
    )
    config: Any = read_config(
        Choice(preset=chosen.preset),  # type: ignore[arg-type]
        chosen.optimizer,
        f"{chosen.preset}-{chosen.optimizer}",
        rest,
    )
    if chosen.layers is not None:
        model = dataclasses.replace(config.model, num_layers=chosen.layers)
        config = dataclasses.replace(config, model=model)
    start_again(chosen.target, "nanogpt", "plan", *words)
    from nanogpt.train.plan import plan_run
    from shampoo_jax import target_devices

    record = plan_run(
        config, target_devices(chosen.target), chosen.programs, chosen.largest_microbatch
    )
    print(json.dumps(record) if chosen.json else page(record))


def start_again(target: str, *module: str) -> None:
    """Starts this process anew in the environment of a target, unless that has been done.

    Libraries are looked for in places that a process is told when it starts.

    Args:
        target: a name for `shampoo_jax.target_devices`.
        *module: that runs, and its words.
    """
    if READY not in os.environ:
        words = [sys.executable, "-m", *module]
        os.execve(sys.executable, words, os.environ | environment(target))


def environment(target: str) -> dict[str, str]:
    """Variables of a process that compiles for a target.

    >>> environment("cpu:8")["XLA_FLAGS"].split()[-1]
    '--xla_force_host_platform_device_count=8'
    """
    kind, _, size = target.partition(":")
    found = {READY: "1", "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    if kind == "cpu":
        flag = f"--xla_force_host_platform_device_count={size}"
        return found | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()}
    folder = Path(sys.prefix, "compilers", "tpu" if kind.startswith("v") else "cuda")
    libraries = (folder / "nvidia" / name / "lib" for name in ("cudnn", "cu13"))
    return found | {
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder)))),
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, (*map(str, libraries), os.environ.get("LD_LIBRARY_PATH")))
        ),
    }


def page(record: Mapping[str, Any]) -> str:
    """A plan for people."""
    memory = record["memory"]
    lines = [
        f"{record['run']} for {record['target']}: {record['devices']} devices, mesh "
        f"{record['mesh']}, {record['microbatch_rows']} of {record['batch_rows']} rows at a time",
        f"each holds {_bytes(record['parameters'])} of parameters and "
        f"{_bytes(record['optimizer_state'])} of optimizer state"
        + (f" in {_bytes(memory)}" if memory else ""),
    ]
    if "largest_microbatch_rows" in record:
        lines.append(f"largest microbatch that fits: {record['largest_microbatch_rows']} rows")
    for name, program in record["programs"].items():
        lines += ["", f"{name}: compiled in {program['compile_s']:.0f} s"]
        if program["short"]:
            lines.append(f"  does NOT fit: {_bytes(program['short'])} missing")
        if "peak" not in program:
            continue
        fits = memory and not program["short"]
        room = f", {_bytes(memory - program['peak'])} free" if fits else ""
        lines.append(f"  memory      {_bytes(program['peak'])} at most{room}")
        lines.append(f"  temporary   {_bytes(program['temporary'])}")
        split = record["temporary"]
        if name == "train" and "optimizer" in split:
            lines.append(
                f"              {_bytes(split['activations'])} activations, "
                f"{_bytes(split['gradient_sums'])} sums of gradients, "
                f"{_bytes(split['optimizer'])} more for the optimizer"
            )
        lines += _counts(program)
    return "\n".join(lines)


def _counts(program: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  products    {n / 1e9:,.1f} GFLOP {kind}" for kind, n in sorted(program["flops"].items())
    ]
    beside = program["overlapped"]
    for kind, (count, size) in program["exchanges"].items():
        number, part = beside.get(kind, (0, 0))
        also = f", beside products {number} of them, {part / 1e6:,.1f} MB" if number else ""
        lines.append(f"  exchanges   {count} {kind}, {size / 1e6:,.1f} MB{also}")
    lines += [f"  calls       {n} {name}" for name, n in sorted(program["calls"].items())]
    if "seconds" in program:
        each = ", ".join(f"{k} {1e3 * s:,.1f}" for k, s in program["seconds"].items())
        lines.append(
            f"  predicted   {1e3 * program['best_s']:,.1f} to {1e3 * program['worst_s']:,.1f} ms: "
            f"at published rates {each} ms; what can be at once, or one after the other at 40 %"
        )
    return lines


def _bytes(size: int) -> str:
    """With a unit.

    >>> _bytes(3 << 29), _bytes(3 << 19)
    ('1.50 GiB', '1.50 MiB')
    """
    return f"{size / 2**30:.2f} GiB" if size >> 30 else f"{size / 2**20:.2f} MiB"
