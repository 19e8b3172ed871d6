"""Python functions that programs call by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_jax.matrix import foreign


def call(name, function, *arguments, results=1):
    foreign.register(name, function)
    kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments[:results]]
    return jax.jit(jax.ffi.ffi_call(name, kinds))(*arguments)


def test_a_function_reads_arguments_and_writes_results():
    def swapped(arguments, results):
        assert [a.dtype for a in arguments] == [np.float32, np.float32]
        results[0][...], results[1][...] = arguments[0] * 2, arguments[1].sum()

    a, b = jnp.arange(6.0).reshape(1, 2, 3), jnp.float32(7)
    twice, same = call("test_swapped", swapped, a, b, results=2)
    np.testing.assert_array_equal(twice, 2 * a)
    np.testing.assert_array_equal(same, b)


def test_what_it_raises_fails_the_program():
    def fails(arguments, results):
        raise MemoryError("no room for 7 matrices")

    with pytest.raises(jax.errors.JaxRuntimeError, match="test_fails: MemoryError: no room for 7"):
        jax.block_until_ready(call("test_fails", fails, jnp.ones(2)))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0\n", "version 1, not 0"),
        ("", "does not say its version"),
    ],
)
def test_an_interface_that_is_not_known_is_refused(tmp_path, monkeypatch, header, reason):
    file = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    file.parent.mkdir(parents=True)
    file.write_text(header)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match=reason):
        foreign.register("test_refused", lambda arguments, results: None)
