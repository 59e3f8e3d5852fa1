"""Threads of libraries that share one OpenMP runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Inside it numba may start its threads, which it does once a process, with omp_set_num_threads.

    torch shares that number where both use one libgomp: it would compute with as many from then on, and a sum that is
    split otherwise is another number in its last bits.
    """
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
