"""Resident memory of the processes that restore a state, against the state's size.

    python -m scripts.maintenance.restore_memory

One process with eight fake CPU devices saves Shampoo's state of `COUNT` matrices of 512x512; then
one, and then two processes of a job, restore it, with eight devices in all. Were a state gathered,
every process would hold all of it once more.
"""

import argparse
import os
import pathlib
import resource
import socket
import subprocess
import sys
import tempfile

COUNT, SIZE = 64, 512
ROOT = pathlib.Path(__file__).parents[2]


def work(arguments: argparse.Namespace) -> None:
    """Saves or restores in this process, and prints what it needed."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType

    import shampoo_jax as sj
    from nanogpt.train import distributed
    from nanogpt.train.compatible import layout_of
    from nanogpt.train.elastic import read_state
    from nanogpt.train.mesh import AXES, Layout

    if arguments.processes > 1:
        distributed.start(
            {
                "coordinator_address": arguments.address,
                "num_processes": arguments.processes,
                "process_id": arguments.number,
            }
        )
    mesh = jax.make_mesh((1, jax.device_count()), AXES, (AxisType.Auto,) * 2)
    layout = Layout(mesh)
    tx = sj.scale_by_shampoo(placement=layout.placement)

    @jax.jit
    def init():
        params = {f"w{k}": jnp.ones((SIZE, SIZE)) for k in range(COUNT)}
        return tx.init(layout.pin(params))

    state = jax.block_until_ready(init())
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
    print(
        f"process {arguments.number} of {arguments.processes}: state {size:.0f} MB, its shards "
        f"{own:.0f} MB; resident {before:.0f} MB before, {peak:.0f} MB at most: "
        f"{(peak - before) / own:.2f} times its shards",
        flush=True,
    )


def resident() -> float:
    """Megabytes that this process holds now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def start(folder: str, processes: int, number: int, address: str, *more: str) -> subprocess.Popen:
    """Starts one process of a job, with its part of eight devices."""
    flag = f"--xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    told = ["--processes", str(processes), "--number", str(number), "--address", address]
    module = "scripts.maintenance.restore_memory"
    words = [sys.executable, "-m", module, "--folder", folder, *told, *more]
    return subprocess.Popen(words, cwd=ROOT, env=environment)


def main() -> None:
    """Saves once, restores in one process and in two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--address", default="")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.folder:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        start(folder, 1, 0, "", "--save").wait()
        for processes in (1, 2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            job = [start(folder, processes, k, address) for k in range(processes)]
            for process in job:
                process.wait()


if __name__ == "__main__":
    main()
