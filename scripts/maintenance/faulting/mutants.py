"""Files with a fault in them, made from whole ones by chance."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

# What a header or a text may be made to claim.
HUGE = (-1, 0, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 10**30)
WORDS = (
    *(b"NaN", b"1e999", b"null", b"-1", b'"x"', b"[]", b"{}", b"[" * 5000, b"true", b"\x00"),
    b"9" * 5000,
)
# In the place of a value of JSON, or around it.
VALUES = (None, True, -1, 0, 1.5, 10**30, "", "x", [], [0], {}, {"x": 0})
KINDS = (
    *("flip", "bits", "cut", "empty", "swap", "number", "word", "repeat", "insert"),
    *("lose", "retype"),  # of JSON
)


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
    if kind in ("lose", "retype"):
        return _other_form(content, chance, kind)
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


def _other_form(content: bytes, chance: random.Random, kind: str) -> bytes:
    """Takes a name or an item out of JSON, or puts a value of another type there.

    What is no JSON, as a whole or by lines, loses a byte.
    """
    for parts in ([content], content.splitlines()):
        place = chance.randrange(len(parts))
        try:
            tree = json.loads(parts[place])
        except (ValueError, RecursionError):
            continue
        holder = [tree]
        inside = list(_places(holder))
        where, key = chance.choice(inside[1:] or inside)
        if kind == "lose":
            del where[key]
        else:
            where[key] = chance.choice((*VALUES, [where[key]]))
        told = json.dumps(holder[0]).encode() if holder else b""
        return b"\n".join([*parts[:place], told, *parts[place + 1 :]])
    at = chance.randrange(len(content))
    return content[:at] + content[at + 1 :]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, name or number) of everything inside."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(inside):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


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
