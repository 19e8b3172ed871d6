"""Operations of a step, against counts of single products and the benchmark's own figures."""

import dataclasses
import itertools

import pytest

from nanogpt.config.presets import preset
from nanogpt.config.run import ModelConfig
from nanogpt.optimizers.flops import (
    block_shapes,
    cut,
    model_flops,
    muon_flops,
    shampoo_flops,
    soap_flops,
    step_flops,
)

TRACK3 = ModelConfig(50304, 12, 768, 128, 3072, 1024)


def product(a, b):
    """Shape and operations of a matrix product."""
    (m, k), (_, n) = a, b
    return (m, n), 2 * m * k * n


def chain(*shapes):
    """Operations of a product of several matrices, from the left."""
    total, left = 0, shapes[0]
    for right in shapes[1:]:
        left, cost = product(left, right)
        total += cost
    return total


def test_model_of_track_3():
    assert sum(m * n for m, n in block_shapes(TRACK3)) == 84_934_656
    forward = model_flops(TRACK3, 1) / 3
    assert forward == pytest.approx(247.1e6 + 18.9e6, rel=1e-3)
    assert model_flops(TRACK3, 524288) == pytest.approx(4.18e14, rel=1e-3)


def test_model_counted_one_product_at_a_time():
    """One layer, one head: causal attention needs about half of each of its two products."""
    rows, d, hidden, vocabulary = 512, 8, 24, 40
    model = ModelConfig(vocabulary, 1, d, 8, hidden, rows)
    x = (rows, d)
    dense = 4 * chain(x, (d, d)) + chain(x, (d, hidden), (hidden, d)) + chain(x, (d, vocabulary))
    attention = chain(x, (d, rows)) + chain((rows, rows), x)
    assert model_flops(model, rows) == 3 * (dense + attention / 2)


def test_optimizers_counted_one_product_at_a_time():
    shapes = [(4, 12), (12, 4), (5, 5)]
    muon = shampoo = soap = 0.0
    for m, n in shapes:
        low, high = min(m, n), max(m, n)
        gram = chain((low, high), (high, low)) + chain((low, low), (low, low))
        muon += 3 * (gram + chain((low, low), (low, high)))
        statistics = chain((m, n), (n, m)) + chain((n, m), (m, n))
        both_sides = chain((m, m), (m, n), (n, n))
        roots, bases = ((c + 2) * (m**3 + n**3) for c in (9, 8 / 3))
        shampoo += statistics + both_sides + roots / 5
        soap += statistics + 3 * both_sides + bases / 2
    assert muon_flops(shapes, 3) == muon
    assert shampoo_flops(shapes, 5) == pytest.approx(shampoo)
    assert soap_flops(shapes, 2) == pytest.approx(soap)


def test_optimizers_of_track_3():
    shapes = block_shapes(TRACK3)
    assert muon_flops(shapes, 12) == pytest.approx(3.9e12, rel=0.02)
    once, never = (shampoo_flops(shapes, every) for every in (1, 10**12))
    assert never == pytest.approx(0.52e12 + 0.52e12, rel=0.02)
    cubes = sum(edge**3 for edge in itertools.chain(*shapes))
    assert once - never == pytest.approx(11 * cubes, rel=1e-3)


def test_blocks_cover_the_matrix():
    blocks = cut([(5, 7)], 3)
    assert sum(m * n for m, n in blocks) == 35
    assert max(itertools.chain(*blocks)) == 3 and len(blocks) == 6


@pytest.mark.parametrize(
    ("optimizer", "own"),
    [
        ("adamw", 0.0),
        ("muon_track3", 3.9e12),
        ("shampoo", 0.52e12 + 0.52e12 + 11 * (120 * 768**3 + 24 * 3072**3)),
        ("soap", 4 * 0.52e12 + (2 + 8 / 3) * (120 * 768**3 + 24 * 3072**3) / 10),
    ],
)
def test_steps_of_our_runs(optimizer, own):
    config = dataclasses.asdict(preset("track3", optimizer))
    assert step_flops(config) == pytest.approx(model_flops(TRACK3, 524288) + own, rel=2e-4)
