"""Our model, optimizers, loader and training against data recorded from the benchmark's script.

The functions of `model`, `optimizers`, `inputs` and `trajectories` that give measurements are
called by the test suite, which asks for no misses, and by `scripts.maintenance.parity_table`,
which prints all.
"""
