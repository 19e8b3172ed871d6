"""Starting one process of several: GPU nodes, TPU pods, or anything that names a coordinator."""

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

# What schedulers set in every process of a job that has more than one; see `jax.distributed`.
_SLURM, _MPI = "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"
_TPU_WORKERS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")  # on GKE
# Says that there are several where no variable does: Cloud TPU hosts ask a metadata server.
DISTRIBUTED = "DISTRIBUTED"
COORDINATOR, PROCESSES, PROCESS = "COORDINATOR_ADDRESS", "PROCESS_COUNT", "PROCESS_ID"


def start() -> int:
    """Joins the processes of one job, if the environment says that there are several.

    Recognized are `COORDINATOR_ADDRESS` (host:port) with `PROCESS_COUNT` and `PROCESS_ID`, which
    come first; jobs of SLURM, of Open MPI and on TPUs of GKE; and, by `DISTRIBUTED=1`, whatever
    else jax knows how to ask, such as the hosts of a TPU pod slice. To be called before anything
    else of jax.

    Returns:
        The number of this process, 0 for the first.

    Raises:
        ValueError: a coordinator without number of processes or own number.
    """
    arguments = join_arguments(os.environ)
    if arguments is not None:
        jax.distributed.initialize(**arguments)
    return jax.process_index()


def wait_for_all(reason: str) -> None:
    """Returns when every process has come here; at once if there is only one."""
    multihost_utils.sync_global_devices(reason)


def largest_of_all(number: int) -> int:
    """The largest of every process's number."""
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def join_arguments(environment: Mapping[str, str]) -> dict | None:
    """Arguments of `jax.distributed.initialize`; None if this process is alone.

    >>> join_arguments({"SLURM_NTASKS": "8"})
    {}
    >>> join_arguments({"SLURM_NTASKS": "1"}) is None
    True
    """
    if COORDINATOR in environment:
        missing = [name for name in (PROCESSES, PROCESS) if name not in environment]
        if missing:
            raise ValueError(
                f"{COORDINATOR} is set, but not {' and '.join(missing)}: set all three, or none."
            )
        return {
            "coordinator_address": environment[COORDINATOR],
            "num_processes": int(environment[PROCESSES]),
            "process_id": int(environment[PROCESS]),
        }
    jobs = [int(environment.get(name, "1")) for name in (_SLURM, _MPI)]
    hosts = [len(environment.get(name, "").split(",")) for name in _TPU_WORKERS]
    told = environment.get(DISTRIBUTED, "") not in ("", "0")
    return {} if told or max(*jobs, *hosts) > 1 else None
