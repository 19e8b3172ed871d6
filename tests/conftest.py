"""Environment of the whole suite, set before anything imports jax.

Eight fake CPU devices stand in for a mesh. jaxlib's LAPACK spins a thread pool per call and XLA's
pool can starve on batched decompositions when it has as few threads as devices, hence the two
thread settings.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("MPLBACKEND", "Agg")
