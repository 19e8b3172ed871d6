"""Draws the pictures of docs/concepts: python -m scripts.maintenance.site.pictures [--out FOLDER].

Numbers are of gradients that were recorded while a small GPT trained (tests/golden/gradients), put
through the library. Every picture is drawn for light pages and for dark ones.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# Before jax is imported: LAPACK's own threads make decompositions slower on few cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import shampoo_jax
from nanogpt.report.plotting import GREY, SMALL, WIDTH, save
from scripts.maintenance.record_gradients import read_gradients
from scripts.maintenance.site.layout_picture import draw_layout
from shampoo_jax.matrix import truncated_root

ROOT = pathlib.Path(__file__).parents[3]
RECORDED = ROOT / "tests" / "golden" / "gradients" / "gpt_d128.npz"
CONCEPTS = ROOT / "docs" / "concepts"
WELL, DEFICIENT = "250:blocks/0/attn/q", "5:blocks/3/attn/proj"
NAMED = {  # of the recorded matrices, as the pictures call them
    DEFICIENT: "proj, step 5",
    "100:blocks/1/attn/v": "v, step 100",
    WELL: "q, step 250",
}
B1, B2 = 0.9, 0.95


def average(arrays: np.ndarray, decay: float) -> np.ndarray:
    """Bias-corrected moving average over the first axis, in float64."""
    weights = decay ** np.arange(len(arrays))[::-1]
    return np.einsum("t,t...->...", weights / weights.sum(), arrays.astype(np.float64))


def factors(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving averages of `G G^T` and of `G^T G`."""
    left = average(gradients @ gradients.swapaxes(1, 2), B2)
    return left, average(gradients.swapaxes(1, 2) @ gradients, B2)


def heat(axes: Axes, matrix: np.ndarray, title: str, **options: Any) -> None:
    """A matrix as colours."""
    axes.imshow(matrix, interpolation="nearest", **options)
    axes.set_title(title, fontsize=SMALL)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def draw_factor(gradients: np.ndarray) -> Figure:
    """A gradient, its left factor, and the factor's eigenvalues."""
    left, _ = factors(gradients)
    figure, (a, b, c) = plt.subplots(
        1, 3, figsize=(WIDTH, 2.3), layout="constrained", width_ratios=(1, 1, 1.3)
    )
    largest = np.abs(gradients[-1]).max() / 2
    heat(a, gradients[-1], "a gradient $G$", cmap="coolwarm", vmin=-largest, vmax=largest)
    largest = np.abs(left).max() / 4
    heat(b, left, "its factor $L$", cmap="coolwarm", vmin=-largest, vmax=largest)
    values = np.linalg.eigvalsh(left)[::-1]
    c.semilogy(np.arange(1, len(values) + 1), values / values[0])
    c.set_title("eigenvalues of $L$", fontsize=SMALL)
    c.set_xlabel("direction")
    return figure


def two_sided(gradients: np.ndarray, rtol: float | None) -> np.ndarray:
    """Shampoo's update `L^(-1/4) M R^(-1/4)` in float32, without a graft."""
    left, right = (
        np.asarray(truncated_root(jnp.asarray(factor, jnp.float32), 0.25, rtol=rtol)[0])
        for factor in factors(gradients)
    )
    return left @ average(gradients, B1).astype(np.float32) @ right


def spectrum(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Eigenvalues of the left factor, largest first, its eigenvectors, and how many are kept."""
    values, vectors = np.linalg.eigh(factors(gradients)[0])
    cutoff = len(values) * float(jnp.finfo(jnp.float32).eps)
    return values[::-1], vectors[:, ::-1], int((values > cutoff * values[-1]).sum())


def truncation_figures(gradients: np.ndarray) -> dict[str, float]:
    """Shares of updates in dropped directions, and what a change in the last bit changes."""
    _, vectors, kept = spectrum(gradients)
    bits = 1 + np.random.default_rng(0).standard_normal(gradients.shape) * 2.0**-24
    found = {}
    for label, rtol in (("truncated", None), ("without a cutoff", 0.0)):
        update, other = (two_sided(g, rtol) for g in (gradients, gradients * bits))
        lengths = np.linalg.norm(vectors.T @ update, axis=1)
        size = np.linalg.norm(update)
        found[f"{label}: share of the length in dropped directions"] = float(
            np.linalg.norm(lengths[kept:]) / size
        )
        found[f"{label}: change by noise in the last bit"] = float(
            np.linalg.norm(other - update) / size
        )
    return found


def draw_truncation(gradients: np.ndarray) -> Figure:
    """Eigenvalues with the cutoff, and updates with and without it, direction by direction."""
    values, vectors, _ = spectrum(gradients)
    rank = np.arange(1, len(values) + 1)
    cutoff = len(values) * float(jnp.finfo(jnp.float32).eps)
    figure, (a, b) = plt.subplots(1, 2, figsize=(WIDTH, 2.8), layout="constrained")
    a.semilogy(rank, values / values[0], ".", markersize=4)
    a.axhline(cutoff, color=GREY, linestyle="--")
    a.annotate("cutoff", (rank[-1], cutoff), ha="right", va="bottom", fontsize=SMALL)
    a.set_title("eigenvalues of a factor", fontsize=SMALL)
    for label, rtol in (("without a cutoff", 0.0), ("truncated", None)):
        b.semilogy(
            rank, np.linalg.norm(vectors.T @ two_sided(gradients, rtol), axis=1), label=label
        )
    b.set_title("length of the update", fontsize=SMALL)
    b.legend(fontsize=SMALL, frameon=False)
    for axes in (a, b):
        axes.set_xlabel("direction")
    return figure


def sizes(gradients: np.ndarray, graft: str | None) -> list[float]:
    """Root mean squares of the updates to consecutive gradients."""
    tx = shampoo_jax.scale_by_shampoo(b1=B1, b2=B2, graft=graft)
    update, found = jax.jit(tx.update), []
    state = tx.init(jnp.zeros_like(gradients[0]))
    for gradient in gradients:
        updates, state = update(jnp.asarray(gradient), state)
        found.append(float(jnp.sqrt(jnp.mean(updates**2))))
    return found


def draw_grafting(recorded: dict[str, np.ndarray]) -> Figure:
    """Sizes of updates of three matrices, as Shampoo has them and with Adam's magnitude."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 2.8), layout="constrained", sharey=True)
    for axes, graft, title in zip(
        both, (None, "adam"), ("Shampoo's own size", "grafted: Adam's size"), strict=True
    ):
        for name, label in NAMED.items():
            axes.semilogy(range(1, 13), sizes(recorded[name], graft), label=label)
        axes.set_title(title, fontsize=SMALL)
        axes.set_xlabel("step of the recording")
        axes.set_xticks((1, 4, 8, 12))
    both[0].set_ylabel("size of an update (rms)")
    both[1].legend(fontsize=SMALL, frameon=False)
    return figure


def draw_eigenbasis(gradients: np.ndarray) -> Figure:
    """Second moments entry by entry, as they are and in the factors' eigenbases."""
    left, right = (np.linalg.eigh(factor)[1][:, ::-1] for factor in factors(gradients))
    rotated = np.einsum("ia,tij,jb->tab", left, gradients, right)
    moments = [np.log10(average(g**2, B2)) for g in (gradients, rotated)]
    top = max(float(m.max()) for m in moments)
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 2.9), layout="constrained")
    titles = ("squares of the gradient", "in the factors' eigenbases")
    for axes, moment, title in zip(both, moments, titles, strict=True):
        heat(axes, moment, title, cmap="viridis", vmin=top - 6, vmax=top)
    bar = figure.colorbar(both[1].images[0], ax=both, shrink=0.9)
    bar.set_label("log10")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=CONCEPTS)
    out = parser.parse_args(arguments).out
    recorded = read_gradients(RECORDED)
    pictures = {
        "factor": lambda: draw_factor(recorded[WELL]),
        "truncation": lambda: draw_truncation(recorded[DEFICIENT]),
        "grafting": lambda: draw_grafting(recorded),
        "eigenbasis": lambda: draw_eigenbasis(recorded["250:blocks/1/attn/v"]),
        "layout": draw_layout,
    }
    for name, draw in pictures.items():
        print(save(out / f"{name}.png", draw))
    for what, number in truncation_figures(recorded[DEFICIENT]).items():
        print(f"{what}: {number:.2g}")
    plt.close("all")


if __name__ == "__main__":
    main()
