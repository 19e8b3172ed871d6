"""What checkpoints cost: room on a disk, waiting, memory. Writes docs/checkpoints.md.

    python -m scripts.maintenance.checkpoint_cost                 all of it, some minutes
    python -m scripts.maintenance.checkpoint_cost sizes memory    parts; the others stay

On a machine that is busy with other things, `chrt -r 5` in front gives it what it asks for.

sizes: the folder of a checkpoint of every recipe of track 3 on the model of preset cpu, and the
state's bytes by shapes at full size. waiting: seconds that runs of preset cpu, and a save of a
gigabyte, kept training from going on. memory: one process with eight fake CPU devices saves
Shampoo's state of `COUNT` matrices of 512x512; then one, and then two processes of a job, restore
it, with eight devices in all. Were a state gathered, every process would hold all of it once more.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

COUNT, SIZE = 64, 512
ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN = "--preset cpu --schedule.steps 40 --output.checkpoint-every 5 --val-every 40".split()
PUBLISHED = "t3_36_muon_tuned_3250"  # the curve whose time is that of a training at full size
MINUTES = 10  # between saves on track3


def work(arguments: argparse.Namespace) -> None:
    """Saves or restores in this process, and prints what it needed."""
    import jax

    from nanogpt.train import distributed
    from nanogpt.train.compatible import layout_of
    from nanogpt.train.elastic import read_state

    if arguments.processes > 1:
        distributed.start(
            {
                "coordinator_address": arguments.address,
                "num_processes": arguments.processes,
                "process_id": arguments.number,
            }
        )
    state = _stacks(jax.device_count())
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6
    folder = pathlib.Path(arguments.folder) / "state"
    if arguments.save:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as writer:
            writer.save(folder, state)
        return
    stored = layout_of(state)
    before = resident()
    read = jax.block_until_ready(read_state(folder, state, stored))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    shards = [s.data.nbytes for x in jax.tree.leaves(read) for s in x.addressable_shards]
    own = sum(shards) / 1e6
    row = [arguments.processes, arguments.number, size, own, before, peak, (peak - before) / own]
    print(json.dumps(row), flush=True)


def _stacks(devices: int) -> Any:
    """Shampoo's state of many matrices on a mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType

    import shampoo_jax as sj
    from nanogpt.train.mesh import AXES, Layout

    layout = Layout(jax.make_mesh((1, devices), AXES, (AxisType.Auto,) * 2))
    tx = sj.scale_by_shampoo(placement=layout.placement)

    @jax.jit
    def init() -> Any:
        params = {f"w{k}": jnp.ones((SIZE, SIZE)) for k in range(COUNT)}
        return tx.init(layout.pin(params))

    return jax.block_until_ready(init())


def resident() -> float:
    """Megabytes that this process holds now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def start(folder: str, processes: int, number: int, address: str, *more: str) -> subprocess.Popen:
    """Starts one process of a job, with its part of eight devices."""
    flag = f"--xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    told = ["--processes", str(processes), "--number", str(number), "--address", address]
    module = "scripts.maintenance.checkpoint_cost"
    words = [sys.executable, "-m", module, "--folder", folder, *told, *more]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def memory() -> list[list[float]]:
    """Saves once, restores in one process and in two; a row of figures for each of these."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start(folder, 1, 0, "", "--save").wait()
        for processes in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            job = [start(folder, processes, k, address) for k in range(processes)]
            rows += [json.loads(process.communicate()[0].splitlines()[-1]) for process in job]
    return rows


def sizes() -> dict[str, list[int]]:
    """By recipe: parameters and bytes on disk of a small model, parameters and bytes at full size.

    Those on disk are of a state that is drawn at random: zeros would be compressed.
    """
    import jax
    import numpy as np

    from nanogpt.config.presets import PRESETS, preset
    from nanogpt.optimizers.build import build_optimizer
    from nanogpt.train.train_step import TrainState, abstract_params, init_state

    chance = np.random.default_rng(0)

    def drawn(x: jax.Array) -> jax.Array:
        return jax.numpy.asarray(chance.normal(size=x.shape) * 100, x.dtype)

    found = {}
    for name in PRESETS["track3"]:
        full = preset("track3", name)
        small = dataclasses.replace(full, model=preset("cpu", "adamw").model)
        params = abstract_params(small.model)
        state = init_state(small, build_optimizer(small, params, None))[1]
        state = TrainState(state.step, *jax.tree.map(drawn, (state.params, state.opt_state)))
        large = abstract_params(full.model)
        moments = jax.eval_shape(build_optimizer(full, large, None).init, large)
        found[name] = [_count(params), _on_disk(small, state), _count(large)]
        found[name].append(
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((large, moments)))
        )
        print(name, found[name], flush=True)
    return found


def _count(params: Any) -> int:
    import jax

    return sum(x.size for x in jax.tree.leaves(params))


@contextlib.contextmanager
def _checkpoints(config: Any) -> Any:
    """Checkpoints of a run in a folder of their own, and data that are only counted."""
    import grain

    from nanogpt.train.checkpoint import Checkpoints

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(pathlib.Path(folder), config, "no data")
        data = iter(grain.MapDataset.range(9).to_iter_dataset())
        with contextlib.closing(checkpoints), contextlib.closing(data):
            yield checkpoints, data, pathlib.Path(folder)


def _on_disk(config: Any, state: Any) -> int:
    with _checkpoints(config) as (checkpoints, data, folder):
        checkpoints.save(0, state, data, 0.0)
        checkpoints.wait()
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def waiting() -> dict[str, list[float]]:
    """Seconds by save of runs of preset cpu; as "gigabyte" those of a gigabyte, and its size."""
    import jax

    from nanogpt.config.presets import preset
    from nanogpt.lab.command_line import DEMO
    from nanogpt.train.train_step import TrainState

    found = {}
    with tempfile.TemporaryDirectory() as runs:
        for name in DEMO:
            words = ["train", *RUN, "--optimizer", name, "--name", name, "--output.directory", runs]
            subprocess.run([sys.executable, "-m", "nanogpt", *words], cwd=ROOT, check=True)
            lines = (pathlib.Path(runs) / name / "metrics.jsonl").read_text().splitlines()
            saves = [one for one in map(json.loads, lines) if one["kind"] == "save"]
            found[name] = [one["save_blocked_s"] for one in saves]
    stacks = _stacks(1)
    gigabytes = sum(x.nbytes for x in jax.tree.leaves(stacks)) / 1e9
    with _checkpoints(preset("cpu", "shampoo")) as (checkpoints, data, _):
        for step in range(4):
            state = TrainState(jax.numpy.int32(step), stacks, ())
            checkpoints.wait()
            begin = time.perf_counter()
            checkpoints.save(step, state, data, 0.0)
            found.setdefault("gigabyte", []).append(time.perf_counter() - begin)
    found["gigabyte"].append(gigabytes)
    return found


TEXT = """\
# What checkpoints cost

`python -m scripts.maintenance.checkpoint_cost` saves and restores by a run's own code on CPUs;
{versions}.

## Time

Seconds that training waited for a save, of runs of preset cpu (the records "save"). Promised is at
most 0.3.

{waiting}

A state of {gigabytes:.2f} GB, in few arrays: {rate:.2f} s per GB. Track 3 trains for
{seconds:.0f} s as published ({published}, eight GPUs), which with {minutes} minutes
between saves, and the last one, makes {saves}. The share "waiting" below is of so many saves, each
with the {fixed:.2f} s that those of preset cpu take at the median, and that rate, as if one host
copied all of it; how fast a GPU's memory is copied is not measured here. Promised is 1 %.

## Room

A checkpoint's folder with the model of preset cpu, and a state's bytes by its shapes at full size.

{sizes}

## Memory of a restore

Shampoo's state of {count} matrices of {size}x{size} on eight devices, in parts; MB. More than its
parts is what a process held at most beyond what it held before.

{memory}
"""


def page(found: dict[str, Any]) -> str:
    """Returns the report in Markdown."""
    from nanogpt.report.curves import published_file, read_reference
    from nanogpt.report.tables import markdown
    from nanogpt.train.provenance import provenance

    seconds = read_reference(published_file(pathlib.Path(f"{PUBLISHED}.csv"))).seconds[-1]
    *blocked, gigabytes = found["waiting"]["gigabyte"]
    rate, saves = statistics.median(blocked) / gigabytes, int(seconds // (60 * MINUTES)) + 1
    runs = [told for name, told in found["waiting"].items() if name != "gigabyte"]
    fixed = statistics.median(seconds for told in runs for seconds in told)
    waited = [
        [name, str(len(told)), f"{statistics.median(told):.3f}", f"{max(told):.3f}"]
        for name, told in found["waiting"].items()
        if name != "gigabyte"
    ]
    rooms = []
    for name, (small, disk, large, state) in found["sizes"].items():
        share = saves * (fixed + rate * state / 1e9) / seconds
        each = [f"{disk / small:.1f}", f"{state / large:.1f}", f"{state / 1e9:.2f}"]
        rooms.append([name, *each, f"{share:.2%}"])
    restored = [
        [str(processes), str(number), *(f"{value:.0f}" for value in figures), f"{times:.2f}"]
        for processes, number, *figures, times in found["memory"]
    ]
    heads = ["on disk, bytes a parameter", "track 3, bytes a parameter", "track 3, GB", "waiting"]
    held = ["number", "state", "its parts", "held before", "at most", "more, over its parts"]
    return TEXT.format(
        versions=", ".join(f"{name} {value}" for name, value in provenance()["versions"].items()),
        waiting=markdown(["optimizer", "saves", "median", "longest"], waited, texts=1),
        sizes=markdown(["recipe", *heads], rooms, texts=1),
        memory=markdown(["processes", *held], restored, texts=0),
        gigabytes=gigabytes, rate=rate, fixed=fixed, seconds=seconds, published=PUBLISHED,
        minutes=MINUTES, saves=saves, count=COUNT, size=SIZE,
    )  # fmt: skip


PARTS = {"sizes": sizes, "waiting": waiting, "memory": memory}


def main() -> None:
    """Runs the command line; parts that were measured before stay."""
    parser = argparse.ArgumentParser("checkpoint_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="folder of the report")
    hidden = parser.add_argument_group("of the processes that restore")
    hidden.add_argument("--folder")
    hidden.add_argument("--processes", type=int, default=1)
    hidden.add_argument("--number", type=int, default=0)
    hidden.add_argument("--address", default="")
    hidden.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.folder:
        work(arguments)
        return
    kept = arguments.docs / "checkpoints.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for part in arguments.parts or PARTS:
        found[part] = PARTS[part]()
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if found.keys() >= PARTS.keys():
        (arguments.docs / "checkpoints.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
