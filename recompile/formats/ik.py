"""The IQ*_K types of the ik_llama.cpp fork, as stored in its GGUF files: decoding on any device, encoding on the CPU.
Its types whose codes stand for several weights are in `ik_codebooks`.

Written from the ik quants format spec. A row of weights is a row head (0, 2 or 4 bytes) and blocks of 256 weights; a
block has scale blocks of 16 or 32 weights, and each scale block has a level (a small integer) and a shift bit:

    weight = (d * level) * (grid[code] + shift bit * shift)        every product rounded to float32, in this order

`d` is the row head, or the float16 that a block begins with. What differs between the types is the row of data in
`TYPES` and where the bits of levels, shift bits and codes lie: one unpack and one pack function for each type below.

Axes: R rows, C columns (weights of a row), B = C / 256 blocks of a row, S scale blocks of a block.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recompile.errors import FormatError, UnsupportedError

BLOCK = 256

_G2 = (-31, -13, 1, 17)
_G3 = (-63, -40, -23, -10, 1, 13, 28, 47)
_G4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# fmt: off
_G5 = (
    -126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
    -1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121,
)
_G6 = (  # what the fork's kernels multiply with; its reference decoder has the cubic that these are rounded from
    -127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54,
    -51, -47, -44, -40, -37, -34, -31, -28, -25, -22, -19, -16, -13, -11, -8, -5,
    -2, 0, 3, 6, 9, 12, 14, 17, 20, 23, 27, 30, 33, 36, 40, 44,
    47, 51, 55, 59, 63, 68, 72, 77, 82, 87, 92, 98, 103, 109, 115, 121,
)
# fmt: on


@dataclass(frozen=True)
class IkType:
    """One tensor type of the fork.

    name:        as in file listings, upper case
    type_id:     its number in a GGUF tensor info
    head_bytes:  bytes before the blocks of each row that hold d: 0 (then each block begins with a float16 d), 2 or 4
    block_bytes: bytes of 256 weights
    scale_block: weights that share a level and a shift bit
    grid:        the signed values of the codes
    shift:       added to every value where the shift bit is set
    levels:      lowest and highest level, and the step between levels
    even_parity: True where the 16 bits of four codes must hold an even number of ones (IQ4_KSS)
    """

    name: str
    type_id: int
    head_bytes: int
    block_bytes: int
    scale_block: int
    grid: tuple[int, ...]
    shift: int
    levels: tuple[int, int, int]
    even_parity: bool = False

    def row_bytes(self, columns: int) -> int:
        """Stored bytes of a row of this many weights, a multiple of 256."""
        return self.head_bytes + columns // BLOCK * self.block_bytes

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per weight of such a row, its head included."""
        return 8 * self.row_bytes(columns) / columns


TYPES: dict[str, IkType] = {
    row.name: row
    for row in (
        #      name       id head bytes scale grid  shift levels
        IkType("IQ2_K", 137, 0, 76, 16, _G2, 5, (-8, 7, 1)),
        IkType("IQ2_KS", 145, 2, 70, 32, _G2, 5, (-16, 15, 1)),
        IkType("IQ3_K", 138, 0, 110, 16, _G3, 4, (-31, 31, 2)),
        IkType("IQ3_KS", 156, 2, 102, 32, _G3, 4, (-16, 15, 1)),
        IkType("IQ4_KSS", 146, 4, 128, 32, _G4, 4, (-127, 127, 2), even_parity=True),
        IkType("IQ4_KS", 144, 4, 136, 32, _G4, 4, (-127, 127, 2)),
        IkType("IQ4_K", 139, 0, 144, 16, _G4, 4, (-32, 31, 1)),
        IkType("IQ5_KS", 152, 4, 168, 32, _G5, 2, (-127, 127, 2)),
        IkType("IQ5_K", 140, 0, 176, 16, _G5, 2, (-32, 31, 1)),
        IkType("IQ6_K", 141, 0, 212, 16, _G6, 1, (-127, 127, 1)),
    )
}

# Types of the fork that a GGUF may hold and that this module passes through.
OPAQUE = ("IQ2_KL", "IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT", "Q8_KV", "IQ1_BN", "IQ2_BN")

# Weights decoded at a time. CPU: about 2 MiB of temporaries, which stay in the second-level cache. Elsewhere: enough to
# fill a GPU, with temporaries of 14 bytes per weight below 1 GiB.
_CHUNK_WEIGHTS_CPU = 1 << 17
_CHUNK_WEIGHTS_OTHER = 1 << 26


@dataclass(frozen=True)
class Fields:
    """What the bytes of some rows say, apart from d.

    levels: int16 [R, B, S]      shifts: uint8 [R, B, S], 0 or 1      codes: uint8 [R, B, 256], indexes into the grid
    """

    levels: Tensor
    shifts: Tensor
    codes: Tensor


def find_type(name: str) -> IkType:
    """The row of `TYPES` of this name, in any case.

    raises: UnsupportedError for a type of the fork without an encoder here, FormatError (with the nearest name)
            for any other
    """
    found = TYPES.get(name.upper()) if isinstance(name, str) else None
    if found is not None:
        return found
    if isinstance(name, str) and name.upper() in OPAQUE:
        raise UnsupportedError(
            f"type {name.upper()}: found a type that this module does not encode; wanted one of {', '.join(TYPES)}. "
            f"Copy its tensors unchanged, or requantize them with ik_llama.cpp"
        )
    nearest = difflib.get_close_matches(str(name).upper(), TYPES, 1, 0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise FormatError(f"type: found {name!r}; wanted one of {', '.join(TYPES)}{hint}")


@torch.no_grad()
def dequantize(type: str, data: Tensor | bytes | NDArray[np.uint8], shape: tuple[int, int]) -> Tensor:
    """Decode rows of one of the fork's types, bit for bit as the fork does (ik quants format spec, decoding rule).

    type:    a key of `TYPES`, in any case, e.g. "IQ4_KSS"
    data:    uint8 bytes of the rows one after another: a tensor or array of any shape, or bytes
    shape:   (rows, columns) in weights, columns a multiple of 256
    returns: float32 [rows, columns], contiguous, on the device of `data`. Bytes of any value decode, to NaN and
             infinity too where d is one.
    raises:  FormatError if the type is unknown, columns are not a multiple of 256 or the size of data does not fit
             them; UnsupportedError for types that can only be copied
    """
    spec = find_type(type)
    if len(shape) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise FormatError(f"{spec.name}: found shape {tuple(shape)}; wanted (rows, columns), two integers from 0 up")
    rows, columns = shape
    check_columns(spec, columns)
    packed = as_rows(spec, data, rows, columns)
    device = packed.device if isinstance(packed, Tensor) else torch.device("cpu")
    values = torch.tensor(spec.grid, dtype=torch.float32, device=device)
    values = torch.cat((values, values + spec.shift))  # [2 * len(grid)]: a shift bit is one more bit of the code

    dense = torch.empty((rows, columns), dtype=torch.float32, device=device)
    budget = _CHUNK_WEIGHTS_CPU if device.type == "cpu" else _CHUNK_WEIGHTS_OTHER
    step = max(1, budget // max(columns, 1))
    for first in range(0, rows if columns else 0, step):
        part = packed[first : first + step]
        # An array is copied a chunk at a time: it may be a read-only memory map.
        d, fields = _unpack(spec, part if isinstance(part, Tensor) else torch.from_numpy(np.array(part)))
        scales = d * fields.levels  # float32 [r, B, S]
        grouped = fields.codes.view(*scales.shape, spec.scale_block)
        index = grouped | (fields.shifts * len(spec.grid)).unsqueeze(-1)
        chosen = torch.index_select(values, 0, index.flatten().int()).view(index.shape)
        torch.mul(chosen, scales.unsqueeze(-1), out=dense[first : first + step].view(index.shape))
    return dense


@torch.no_grad()
def quantize(type: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Encode rows as one of the fork's types so that the importance-weighted squared error is small.

    type:       a key of `TYPES`, in any case
    weight:     float [rows, columns], finite, columns a multiple of 256
    importance: float [columns], what a squared error of that column counts (mean squared input of the layer); finite,
                not negative, not all zero. A column counts at least a millionth of the mean. None: all count the same
    returns:    uint8 [rows, row bytes], on the device of weight; the search itself runs on the CPU, on as many threads
                as numba is set to. Same arguments, same bytes, whatever the number of threads. Rows of zeros decode to
                zeros; the sign of a zero is not kept.
    raises:     FormatError if the type is unknown, the weight is not a finite matrix, its columns are not a multiple of
                256 or the importance does not fit it; UnsupportedError for types that can only be copied, and where
                numba is not installed
    source:     ik quants format spec, "What an encoder has to find"; the search is described in `ik_encode_cpu`
    """
    spec = find_type(type)
    dense = check_weight(spec, weight)
    rows, columns = dense.shape
    counts = check_importance(spec, importance, columns)
    try:
        from recompile.formats.ik_encode_cpu import Target, search
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("numba"):
            raise
        raise UnsupportedError(f"encoding {spec.name} needs numba, which is not installed: pip install numba") from None

    target = Target(
        spec.grid,
        spec.shift,
        spec.levels,
        spec.scale_block,
        spec.even_parity,
        span=0 if spec.head_bytes else BLOCK,
        half=spec.head_bytes != 4,
    )
    d, levels, shifts, codes = search(target, dense, counts)
    blocks = columns // BLOCK
    fields = Fields(
        torch.from_numpy(levels).view(rows, blocks, BLOCK // spec.scale_block),
        torch.from_numpy(shifts).view(rows, blocks, BLOCK // spec.scale_block),
        torch.from_numpy(codes).view(rows, blocks, BLOCK),
    )
    return _pack(spec, torch.from_numpy(d), fields).to(weight.device)


class RowLayout(Protocol):
    """What the size of a row follows from: name, bytes of its head, bytes of 256 weights."""

    @property
    def name(self) -> str: ...
    @property
    def head_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    def row_bytes(self, columns: int) -> int: ...


def check_columns(spec: RowLayout, columns: int) -> None:
    """Raise FormatError where blocks of 256 do not divide the columns."""
    if columns % BLOCK:
        raise FormatError(
            f"{spec.name}: found {columns} columns; wanted a multiple of {BLOCK}. Take a type with blocks of 32 "
            f"(Q4_0, IQ4_NL, Q5_0, Q6_0, Q8_0) for such a tensor"
        )


def as_rows(
    spec: RowLayout, data: Tensor | bytes | NDArray[np.uint8], rows: int, columns: int
) -> Tensor | NDArray[np.uint8]:
    """data as [rows, row bytes], uint8; nothing is copied."""
    packed = np.frombuffer(data, np.uint8) if isinstance(data, bytes | bytearray | memoryview) else data
    if not isinstance(packed, Tensor | np.ndarray):
        raise FormatError(f"{spec.name}: found data of {packed.__class__}; wanted a uint8 tensor or array, or bytes")
    if packed.dtype not in (torch.uint8, np.dtype(np.uint8)):
        raise FormatError(f"{spec.name}: found data of {packed.dtype}; wanted uint8")
    found = packed.numel() if isinstance(packed, Tensor) else packed.size
    row_bytes = spec.row_bytes(columns)
    if found != rows * row_bytes:
        raise FormatError(
            f"{spec.name}: found {found} bytes; wanted {rows * row_bytes}, {rows} rows of {row_bytes} bytes "
            f"({columns} columns, row head {spec.head_bytes}, {spec.block_bytes} per {BLOCK})"
        )
    return packed.reshape(rows, row_bytes)


def check_weight(spec: RowLayout, weight: Tensor) -> NDArray[np.float32]:
    """weight as float32 [rows, columns], contiguous."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        found = f"{weight.dtype} {list(weight.shape)}" if isinstance(weight, Tensor) else str(weight.__class__)
        raise FormatError(f"{spec.name}: found weight {found}; wanted a float tensor [rows, columns]")
    check_columns(spec, weight.shape[1])
    dense = weight.detach().to("cpu", torch.float32).contiguous()
    finite = torch.isfinite(dense)
    if not finite.all():
        row = int(finite.all(dim=1).int().argmin())
        raise FormatError(
            f"{spec.name}: found {int((~finite).sum())} weights that are NaN, infinite or too large for float32, the "
            f"first in row {row}; wanted finite weights only"
        )
    return dense.numpy()


def check_importance(spec: RowLayout, importance: Tensor | None, columns: int) -> NDArray[np.float32]:
    """Importance with a mean of 1 and a floor, float32 [columns]."""
    if importance is None:
        return np.ones(columns, np.float32)
    if not isinstance(importance, Tensor) or importance.shape != (columns,):
        found = list(importance.shape) if isinstance(importance, Tensor) else str(importance.__class__)
        raise FormatError(f"{spec.name}: found importance {found}; wanted a tensor [{columns}], one for each column")
    counts = importance.detach().to("cpu", torch.float64)
    if not torch.isfinite(counts).all() or (counts < 0).any() or (columns and not counts.any()):
        raise FormatError(
            f"{spec.name}: found importance with {int((~torch.isfinite(counts)).sum())} NaN or infinite, "
            f"{int((counts < 0).sum())} negative and {int((counts > 0).sum())} positive values; wanted finite values "
            f"from 0 up, not all 0"
        )
    counts = counts / counts.max() if columns else counts  # the mean of values near the end of float64 would overflow
    # float32 sums in the search, and a column of no importance must still decode to something near its weights
    counts = (counts / counts.mean()).clamp(min=1e-6) if columns else counts
    return counts.float().numpy()


# Layouts: bytes -> levels, shift bits, codes, and back. `body` is uint8 [R, B, bytes of a block without d].

_Unpack = Callable[[Tensor], Fields]
_Pack = Callable[[Fields], Tensor]


def _unpack(spec: IkType, packed: Tensor) -> tuple[Tensor, Fields]:
    """d as float32 [R, 1 or B, 1], and the fields of rows uint8 [R, row bytes]."""
    rows = packed.shape[0]
    if spec.head_bytes:
        head, body = packed[:, : spec.head_bytes], packed[:, spec.head_bytes :].reshape(rows, -1, spec.block_bytes)
        d = head.contiguous().view(torch.float16 if spec.head_bytes == 2 else torch.float32).float().unsqueeze(-1)
    else:
        blocks = packed.reshape(rows, -1, spec.block_bytes)
        d, body = blocks[..., :2].contiguous().view(torch.float16).float(), blocks[..., 2:]
    return d, _LAYOUTS[spec.name][0](body)


def _pack(spec: IkType, d: Tensor, fields: Fields) -> Tensor:
    """Rows uint8 [R, row bytes] from d, float32 [R, 1 or B], exact in the type's own dtype, and the fields."""
    body = _LAYOUTS[spec.name][1](fields)  # [R, B, bytes]
    rows = body.shape[0]
    stored = (d if spec.head_bytes == 4 else d.half()).contiguous().unsqueeze(-1).view(torch.uint8)
    if spec.head_bytes:
        return torch.cat((stored.view(rows, spec.head_bytes), body.flatten(1)), 1)
    return torch.cat((stored, body), 2).flatten(1)


@cache
def _count(n: int, step: int, device: torch.device) -> Tensor:
    """0, step, 2 * step ... as uint8 [n]: shifts of fields that lie side by side in a byte."""
    return (torch.arange(n, device=device) * step).to(torch.uint8)


def _nibbles(packed: Tensor) -> Tensor:
    """Low nibble, high nibble of each byte in turn: [..., n] -> [..., 2n]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _join_nibbles(values: Tensor) -> Tensor:
    return values[..., 0::2] | (values[..., 1::2] << 4)


def _bits(packed: Tensor) -> Tensor:
    """The bits of each byte in turn, lowest first: [..., n] -> [..., 8n]."""
    return ((packed.unsqueeze(-1) >> _count(8, 1, packed.device)) & 1).flatten(-2)


def _join_bits(bits: Tensor) -> Tensor:
    return _join(bits.unflatten(-1, (-1, 8)), 1, -1)


def _planes(packed: Tensor, groups: int, width: int) -> Tensor:
    """Codes of 32 * groups bytes: in each group, 32 weights at the lowest `width` bits of its bytes, 32 at the next."""
    count = 8 // width
    bytes_ = packed.unflatten(-1, (groups, 1, 32))
    return ((bytes_ >> _count(count, width, packed.device).unsqueeze(-1)) & ((1 << width) - 1)).flatten(-3)


def _join_planes(codes: Tensor, groups: int, width: int) -> Tensor:
    return _join(codes.unflatten(-1, (groups, 8 // width, 32)), width, -2).flatten(-2)


def _join(values: Tensor, width: int, dim: int) -> Tensor:
    """Put values of `width` bits along `dim` side by side into bytes, the first at the lowest bits."""
    joined = torch.zeros_like(values.select(dim, 0))
    for i in range(values.shape[dim]):
        joined |= values.select(dim, i) << (width * i)
    return joined


def _half_planes(packed: Tensor) -> Tensor:
    """Codes of 16 bytes for every 32 weights: low nibbles weights 0-15, high nibbles weights 16-31."""
    bytes_ = packed.unflatten(-1, (8, 16))
    return torch.stack((bytes_ & 15, bytes_ >> 4), -2).flatten(-3)


def _join_half_planes(codes: Tensor) -> Tensor:
    return _join(codes.unflatten(-1, (8, 2, 16)), 4, -2).flatten(-2)


def _odd_levels(s: Tensor) -> tuple[Tensor, Tensor]:
    """(level, shift bit) of the byte that the KS types of 4 and 5 bits keep for each scale block."""
    return (s & 254).short() - 127, s & 1


def _join_odd_levels(fields: Fields) -> Tensor:
    return (fields.levels + 127).to(torch.uint8) | fields.shifts


def _six_bit_levels(high: Tensor, low: Tensor) -> Tensor:
    """Levels of IQ4_K and IQ5_K: two bits of high (4 bytes) above four of low (8 bytes), less 32."""
    twos = ((high.unsqueeze(-1) >> _count(4, 2, high.device)) & 3).flatten(-2)
    return (_nibbles(low) | (twos << 4)).short() - 32


def _join_six_bit_levels(levels: Tensor) -> Tensor:
    stored = (levels + 32).to(torch.uint8)
    high = _join((stored >> 4).unflatten(-1, (4, 4)), 2, -1)
    return torch.cat((high, _join_nibbles(stored & 15)), -1)


def _unpack_iq2_k(body: Tensor) -> Fields:
    extra, low, q = body.split((2, 8, 64), -1)
    return Fields(_nibbles(low).short() - 8, _bits(extra), _planes(q, 2, 2))


def _pack_iq2_k(fields: Fields) -> Tensor:
    low = _join_nibbles((fields.levels + 8).to(torch.uint8))
    return torch.cat((_join_bits(fields.shifts), low, _join_planes(fields.codes, 2, 2)), -1)


def _unpack_iq2_ks(body: Tensor) -> Fields:
    shifts, fifth, low, q = body.split((1, 1, 4, 64), -1)  # the u16 "extra": shift bits, then the fifth bits of levels
    return Fields((_nibbles(low) | (_bits(fifth) << 4)).short() - 16, _bits(shifts), _planes(q, 2, 2))


def _pack_iq2_ks(fields: Fields) -> Tensor:
    stored = (fields.levels + 16).to(torch.uint8)
    parts = (_join_bits(fields.shifts), _join_bits(stored >> 4), _join_nibbles(stored & 15))
    return torch.cat((*parts, _join_planes(fields.codes, 2, 2)), -1)


def _unpack_iq3_k(body: Tensor) -> Fields:
    extra, sign, low, q, h = body.split((2, 2, 8, 64, 32), -1)
    levels = (2 * _nibbles(low).short() + 1) * (1 - 2 * _bits(sign).short())
    return Fields(levels, _bits(extra), _planes(q, 2, 2) | (_planes(h, 1, 1) << 2))


def _pack_iq3_k(fields: Fields) -> Tensor:
    sign = _join_bits((fields.levels < 0).to(torch.uint8))
    low = _join_nibbles((fields.levels.abs() >> 1).to(torch.uint8))
    q, h = _join_planes(fields.codes & 3, 2, 2), _join_planes(fields.codes >> 2, 1, 1)
    return torch.cat((_join_bits(fields.shifts), sign, low, q, h), -1)


def _unpack_iq3_ks(body: Tensor) -> Fields:
    fifth, shifts, low, q, h = body.split((1, 1, 4, 64, 32), -1)  # the other way round than IQ2_KS
    stored = torch.cat((low & 15, low >> 4), -1) | (_bits(fifth) << 4)
    return Fields(stored.short() - 16, _bits(shifts), _planes(q, 2, 2) | (_planes(h, 1, 1) << 2))


def _pack_iq3_ks(fields: Fields) -> Tensor:
    stored = (fields.levels + 16).to(torch.uint8)
    low = (stored[..., :4] & 15) | (stored[..., 4:] << 4)
    q, h = _join_planes(fields.codes & 3, 2, 2), _join_planes(fields.codes >> 2, 1, 1)
    return torch.cat((_join_bits(stored >> 4), _join_bits(fields.shifts), low, q, h), -1)


def _unpack_iq4_ks(body: Tensor) -> Fields:
    s, q = body.split((8, 128), -1)
    return Fields(*_odd_levels(s), _half_planes(q))


def _pack_iq4_ks(fields: Fields) -> Tensor:
    return torch.cat((_join_odd_levels(fields), _join_half_planes(fields.codes)), -1)


def _unpack_iq4_kss(body: Tensor) -> Fields:
    low, high = body[..., 0::2], body[..., 1::2]  # [R, B, 64], the bytes of the words w
    s = _join_bits(low & 1)
    even = low & 254  # v = w without bit 0, t = v ^ (v >> 1) in the bytes
    t = torch.stack((even ^ (even >> 1) ^ (high << 7), high ^ (high >> 1)), -1).flatten(-2)
    return Fields(*_odd_levels(s), _half_planes(t))


def _pack_iq4_kss(fields: Fields) -> Tensor:
    t = _join_half_planes(fields.codes)
    low, high = t[..., 0::2], t[..., 1::2]
    high = _suffix_xor(high)
    low = _suffix_xor(low) ^ (0 - (high & 1))  # bit i of v = parity of the bits of t from i up; 0 - 1 is 255
    return torch.stack((low | _bits(_join_odd_levels(fields)), high), -1).flatten(-2)


def _suffix_xor(value: Tensor) -> Tensor:
    """Bit i of the result is the parity of the bits from i up."""
    for step in (1, 2, 4):
        value = value ^ (value >> step)
    return value


def _unpack_iq4_k(body: Tensor) -> Fields:
    extra, high, low, q = body.split((2, 4, 8, 128), -1)
    return Fields(_six_bit_levels(high, low), _bits(extra), _half_planes(q))


def _pack_iq4_k(fields: Fields) -> Tensor:
    levels = _join_six_bit_levels(fields.levels)
    return torch.cat((_join_bits(fields.shifts), levels, _join_half_planes(fields.codes)), -1)


def _unpack_iq5_ks(body: Tensor) -> Fields:
    s, q, h = body.split((8, 128, 32), -1)
    return Fields(*_odd_levels(s), _planes(q, 4, 4) | (_planes(h, 1, 1) << 4))


def _pack_iq5_ks(fields: Fields) -> Tensor:
    q, h = _join_planes(fields.codes & 15, 4, 4), _join_planes(fields.codes >> 4, 1, 1)
    return torch.cat((_join_odd_levels(fields), q, h), -1)


def _unpack_iq5_k(body: Tensor) -> Fields:
    extra, high, low, q, h = body.split((2, 4, 8, 128, 32), -1)
    return Fields(_six_bit_levels(high, low), _bits(extra), _planes(q, 4, 4) | (_planes(h, 1, 1) << 4))


def _pack_iq5_k(fields: Fields) -> Tensor:
    q, h = _join_planes(fields.codes & 15, 4, 4), _join_planes(fields.codes >> 4, 1, 1)
    return torch.cat((_join_bits(fields.shifts), _join_six_bit_levels(fields.levels), q, h), -1)


def _unpack_iq6_k(body: Tensor) -> Fields:
    extra, levels, q, h = body.split((2, 16, 128, 64), -1)
    return Fields(
        levels.contiguous().view(torch.int8).short(), _bits(extra), _planes(q, 4, 4) | (_planes(h, 2, 2) << 4)
    )


def _pack_iq6_k(fields: Fields) -> Tensor:
    levels = fields.levels.to(torch.int8).view(torch.uint8)
    q, h = _join_planes(fields.codes & 15, 4, 4), _join_planes(fields.codes >> 4, 2, 2)
    return torch.cat((_join_bits(fields.shifts), levels, q, h), -1)


_LAYOUTS: dict[str, tuple[_Unpack, _Pack]] = {
    "IQ2_K": (_unpack_iq2_k, _pack_iq2_k),
    "IQ2_KS": (_unpack_iq2_ks, _pack_iq2_ks),
    "IQ3_K": (_unpack_iq3_k, _pack_iq3_k),
    "IQ3_KS": (_unpack_iq3_ks, _pack_iq3_ks),
    "IQ4_KSS": (_unpack_iq4_kss, _pack_iq4_kss),
    "IQ4_KS": (_unpack_iq4_ks, _pack_iq4_ks),
    "IQ4_K": (_unpack_iq4_k, _pack_iq4_k),
    "IQ5_KS": (_unpack_iq5_ks, _pack_iq5_ks),
    "IQ5_K": (_unpack_iq5_k, _pack_iq5_k),
    "IQ6_K": (_unpack_iq6_k, _pack_iq6_k),
}
