"""Several processes as one job: how each finds the others, and how all end when one fails."""

import contextlib
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

# Setting -> variable that stands for its flag; those that Kubeflow's trainer sets, too.
_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# Number of processes and own number, as launchers tell each process; MPICH's are also Intel MPI's.
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID")
_OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
_MPICH = ("PMI_SIZE", "PMI_RANK")
_LAUNCHERS = (_SLURM, _OPEN_MPI, _MPICH)
# Without these jax cannot find the coordinator by itself.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_OPEN_MPI_URI = "OMPI_MCA_orte_hnp_uri"
_TPU_WORKERS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # on GKE
_TPU_SLICES = "MEGASCALE_NUM_SLICES"


class JobFailedError(Exception):
    """Some process failed in `agreed`; raised in all of them, so that all can end at once."""


def start(flags: Mapping[str, str | int | None], *, detect: bool = False) -> int:
    """Joins the processes of one job, if there are several. To be called before anything of jax.

    Args:
        flags: "coordinator_address" (host:port of process 0, the same in every process),
            "num_processes" and "process_id" (of this one, from 0); None stands for not given.
        detect: ask whatever jax knows, such as the metadata server of a TPU slice.

    Returns:
        The number of this process, 0 for the first.

    Raises:
        ValueError: as `join_arguments`.
    """
    arguments = join_arguments(os.environ, flags, detect=detect)
    # A program of several runs asks before each.
    if arguments is not None and not jax.distributed.is_initialized():
        jax.distributed.initialize(**arguments)
    return jax.process_index()


def join_arguments(
    environment: Mapping[str, str],
    flags: Mapping[str, str | int | None] = types.MappingProxyType({}),
    *,
    detect: bool = False,
) -> dict | None:
    """Arguments of `jax.distributed.initialize`; None if this process is alone.

    Flags come first, then `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; with
    an address, number and count may also be those of SLURM, Open MPI or MPICH. Without any of them
    jax itself reads what SLURM, Open MPI 4 and TPUs on GKE say.

    Args:
        environment: variables of this process.
        flags: any of the three settings; None stands for not given.
        detect: there are several, whether or not a variable says so.

    Raises:
        ValueError: settings that are incomplete, contradict each other or are out of range, or a
            launcher that does not say where process 0 is.

    >>> join_arguments({"JAX_COORDINATOR_ADDRESS": "node1:1234", "PMI_SIZE": "8", "PMI_RANK": "3"})
    {'coordinator_address': 'node1:1234', 'num_processes': 8, 'process_id': 3}
    >>> join_arguments({"SLURM_NTASKS": "1"}) is None
    True
    """
    settings = {name: _setting(name, flags.get(name), environment) for name in _VARIABLES}
    launcher = next((names for names in _LAUNCHERS if _number(names[0], environment) > 1), None)
    if any(value is not None for value in settings.values()):
        for name, variable in zip(("num_processes", "process_id"), launcher or (), strict=False):
            settings[name] = settings[name] or environment.get(variable)
        explicit = _complete(settings)
        return None if explicit["num_processes"] == 1 else explicit | _local_devices(environment)
    if launcher is not None:
        _require_coordinator(launcher, environment)
    hosts = [len(environment.get(name, "").split(",")) for name in _TPU_WORKERS]
    several = launcher or max(*hosts, _number(_TPU_SLICES, environment)) > 1
    return _local_devices(environment) if several or detect else None


@contextlib.contextmanager
def agreed(work: str) -> Iterator[None]:
    """Leaves the block when every process has done its work there, or raises in every process.

    What is done inside must not itself wait for other processes. With one process this does
    nothing, and errors pass through.

    Args:
        work: what is done, as in "opening the data".

    Raises:
        JobFailedError: the work failed in this process, or in another one.
    """
    failure = None
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failure = error
    if jax.process_count() == 1:
        return
    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(failure is not None)))
    if failure is not None:
        raise JobFailedError(f"{_this_process()} failed {work}: {_told(failure)}") from failure
    if failed.size:
        raise JobFailedError(
            f"process {failed[0]} of {jax.process_count()} failed {work}; its own output says why."
        )


@contextlib.contextmanager
def failing_for_all() -> Iterator[None]:
    """Ends this process at once if the block fails, so that no other one waits for it forever.

    Leaving in the ordinary way would wait for the others, which wait for this one. They notice the
    closed connections (CPU) or the missing heartbeats, at the latest after the 100 seconds that are
    the default of `jax.distributed.initialize`. With one process this does nothing.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        print(f"error: {_this_process()} failed: {_told(error)}", file=sys.stderr)
        print("The whole job ends: the other processes within 100 seconds.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def largest_of_all(number: int) -> int:
    """The largest of every process's number."""
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def _setting(name: str, flag: str | int | None, environment: Mapping[str, str]) -> str | None:
    """What flag or variable says; both may, if they say the same."""
    variable = environment.get(_VARIABLES[name])
    if flag is not None and variable is not None and str(flag) != variable:
        raise ValueError(
            f"{_flag(name)} {flag} contradicts {_VARIABLES[name]}={variable}: drop one of them."
        )
    return variable if flag is None else str(flag)


def _complete(settings: Mapping[str, str | None]) -> dict:
    """The three settings as jax takes them."""
    missing = [
        f"{_flag(name)} (or {_VARIABLES[name]})" for name, x in settings.items() if x is None
    ]
    if missing:
        given = [f"{_flag(name)} {x}" for name, x in settings.items() if x is not None]
        raise ValueError(
            f"{' and '.join(given)} without {' and '.join(missing)}: set all three, or none."
        )
    address, count, number = (str(x) for x in settings.values())
    if not re.fullmatch(r".+:\d+", address):
        raise ValueError(
            f"--coordinator-address {address} is not HOST:PORT: give a host that every process "
            "reaches and a free port of it, as in node1:12345."
        )
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(
            f"--process-id {number} of --num-processes {count}: processes are numbered from 0 to "
            "their count - 1."
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}


def _require_coordinator(launcher: tuple[str, str], environment: Mapping[str, str]) -> None:
    """Refuses launchers that do not tell jax where process 0 is."""
    told = f"{launcher[0]}={environment[launcher[0]]}"
    if launcher == _SLURM:
        missing = [name for name in _SLURM_STEP if name not in environment]
        if missing:
            raise ValueError(
                f"{told}, but {', '.join(missing)} not set: start the processes by srun, or unset "
                f"{launcher[0]} to run one process alone."
            )
    elif launcher == _MPICH or _OPEN_MPI_URI not in environment:
        raise ValueError(
            f"{told}, but this launcher (MPICH, Intel MPI, Open MPI 5) does not say where process "
            "0 is: give all processes the same --coordinator-address HOST:PORT."
        )


def _local_devices(environment: Mapping[str, str]) -> dict:
    """All GPUs for the only process of a SLURM node: jax would take the first one alone."""
    gpus = _number("SLURM_GPUS_ON_NODE", environment)
    single = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not single or gpus <= 1 or "JAX_LOCAL_DEVICE_IDS" in environment:
        return {}
    return {"local_device_ids": list(range(gpus))}


def _number(name: str, environment: Mapping[str, str]) -> int:
    value = environment.get(name) or "1"
    if not value.isdecimal():
        raise ValueError(f"{name}={value} is not a number: correct or unset it.")
    return int(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _this_process() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _told(error: BaseException) -> str:
    """The message of an error about input; of any other one, where it came from as well."""
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return "".join(traceback.format_exception(error))
