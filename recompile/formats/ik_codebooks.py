"""The types of the ik_llama.cpp fork whose codes stand for two, four or eight weights: decoding on any device, encoding
on the CPU.

IQ2_KL has a table of pairs. In the trellis types (IQ1_KT to IQ4_KT) a code is the start of a sequence x_k =
0xCBAC1FED * x_(k-1) modulo 2^32, and each weight is the sum of the four bytes of x_k & 0x3f3f3f3f, less 126. A scale
block of 32 weights has a level:

    weight = (d * level) * value        both products rounded to float32, in this order

Layouts and constants are facts of the fork's sources (ggml-common.h, iqk_quantize.cpp). Encoding is a search over
sequences of our own (`ik_codebook_encode`).

Axes: R rows, C columns (weights of a row), B = C / 256 blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recompile.errors import FormatError, UnsupportedError
from recompile.formats.ik import BLOCK, as_rows, check_columns, check_importance, check_weight

if TYPE_CHECKING:
    from recompile.formats.ik_codebook_encode import Clusters

_SCALE_BLOCK = 32
_MULTIPLIER, _MASK, _MEAN = 0xCBAC1FED, 0x3F, 126
_START = 4096  # the sequence of code c begins at c + 4096; IQ4_KT has a bit that adds 32768
# fmt: off
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ1_KT and IQ2_KT
_PAIRS = (  # of IQ2_KL
    (-63, -23), (-63, 13), (-40, -63), (-40, -10), (-40, 13), (-40, 47), (-23, -40), (-23, -23),
    (-23, 1), (-23, 13), (-23, 28), (-10, -63), (-10, 1), (-10, 13), (-10, 47), (1, -23),
    (1, -10), (1, 1), (1, 13), (1, 28), (13, -40), (13, -23), (13, -10), (13, 1),
    (13, 13), (28, -63), (28, -23), (28, 1), (28, 28), (28, 47), (47, -23), (47, 13),
)
# fmt: on


@dataclass(frozen=True)
class Chosen:
    """What an encoder found for some rows.

    levels:   int64 [R, B, 8], indexes into the type's levels; tables: int64 [R, B, 8]
    codes:    int64 [R, B, 256 / weights of a code]; negative: bool [R, B, 256], of the weights
    """

    levels: Tensor
    tables: Tensor
    codes: Tensor
    negative: Tensor


@dataclass(frozen=True)
class CodebookType:
    """One tensor type.

    head_bytes:  bytes before the blocks of each row that hold d: 2 (float16) or 4 (float32)
    block_bytes: bytes of 256 weights
    weights:     that a code stands for
    unpack:      uint8 [R, B, block bytes] -> levels int16 [R, B, 8], and the values of all weights, whole numbers
                 [R, B, 256]
    pack:        the reverse of that, of what an encoder chose
    levels:      what a scale block may have, in ascending order
    sequences:   that a code chooses between; tables: of them, between which a scale block chooses
    """

    name: str
    head_bytes: int
    block_bytes: int
    weights: int
    unpack: Callable[[Tensor], tuple[Tensor, Tensor]]
    pack: Callable[[Chosen], Tensor]
    levels: tuple[int, ...]
    sequences: int
    tables: int = 1

    def row_bytes(self, columns: int) -> int:
        """Stored bytes of a row of this many weights, a multiple of 256."""
        return self.head_bytes + columns // BLOCK * self.block_bytes


@cache
def _sequences(count: int, weights: int, start: int, device: torch.device) -> Tensor:
    """What the codes 0 to count - 1 stand for: int16 [count, weights]."""
    x = torch.arange(count, dtype=torch.int64) + start
    values = []
    for _ in range(weights):
        x = x * _MULTIPLIER & 0xFFFFFFFF
        values.append(torch.stack([x >> shift & _MASK for shift in (0, 8, 16, 24)]).sum(0) - _MEAN)
    return torch.stack(values, 1).to(device, torch.int16)


@cache
def _table(values: tuple[tuple[int, ...], ...] | tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int16, device=device)


def _chosen(table: Tensor, codes: Tensor) -> Tensor:
    """Rows of a table [n, k] by codes [R, B, m]: [R, B, m * k]."""
    return table.index_select(0, codes.reshape(-1)).view(*codes.shape[:-1], -1)


def _words(packed: Tensor) -> Tensor:
    """Little-endian 16-bit words: uint8 [..., 2n] -> int32 [..., n]."""
    return packed[..., 0::2].int() | packed[..., 1::2].int() << 8


def _nibbles_apart(packed: Tensor) -> Tensor:
    """All low nibbles, then all high ones: [..., n] -> int32 [..., 2n]."""
    return torch.cat((packed & 15, packed >> 4), -1).int()


def _unpack_iq2_kl(block: Tensor) -> tuple[Tensor, Tensor]:
    high, low, q, h = block.split((2, 4, 64, 16), -1)
    twos = torch.stack([_words(high)[..., 0] >> 2 * n & 3 for n in range(8)], -1)
    levels = (_nibbles_apart(low) | twos << 4) - 32
    fours = q.unflatten(-1, (4, 1, 16)) >> torch.tensor([[0], [4]], dtype=torch.uint8, device=q.device) & 15
    fifths = torch.stack([h >> n & 1 for n in range(8)], -2).unflatten(-2, (4, 2))  # [R, B, 4, 2, 16]
    codes = (fours | fifths << 4).int().flatten(2)
    return levels.short(), _chosen(_table(_PAIRS, q.device), codes)


def _unpack_iq1_kt(block: Tensor) -> tuple[Tensor, Tensor]:
    s, low, high = block.split((8, 32, 16), -1)
    thirteenth = torch.stack([s.int() >> 4 + n & 1 for n in range(4)], -1).flatten(-2)  # [R, B, 32]
    codes = low.int() | _nibbles_apart(high) << 8 | thirteenth << 12
    levels = _chosen(_table(_LEVELS, s.device)[:, None], (s & 15).int())
    return levels, _chosen(_sequences(1 << 13, 8, _START, s.device), codes)


def _unpack_iq2_kt(block: Tensor) -> tuple[Tensor, Tensor]:
    s, q = block.split((4, 64), -1)
    levels = _chosen(_table(_LEVELS, s.device)[:, None], _nibbles_apart(s))
    return levels, _chosen(_sequences(1 << 16, 8, _START, s.device), _words(q))


def _unpack_iq3_kt(block: Tensor) -> tuple[Tensor, Tensor]:
    s, q, signs = block.split((4, 64, 32), -1)
    values = _chosen(_sequences(1 << 16, 8, _START, s.device), _words(q)).abs()
    negative = torch.stack([signs >> n & 1 for n in range(8)], -2).flatten(-2)  # [R, B, 256]
    signed = values.float() * (1 - 2 * negative.float())  # a zero may be negative
    return _nibbles_apart(s).short(), signed


def _unpack_iq4_kt(block: Tensor) -> tuple[Tensor, Tensor]:
    s, low, high = block.split((32, 64, 32), -1)
    first, second, third, fourth = (s[..., n::4].int() for n in range(4))  # of the eight 32-bit words
    upper = second | third << 8 | fourth << 16
    threes = torch.stack([upper >> 3 * n & 7 for n in range(8)], -1).flatten(-2)  # [R, B, 64]
    codes = low.int() | _nibbles_apart(high) << 8 | threes << 12 | (first & 1).repeat_interleave(8, -1) << 15
    table = torch.cat([_sequences(1 << 15, 4, _START + offset, s.device) for offset in (0, 1 << 15)])
    return ((first >> 1) - 64).short(), _chosen(table, codes)


# ---- the reverse -----------------------------------------------------------------------------------------------------


def _bits(values: Tensor, width: int = 1) -> Tensor:
    """Numbers of so many bits side by side in bytes: [..., n, 8 / width] -> uint8 [..., n], the first one lowest."""
    places = torch.arange(values.shape[-1], device=values.device) * width
    return (values << places).sum(-1).to(torch.uint8)


def _as_nibbles_apart(values: Tensor) -> Tensor:
    """[..., 2n] below 16 -> uint8 [..., n], the second half in the high nibbles."""
    low, high = values.chunk(2, -1)
    return (low | high << 4).to(torch.uint8)


def _as_words(values: Tensor) -> Tensor:
    """[..., n] below 2^16 -> uint8 [..., 2n]."""
    return torch.stack((values & 255, values >> 8), -1).flatten(-2).to(torch.uint8)


def _pack_iq2_kl(found: Chosen) -> Tensor:
    twos = (found.levels >> 4 << 2 * torch.arange(8, device=found.levels.device)).sum(-1, keepdim=True)
    low, high = (found.codes & 15).unflatten(-1, (4, 2, 16)).unbind(-2)
    fifths = (found.codes >> 4).unflatten(-1, (8, 16)).transpose(-1, -2)
    q = (low | high << 4).flatten(-2).to(torch.uint8)
    return torch.cat((_as_words(twos), _as_nibbles_apart(found.levels & 15), q, _bits(fifths)), -1)


def _pack_iq1_kt(found: Chosen) -> Tensor:
    thirteenth = _bits((found.codes >> 12).unflatten(-1, (8, 4)))
    s = (found.levels | thirteenth.long() << 4).to(torch.uint8)
    return torch.cat((s, (found.codes & 255).to(torch.uint8), _as_nibbles_apart(found.codes >> 8 & 15)), -1)


def _pack_iq2_kt(found: Chosen) -> Tensor:
    return torch.cat((_as_nibbles_apart(found.levels), _as_words(found.codes)), -1)


def _pack_iq3_kt(found: Chosen) -> Tensor:
    signs = _bits(found.negative.long().unflatten(-1, (8, 32)).transpose(-1, -2))
    return torch.cat((_as_nibbles_apart(found.levels), _as_words(found.codes), signs), -1)


def _pack_iq4_kt(found: Chosen) -> Tensor:
    threes = (found.codes >> 12).unflatten(-1, (8, 8))
    upper = (threes << 3 * torch.arange(8, device=threes.device)).sum(-1)
    word = torch.stack((found.levels << 1 | found.tables, upper & 255, upper >> 8 & 255, upper >> 16), -1)
    low, high = (found.codes & 255).to(torch.uint8), _as_nibbles_apart(found.codes >> 8 & 15)
    return torch.cat((word.flatten(-2).to(torch.uint8), low, high), -1)


TYPES: dict[str, CodebookType] = {
    row.name: row
    for row in (
        CodebookType("IQ2_KL", 2, 86, 2, _unpack_iq2_kl, _pack_iq2_kl, tuple(range(-32, 32)), len(_PAIRS)),
        CodebookType("IQ1_KT", 4, 56, 8, _unpack_iq1_kt, _pack_iq1_kt, _LEVELS, 1 << 13),
        CodebookType("IQ2_KT", 4, 68, 8, _unpack_iq2_kt, _pack_iq2_kt, _LEVELS, 1 << 16),
        CodebookType("IQ3_KT", 4, 100, 8, _unpack_iq3_kt, _pack_iq3_kt, tuple(range(16)), 1 << 16),
        CodebookType("IQ4_KT", 4, 128, 4, _unpack_iq4_kt, _pack_iq4_kt, tuple(range(-64, 64)), 1 << 15, tables=2),
    )
}
_CHUNK_WEIGHTS_CPU = 1 << 17
_CHUNK_WEIGHTS_OTHER = 1 << 24
CHUNK_WEIGHTS_ENCODED = 1 << 22
_ABSOLUTE = "IQ3_KT"  # stores signs of weights beside sequences, of which it takes the absolute values


@torch.no_grad()
def dequantize(name: str, data: Tensor | bytes | NDArray[np.uint8], shape: tuple[int, int]) -> Tensor:
    """Decode rows of one of `TYPES`, bit for bit as the fork's reference decoder does.

    name:    a key of `TYPES`
    data:    uint8 bytes of the rows one after another: a tensor or array of any shape, or bytes
    shape:   (rows, columns) in weights, columns a multiple of 256
    returns: float32 [rows, columns] on the device of `data`. Bytes of any value decode, to NaN and infinity too where d
             is one
    raises:  FormatError if the type is unknown, columns are not a multiple of 256 or the size of data does not fit
    """
    spec = TYPES.get(name)
    if spec is None:
        raise FormatError(f"type: found {name!r}; wanted one of {', '.join(TYPES)}")
    rows, columns = shape
    check_columns(spec, columns)
    found = as_rows(spec, data, rows, columns)
    packed = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    dense = torch.empty((rows, columns), dtype=torch.float32, device=packed.device)
    budget = _CHUNK_WEIGHTS_CPU if packed.device.type == "cpu" else _CHUNK_WEIGHTS_OTHER
    step = max(1, budget // max(columns, 1))
    for first in range(0, rows if columns else 0, step):
        part = packed[first : first + step]
        head = part[:, : spec.head_bytes].contiguous()
        d = head.view(torch.float16 if spec.head_bytes == 2 else torch.float32).float()  # [r, 1]
        levels, values = spec.unpack(part[:, spec.head_bytes :].reshape(len(part), -1, spec.block_bytes))
        scales = d[:, None] * levels  # [r, B, 8]
        dense[first : first + step] = (values.unflatten(-1, (-1, _SCALE_BLOCK)) * scales[..., None]).flatten(1)
    return dense


@torch.no_grad()
def quantize(name: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Encode rows so that the importance-weighted squared error is small.

    name:       a key of `TYPES`
    weight:     float [rows, columns], finite, columns a multiple of 256
    importance: float [columns], as in `recompile.formats.ik.quantize`
    returns:    uint8 [rows, row bytes] on the device of weight; the search runs on the CPU, on as many threads as numba
                is set to; a million weights take 20 to 75 s of a core, of IQ2_KL 6 s. Same arguments, same bytes
    raises:     FormatError as `ik.quantize` does; UnsupportedError where numba is not installed
    """
    spec = TYPES.get(name)
    if spec is None:
        raise FormatError(f"type: found {name!r}; wanted one of {', '.join(TYPES)}")
    dense = check_weight(spec, weight)
    counts = check_importance(spec, importance, dense.shape[1])
    try:
        from recompile.formats.ik_codebook_encode import Target, search
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("numba"):
            raise
        raise UnsupportedError(f"encoding {spec.name} needs numba, which is not installed: pip install numba") from None

    target = Target(spec.levels, spec.name == _ABSOLUTE, spec.head_bytes == 2)
    packed = torch.empty(len(dense), spec.row_bytes(dense.shape[1]), dtype=torch.uint8)
    step = max(1, CHUNK_WEIGHTS_ENCODED // max(dense.shape[1], 1))
    for first in range(0, len(dense), step):
        rows = dense[first : first + step]
        d, *fields = (torch.from_numpy(value) for value in search(target, _clusters_of(name), rows, counts))
        levels, tables, codes = (value.long().view(len(rows), dense.shape[1] // BLOCK, -1) for value in fields)
        negative = torch.from_numpy(rows < 0).view(len(rows), -1, BLOCK)
        head = (d.half() if spec.head_bytes == 2 else d)[:, None].contiguous().view(torch.uint8)
        packed[first : first + step] = torch.cat(
            (head, spec.pack(Chosen(levels, tables, codes, negative)).flatten(1)), 1
        )
    return packed.to(weight.device)


@cache
def _clusters_of(name: str) -> Clusters:
    """The tables of sequences of a type, in clusters."""
    from recompile.formats.ik_codebook_encode import clustered

    return clustered(_tables_of(name))


def _tables_of(name: str) -> list[NDArray[np.float32]]:
    """The tables of sequences of a type, [n, weights] each."""
    spec, device = TYPES[name], torch.device("cpu")
    if spec.sequences == len(_PAIRS):
        return [np.array(_PAIRS, np.float32)]
    starts = (_START + number * spec.sequences for number in range(spec.tables))
    made = [_sequences(spec.sequences, spec.weights, start, device).float().numpy() for start in starts]
    return [np.abs(table) for table in made] if name == _ABSOLUTE else made
