"""Sizes as people write and read them."""

from __future__ import annotations

import re

from recompile.errors import RecompileError

_UNITS = {"": 1, "b": 1, "kib": 2**10, "k": 2**10, "kb": 10**3, "mib": 2**20, "m": 2**20, "mb": 10**6}
_UNITS |= {"gib": 2**30, "g": 2**30, "gb": 10**9, "tib": 2**40, "t": 2**40, "tb": 10**12}


def parse_size(text: str, argument: str = "") -> int:
    """ "4.2GiB", "1.5G", "900MB" -> bytes. GiB and G are 2^30, GB 10^9. Raises RecompileError.

    argument: what it was given as, for the message"""
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        given = f'{argument} "{text}"'.lstrip()
        raise RecompileError(f"{given} is not a size; write 4.2GiB, 900MiB or 4.5GB")
    return int(float(found[1]) * unit)


def size_bytes(size: int | str | None, argument: str = "") -> int | None:
    """Bytes of a size given as a number or as text; None stays None. Raises RecompileError as `parse_size` does."""
    return parse_size(size, argument) if isinstance(size, str) else size


def format_bytes(size_bytes: float) -> str:
    """1536 -> "1.50 KiB"."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def format_bpw(bits_per_weight: float | None) -> str:
    """4.25 -> "4.250"; None (there is no such module) -> "-"."""
    return "-" if bits_per_weight is None else f"{bits_per_weight:.3f}"


def format_seconds(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if not seconds < float("inf"):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
