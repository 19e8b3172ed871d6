"""Operations of a training step, counted by formula; a multiplication and an addition are two.

Forward and backward (the backward pass costs twice the forward pass):

    3 * tokens * (2 * matrix parameters + 2 * layers * sequence_length * model_dim)

The matrix parameters are those of the blocks and the head: the embedding is looked up. The second
term is causal attention's two products, of which the lower half is needed; of kind medium it is
that of the window at the end of the run. Norms, activations and
the softmax are left out.

An optimizer's own work counts its matrix products and decompositions and leaves out what it does
element by element, some ten operations a parameter, 1e-5 of a step. Methods without a formula here
are not counted.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from nanogpt.config.run import ModelConfig

# Multiples of d^3 for a d x d matrix. A product, such as Q diag(w^-e) Q^T.
PRODUCT = 2.0
# Golub and Van Loan, Matrix Computations, 4th edition, algorithm 8.3.3: eigenvalues and
# eigenvectors of a symmetric matrix by tridiagonal QR, 4/3 of which is the reduction.
EIGH = 9.0
# Algorithm 5.2.1, Householder QR, and as much again to form Q.
QR = 8 / 3

Shapes = Iterable[tuple[int, int]]


def block_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Returns the shapes of all block matrices: queries, keys, values, projection and the MLP's."""
    model = model.scaled()
    d, hidden = model.model_dim, model.mlp_dim
    without = model.kind == "medium"  # one layer has no attention
    attention = 4 * (model.num_layers - without) * [(d, d)]
    return attention + model.num_layers * [(d, hidden), (hidden, d)]


def model_flops(model: ModelConfig, tokens: int) -> float:
    """Returns the operations of forward and backward passes on `tokens` tokens.

    Args:
        model: shape of the model.
        tokens: of all rows of a step.
    """
    model = model.scaled()
    columns = model.head_columns or model.vocab_size
    matrices = sum(m * n for m, n in block_shapes(model)) + model.model_dim * columns
    attention = 2 * model.num_layers * model.sequence_length * model.model_dim
    if model.kind == "medium":  # four layers of the whole window, eleven of half of it
        attention = 4 * (4 + 11 / 2) * min(model.window, model.sequence_length) * model.model_dim
    return 3.0 * tokens * (2 * matrices + attention)


def muon_flops(shapes: Shapes, iterations: int) -> float:
    """Returns the operations of Muon's orthogonalization, once on every matrix.

    An iteration on [m, n], m <= n, is A = X X^T, A^2 and (a I + b A + c A^2) X: 4 m^2 n + 2 m^3.
    """
    ordered = [sorted(shape) for shape in shapes]
    return float(iterations * sum(4 * m * m * n + 2 * m**3 for m, n in ordered))


def cut(shapes: Shapes, block_size: int) -> list[tuple[int, int]]:
    """Returns the blocks that matrices are cut into.

    >>> cut([(768, 3072)], 2048)
    [(768, 2048), (768, 1024)]
    """
    return [(m, n) for a, b in shapes for m in _cut(a, block_size) for n in _cut(b, block_size)]


def shampoo_flops(shapes: Shapes, every: int, side: float | str = 0.25) -> float:
    """Returns the operations of Shampoo, roots by eigh, once a step.

    A factor's statistics and its application cost 4 m n d for [m, n], d its own side; the roots
    cost eigh and one product of each size, spread over the steps between refreshes.

    Args:
        shapes: of the blocks, see `cut`.
        every: steps between refreshes of the roots.
        side: as `ShampooConfig.exponent`: the name of the one side, or a number for both.

    >>> shampoo_flops([(2, 4)], 1, "right") + shampoo_flops([(2, 4)], 1, "left")
    984.0
    >>> shampoo_flops([(2, 4)], 1)
    984.0
    """
    chosen = {"left": lambda m, n: [m], "right": lambda m, n: [n], "smaller": lambda *s: [min(s)]}
    sides = chosen.get(str(side), lambda *s: s)
    root = (EIGH + PRODUCT) / every
    return sum(4.0 * m * n * d + root * d**3 for m, n in shapes for d in sides(m, n))


def soap_flops(shapes: Shapes, every: int) -> float:
    """Returns the operations of SOAP, bases refreshed by one QR step, once a step.

    For [m, n] statistics cost 2 m n (m + n), as does each change of basis: of the gradient, of the
    momentum, and of the update back. A refresh is a product and a QR decomposition of each size.

    Args:
        shapes: of the matrices.
        every: steps between refreshes of the bases.
    """
    return sum(8.0 * m * n * (m + n) + (PRODUCT + QR) * (m**3 + n**3) / every for m, n in shapes)


def pmuon_flops(shapes: Shapes, iterations: int) -> float:
    """Returns the operations of PMuon, roots by one QR step, once a step.

    For [m, n] statistics, counted twice, and their application cost 6 m n (m + n); a QR step, its
    product, eigenvalues and the root cost three products and a QR decomposition of each size.

    Args:
        shapes: of the matrices.
        iterations: of Newton-Schulz.
    """
    roots = [6.0 * m * n * (m + n) + (3 * PRODUCT + QR) * (m**3 + n**3) for m, n in shapes]
    return sum(roots) + muon_flops(shapes, iterations)


def step_flops(config: Mapping[str, Any]) -> float:
    """Returns the operations of a step of one of our runs, its optimizer's work included.

    Shampoo's roots count as eigh, by whatever method they are computed; of optimizers other than
    AdamW, Lion, Muon, PMuon, Shampoo, SOAP and SOAP-Muon only the model is counted.

    Args:
        config: a `nanogpt.config.run.Config` as its run wrote it to metrics.jsonl.
    """
    model, matrices = ModelConfig(**config["model"]), config["matrices"]
    tokens = config["data"]["batch_rows"] * model.sequence_length
    shapes, own = block_shapes(model), 0.0
    match config["optimizer"]:
        case "muon" | "muon_track3":
            own = muon_flops(shapes, matrices["ns_steps"])
        case "shampoo":
            blocks, side = cut(shapes, matrices["block_size"]), matrices.get("exponent", 0.25)
            own = shampoo_flops(blocks, matrices["every"], side)
        case "soap":
            own = soap_flops(shapes, matrices["every"])
        case "soap_muon":
            own = soap_flops(shapes, matrices["every"]) + muon_flops(shapes, matrices["ns_steps"])
        case "pmuon":
            own = pmuon_flops(shapes, matrices["ns_steps"])
    return model_flops(model, tokens) + own


def _cut(edge: int, block_size: int) -> list[int]:
    whole, rest = divmod(edge, block_size)
    return [block_size] * whole + [rest] * (rest > 0)
