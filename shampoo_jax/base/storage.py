"""The one door through which arrays of a state are stored and read again."""

from typing import Any

import jax
import numpy as np

from shampoo_jax.base.options import check_dtype

Array = jax.Array


def check_form(name: str, form: Any) -> None:
    """Raises ValueError for what is neither None, a storage dtype nor a stored form."""
    if is_form(form):
        return
    try:
        check_dtype(name, form)
    except ValueError as error:
        raise ValueError(f"{error} A form of storage of your own has encode and decode.") from None


def is_form(form: Any) -> bool:
    """Whether this stores arrays in a way of its own: a class, or an instance that it made."""
    return hasattr(form, "encode") and hasattr(form, "decode")


def encode(x: Array, form: Any) -> Any:
    """An array as a state keeps it.

    Args:
      x: `f[N, ...]`, one entry a block.
      form: None to keep it as it is; a dtype; a class with `encode(x)`, a class method that returns
        an instance, and `decode(dtype)`, a `NamedTuple` of arrays `[N, ...]` say; or what was
        stored before, whose form is kept.

    Returns:
      What `decode` turns back.

    >>> import jax.numpy as jnp
    >>> encode(jnp.ones(2), jnp.bfloat16).dtype.name, encode(jnp.ones(2), None).dtype.name
    ('bfloat16', 'float32')
    """
    if form is None:
        return x
    if is_form(form):
        return form.encode(x)
    return x.astype(form.dtype if isinstance(form, Array | np.ndarray) else form)


def decode(stored: Any, dtype: Any) -> Array:
    """The array that `encode` stored, in the dtype of the arithmetic."""
    return stored.decode(dtype) if is_form(stored) else stored.astype(dtype)
