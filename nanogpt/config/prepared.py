"""What a run's defaults are on a prepared folder of one's own."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

from nanogpt.config.run import Config

# A vocabulary may be rounded up to what the hardware likes: track 3 has 50304 rows for 50257 ids.
PADDING = 128


def fitted(default: Config, words: Sequence[str]) -> Config:
    """Returns a preset with the vocabulary and validation tokens of the folder that words name.

    Args:
        default: the preset.
        words: a command line; without --data.directory, or where that folder has no manifest, the
            preset stays as it is. Settings that it names are set afterwards.

    Raises:
        ValueError: a manifest that cannot be read; names it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data.directory", dest="folder", default="", const="", nargs="?")
    folder = parser.parse_known_args(words)[0].folder
    path = pathlib.Path(folder, "manifest.json")
    if not folder or not path.exists():
        return default
    from data_pipeline import read_manifest  # it imports much, for which no help should wait

    manifest = read_manifest(folder)
    ids, scored = manifest.source.vocab_size, manifest.baselines.val_tokens
    model, data = default.model, default.data
    if not 0 <= model.vocab_size - ids < PADDING:
        model = dataclasses.replace(model, vocab_size=ids)
    if scored < data.val_tokens and scored % (data.microbatch_rows * model.sequence_length) == 0:
        data = dataclasses.replace(data, val_tokens=scored)
    return dataclasses.replace(default, model=model, data=data)
