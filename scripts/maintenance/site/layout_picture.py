"""A drawing of how two matrices are cut into blocks, stacked, and split over four devices.

Which block comes where is not drawn by hand: matrices whose blocks hold their own number go through
the library, and the stack in its state is read.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import shampoo_jax
from nanogpt.report.plotting import SMALL, WIDTH

EDGE, OWNERS = 8, 4
SHAPES = {"attn": (2, 2), "mlp": (2, 4)}  # in blocks
COLOURS = ("C0", "C1", "C2", "C3")


def numbered() -> dict[str, np.ndarray]:
    """Matrices whose blocks hold 1, 2, ... by row and column."""
    found, first = {}, 1
    for name, (rows, columns) in SHAPES.items():
        numbers = np.arange(first, first + rows * columns).reshape(rows, columns)
        found[name] = np.kron(numbers, np.ones((EDGE, EDGE)))
        first += rows * columns
    return found


def stack_order() -> list[int]:
    """Numbers of the blocks in the order of their stack.

    >>> sorted(stack_order()) == list(range(1, 13))
    True
    """
    trees = {name: jnp.asarray(m, jnp.float32) for name, m in numbered().items()}
    blocking = shampoo_jax.Blocking(size=EDGE, merge=2)
    tx = shampoo_jax.blocked(shampoo_jax.filter_gradient(0.5), blocking=blocking)
    _, state = tx.update(trees, tx.init(trees))
    (stack,) = [np.asarray(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    return [int(round(float(block[0, 0]) / float(stack.min()))) for block in stack]


def _box(axes: Axes, x: float, y: float, number: int, owner: int) -> None:
    axes.add_patch(Rectangle((x, y), 0.9, 0.9, color=COLOURS[owner], linewidth=0))
    axes.text(
        x + 0.45, y + 0.43, str(number), ha="center", va="center", color="#111111", size=SMALL
    )


def draw_layout() -> Figure:
    """Matrices, their stack, and the devices that own it."""
    order = stack_order()
    share = len(order) // OWNERS
    owner = {number: place // share for place, number in enumerate(order)}
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    top = 6.5
    for name, matrix in numbered().items():
        blocks = matrix[::EDGE, ::EDGE].astype(int)
        for (row, column), number in np.ndenumerate(blocks):
            _box(axes, column, top - 1 - row, number, owner[number])
        rows, columns = matrix.shape
        axes.text(0, top + 0.1, f"{name}, {rows} x {columns}", size=SMALL)
        top -= len(blocks) + 1.4
    for place, number in enumerate(order):
        _box(axes, 6, 6.5 - 0.95 * place + 0.5, number, owner[number])
    axes.text(5.6, 8.1, f"stack [{len(order)}, {EDGE}, {EDGE}]", size=SMALL)
    for device in range(OWNERS):
        y = 6.0 - 2.85 * device + 0.05
        axes.annotate("", (8.4, y), (7.1, y), arrowprops={"arrowstyle": "->", "color": "C4"})
        for k, number in enumerate(order[device * share : (device + 1) * share]):
            _box(axes, 8.6 + k, y - 0.45, number, device)
        axes.text(8.6, y + 0.65, f"device {device}", size=SMALL)
    axes.set_xlim(-0.2, 11.8)
    axes.set_ylim(-4.6, 8.8)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure
