"""The device: versions, clock, memory, its rates, and what is chosen for it by default."""

import pathlib
import platform
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nanogpt.config.run import ModelConfig
from nanogpt.model.gpt import GPT
from nanogpt.train.provenance import provenance
from scripts.maintenance.device import candidates
from scripts.maintenance.device.measure import Program, compile_all, on_gpu, ready, seconds_per_call
from scripts.maintenance.device.records import Recorder
from scripts.maintenance.device.sizes import Sizes

# File of the revision that is carried, for a copy of the checkout that git does not know.
REVISION = "revision"
QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.max.memory,power.limit,memory.total"


def run(part: str, recorder: Recorder, sizes: Sizes, carried: pathlib.Path) -> None:
    """Measures the part."""
    del part
    found = device()
    path = carried / REVISION
    if found["commit"] is None and path.exists():
        found["commit"] = path.read_text(encoding="utf-8").strip()
    recorder.add("device", **found)
    backend = jax.default_backend()
    for edge in sorted({edge for _, edge in sizes.stacks} | {128}):
        recorder.add("choices", name=f"edge {edge}", **candidates.choices(edge, backend))
    model = candidates.model_config(sizes, bfloat16=on_gpu())
    recorder.add("choices", name="attention", solver=_attention(model))
    _rates(recorder, sizes)
    recorder.attempt("clock", "after the products", _smi)


def _attention(config: ModelConfig) -> str:
    """The kernel in the model's program, of which nothing is run."""
    tokens = jax.ShapeDtypeStruct((1, config.sequence_length), jnp.int32)
    model = nnx.eval_shape(lambda: GPT(config, nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    program = jax.jit(lambda p, tokens: nnx.merge(graphdef, p)(tokens)).lower(params, tokens)
    return "cudnn" if "cudnn" in program.as_text() else "xla"


def device() -> dict[str, Any]:
    """Versions, kind and memory of the first device."""
    found = provenance()
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "kind": found["device"]["kind"],
        "platform": found["device"]["platform"],
        "versions": found["versions"] | _cuda(),
        "commit": found["git_commit"],
        "processor": platform.machine(),
        "memory_bytes": memory.get("bytes_limit"),
    }


def _cuda() -> dict[str, str]:
    """Versions of jax's CUDA plugin and of the libraries beside it, where there are any."""
    from importlib import metadata

    wanted = ("jax-cuda", "nvidia-cublas", "nvidia-cudnn", "nvidia-cusolver")
    names = {d.metadata["Name"]: d.version for d in metadata.distributions() if d.metadata["Name"]}
    return {name: v for name, v in sorted(names.items()) if name.startswith(wanted)}


def _smi() -> dict[str, Any]:
    """What the driver says of clocks, power and memory; nothing is set."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    values = done.stdout.strip().splitlines()[0].split(", ")
    return dict(zip(QUERY.split(","), values, strict=True))


def _rates(recorder: Recorder, sizes: Sizes) -> None:
    """Products of two large matrices, of stacks like the roots', and a stream through memory."""
    n, stacks = sizes.product, [(1, sizes.product), *sizes.stacks]
    programs = {}
    for name in candidates.PRECISIONS:
        for count, edge in stacks:
            struct = jax.ShapeDtypeStruct((count, edge, edge), jnp.float32)
            programs[f"{name}, {count} x {edge}"] = Program(
                candidates.product(name), (struct, struct)
            )
    half = jax.ShapeDtypeStruct((1, n, n), jnp.bfloat16)
    programs[f"bfloat16, 1 x {n}"] = Program(jnp.matmul, (half, half))
    flat = jax.ShapeDtypeStruct((sizes.stream,), jnp.float32)
    programs["memory"] = Program(lambda x: x + 1, (flat,), (0,))
    compiled = compile_all(programs, recorder.left())
    for name, program in programs.items():
        recorder.attempt("rates", name, lambda p=program, c=compiled[name]: _rate(p, c, sizes))


def _rate(program: Program, compiled: Any, sizes: Sizes) -> dict[str, float]:
    call, struct = ready(compiled), program.arguments[0]
    # Random numbers: products of zeros take less power and run faster.
    held = [jax.random.normal(jax.random.key(0, impl="rbg"), struct.shape, struct.dtype)]

    def once(_: int) -> Any:
        if program.donate:
            held[0] = call(held[0])
            return held[0]
        return call(held[0], held[0])

    seconds = seconds_per_call(once, rounds=sizes.rounds, calls=sizes.calls)
    if program.donate:
        return {"seconds": seconds, "bytes_per_s": 2 * 4 * sizes.stream / seconds}
    count, edge, _ = struct.shape
    return {"seconds": seconds, "flops_per_s": 2.0 * count * edge**3 / seconds}
