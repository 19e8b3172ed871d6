"""Seconds that a compiled program may take, by published rates."""

from typing import Any

from nanogpt.train.rates import DEVICES, Rates
from shampoo_jax import Compiled

RATES = {
    **{"a100": "A100 SXM 80 GB", "h100": "H100 SXM", "h200": "H200 SXM", "b200": "B200 SXM"},
    **{"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"},
}
# Of peak rates, products, memory and links alike: what runs reach, see docs/scaling.md.
EFFICIENCY = 0.4


def predicted(found: Compiled, kind: str, devices: int) -> dict[str, Any]:
    """A range of seconds, its parts and where the rates are from; nothing for a CPU.

    The lower end is the longest of three, at published rates: products and the exchanges that the
    schedule lets nothing overlap with; memory; links. The upper end is the sum of products, memory
    and links at 40 % of the rates: that a schedule lets two overlap does not say that both keep
    their rates, so nothing is taken off it.

    Args:
        found: a program that fits.
        kind: of device, as in the name of a target.
        devices: how many there are.
    """
    if kind not in RATES:
        return {}
    assert found.program is not None
    rates = DEVICES[RATES[kind]]
    seconds = parts(found, rates, devices)
    waited = seconds["products"] + seconds["waits"]
    return {
        "seconds": seconds,
        "best_s": max(waited, seconds["memory"], seconds["links"]),
        "worst_s": sum(seconds[k] for k in ("products", "memory", "links")) / EFFICIENCY,
        "rates": rates.source,
    }


def parts(found: Compiled, rates: Rates, devices: int) -> dict[str, float]:
    """Seconds of products, of memory, of links, and of links waited for, at published rates.

    Every argument is read and every result written once, temporary memory both. Kernels without
    products in the program's text, cuDNN's attention and decompositions, are left out.

    Args:
        found: a program.
        rates: of one device.
        devices: how many there are.
    """
    program = found.program
    assert program is not None  # it fits
    touched = found.arguments + found.outputs + 2 * found.temporary
    link = rates.near if devices <= rates.node else rates.far
    all_sent = sent(program.exchanges, devices)
    return {
        "products": sum(n / rate(arithmetic, rates) for arithmetic, n in program.flops.items()),
        "memory": touched / rates.memory,
        "links": all_sent / link,
        "waits": (all_sent - sent(program.overlapped, devices)) / link,
    }


def sent(exchanges: dict[str, tuple[int, int]], devices: int) -> float:
    """Bytes that leave a device in rings of all, which is more than what comes of some kinds.

    >>> sent({"all-gather": (1, 80), "reduce-scatter": (1, 10), "all-reduce": (1, 80)}, 8)
    280.0
    """
    others = (devices - 1) / devices
    times = {"reduce-scatter": devices - 1, "all-reduce": 2 * others, "collective-permute": 1}
    return float(sum(size * times.get(kind, others) for kind, (_, size) in exchanges.items()))


def rate(arithmetic: str, rates: Rates) -> float:
    """Operations a second of products in an arithmetic, as `shampoo_jax.Program` names it."""
    if arithmetic.startswith("bf16_bf16_f32_x3"):
        return rates.bfloat16 / 3
    if arithmetic.startswith(("bf16", "f16")):
        return rates.bfloat16
    if arithmetic.startswith("tf32"):
        return rates.rest
    wide = {"highest": rates.full, "high": rates.rest}
    return wide.get(arithmetic.partition(" ")[2], rates.plain)
