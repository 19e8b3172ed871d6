"""Files with a fault in them, made from whole ones by chance."""

import random
import re

# What a header or a text may be made to claim.
HUGE = (-1, 0, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 10**30)
WORDS = (
    *(b"NaN", b"1e999", b"null", b"-1", b'"x"', b"[]", b"{}", b"[" * 5000, b"true", b"\x00"),
    b"9" * 5000,
)
KINDS = ("flip", "bits", "cut", "empty", "swap", "number", "word", "repeat", "insert")


def mutate(content: bytes, chance: random.Random, kind: str | None = None) -> bytes:
    """Returns a file with one fault.

    Args:
        content: the whole file.
        chance: decides where.
        kind: one of `KINDS`; by chance if missing.
    """
    kind = kind or chance.choice(KINDS)
    if not content or kind == "empty":
        return b""
    at = chance.randrange(len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    if kind == "bits":
        many = bytearray(content)
        for _ in range(chance.randint(2, 64)):
            many[chance.randrange(len(many))] = chance.randrange(256)
        return bytes(many)
    if kind == "cut":
        return content[:at]
    if kind == "swap":
        other = chance.randrange(len(content))
        low, high = sorted((at, other))
        return content[:low] + content[high:] + content[low:high]
    if kind == "number":
        return _number(content, chance)
    if kind == "word":
        found = list(re.finditer(rb"[\w.+-]+", content)) or [re.match(rb".", content, re.S)]
        word = chance.choice(found)
        span = word.span() if word else (0, 1)
        return content[: span[0]] + chance.choice(WORDS) + content[span[1] :]
    if kind == "repeat":
        return content[:at] + content[: chance.randint(1, 2000)] + content[at:]
    return content[:at] + chance.randbytes(chance.randint(1, 40)) + content[at:]


def _number(content: bytes, chance: random.Random) -> bytes:
    """Replaces a number: digits of a text, or a word of four or eight bytes of a header."""
    huge = chance.choice(HUGE)
    digits = list(re.finditer(rb"\d+", content))
    if digits and chance.random() < 0.7:
        place = chance.choice(digits)
        return content[: place.start()] + str(huge).encode() + content[place.end() :]
    width = chance.choice((4, 8))
    at = width * chance.randrange(max(1, min(len(content), 1024) // width))
    word = (huge % (1 << 8 * width)).to_bytes(width, "little")
    return content[:at] + word + content[at + width :]
