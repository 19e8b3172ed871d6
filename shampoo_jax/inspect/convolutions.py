"""FLOPs of convolutions in the text of a program: instructions, and calls of cuDNN."""

import math
import re
from collections.abc import Mapping

_CALL = re.compile(r"^(.*?) (convolution|custom-call)\(%?([\w.-]+), %?([\w.-]+)")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
_CUDNN = re.compile(r'"__cudnn\$conv(BackwardInput|BackwardFilter|\w*Forward)"')
_DILATED = re.compile(r"lhs_dilate=([\dx]+)")


def convolution_flops(line: str, lines: Mapping[str, str]) -> tuple[int, str] | None:
    """FLOPs of a convolution, and its first operand's name; None for another line.

    With `y` what it gives and `w` its window of `o` outputs they are `2 |y| |w| / o`, padding
    included. cuDNN's calls are told by the names of the forward pass: of those for the backward
    pass `y` or `w` is an operand. An input that is dilated, which is how a TPU's compiler writes a
    batched product, is that much cheaper: most of it is zeros.

    Args:
      line: An instruction, without its name.
      lines: Those of the computation by name.

    Example:
      >>> lines = {"x": "f32[8,9,9,4] parameter(0)", "w": "f32[3,3,4,16] parameter(1)"}
      >>> line = "f32[8,7,7,16] convolution(%x, %w), window={size=3x3}, dim_labels=b01f_01io->b01f"
      >>> convolution_flops(line, lines)
      (451584, 'x')
    """
    labels = _LABELS.search(line)
    call, kind = _CALL.match(line) if labels else None, _CUDNN.search(line)
    if labels is None or call is None or (call[2] == "custom-call" and kind is None):
        return None
    result, first, second = (
        _edges(t) for t in (call[1], *(lines.get(call[k], "") for k in (3, 4)))
    )
    y, w = {"BackwardInput": (first, second), "BackwardFilter": (second, result)}.get(
        kind[1] if kind else "", (result, second)
    )
    if len(w) != len(labels[1]):
        return 0, call[3]  # an operand whose shape is not written
    dilated = _DILATED.search(line)
    times = math.prod(int(n) for n in dilated[1].split("x")) if dilated else 1
    outputs = w[labels[1].index("o")]
    return 2 * math.prod(y) * math.prod(w) // outputs // times, call[3]


def _edges(text: str) -> list[int]:
    """Edges of the first array that a text names; none where there is none."""
    found = _SHAPE.search(text)
    return [int(d) for d in found[1].split(",") if d] if found else []
