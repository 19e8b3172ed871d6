"""What each field of a state of ours becomes, from Meta's state of the same parameter."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_jax.blocks.exponents import Exponents
from shampoo_jax.inspect.checkpoints import LAYOUT
from shampoo_jax.inspect.meta_archive import CORRECTED, MetaParameter
from shampoo_jax.inspect.meta_blocks import Match, Shape, Slot
from shampoo_jax.solvers.carried import CarriedBasis

ROOTS, VECTORS = "inv_factor_matrices", "factor_matrices_eigenvectors"
VALUES = "factor_matrices_eigenvalues"
FACTORS = "factor_matrices"
PACKED = (FACTORS, ROOTS)

# By field of our state the one of theirs: of a block, of a factor, of the whole parameter.
OF_BLOCK = {"mu": "filtered_grad", "nu": "adagrad"}
OF_FACTOR = {"factors": FACTORS, "roots": ROOTS, "bases": VECTORS, "solver": VECTORS}
OF_PARAMETER = {"trace": "momentum_buffer", "z": "weight_buffer"}
OWN = ("failures", "keep", LAYOUT)  # without a counterpart there: they stay as they are

# What makes an optimizer of ours keep the counterpart of each field of theirs.
MAKERS = {
    "filtered_grad": "a first moment, b1 > 0",
    "adagrad": "graft='adam', 'rmsprop' or 'adagrad'",
    "momentum_buffer": "momentum",
    "weight_buffer": "averaging(...)",
    FACTORS: "scale_by_shampoo or scale_by_soap, and an exponent that is not 0",
    ROOTS: "scale_by_shampoo and a solver that keeps no basis, as ShiftedEigh(...)",
    VECTORS: "scale_by_shampoo and CarriedBasis(...), or scale_by_soap",
    VALUES: "scale_by_shampoo and CarriedBasis(...)",
    CORRECTED: "scale_by_soap",
}


class Place(NamedTuple):
    """Where a field of the tree of a state belongs.

    Attributes:
      field: Its counterpart there.
      stack: None where it has the shape of the parameter.
      dimension: None where it has the shape of a block.
    """

    field: str
    stack: str | None = None
    dimension: int | None = None


def place_of(key: str, keys: Collection[str], stacks: Collection[str]) -> Place | None:
    """Where a field of the tree of a state belongs; None where it stays as it is.

    >>> place_of("inner/1/factors/1/0", (), ["1"])
    Place(field='factor_matrices', stack='1', dimension=0)

    Args:
      key: Of the field.
      keys: Of all fields of the parameter.
      stacks: That hold its blocks.

    Raises:
      ValueError: A field without a counterpart.
    """
    words = key.split("/")
    # A stack stands behind the name of a field; so "1" is no place in a chain.
    ends = (i for i in (len(words) - 1, len(words) - 2) if i > 0 and words[i] in stacks)
    stack = next((i for i in ends if words[i - 1].isidentifier()), None)
    field = words[-1] if stack is None else words[stack - 1]
    if field in OWN or "figures" in words:
        return None
    rest = [] if stack is None else words[stack + 1 :]
    table = OF_PARAMETER if stack is None else OF_FACTOR if rest else OF_BLOCK
    if field not in table:
        raise ValueError(
            f"the optimizer keeps {key!r}, for which Meta's state has nothing: build the "
            "counterpart of theirs, as docs/migration.md says."
        )
    theirs = table[field]
    if field == "nu" and words[-3:-2] == ["inner"]:
        # A second moment in an eigenbasis stands inside of the part that keeps the basis.
        outer = "/".join([*words[:-3], "bases", ""])
        theirs = CORRECTED if any(other.startswith(outer) for other in keys) else theirs
    return Place(theirs, None if stack is None else words[stack], int(rest[0]) if rest else None)


class Filler:
    """Fills the fields of one parameter, and remembers what of theirs it has used.

    Args:
      name: Of the parameter.
      one: Their state of it.
      match: Its blocks there and here.
      fields: Of our fresh state.
      transposed: Whether ours is the transpose of theirs.
      solver: Of eigendecompositions.
      exponents: Of our roots.
    """

    def __init__(
        self, name: str, one: MetaParameter, match: Match, fields: Mapping[str, Any],
        transposed: bool, solver: CarriedBasis | None, exponents: Exponents,
    ) -> None:  # fmt: skip
        self.name, self.one, self.match, self.fields = name, one, match, fields
        self.transposed, self.solver, self.exponents = transposed, solver, exponents
        self.places = {key: place_of(key, fields, match.stored) for key in fields}
        self.used: set[tuple[int, str]] = set()

    def filled(self, without: Collection[str] = ()) -> dict[str, Any]:
        """All fields; those whose counterpart is in `without` stay as they are.

        Raises:
          ValueError: Theirs lacks a counterpart, has it in another shape, or has more.
        """
        new = {}
        for key, place in self.places.items():
            old = self.fields[key]
            new[key] = old
            if place is not None and place.field not in without:
                new[key] = self._value(place, old)
        for number, block in enumerate(self.one.blocks):
            for field in sorted(block):
                if (number, field) not in self.used:
                    raise ValueError(
                        f"{self.one.key(number, field)} has no counterpart in the optimizer's "
                        f"state of {self.name}: build it with {_maker(field)}."
                    )
        return new

    def _value(self, place: Place, old: Any) -> np.ndarray:
        new = np.array(old)
        if place.stack is None:
            return self._assembled(place.field, new)
        if place.dimension is not None and new.ndim != 3:  # what another solver counts
            return new
        for slot in self.match.slots:
            if slot.stack != place.stack:
                continue
            if place.dimension is None:
                new[slot.row] = self._block(slot.block, place.field, slot.turned)
            else:
                new[slot.row] = self._matrix(place.field, place.dimension, slot)
        return new

    def _assembled(self, field: str, new: np.ndarray) -> np.ndarray:
        """Their blocks put together to the parameter."""
        plan = self.match.theirs
        whole = np.empty(plan.merged, new.dtype)
        for number, cell in enumerate(plan.cells):
            box = tuple(slice(a, a + n) for a, n in zip(cell.start, cell.size, strict=True))
            whole[box] = self._block(number, field)
        whole = whole.reshape(plan.shape)
        return whole.T if self.transposed else whole

    def _block(self, number: int, field: str, turned: bool = False) -> np.ndarray:
        value = self._take(number, field, self.match.theirs.cells[number].size)
        return value.T if turned else value

    def _matrix(self, field: str, dimension: int, slot: Slot) -> np.ndarray:
        """A factor, its root or its basis; they count the dimensions that have a factor."""
        shape = self.match.stored[slot.stack]
        places = (p for p in self.places.values() if p and p[:2] == (FACTORS, slot.stack))
        dimensions = sorted((p.dimension or 0 for p in places), reverse=slot.turned)
        d, k = shape[dimension], dimensions.index(dimension)
        has = self.one.blocks[slot.block].keys()
        if field == ROOTS and f"{ROOTS}/{k}" not in has and f"{VALUES}/{k}" in has:
            vectors = self._take(slot.block, f"{VECTORS}/{k}", (d, d))
            values = self._take(slot.block, f"{VALUES}/{k}", (d,))
            if self.solver is None:
                raise ValueError(
                    f"{self.one.key(slot.block, f'{VALUES}/{k}')}: they kept eigendecompositions, "
                    "ours are roots of them: give the optimizer's solver=CarriedBasis(...), and "
                    "its exponents where it has any."
                )
            exponent = self.exponents(shape)[dimension]
            spectrum = jnp.asarray(values)[None], jnp.asarray(vectors)[None]
            # One program for each shape, not one for each operation.
            return np.asarray(jax.jit(self.solver.root, static_argnums=2)(*spectrum, exponent)[0])
        return self._take(slot.block, f"{field}/{k}", (d, d))

    def _take(self, number: int, field: str, shape: Shape) -> np.ndarray:
        """One of their arrays in this shape."""
        key = self.one.key(number, field)
        if field not in self.one.blocks[number]:
            raise ValueError(
                f"{key} is missing, which the optimizer keeps of {self.name}: build it without "
                f"{_maker(field)}, or save the state of a run that has it."
            )
        self.used.add((number, field))
        value = self.one.blocks[number][field]
        packs = field.partition("/")[0] in PACKED
        triangle = (shape[0] * (shape[0] + 1) // 2,) if packs else None
        if value.shape == triangle:
            return _unpacked(value, shape[0])
        if value.shape != shape:
            raise ValueError(
                f"{key} has shape {value.shape}, {self.name} needs {shape}"
                f"{f' or its triangle {triangle}' if packs else ''}: give the optimizer the "
                "blocking and the exponents of theirs."
            )
        return value


def _maker(field: str) -> str:
    return MAKERS[field.partition("/")[0]]


def _unpacked(triangle: np.ndarray, d: int) -> np.ndarray:
    """The symmetric matrix of an upper triangle, row by row."""
    rows, columns = np.triu_indices(d)
    matrix = np.empty((d, d), triangle.dtype)
    matrix[rows, columns] = matrix[columns, rows] = triangle
    return matrix
