"""What `explain` found, as figures and as a table for people."""

import collections
import dataclasses
import re
from collections.abc import Mapping

from shampoo_jax.stacks.exchanges import OnMesh

LARGE_STATE = 10  # times AdamW's, above which a report warns


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      name: Path, components joined by `/`.
      shape: Its shape.
      preconditioned: Whether it is preconditioned; otherwise the fields below are empty.
      batch: Number of independent slices, each with factors of its own.
      merged: Shape of a slice as it is read, before it is cut.
      blocks: Number of blocks by block shape, over all slices.
      factors: Number of factors by edge length, over all blocks.
    """

    name: str
    shape: tuple[int, ...]
    preconditioned: bool
    batch: int = 0
    merged: tuple[int, ...] = ()
    blocks: Mapping[tuple[int, ...], int] = dataclasses.field(default_factory=dict)
    factors: Mapping[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `explain` found; `str()` of it is a table for people.

    Attributes:
      rows: One per parameter, in the order of `jax.tree.leaves`.
      others: What trains those that are not preconditioned, as the table calls it.
      state_bytes: Bytes of optimizer state by kind: first moment, factors, roots (or bases), second
        moment (of the graft or in the eigenbasis), adam (both moments of parameters that are not
        preconditioned), other (momentum, counts ...).
      dtypes: Names of the floating-point dtypes of that state by kind.
      adamw_bytes: State of AdamW on all parameters, twice their size.
      muon_bytes: State of Muon on the preconditioned parameters, once their size, with AdamW on
        the others.
      refresh_flops: One refresh of all roots or bases; for Newton's methods, one iteration of it.
      refresh_method: How that is done, and its multiple of d^3 per factor (Golub and Van Loan for
        eigh and QR, counted for products); `"auto"` is resolved for the default backend.
      every: Steps from one refresh to the next.
      staggered_flops: The part of `refresh_flops` in one step that refreshes: all of it, or with
        `stagger`, where every step does, one in `every`, rounded up for each stack.
      working_bytes: Temporary memory of the largest root computation, where all the factors of a
        shape, or `chunk` of them, or the share of a staggered step, are solved together; CPU takes
        them one at a time.
      temporary_bytes: Estimate of the temporary memory of a step on one device, of stacks of
        gradients and of the blocks that are computed at the same time: what XLA reports as
        `memory_analysis().temp_size_in_bytes` where gradients and state are donated.
      statistics_flops: Factor statistics of one step, `2 d |block|` per factor, and whitening.
      apply_flops: Application in one step: with roots `2 d |block|` per factor; with eigenbases
        three times that, for gradient and first moment into the basis and the update back.
      root_batches: Root computations in the compiled program, one per block shape and side.
      fallback_batches: Computations by eigh beside them, of roots that polynomials fail on.
      largest_factor: Largest edge of a factor, 0 without factors.
      on_mesh: What one device exchanges, holds and computes, where there is a mesh.

    Example:
      >>> import jax.numpy as jnp, shampoo_jax
      >>> tx = shampoo_jax.shampoo(0.1, blocking=shampoo_jax.Blocking(32))
      >>> report = shampoo_jax.explain({"w": jnp.ones((64, 32))}, tx)
      >>> report.state_bytes["factors"], report.largest_factor  # two blocks, two factors each
      (16384, 32)
    """

    rows: tuple[Row, ...]
    others: str
    state_bytes: dict[str, int]
    dtypes: dict[str, str]
    adamw_bytes: int
    muon_bytes: int
    refresh_flops: float
    refresh_method: str
    every: int
    staggered_flops: float
    working_bytes: int
    statistics_flops: int
    apply_flops: int
    temporary_bytes: int
    root_batches: int
    fallback_batches: int
    largest_factor: int
    on_mesh: OnMesh | None = None

    def __str__(self) -> str:
        header = ("parameter", "count", "shape", "optimizer", "read as", "blocks", "factors")
        lines = [*_align([header, *_cells(self.rows, self.others)]), ""]
        total = sum(self.state_bytes.values())
        kinds = ", ".join(
            f"{k} {_scaled(v, 'B')}" + self._narrow(k) for k, v in self.state_bytes.items() if v
        )
        schedule = "every step" if self.every == 1 else f"every {self.every} steps"
        if self.staggered_flops < self.refresh_flops:
            schedule = f"{_scaled(self.staggered_flops, 'FLOP')} of it each step"
        lines += [
            f"optimizer state   {_scaled(total, 'B')} ({kinds})",
            f"in comparison     AdamW {_scaled(self.adamw_bytes, 'B')}, "
            f"Muon {_scaled(self.muon_bytes, 'B')}",
            f"refresh           {_scaled(self.refresh_flops, 'FLOP')} by {self.refresh_method}, "
            f"{schedule}",
            f"temporary memory  about {_scaled(self.temporary_bytes, 'B')} a step, "
            f"{_scaled(self.working_bytes, 'B')} of it for the largest root batch",
            f"every step        {_scaled(self.statistics_flops, 'FLOP')} statistics, "
            f"{_scaled(self.apply_flops, 'FLOP')} application",
            f"root batches      {self.root_batches} (block shapes x sides)"
            + (f", {self.fallback_batches} by eigh as fallback" if self.fallback_batches else ""),
            f"largest factor    {self.largest_factor} x {self.largest_factor}",
        ]
        if self.on_mesh is None and total > LARGE_STATE * self.adamw_bytes:
            times = f"{total / self.adamw_bytes:.0f} times AdamW's"
            lines.append(
                f"warning           the state is {times}: bound factors by "
                "blocking=Blocking(size=1024), or leave long sides alone by exponents"
            )
        return "\n".join(lines if self.on_mesh is None else [*lines, "", *_device(self.on_mesh)])

    def _narrow(self, kind: str) -> str:
        """The dtypes of a kind of state where they are not the usual one."""
        dtypes = self.dtypes[kind]
        return f" in {dtypes}" if dtypes not in ("", "float32") else ""


def _device(mesh: OnMesh) -> list[str]:
    """Lines about one device of a mesh."""
    blocks = ", ".join(f"{n} of {key}" for key, n in mesh.blocks.items()) or "none"
    exchanges = ", ".join(
        f"{n} {kind} {_scaled(b, 'B')}" for kind, (n, b) in mesh.exchanges.items()
    )
    # Filling is gathered like any block: with few blocks, most of what a device receives is zeros.
    advice = ", name fewer mesh axes as `owners`" if mesh.padding > 0.5 else ""
    return [
        f"one device of     {mesh.devices}, blocks split over {mesh.owners}",
        f"blocks            {blocks}; {mesh.padding:.1%} filling{advice}",
        f"optimizer state   {_scaled(mesh.state_bytes, 'B')}",
        f"refresh           {_scaled(mesh.refresh_flops, 'FLOP')} an owner",
        f"exchanges a step  {exchanges or 'none'}",
        f"sent, received    {_scaled(mesh.sent_in, 'B')} for gradients to owners, "
        f"{_scaled(mesh.sent_out, 'B')} for updates back",
    ]


def _cells(rows: tuple[Row, ...], others: str) -> list[tuple[str, ...]]:
    """Table cells; parameters that differ only in numbers of their path share a line."""
    groups = collections.Counter(
        (
            re.sub(r"\d+", "*", row.name),
            _by(row.shape),
            "preconditioned" if row.preconditioned else others,
            (f"{row.batch} of " if row.batch > 1 else "") + _by(row.merged)
            if row.preconditioned
            else "-",
            ", ".join(f"{n} of {_by(shape)}" for shape, n in row.blocks.items()) or "-",
            ", ".join(f"{n} of {d}" for d, n in row.factors.items()) or "-",
        )
        for row in rows
    )
    return [(name, str(count), *rest) for (name, *rest), count in groups.items()]


def _align(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _scaled(n: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if n < 1000 or prefix == "T":
            break
        n /= 1000
    return f"{n:.3g} {prefix}{unit}"
