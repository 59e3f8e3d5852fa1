"""Tail-biting Viterbi search of EXL3 tiles on the CPU, compiled by numba (extra `[exl3]`). Import lazily.

The search is that of `recompile.quantize.exl3.viterbi_torch`, whose docstring has the maths (EXL3 format spec,
section 8). What makes it fast here:

- no traceback is stored. The forward pass keeps the cost of every node at every step, and the way back recomputes the
  few candidates of the nodes on the one best path. So a step is only subtract, fused multiply-add and minimum;
- a step reads `table`, `cost` and writes `out` contiguously along the leaving nodes that share one entering node, and
  the minimum over a chunk of `_CHUNK` new symbols stays in registers. The chunk is what LLVM unrolls: with 8 leaving
  nodes it must be 4, or both loops are unrolled and nothing is vectorised (measured: 20 against 54 s per M weights).

Memory: 257 * 2^(16-K) * 4 bytes a thread, 4 MiB at K = 4 and 33 MiB at K = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import get_num_threads, njit, prange
from numpy.typing import NDArray

from recompile.io.threads import torch_threads_kept

_FASTMATH = {"nnan", "nsz", "contract", "reassoc"}  # no NaN ever enters; costs may be fused and reordered
_UNREACHED = np.float32(1e30)  # finite: fastmath on infinities is undefined
_CHUNK = {3: 4}  # log2 of leaving nodes that share an entering node -> symbols unrolled; 8 elsewhere


def viterbi_cpu(targets: NDArray[np.float32], table: NDArray[np.float32], bits: int | float) -> NDArray[np.int32]:
    """Best overlap-consistent, tail-biting states of each tile (EXL3 format spec, section 8), on `NUMBA_NUM_THREADS`.

    targets: float32 [tiles, 256], stream order, finite
    table:   float32 [65536], value of each state
    bits:    K = 1..8, or 1.5, 2.5, 3.5
    returns: int32 [tiles, 256], states 0..65535
    """
    states = np.empty(targets.shape, np.int32)
    with torch_threads_kept():
        chunks = min(len(targets), 4 * get_num_threads())  # a few a thread, since the cores may be shared
        if chunks:
            _kernel(bits)(np.ascontiguousarray(targets), table, states, chunks)
    return states


@njit(fastmath=_FASTMATH, forceinline=True)
def _step(d_in: int, d_out: int, chunk: int, cost: Any, table: Any, target: Any, out: Any) -> None:
    """out[o] = min over k of cost[s >> d_in] + (table[s] - target)^2 with s = k << (16 - d_out) | o."""
    lows = 1 << d_in  # leaving nodes that share an entering node for each k
    highs = 1 << (16 - d_in - d_out)
    nodes = 1 << (16 - d_out)
    for high in range(highs):
        for low in range(lows):
            o = high * lows + low
            best = _UNREACHED
            for k in range(chunk):
                error = table[k * nodes + o] - target
                best = min(best, cost[k * highs + high] + error * error)
            out[o] = best
        for start in range(chunk, 1 << d_out, chunk):
            for low in range(lows):
                o = high * lows + low
                best = out[o]
                for k in range(chunk):
                    error = table[(start + k) * nodes + o] - target
                    best = min(best, cost[(start + k) * highs + high] + error * error)
                out[o] = best


@njit(fastmath=_FASTMATH, forceinline=True)
def _best_state(d_in: int, d_out: int, cost: Any, table: Any, target: Any, node: int) -> int:
    """State of the best candidate that leaves to `node`: the way back through one step."""
    best_state = node
    best = np.float32(3e38)
    for k in range(1 << d_out):
        state = (k << (16 - d_out)) | node
        error = table[state] - target
        candidate = cost[state >> d_in] + error * error
        if candidate < best:
            best = candidate
            best_state = state
    return best_state


@lru_cache(maxsize=16)
def _kernel(bits: int | float) -> Callable[..., None]:
    """Compiled search for one K. d0, d1: bits that are new at even and odd positions (they differ for half K)."""
    d0 = int(bits)
    d1 = round(2 * bits) - d0
    chunk0 = min(1 << d0, _CHUNK.get(d1, 8))  # symbols of an even position compete in the step before it, an odd one
    chunk1 = min(1 << d1, _CHUNK.get(d0, 8))
    nodes = 1 << (16 - d0)

    @njit(parallel=True, fastmath=_FASTMATH, cache=True)
    def search(targets: Any, table: Any, states: Any, chunks: int) -> None:
        tiles = targets.shape[0]
        for chunk in prange(chunks):
            costs = np.empty((257, nodes), np.float32)
            for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
                target = targets[tile]
                # Pass 1 runs from position 128 round to 127, all starts free, to find the node entered at position 0.
                # Pass 2 runs from position 0 to 255, start and end pinned to that node.
                node = 0
                for start in range(128, -128, -128):
                    if start == 128:
                        costs[0, :] = np.float32(0)
                    else:
                        costs[0, :] = _UNREACHED
                        costs[0, node] = np.float32(0)
                    for p in range(0, 256, 2):
                        _step(d0, d1, chunk1, costs[p], table, target[(start + p) & 255], costs[p + 1])
                        _step(d1, d0, chunk0, costs[p + 1], table, target[(start + p + 1) & 255], costs[p + 2])
                    if start == 128:
                        node = int(np.argmin(costs[256]))
                    for p in range(254, start - 2, -2):
                        at = (start + p) & 255
                        states[tile, at + 1] = _best_state(d1, d0, costs[p + 1], table, target[at + 1], node)
                        node = states[tile, at + 1] >> d1
                        states[tile, at] = _best_state(d0, d1, costs[p], table, target[at], node)
                        node = states[tile, at] >> d0

    return search
