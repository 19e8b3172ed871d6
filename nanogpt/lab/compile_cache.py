"""Compiled programs are kept for later processes, so that a resume does not compile again."""

import os
import pathlib
import platform

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def prepare() -> None:
    """Sets what jax reads when it is first imported; a folder that the user has set stays.

    A cached program is run as it is found, so the folder is nobody else's to write; where it cannot
    be made so, nothing is kept. It is one a host, since programs for a CPU are for that very CPU.
    """
    # OpenBLAS spins a thread pool for every decomposition, which is slower on few cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if VARIABLE in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(base, "shampoo-jax", f"compiled-{platform.node()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            return
        folder.chmod(0o700)
    except OSError:
        return
    os.environ[VARIABLE] = str(folder)
