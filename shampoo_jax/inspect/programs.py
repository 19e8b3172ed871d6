"""What an optimized program holds, read from its text: exchanges, products, calls of libraries."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

from shampoo_jax.inspect.convolutions import convolution_flops

KINDS = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "f64": 8, "s64": 8}

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_PRODUCT = re.compile(r"^(\S+) dot\(%?([\w.-]+), %?([\w.-]+)\)(.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+)"
)
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
# Ends of what was started: `all-gather-done(%x)`, `async-done(%x)`, also with the operand's shape.
_ENDED = re.compile(r" [a-z-]+-(done|update)\((?:[^%]*?%)?([\w.-]+)\)")
# Libraries that compute: attention, decompositions, products.
_KERNEL = re.compile(r'custom_call_target="(?:__cu|cusolver|cublas|lapack)')
Counts = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Program:
    """What one device does, each loop run as often as the program says it is.

    Loops of unknown length count once. Of branches the dearest counts: a step with a refresh, and
    with what is done where roots fail.

    Attributes:
      flops: Of products and convolutions, by arithmetic.
      exchanges: Number and bytes of results, by kind.
      calls: Calls of libraries by name, as often as they are in the text.
      overlapped: Of the exchanges those between whose start and end the schedule has products, or
        attention and decompositions of libraries; the device waits for all others.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> compiled = jax.jit(jnp.sin).lower(jnp.ones(3)).compile()
      >>> shampoo_jax.read_program(compiled.as_text())
      Program(flops={}, exchanges={}, calls={}, overlapped={})
    """

    flops: dict[str, float]
    exchanges: dict[str, tuple[int, int]]
    calls: dict[str, int]
    overlapped: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


def exchanges(program: str) -> dict[str, tuple[int, int]]:
    """Number of collectives of each kind in optimized HLO, and bytes of their results on a device.

    Args:
      program: Text of the module of one device, or of a line of it.

    >>> exchanges("  %a = (f32[8]{0}, bf16[4]{0}) all-reduce(%x, %y), replica_groups={}")
    {'all-reduce': (1, 40)}
    """
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind, start in re.findall(rf"= (.*?) ({KINDS})(-start)?\(", program):
        nested = start and shapes.startswith("((")  # operands, then results
        came = shapes[_end(shapes) :] if nested else shapes
        sizes = [BYTES.get(dtype, 4) * _size(dims) for dtype, dims in _SHAPE.findall(came)]
        if start and kind == "all-gather" and not nested:  # likewise, one by one
            sizes = sizes[len(sizes) // 2 :]
        elif start and kind == "collective-permute":  # which has two numbers in the end
            sizes = sizes[:1] if nested else sizes[1:2]
        size = sum(sizes)
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + 1, total + size)
    return found


def _end(shapes: str) -> int:
    """Where the first tuple inside of a tuple ends.

    >>> _end("((f32[8]{0:T(8)}), f32[4])")
    16
    """
    depth = 0
    for place, letter in enumerate(shapes):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 1:
            return place
    return 0


def read_program(text: str) -> Program:
    """Counts what the optimized HLO of one device does.

    Args:
      text: Of `jax.stages.Compiled.as_text()`.

    Returns:
      The counts.

    Example:
      >>> import jax, jax.numpy as jnp, shampoo_jax
      >>> square = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
      >>> sum(shampoo_jax.read_program(square.as_text()).flops.values())
      524288.0
    """
    computations, entry = _computations(text)
    total = _total(computations, {}, entry)
    calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text))
    return Program(_flops(total), _split(total), dict(calls), _split(total, "overlapped "))


def _split(total: Counts, which: str = "") -> dict[str, tuple[int, int]]:
    return {
        kind: (int(total[f"{which}number {kind}"]), int(total[f"{which}bytes {kind}"]))
        for kind in KINDS.split("|")
        if total[f"{which}number {kind}"]
    }


def _flops(total: Counts) -> dict[str, float]:
    return {k.removeprefix("flops "): float(n) for k, n in total.items() if k.startswith("flops ")}


def _computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """By name the lines of each computation, by name as well; and the name of the first."""
    found: dict[str, dict[str, str]] = {}
    entry, lines = "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            lines[match[1]] = match[2]
    return found, entry


def _total(
    computations: Mapping[str, Mapping[str, str]], known: dict[str, Counts], name: str
) -> Counts:
    """What a computation does, with all that it calls."""
    if name in known:
        return known[name]
    total: Counts = collections.Counter()
    again = functools.partial(_total, computations, known)
    lines = computations.get(name, {})
    started: dict[str, tuple[Counts, float]] = {}
    for line, rest in lines.items():
        own = _own(rest, lines, computations, again)
        total += own
        chain = _chain(line, rest, computations)
        ended = _ENDED.search(rest)
        if line.startswith("async-collective-start") or re.search(r"-start\(", rest):
            sent = {k: n for k, n in own.items() if k.startswith(("number ", "bytes "))}
            started[chain or line] = collections.Counter(sent), _computed(total)
        elif known_start := started.pop(chain or (ended[2] if ended else ""), None):
            sent, before = known_start
            if ended and ended[1] == "update":
                started[line] = known_start
            elif _computed(total) > before:
                total += collections.Counter({f"overlapped {k}": n for k, n in sent.items()})
    known[name] = total
    return total


def _chain(line: str, rest: str, computations: Mapping[str, Mapping[str, str]]) -> str:
    """Which exchange it is that a fusion starts or ends, as TPUs have them; else nothing."""
    called = _CALLED.search(rest) if line.startswith("async-collective-") else None
    pieces = " ".join(computations.get(called[1], {}).values()) if called else ""
    found = re.search(r'chain_id="\w+"', pieces)
    return found[0] if found else ""


def _own(
    rest: str,
    lines: Mapping[str, str],
    computations: Mapping[str, Mapping[str, str]],
    again: Callable[[str], Counts],
) -> Counts:
    """What a line does, with all that it calls."""
    total: Counts = collections.Counter()
    if product := _PRODUCT.match(rest):
        total["flops " + _arithmetic(rest, lines[product[2]])] += _work(product, lines)
    elif convolution := convolution_flops(rest, lines):
        total["flops " + _arithmetic(rest, lines.get(convolution[1], ""))] += convolution[0]
    elif branches := _BRANCHES.search(rest):
        names = re.findall(r"[\w.-]+", " ".join(filter(None, branches.groups())))
        total += max((again(n) for n in names), key=_weight)
    elif loop := _LOOP.search(rest):
        turns = _turns(rest, computations.get(loop[1], {}))
        total += collections.Counter({k: n * turns for k, n in again(loop[2]).items()})
    elif called := _CALLED.search(rest):
        total += again(called[1])
    if _KERNEL.search(rest):
        total["kernels"] += 1
    if "chain_id=" in rest and not any("AsyncCollectiveStart" in each for each in lines.values()):
        return total  # a further piece of what was started elsewhere
    for kind, (count, size) in exchanges("= " + rest).items():
        total[f"number {kind}"] += count
        total[f"bytes {kind}"] += size
    return total


def _computed(total: Counts) -> float:
    """Grows with every product and every call of a library that computes."""
    return sum(_flops(total).values()) + total["kernels"]


def _weight(total: Counts) -> tuple[float, float]:
    return sum(_flops(total).values()), sum(total.values())


def _size(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


def _work(product: re.Match[str], shapes: Mapping[str, str]) -> int:
    """FLOPs of a product: `2 b m k n` from the sizes `b m k`, `b k n` and `b m n`."""
    sizes = []
    for text in (product[1], *(shapes.get(product[k], "") for k in (2, 3))):
        shape = _SHAPE.search(text)
        sizes.append(_size(shape[2]) if shape else 0)
    batch = 1
    out = _SHAPE.search(product[1])
    if dims := re.search(r"lhs_batch_dims=\{([\d,]+)\}", product[4]):
        # The result has them first.
        edges = [int(d) for d in out[2].split(",")] if out else []
        batch = math.prod(edges[: len(dims[1].split(","))])
    return round(2 * math.sqrt(math.prod(sizes) / batch))


def _arithmetic(rest: str, operand: str) -> str:
    """What a product is computed in: its algorithm, or its operand's dtype and the precision."""
    if algorithm := re.search(r"algorithm=(\w+)", rest):
        return algorithm[1].removeprefix("dot_")
    dtype = operand.partition("[")[0]
    precision = re.search(r"operand_precision=\{(\w+)", rest)
    return f"{dtype} {precision[1]}" if precision else dtype


def _turns(rest: str, condition: Mapping[str, str]) -> int:
    """How often a loop runs; once where that is not written."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    constants = {
        n: c[1] for n, r in condition.items() if (c := re.match(r"s32\S* constant\((\d+)\)", r))
    }
    for line in condition.values():
        if less := re.search(r"compare\(%?[\w.-]+, %?([\w.-]+)\), direction=LT", line):
            if less[1] in constants and len(constants) == 1:
                return int(constants[less[1]])
    return 1
