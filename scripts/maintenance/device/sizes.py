"""How large everything is: on the device, and in a rehearsal on a laptop's CPU."""

import dataclasses

# A dozen of the recorded trajectories of Meta's package, one of each kind: inverse roots by eigh
# and by iterations, grafts, blocks, exponents, eigenbases, KL factors; and the matrix functions.
RECORDINGS = (
    "01_root_nograft",
    "05_root_graft_adam",
    "06_pseudo_rtol_none",
    "09_record_config",
    "15_blocks8",
    "29_one_sided",
    "30_exponent_third",
    "32_eigenbasis_adam_qr",
    "35_eig_eigh",
    "39_kl_root",
    "41_newton",
    "70_matrix_functions",
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured, and how often.

    Attributes:
        product: edge of the square products that give the device's rates.
        stream: float32 numbers that are read and written for the rate of the memory.
        recordings: names of recorded trajectories that are replayed.
        numerics: edges of the matrices whose roots are compared with float64.
        attention: rows, tokens, heads and width of a head.
        layers: of the GPT.
        width: of its residual stream.
        head: width of an attention head.
        vocabulary: rows of its embedding.
        length: tokens in a row.
        rows: in a step that is timed.
        microbatch: rows in a forward and backward pass.
        block: largest edge of a block.
        rounds: timed rounds, whose median counts.
        calls: calls of a round; a multiple of `every`.
        every: steps between refreshes in the second column of the steps.
        stacks: count and edge of the factors of GPT-2 124M.
        dash: shapes of the stacked gradients of the first of DASH's eight devices: count, rows,
            columns.
        steps: of a training run.
        train_rows: rows in one of its steps.
        precision: count and edge of the matrices of the precision trials.
    """

    product: int = 8192
    stream: int = 2**29
    recordings: tuple[str, ...] = RECORDINGS
    numerics: tuple[int, ...] = (768, 1024)
    attention: tuple[int, int, int, int] = (4, 1024, 6, 128)
    layers: int = 12
    width: int = 768
    head: int = 128
    vocabulary: int = 50304
    length: int = 1024
    rows: int = 64
    microbatch: int = 16
    block: int = 1024
    rounds: int = 3
    calls: int = 10
    every: int = 10
    stacks: tuple[tuple[int, int], ...] = ((72, 1024), (168, 768))
    # Llama with 953 million parameters, blocks of 1024: the docstring of `_update_factors` in
    # IST-DASLab/ISTA-DASLab-Optimizers, dash/processors/gpu_processor_2d.py, revision 4c98e6e.
    dash: tuple[tuple[int, int, int], ...] = (
        (110, 1024, 1024),
        (2, 256, 1024),
        (4, 1024, 512),
        (4, 512, 1024),
    )
    steps: int = 300
    train_rows: int = 32
    precision: tuple[int, int] = (168, 768)

    def dash_factors(self) -> tuple[tuple[int, int], ...]:
        """Count and edge of DASH's factors, the largest first.

        >>> Sizes().dash_factors()
        ((230, 1024), (8, 512), (2, 256))
        """
        counts: dict[int, int] = {}
        for count, rows, columns in self.dash:
            for edge in (rows, columns):
                counts[edge] = counts.get(edge, 0) + count
        return tuple((counts[edge], edge) for edge in sorted(counts, reverse=True))


FULL = Sizes()
# Sizes that a CPU does at once, one stack of blocks in all; the programs are the same.
REHEARSAL = Sizes(
    product=64,
    stream=2**12,
    recordings=RECORDINGS[:1],
    numerics=(16,),
    attention=(1, 16, 2, 8),
    layers=1,
    width=16,
    head=8,
    vocabulary=50304,
    length=32,
    rows=2,
    microbatch=1,
    block=16,
    rounds=1,
    calls=2,
    every=2,
    stacks=((2, 32), (3, 16)),
    dash=((3, 16, 16), (1, 8, 16)),
    steps=6,
    train_rows=2,
    precision=(2, 16),
)


def sizes(rehearse: bool) -> Sizes:
    """Those of a rehearsal, or the true ones."""
    return REHEARSAL if rehearse else FULL
