"""What a training step sends, with --scatter-gradients and without.

Compiles the whole training step of a preset for eight devices made of one CPU, both ways, and reads
number and bytes of its exchanges out of the optimized program; those inside the loop over
microbatches count once for each. Nothing is executed, so this runs for 124M parameters as well:

    python -m scripts.maintenance.gradient_exchange --preset track3 --optimizer shampoo
        --microbatch-rows 128

In a ring of n, a device sends (n - 1) / n of what it gathers or exchanges, n - 1 times what it
keeps of what is scattered, and 2 (n - 1) / n of what is summed everywhere. XLA on CPU has no
exchanges in bfloat16, so what would travel in it is counted in float32.
"""

import argparse
import collections
import dataclasses
import os
import time
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from nanogpt.config.presets import PRESETS, preset
from nanogpt.config.run import Config
from nanogpt.train.mesh import make_layout
from nanogpt.train.plan import abstract_step
from shampoo_jax import exchanges


def compiled_step(config: Config) -> str:
    """Optimized program of one training step of one device of `config.mesh`."""
    layout = make_layout(config)
    if layout is None:
        raise ValueError(f"mesh={config.mesh!r} is one device, which sends nothing: name a mesh.")
    step, state, batch = abstract_step(config, layout)
    return step.lower(state, batch).compile().as_text() or ""


def step_exchanges(program: str, microbatches: int) -> dict[str, tuple[int, int]]:
    """Number and bytes of results by kind of exchange, of a whole step.

    Args:
      program: From `compiled_step`.
      microbatches: Turns of its loop.
    """
    found: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for line in program.splitlines():
        # The forward and backward passes are the only loop with exchanges in it.
        turns = microbatches if "/while/body" in line else 1
        for kind, (count, size) in exchanges(line).items():
            found[kind] += count * turns
            total[kind] += size * turns
    return {kind: (found[kind], total[kind]) for kind in found}


def sent(found: dict[str, tuple[int, int]], devices: int) -> float:
    """Bytes that one device sends in a step, by rings."""
    factors = {"all-reduce": 2 * (devices - 1) / devices, "reduce-scatter": devices - 1.0}
    return sum(
        size * factors.get(kind, (devices - 1) / devices) for kind, (_, size) in found.items()
    )


def table(config: Config) -> str:
    """Markdown: one row for each way."""
    microbatches = config.data.batch_rows // config.data.microbatch_rows
    lines = ["| gradients | exchanges of a step: number, MB of results | sent by a device, MB |"]
    lines += ["|---|---|---|"]
    for scatter in (False, True):
        one = dataclasses.replace(config, scatter_gradients=scatter)
        found = step_exchanges(compiled_step(one), microbatches)
        each = "; ".join(f"{n} {kind} {size / 1e6:,.1f}" for kind, (n, size) in found.items())
        way = "scattered" if scatter else "by the compiler"
        lines.append(f"| {way} | {each} | {sent(found, jax.device_count()) / 1e6:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--optimizer", default="shampoo")
    parser.add_argument("--microbatch-rows", type=int, default=8, help="over all devices")
    parser.add_argument("--batch-rows", type=int, help="of a step; the preset's if left out")
    options = parser.parse_args()
    config = preset(options.preset, options.optimizer)
    data: dict[str, Any] = {"microbatch_rows": options.microbatch_rows}
    if options.batch_rows is not None:
        data["batch_rows"] = options.batch_rows
    config = dataclasses.replace(
        config, mesh="data=-1", data=dataclasses.replace(config.data, **data)
    )
    begin = time.perf_counter()
    print(table(config))
    print(f"\ncompiled twice in {time.perf_counter() - begin:.0f} s, jax {jax.__version__}")


if __name__ == "__main__":
    main()
