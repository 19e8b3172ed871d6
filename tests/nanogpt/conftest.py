"""Programs of runs are compiled once for the whole suite."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SECONDS = 0.1  # of compiling, from which on a program is kept


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """For this process and those that it starts."""
    folder = os.environ["SUITE_COMPILED"]
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": SECONDS,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            jax.config.update(name, value)
            environment.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()  # jax decides once whether there is one
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
