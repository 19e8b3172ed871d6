"""Rates of matrices that the two small boards give preset medium, by the rules of transfer.

    python -m scripts.maintenance.medium_rates

Prints the table of docs/medium.md. A rate that was tuned on a board is multiplied as
docs/methods/transfer.md says, from that board's width and depth to those of preset medium; of the
two that come of it the geometric mean is taken. What the rules do not know, the longer run and the
larger batch, they get wrong by the same factor for AdamW and for Muon as for those that have the
same rule, so a rate is divided by that factor: the mean over the rate that is published.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import shampoo_jax
from nanogpt.config.presets import preset
from nanogpt.report.tables import markdown

BOARDS = {
    "board": Path("docs/leaderboard/board.jsonl"),
    "medium_board": Path("docs/medium_board.jsonl"),
}
SEED = 0  # the first of those that a board's final runs have, at the rate that was chosen
# Of every entry: the method whose rule it has, and its form. A grafted Shampoo has the graft's.
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": ("adam", {}),
    "muon_track3": ("muon", {}),
    "lion": ("adam", {}),
    "sophia": ("adam", {}),
    "psgd": ("adam", {}),
    "shampoo": ("adam", {}),
    "soap": ("soap", {}),
    "kl_shampoo": ("shampoo", {"exponents": 0.5, "graft": None}),
}
# Whose published rate says how far a rule is off.
MEASURES = {"adam": "adamw", "muon": "muon_track3", "soap": "muon_track3", "shampoo": "muon_track3"}


def tuned(board: str) -> dict[str, float]:
    """The rates that a board chose, by entry."""
    records = map(json.loads, BOARDS[board].read_text(encoding="utf-8").splitlines())
    settings = [record["settings"] for record in records if record["seed"] == SEED]
    return {each["entry"]: each["matrices.learning_rate"] for each in settings}


def multiplier(name: str, board: str) -> float:
    """What the rules multiply a rate with, from a board's model to preset medium's."""
    small, large = (preset(each, "adamw").model for each in (board, "medium"))
    method, form = RULES[name]

    def tree(width: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"kernel": jax.ShapeDtypeStruct((width, width), "float32")}

    base, new = tree(small.model_dim), tree(large.model_dim)
    depth = large.num_layers / small.num_layers
    rules = shampoo_jax.transfer_rules(base, new, method, depth=depth, **form)
    return rules.multipliers["kernel"].learning_rate


def transferred(name: str) -> dict[str, float]:
    """Rates by board, as the rules have them."""
    return {board: tuned(board)[name] * multiplier(name, board) for board in BOARDS}


def mean(name: str) -> float:
    """The geometric one of both boards'."""
    return math.prod(transferred(name).values()) ** 0.5


def rate(name: str) -> float:
    """That, as the published rate of the same rule's measure corrects it."""
    measure = MEASURES[RULES[name][0]]
    return mean(name) * preset("medium", measure).matrices.learning_rate / mean(measure)


def table() -> str:
    """A line for each entry."""

    def lines() -> Iterator[list[str]]:
        for name in RULES:
            chosen = preset("medium", name).matrices.learning_rate
            own = [tuned(board)[name] for board in BOARDS]
            numbers = [*own, *transferred(name).values(), rate(name), chosen]
            yield [name, *(f"{number:.2g}" for number in numbers)]

    heads = ["optimizer", "board", "medium_board", "from board", "from medium_board"]
    return markdown([*heads, "corrected", "preset medium"], list(lines()))


if __name__ == "__main__":
    print(table())
