"""The byte-pair encoding of GPT-2, and its truncations, without a download.

The merge table is bundled. Its order is the order of training, so any prefix of it is itself a
complete, lossless BPE: fewer merges, more tokens, a smaller head.
"""

import functools
import hashlib
import lzma
from importlib import resources

import numpy as np
import tiktoken

GPT2_VOCAB_SIZE = 50257
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

_MERGES_FILE = "gpt2_merges.xz"
_MERGES_BYTES = 456318
# How GPT-2 cuts text into pieces that merges do not cross: contractions, then letters, digits or
# other symbols with at most one space before them, then white space (all but the last of a run).
_PIECES = "|".join(
    [
        r"'s|'t|'re|'ve|'m|'ll|'d",
        r" ?\p{L}+",
        r" ?\p{N}+",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class Tokenizer:
    """A byte-level BPE with one special token, end-of-text, as its last id.

    Attributes:
      name: "gpt2", whatever the number of merges.
      vocab_size: number of ids.
      end_of_text: the id that precedes every document.
      fingerprint: sha256 (hex) of merges and vocabulary size; equal fingerprints, equal ids.
    """

    def __init__(self, tokens: list[bytes]):
        """Builds the encoder from `tokens`: the bytes of id 0, 1, ...; end-of-text follows."""
        self.name = "gpt2"
        self.vocab_size = len(tokens) + 1
        self.end_of_text = len(tokens)
        self.fingerprint = hashlib.sha256(f"{MERGES_SHA256} {self.vocab_size}".encode()).hexdigest()
        self._tokens = tokens
        self._encoding = tiktoken.Encoding(
            f"{self.name}-{self.vocab_size}",
            pat_str=_PIECES,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={"<|endoftext|>": self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> np.ndarray:
        """Encodes text; "<|endoftext|>" in it is text, not the special token.

        Args:
          text: any string that UTF-8 can hold.

        Returns:
          uint16 (tokens,).

        Raises:
          UnicodeEncodeError: if `text` holds half a surrogate pair.
        """
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, tokens: np.ndarray) -> str:
        """Inverts `encode`.

        Args:
          tokens: integers (tokens,) below `vocab_size`.

        Returns:
          The text; bytes that are not UTF-8 (a cut character) become U+FFFD.
        """
        return self._encoding.decode(np.asarray(tokens).tolist())

    def bytes_of(self, token: int) -> bytes:
        """What an id stands for, perhaps a part of a character; nothing of end-of-text."""
        return b"" if token == self.end_of_text else self._tokens[token]

    def token_bytes(self) -> np.ndarray:
        """Counts the bytes of text that each id stands for.

        Returns:
          int64 (vocab_size,); 0 for end-of-text.
        """
        return np.array([len(token) for token in self._tokens] + [0], dtype=np.int64)


@functools.cache
def gpt2(vocab_size: int = GPT2_VOCAB_SIZE) -> Tokenizer:
    """GPT-2's BPE, whole or truncated to its first merges.

    >>> gpt2().encode("Hello world").tolist()
    [15496, 995]
    >>> small = gpt2(1024)
    >>> small.end_of_text, small.decode(small.encode("Hello world"))
    (1023, 'Hello world')

    Args:
      vocab_size: ids in the vocabulary: 256 bytes, `vocab_size - 257` merges, end-of-text.

    Returns:
      The tokenizer; ids below `vocab_size - 1` mean the same for every `vocab_size`.

    Raises:
      ValueError: if `vocab_size` is not in 257..50257, or the bundled table is not GPT-2's.
    """
    if not 257 <= vocab_size <= GPT2_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size}: choose one from 257 (bytes and end-of-text) to "
            f"{GPT2_VOCAB_SIZE} (all of GPT-2's merges)."
        )
    return Tokenizer(_gpt2_tokens()[: vocab_size - 1])


def unpack(packed: bytes) -> bytes:
    """Unpacks the merge table.

    Args:
      packed: the bundled file.

    Raises:
      ValueError: if it is not GPT-2's table; more than its length is not unpacked.
    """
    try:
        table = lzma.LZMADecompressor().decompress(packed, max_length=_MERGES_BYTES)
        digest = hashlib.sha256(table).hexdigest()
    except lzma.LZMAError as error:
        table, digest = b"", str(error)
    if digest != MERGES_SHA256:
        raise ValueError(
            f"{_MERGES_FILE}: sha256 {digest}, expected {MERGES_SHA256}: "
            "the bundled merge table is damaged; install the package again."
        )
    return table


@functools.cache
def _gpt2_tokens() -> list[bytes]:
    """The bytes of GPT-2's 50,256 ordinary tokens by id.

    The table writes a byte as a character: itself where that is printable, else the next of
    U+0100, U+0101, ... Ids 0..255 are the printable bytes, then the others, both ascending.
    """
    table = unpack(resources.files("data_pipeline").joinpath(_MERGES_FILE).read_bytes())
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    merges = table.decode().splitlines()[1:]
    merged = [bytes(byte_of[char] for char in merge if char != " ") for merge in merges]
    return [bytes([byte]) for byte in printable + others] + merged
