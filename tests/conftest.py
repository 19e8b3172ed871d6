"""Environment of the whole suite, set before anything imports jax.

Eight fake CPU devices stand in for a mesh. jaxlib's LAPACK spins a thread pool per call and XLA's
pool can starve on batched decompositions when it has as few threads as devices, hence the two
thread settings. Compiling is most of the suite's time: without LLVM's optimizations, and with the
older emitters of fused loops where jaxlib still has them, it takes half. What takes long is kept
for all tests of nanogpt, workers and the processes that they start, as long as the suite runs; not
for those of the library, since the text of a program that was kept is another one. `make golden`
and the test with a plain environment run the programs as users compile them.

Tracing makes many small objects that live briefly, and each collection calls back into jax: without
rarer ones a twentieth to an eighth of the suite's time is spent collecting.
"""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_optimization_level=0",
]
if version("jaxlib").startswith("0.10."):  # later ones end the process on an unknown flag
    flags.append("--xla_cpu_use_fusion_emitters=false")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
os.environ.setdefault("MPLBACKEND", "Agg")
# Else jax computes a key of every program, and notes where in the source each operation comes from.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")


COMPILED = "SUITE_COMPILED"  # variable with the folder


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder of compiled programs, unless this is a worker, who is told of it."""
    if not hasattr(config, "workerinput"):
        os.environ[COMPILED] = tempfile.mkdtemp(prefix="compiled-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[COMPILED], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Takes what the imports made out of later collections, and makes those rare."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
