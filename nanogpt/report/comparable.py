"""Which runs can be compared: the one rule that tables, verdicts and pictures follow.

Losses mean the same where data, tokenizer, model and validation tokens are the same. Steps, rates
and seeds may differ: they are what is compared. Times mean the same on the same host and device.
Published curves carry no fingerprint; they stand for the track in their name, and runs keep its
rules or not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nanogpt.config.presets import preset
from nanogpt.report.verdicts import MEDIUM_TARGET, TARGET

PARTS = ("data", "tokenizer", "model", "validation")
Starts = Mapping[str, Mapping[str, Any]]
# Of each track the loss to reach; published curves name theirs in their file's name.
TARGETS = {"t3": TARGET, "t2": MEDIUM_TARGET}
# The preset that is a track's benchmark, by the track's mark in names of published curves.
TRACKS = {"t3": "track3", "t2": "medium"}
# What the rules of a track fix: settings, and the text as the fingerprint tells it.
FIXED = {
    "model": (
        *("vocab_size", "num_layers", "model_dim", "head_dim", "mlp_dim", "sequence_length"),
        *("width_multiplier", "depth_multiplier"),
        *("kind", "head_columns", "end_of_text", "mask_block", "window"),
    ),
    "data": ("mode", "batch_rows", "val_tokens", "val_length"),
}
# Of runs that were written before these settings were there.
MISSING = {
    **{"width_multiplier": 1.0, "depth_multiplier": 1.0, "kind": "track3"},
    **{"end_of_text": 50256, "mask_block": 128, "window": 3456},
}
BENCHMARKS = {track: preset(name, "muon_track3") for track, name in TRACKS.items()}
TEXT = {
    "shards": "fineweb_train_000001.bin and fineweb_val_000000.bin",
    "tokenizer": "gpt2 50257 1ce1664773c5",
}


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


def departure(start: Mapping[str, Any], track: str = "t3") -> str | None:
    """Returns where a run leaves the rules of a track, None where it keeps them.

    Args:
        track: key of `TRACKS`.
        start: first record of its metrics. What its fingerprint does not tell is not held against
            it: shards without a manifest are of an unknown tokenizer.

    >>> departure({"config": {"model": {"vocab_size": 300}}})
    'model.vocab_size=300, the benchmark 50304'
    """
    config, told = start["config"], start.get("fingerprint") or {}
    benchmark: Mapping[str, Any] = dataclasses.asdict(BENCHMARKS[track])
    for part, names in FIXED.items():
        for name in names:
            found = config.get(part, {}).get(name, MISSING.get(name))
            wanted = benchmark[part][name]
            if found != wanted:
                return f"{part}.{name}={found!r}, the benchmark {wanted!r}"
    if begun := config.get("init_from"):
        return f"init_from={begun!r}, the benchmark begins with none"
    for name, wanted in TEXT.items():
        if told.get(name, wanted) not in (None, wanted):
            return f"{name} {told[name]!r}, the benchmark {wanted!r}"
    return None


def common_track(published: Sequence[str], starts: Starts) -> str | None:
    """Returns the track that published curves and runs share, None where there is none.

    Args:
        published: names of the files of curves, as t3_36_muon_tuned_3250.
        starts: first record of the metrics of each run, by the run's name.

    Raises:
        ValueError: curves of two tracks, or a run beside a curve of which it has not the rules.
    """
    known = [name for name in published if name.partition("_")[0] in TARGETS]
    if not known:
        kept = (t for t in TRACKS if not any(departure(start, t) for start in starts.values()))
        return next(kept, None) if starts else None
    track = known[0].partition("_")[0]
    departures = {name: departure(start, track) for name, start in starts.items()}
    for name in known:
        if not name.startswith(f"{track}_"):
            raise ValueError(
                f"{known[0]} and {name} are of two tracks with two models: name curves of one."
            )
    for name, left in departures.items():
        if left:
            raise ValueError(
                f"{name} cannot be compared with {known[0]}: it has {left}. Name runs of the "
                "curve's track, or leave the curve out."
            )
    return track
