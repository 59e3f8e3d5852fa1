"""How much memory this process holds and may come to hold, and how freed memory is given back: what plans are made of.

A plan counts what a run will hold and adds `process_bytes`: the program as it is now, what of it is not there yet
(pages of libraries that are touched later, their tables), and what the allocator keeps of what was freed. Under a cap
the last is bounded: blocks of 256 KiB and more go back to the system when they are freed, and the rest is trimmed.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FREE_BYTES_KEPT = 48 * 2**20  # of freed blocks that the allocator may hold on to
GROWN_BYTES = 8 * 2**20  # of the process, after which what it holds of these is counted again
LOOKS_APART = 20  # times what counting takes, where it has not grown
GROWTH_BYTES = 32 * 2**20  # of the program itself: libraries touched later; 31 MiB were seen over a search
LARGE_BLOCK_BYTES = 2**18  # under a cap, blocks from this size on are the system's own; from 2^20 on, 63 MiB were kept
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


class _HeapFigures(ctypes.Structure):
    """glibc's struct mallinfo2: ten sizes, of which the fifth is the bytes of blocks that are the system's own, the
    eighth those of blocks in use, and the ninth those of freed ones, given back or not."""

    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]


@cache
def glibc() -> ctypes.CDLL | None:
    """The C library, where it is a glibc that can count and give back freed memory."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _HeapFigures
        library.malloc_trim.argtypes = [ctypes.c_size_t]
        library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    except (AttributeError, OSError, TypeError):
        return None
    return library


@cache
def keep_heap_small() -> None:
    """From now on this process gives large blocks back when they are freed.

    glibc otherwise keeps freed blocks of up to 32 MiB in its heap, where aligned ones leave holes that the next one of
    the same size does not fit: a heap of 250 MiB in use was seen to spread over 7 GiB of addresses. Costs a page fault
    for every page that is used again, which is why only runs under a cap do it."""
    library = glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


@dataclass
class Freed:
    """The pages of freed blocks, which are given back to the system once they are many.

    What glibc counts as freed includes what was given back long ago, so that resident memory tells how much is held:
    all of it but blocks in use. A little is left: pages given back have to be asked for again. Counting walks the heap,
    which takes a millisecond where that is in many pieces; so it is done where the process has grown, or now and then.
    """

    kept: int = 0  # bytes outside of blocks in use after pages were given back last: the program's own
    resident: int = 0  # the least that the process has held since it was counted
    next_time: float = 0.0  # when that is done again though the process has not grown

    def release(self, library: Any) -> None:
        """library: a glibc; its mallinfo2 and malloc_trim are called."""
        resident, began = resident_bytes(), time.monotonic()
        self.resident = min(self.resident, resident)
        if resident - self.resident <= GROWN_BYTES and began < self.next_time:
            return
        if _unused_bytes(library) - self.kept > FREE_BYTES_KEPT - GROWN_BYTES:
            library.malloc_trim(0)
            self.kept = _unused_bytes(library)
        ended = time.monotonic()
        self.resident, self.next_time = resident_bytes(), ended + LOOKS_APART * (ended - began)


_freed = Freed()


def release_freed() -> None:
    """Give the pages of freed blocks back to the system once they are many; nothing where glibc keeps no books."""
    library = glibc()
    if library is not None:
        _freed.release(library)


def _unused_bytes(library: Any) -> int:
    figures = library.mallinfo2()
    return resident_bytes() - int(figures.field4) - int(figures.field7)


def process_bytes(cap_bytes: int | None = None) -> int:
    """What a plan counts for the program itself. With a cap, which is a promise, the heap is kept small from now on;
    better from the start: blocks that it holds already are used again."""
    if cap_bytes is not None:
        keep_heap_small()
        release_freed()
    return resident_bytes() + GROWTH_BYTES + FREE_BYTES_KEPT


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
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
    """Bytes as MiB, for messages; as they are where that would say 0."""
    return f"{count / 2**20:.0f} MiB" if count >= 2**19 else f"{count} bytes"
