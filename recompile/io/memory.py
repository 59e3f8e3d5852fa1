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


def available_bytes(device: str = "cpu") -> int:
    """Bytes of memory that a device has left for everybody, or this container; 0 where nothing says."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 2**10)
        limit, used = ((Path("/sys/fs/cgroup") / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append(max(0, int(limit) - int(used)))  # "max": no limit, and no number
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return min(found, default=0)


def format_mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
