"""Which runs can be compared: the one rule that tables, verdicts and pictures follow.

Losses mean the same where data, tokenizer, model and validation tokens are the same. Steps, rates
and seeds may differ: they are what is compared. Times mean the same on the same host and device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PARTS = ("data", "tokenizer", "model", "validation")
Starts = Mapping[str, Mapping[str, Any]]


def check_comparable(starts: Starts, *, unchecked: bool = False) -> list[str]:
    """Refuses runs whose losses are about different things.

    Args:
        starts: first record of the metrics of each run, by the run's name.
        unchecked: accept runs that carry no fingerprint.

    Returns:
        Names of the runs that were accepted unchecked.

    Raises:
        ValueError: names the runs and what differs, or a run without a fingerprint.
    """
    unknown = [name for name, start in starts.items() if not start.get("fingerprint")]
    if unknown and not unchecked:
        raise ValueError(
            f"{', '.join(unknown)}: no fingerprint says which data, model and validation tokens "
            "the losses are about (an older version trained it): train it again, or pass "
            "--unchecked to take it as comparable."
        )
    known = {name: start["fingerprint"] for name, start in starts.items() if name not in unknown}
    for part in PARTS:
        told = [(name, found[part]) for name, found in known.items() if found.get(part)]
        for name, value in told:
            if value != told[0][1]:
                raise ValueError(
                    f"{told[0][0]} and {name} cannot be compared: their {part} differs "
                    f"({told[0][1]} and {value}). Name runs that agree in it."
                )
    return unknown


def same_clock(starts: Sequence[Mapping[str, Any]]) -> bool:
    """Tells whether times may stand side by side: all on one host and kind of device.

    >>> here = {"host": "a", "device": {"kind": "H100", "count": 8}}
    >>> same_clock([here, here]), same_clock([here, here | {"host": "b"}])
    (True, False)
    """
    return all(
        (start.get("host"), start["device"]) == (starts[0].get("host"), starts[0]["device"])
        for start in starts
    )
