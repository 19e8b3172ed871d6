"""How parameters are cut into blocks: the options as one object."""

import dataclasses

from shampoo_jax.base.hyperparameters import check_static
from shampoo_jax.base.options import Checked
from shampoo_jax.blocks.dimension_numbers import DimensionOption, resolve_dimension_numbers


@dataclasses.dataclass(frozen=True)
class Blocking(Checked):
    """How parameters are read and cut.

    A parameter is permuted and merged to the dimensions of its blocks, then cut into boxes of at
    most `size` per edge.

    Attributes:
      size: Largest edge of a block; None for whole parameters. It bounds factors, `size x size`.
      merge: Neighbouring dimensions are merged while at least this many remain and the product is
        at most `size`; 1 turns small matrices into vectors as Meta's package does; None leaves all
        shapes alone.
      canonical: Whether matrix blocks with equal exponents are stored longer dimension first, which
        halves the number of shapes. False keeps the order of every product as in the parameter,
        which matters only for parity of rounding noise under a cutoff at 0.
      dimension_numbers: `"flax"` reads attention and convolution kernels as matrices, see
        `default_dimension_numbers`; None merges everywhere; or a callable of (path, leaf) that
        returns `DimensionNumbers` or None, such as `batch_axes` makes.
      cut_all: Whether dimensions without a factor are cut as well, as in Meta's package; False
        leaves them whole, as `exponents="smaller"` does in any case. A factor then sums over the
        whole other side, of a vocabulary say.

    Raises:
      ValueError: `size` or `merge` below 1 or traced; an unknown name of dimension numbers.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.shampoo(0.1, blocking=shampoo_jax.Blocking(size=256))
      >>> state = tx.init({"w": jnp.ones((300, 8))})  # blocks of 256x8 and 44x8
    """

    size: int | None = 1024
    merge: int | None = 2
    canonical: bool = True
    dimension_numbers: DimensionOption = "flax"
    cut_all: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a field out of range."""
        check_static(vars(self))
        super().__post_init__()
        resolve_dimension_numbers(self.dimension_numbers)
