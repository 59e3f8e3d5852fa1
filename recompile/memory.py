"""How much memory this process holds, and how sizes are spelled in plans."""

from __future__ import annotations

import os
from pathlib import Path


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 400 * 2**20  # no /proc: about what Python with torch and transformers takes


def format_mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
