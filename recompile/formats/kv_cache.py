"""Keys and values as a quantized cache gives them back: stored by an engine's encoder and decoded again.

exllamav3 (1.0 and later, exllamav3_ext/cache/q_cache_kernels.cuh): groups of 32 of float16 values are rotated by the
Hadamard matrix H32 / sqrt(32) and divided by their largest magnitude s, which is stored as float16; code q of b bits is
the one of 2^b equal steps of [-1, 1] that holds the value, decoded to the middle of the step: s (2q + 1 - 2^b) / 2^b.

llama.cpp (since April 2026, src/llama-kv-cache.cpp): where a type is quantized and the head dimension a multiple of
64, keys and values are rotated before they are stored: keys by the largest Hadamard matrix of 64 * 2^n that divides a
head, values by one of 64. Then blocks of 32 along a head, in ggml's encoders without importance. ik_llama.cpp does not
rotate. Both round queries and weights of attention as they compute, too, which is not simulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recompile.errors import FormatError, UnsupportedError
from recompile.formats.cache_types import EXLLAMA, GROUP, LLAMA, CacheFormat, is_quantized
from recompile.formats.exl3 import hadamard
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_decode import IQ4_VALUES
from recompile.formats.gguf_encode import quantize_rows

ROTATION = 64  # the smallest rotation of llama.cpp, and the one of values
SMALLEST = 1e-10  # exllamav3 adds it to a group's largest magnitude
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def store(keys: Tensor, values: Tensor, cache: CacheFormat, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Keys (rotary embedding applied) and values as the cache gives them back.

    keys, values: [..., head dimension] any float dtype; of both the shape, dtype and device stay
    interleaved: llama.cpp has the halves of a key side by side (recompile.gguf.architectures.keys_are_interleaved)
    Raises FormatError where a head is no multiple of 32.
    """
    stored_values = _stored(values, cache.values, cache.engine, False)
    if not interleaved or cache.engine == EXLLAMA:
        return _stored(keys, cache.keys, cache.engine, True), stored_values
    side_by_side = keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    stored_keys = _stored(side_by_side, cache.keys, cache.engine, True)
    return stored_keys.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), stored_values


def store_latent(latent: Tensor, rotary: Tensor, cache: CacheFormat) -> tuple[Tensor, Tensor]:
    """What multi-head latent attention stores, as the cache gives it back: exllamav3 quantizes the latent with the bits
    of the keys and keeps the rotary part float16 (exllamav3/cache/mla.py).

    latent: [..., rank] and rotary: [..., rotary dimension], any float dtype; shape, dtype and device stay
    Raises UnsupportedError for llama.cpp, which stores both in rows of their own kind.
    """
    if cache.engine != EXLLAMA:
        raise UnsupportedError(
            f"{{cache_quant}} {cache.name}: this model stores latents (MLA), which are simulated as exllamav3 stores "
            f"them only; give bits, such as 8"
        )
    return _stored(latent, cache.keys, EXLLAMA, True), rotary.half().to(rotary.dtype)


def _stored(x: Tensor, kind: str, engine: str, is_key: bool) -> Tensor:
    if kind in _FLOATS:
        return x.to(_FLOATS[kind]).to(x.dtype)
    head = x.shape[-1]
    if head % GROUP:
        raise FormatError(
            f"a cache of {kind}: heads have {head} values, and {engine} stores groups of {GROUP}; leave it f16"
        )
    if engine == EXLLAMA:
        return _exllama(x, int(kind))
    width = rotation(head, is_key) if engine == LLAMA and is_quantized(kind) else None
    if width is None:
        return _ggml(x.float(), kind).to(x.dtype)
    turn = hadamard(width, x.device)  # symmetric: its own inverse
    turned = (x.float().unflatten(-1, (-1, width)) @ turn).flatten(-2)
    return (_ggml(turned, kind).unflatten(-1, (-1, width)) @ turn).flatten(-2).to(x.dtype)


def rotation(head: int, is_key: bool) -> int | None:
    """Side of the Hadamard matrix that llama.cpp rotates heads of so many values by; None: it does not."""
    if head % ROTATION:
        return None
    width = ROTATION
    while is_key and head % (2 * width) == 0:
        width *= 2
    return width


def _exllama(x: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    turn = hadamard(GROUP, x.device)
    groups = x.half().float().unflatten(-1, (-1, GROUP)) @ turn
    largest = groups.abs().amax(-1, keepdim=True) + SMALLEST
    codes = (groups / largest * half + half).floor().clamp(0, 2 * half - 1)
    made = (codes - (half - 0.5)) * (largest.half().float() / half)
    return (made @ turn).flatten(-2).half().to(x.dtype)


def _ggml(x: Tensor, kind: str) -> Tensor:
    """float32 of any shape through one of ggml's types, as its `from_float` encodes a row."""
    rows = x.reshape(-1, x.shape[-1])
    if kind == "iq4_nl":
        return _iq4_nl(rows.view(-1, GROUP)).view_as(x)
    packed = quantize_rows(kind, rows)
    return dequantize_rows(kind.upper(), packed, x.shape[-1]).to(x.device).view_as(x)


def _iq4_nl(blocks: Tensor) -> Tensor:
    """IQ4_NL without a search, as caches are written: codes by the largest value, then the scale that fits them best
    with squares as weights. blocks: float32 [n, 32]."""
    table = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=blocks.device)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / table[0]
    scaled = torch.where(largest != 0, blocks / largest, 0)
    middles = (table[1:] + table[:-1]) / 2
    codes = table[torch.bucketize(scaled, middles, right=True)]
    weights = blocks.square()
    below = (weights * codes.square()).sum(1, keepdim=True)
    scale = torch.where(below > 0, (weights * codes * blocks).sum(1, keepdim=True) / below, 0)
    return codes * scale.half().float()
