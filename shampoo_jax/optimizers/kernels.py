"""Parameters read as maps from inputs to outputs."""

import math
from typing import Any, NamedTuple

import numpy as np

from shampoo_jax.base.paths import KeyPath, as_written
from shampoo_jax.blocks.dimension_numbers import DimensionNumbers, DimensionRule


class Kernel(NamedTuple):
    """How a parameter is read.

    Attributes:
      axes: Its axes in the order batch, inputs, outputs.
      batch: Number of independent maps, of scanned layers say.
      inputs: Number of inputs; 1 for a vector, whose entries are outputs of a constant.
      outputs: Number of outputs.
    """

    axes: tuple[int, ...]
    batch: int
    inputs: int
    outputs: int


def read_kernel(path: KeyPath, leaf: Any, rule: DimensionRule) -> Kernel:
    """A parameter as `batch` matrices of `inputs x outputs`.

    Without dimension numbers the last axis is that of the outputs, as in the kernels of Flax, and
    all others are inputs.

    Args:
      path: Its key path.
      leaf: The parameter or its shape.
      rule: Gives its dimension numbers, or None. The last dimension is that of the outputs.
    """
    shape = np.shape(leaf)
    numbers = rule(as_written(path), leaf)
    if numbers is None:
        numbers = DimensionNumbers(tuple((k,) for k in range(len(shape))))
    *inputs, outputs = numbers.dimensions or ((),)
    flat = tuple(axis for group in inputs for axis in group)
    sizes = (math.prod(shape[a] for a in group) for group in (numbers.batch, flat, outputs))
    return Kernel((*numbers.batch, *flat, *outputs), *sizes)
