"""EXL3: trellis-coded weights in a Hadamard basis. Stored parts to dense, and states to stored parts.

Every weight is a 16-bit state, looked up in a procedural codebook; consecutive states of a 16x16 tile overlap in all
but K bits, and only the K new bits are stored. Sections named below are those of the EXL3 format spec of this project.

    linear      trellis int16 [in/16, out/16, 16*K]   packed states; K = 1..8, or 1.5, 2.5, 3.5 with the mul1 codebook
                suh     float16 [in]                  input-side signs and scales  (or `su`  int16 [in/16], signs only)
                svh     float16 [out]                 output-side signs and scales (or `sv`  int16 [out/16], signs only)
                mcg | mul1  int32 []                  at most one; its presence selects the codebook
                bias    float16 or float32 [out]      optional; not used here
    embedding   trellis int16 [vocab, G*(1 + 16*K)]   K = 1..8, always mul1
                signs   float16 [G, 256]

`in`, `out` and `G*256` are padded sizes: what comes back is padded too and the caller, who knows the model, crops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from recompile.errors import FormatError

FORMAT = "exl3"  # the row that this file is the code of
TILE = 16  # a tile is 16 x 16 weights
TILE_WEIGHTS = 256
BLOCK = 128  # side of the Hadamard rotation of a linear; in and out are padded to it
EMBEDDING_GROUP = 256  # side of the Hadamard rotation of an embedding row
BITS: tuple[int | float, ...] = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}  # part name -> the only legal value, as uint32

_LINEAR_PARTS = frozenset({"trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "bias", "scale"})
_EMBEDDING_PARTS = frozenset({"trellis", "signs"})
_BAND_COLUMNS = 8192  # outputs decoded at once: 128 x 8192 float32 = 4 MiB, about what the caches hold
_EMBEDDING_CHUNK = 1 << 20  # embedding weights decoded at once


# ---------------------------------------------------------------------------------------------------------------------
# Public API: dense weights
# ---------------------------------------------------------------------------------------------------------------------


def take_rows(parts: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """The parts of output features first..last of [out, in] alone; both are multiples of 128, or the end."""
    taken = {**parts, "trellis": parts["trellis"][:, first // 16 : last // 16].contiguous()}
    if "svh" in taken:
        taken["svh"] = taken["svh"][first:last]
    if "sv" in taken:
        taken["sv"] = taken["sv"][first // 16 : last // 16]
    return taken


@torch.no_grad()
def dequantize(parts: Mapping[str, Tensor], scheme: object | None = None, module: str = "tensor") -> Tensor:
    """Dense weight of one EXL3 module, at padded size (EXL3 format spec, sections 5 and 9).

    W = (diag(suh) (I x Hn) Q (I x Hn) diag(svh))^T, Hn = 128x128 Sylvester Hadamard matrix / sqrt(128), in float32.

    parts:   the module's parts by short name (see the top of this file), all on one device
    scheme:  ignored: an EXL3 module describes itself
    module:  name used in errors
    returns: linear (3-D trellis): float32 [out_features, in_features], both padded to multiples of 128;
             embedding (2-D trellis): float32 [vocab, G*256]
    raises FormatError if the parts break the format (see `check_parts`).
    """
    check_parts(module, parts)
    trellis = parts["trellis"]
    if trellis.ndim == 2:
        return _decode_embedding(trellis, parts["signs"])
    bits, device = bits_of(trellis), trellis.device
    table = codebook_table(codebook_of(parts), device).float()
    rotation = hadamard(BLOCK, device)
    suh, svh = _channel_scales(parts, "suh", "su"), _channel_scales(parts, "svh", "sv")  # [in], [out]
    rows, columns = trellis.shape[0] * TILE, trellis.shape[1] * TILE
    words, shifts = _windows(bits, device)
    dense = torch.empty(columns, rows, dtype=torch.float32, device=device)
    for row in range(0, rows, BLOCK):
        for column in range(0, columns, _BAND_COLUMNS):
            end = min(column + _BAND_COLUMNS, columns)
            band = trellis[row // TILE : row // TILE + 8, column // TILE : end // TILE]  # [8, (end-column)/16, 16K]
            pairs = _word_pairs(band).reshape(-1, band.shape[2]).t().contiguous()  # [16K, tiles]
            states = pairs.index_select(0, words).bitwise_right_shift_(shifts).bitwise_and_(0xFFFF)  # [256, tiles]
            inner_t = table.index_select(0, states.view(-1)).view(TILE, TILE, 8, -1)  # [tile row, tile col, 8, ...]
            inner_t = inner_t.permute(3, 1, 2, 0).reshape(-1, BLOCK)  # [end-column, 128]: Q^T of this band
            rotated = torch.matmul(rotation, (inner_t @ rotation).view(-1, BLOCK, BLOCK)).view(-1, BLOCK)
            rotated *= svh[column:end, None]
            torch.mul(rotated, suh[row : row + BLOCK], out=dense[column:end, row : row + BLOCK])
    return dense


@torch.no_grad()
def dequantize_embedding(parts: Mapping[str, Tensor], module: str = "tensor") -> Tensor:
    """Dense token embedding from a 2-D trellis (EXL3 format spec, section 9); the caller joins `.shard_N` parts first.

    parts:   trellis int16 [vocab, G*(1 + 16*K)], signs float16 [G, 256]
    returns: float32 [vocab, G*256]
    raises FormatError if the parts break the format, or belong to a linear.
    """
    check_parts(module, parts)
    if parts["trellis"].ndim != 2:
        _fail(module, "trellis", "rank 3 (a linear)", "rank 2 (an embedding); use dequantize()")
    return _decode_embedding(parts["trellis"], parts["signs"])


@torch.no_grad()
def inner(parts: Mapping[str, Tensor], module: str = "tensor") -> Tensor:
    """The inner matrix Q of a linear, bit for bit: codebook values before rotation and scales (sections 2 to 4).

    returns: float16 [in, out], padded size
    raises FormatError as `check_parts`, and for an embedding.
    """
    check_parts(module, parts)
    trellis = parts["trellis"]
    if trellis.ndim != 3:
        _fail(module, "trellis", "rank 2 (an embedding)", "rank 3 (a linear)")
    table = codebook_table(codebook_of(parts), trellis.device)
    return tiles_to_matrix(table.index_select(0, codes(trellis).view(-1)).view(*trellis.shape[:2], TILE_WEIGHTS))


# ---------------------------------------------------------------------------------------------------------------------
# Public API: pieces
# ---------------------------------------------------------------------------------------------------------------------


def bits_of(trellis: Tensor) -> int | float:
    """K, bits per weight of a linear's trellis [in/16, out/16, 16*K] (section 1). Raises FormatError if not legal."""
    if trellis.ndim == 3:
        for bits in BITS:
            if trellis.shape[2] == 16 * bits:
                return bits
    _fail("tensor", "trellis", f"shape {list(trellis.shape)}", "[in/16, out/16, 16*K] with K = 1..8 or 1.5, 2.5, 3.5")


def codebook_of(parts: Mapping[str, Tensor]) -> str:
    """ "3inst", "mcg" or "mul1": the codebook of a linear, chosen by which marker is present (section 1).

    parts: of one linear; markers are int32 [], or [1]
    raises FormatError if both markers are present: engines then disagree with themselves (section 13).
    """
    found = [marker for marker in MARKERS if marker in parts]
    if len(found) > 1:
        _fail("tensor", "mcg", "both markers, mcg and mul1", "at most one; delete the one that does not belong")
    return found[0] if found else "3inst"


@torch.no_grad()
def codes(trellis: Tensor) -> Tensor:
    """States of a linear, in stream order (section 2: 16-bit windows of the tile's bit ring, earliest bit highest).

    trellis: int16 [in/16, out/16, 16*K]
    returns: int32 [in/16, out/16, 256], each 0..65535
    raises FormatError if the last dimension is no legal K.
    """
    ends = _window_ends(bits_of(trellis))
    words = torch.tensor([(end - 1) >> 4 for end in ends], device=trellis.device)
    shifts = torch.tensor([-end % 16 for end in ends], dtype=torch.int32, device=trellis.device)
    return _word_pairs(trellis).index_select(-1, words).bitwise_right_shift_(shifts).bitwise_and_(0xFFFF)


@torch.no_grad()
def pack_states(states: Tensor, bits: int | float) -> Tensor:
    """Stored trellis of states that obey the overlap rule (section 7).

    states:  integer [in/16, out/16, 256], stream order, each 0..65535; the upper 16-D(t) bits of state t equal the low
             16-D(t) bits of state t-1, cyclically (D(t) = new bits at position t). Asserted: a break would decode to
             other states without an error
    bits:    K = 1..8, or 1.5, 2.5, 3.5
    returns: int16 [in/16, out/16, 16*K]
    """
    assert bits in BITS, f"K = {bits} is none of {BITS}"
    assert tuple(states.shape[2:]) == (TILE_WEIGHTS,), f"states {list(states.shape)}, wanted [.., .., 256]"
    ends, device = _window_ends(bits), states.device
    new_bits = torch.tensor([ends[0], *(end - start for start, end in pairwise(ends))], device=device)
    states = states.long()
    overlap = (states.roll(1, -1) & ((1 << (16 - new_bits)) - 1)) == states >> new_bits
    assert bool(overlap.all()), "states break the overlap rule of the EXL3 trellis"
    # Word m is ring bits [16m, 16m+16): all in state `last` (the first to end behind them) and the one before it.
    last = [next(t for t, end in enumerate(ends) if end >= 16 * m + 16) for m in range(round(16 * bits))]
    excess = torch.tensor([ends[t] - 16 * m - 16 for m, t in enumerate(last)], device=device)
    at = torch.tensor(last, device=device)
    span = (states[..., at - 1] << new_bits[at]) | (states[..., at] & ((1 << new_bits[at]) - 1))
    words = ((span >> excess) & 0xFFFF).view(*states.shape[:2], -1, 2).flip(-1).flatten(-2)  # 16-bit halves swap
    return _to_int16(words)


@lru_cache(maxsize=32)
def codebook_table(codebook: str, device: torch.device) -> Tensor:
    """Value of every state (section 4): float16 [65536]. codebook: "3inst", "mcg" or "mul1"."""
    with torch.inference_mode(False):  # a cached tensor must also serve callers outside inference mode
        state = torch.arange(1 << 16, dtype=torch.int64, device=device)
        if codebook == "mul1":
            x = (state * MARKERS["mul1"]) & 0xFFFFFFFF
            byte_sum = (x & 0xFF) + ((x >> 8) & 0xFF) + ((x >> 16) & 0xFF) + (x >> 24)
            slope, offset = _halves([0x1EEE, 0xC931], device).float()
            return ((1024 + byte_sum).float() * slope + offset).half()  # exact in float32: one rounding, as an fma
        if codebook == "mcg":
            x = (state * MARKERS["mcg"]) & 0xFFFFFFFF
        elif codebook == "3inst":
            x = (state * 89226354 + 64248484) & 0xFFFFFFFF
        else:
            raise ValueError(f'codebook {codebook!r}; wanted "3inst", "mcg" or "mul1"')
        y = (x & 0x8FFF8FFF) ^ 0x3B603B60
        low, high = _to_int16(y & 0xFFFF).view(torch.float16), _to_int16(y >> 16).view(torch.float16)
        return (low.float() + high.float()).half()  # float32 sums of two halves are exact, so this rounds once


@lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester Hadamard matrix / sqrt(size), H[a, b] = (-1)^popcount(a & b) (section 5): float32 [size, size]."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        assert matrix.shape[0] == size, f"{size} is no power of two"
        return matrix / math.sqrt(size)


@lru_cache(maxsize=32)
def stream_order(device: torch.device) -> Tensor:
    """Place row*16 + col in its tile of each stream position (section 3): int64 [256]."""
    with torch.inference_mode(False):
        position = torch.arange(TILE_WEIGHTS, device=device)
        lane, q = position >> 3, position & 7
        row = 2 * (lane & 3) + (q & 1) + 8 * ((q >> 1) & 1)
        column = (lane >> 2) + 8 * (q >> 2)
        return row * TILE + column


def tiles_to_matrix(tiles: Tensor) -> Tensor:
    """[in/16, out/16, 256] in stream order -> [in, out], any dtype (section 3)."""
    from_stream = torch.argsort(stream_order(tiles.device))
    grid = tiles.index_select(-1, from_stream).view(*tiles.shape[:2], TILE, TILE)
    return grid.transpose(1, 2).reshape(tiles.shape[0] * TILE, tiles.shape[1] * TILE)


def matrix_to_tiles(matrix: Tensor) -> Tensor:
    """[in, out] -> [in/16, out/16, 256] in stream order, any dtype (section 3). Sizes are multiples of 16."""
    grid = matrix.reshape(matrix.shape[0] // TILE, TILE, matrix.shape[1] // TILE, TILE).transpose(1, 2)
    return grid.reshape(*grid.shape[:2], TILE_WEIGHTS).index_select(-1, stream_order(matrix.device))


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_parts(module: str, parts: Mapping[str, Tensor]) -> None:
    """Raise FormatError, naming the tensor, if the parts of `module` break the format (sections 1, 9 and 13).

    Every bit pattern of a trellis is legal, so what can be checked are names, dtypes, shapes, which parts stand
    together, marker values, and that scales are finite. A marker of shape [1] is accepted (other tools write it); an
    unknown part is not, since it might change the weights. Values of tensors on the meta device are not looked at.
    """
    if "trellis" not in parts:
        _fail(module, "trellis", "no such tensor", "a trellis: without it this is no EXL3 module")
    trellis = parts["trellis"]
    _check_dtype(module, "trellis", trellis, torch.int16)
    if trellis.ndim not in (2, 3):
        _fail(module, "trellis", f"shape {list(trellis.shape)}", "rank 3 (linear) or rank 2 (embedding)")
    if trellis.numel() == 0:
        _fail(module, "trellis", f"shape {list(trellis.shape)}", "at least one weight")
    known = _LINEAR_PARTS if trellis.ndim == 3 else _EMBEDDING_PARTS
    for name in parts:
        if name not in known:
            kind = "a linear" if trellis.ndim == 3 else "an embedding"
            _fail(module, name, f"a part that {kind} does not have", f"only {', '.join(sorted(known))}; delete it")
        if parts[name].device != trellis.device:
            _fail(module, name, f"on {parts[name].device}", f"on {trellis.device}, as its trellis")
    if trellis.ndim == 2:
        _check_embedding(module, trellis, parts)
    else:
        _check_linear(module, trellis, parts)


def _check_linear(module: str, trellis: Tensor, parts: Mapping[str, Tensor]) -> None:
    bits = trellis.shape[2] / 16
    if bits not in BITS:
        wanted = "16*K: 16, 24, 32, 40, 48, 56, 64, 80, 96, 112 or 128"
        _fail(module, "trellis", f"shape {list(trellis.shape)}", f"a last dimension of {wanted}")
    features = {"in": trellis.shape[0] * TILE, "out": trellis.shape[1] * TILE}
    for side, size in features.items():
        if size % BLOCK:
            _fail(module, "trellis", f"shape {list(trellis.shape)}, {side} = {size}", f"{side} a multiple of 128")
    markers = [marker for marker in MARKERS if marker in parts]
    if len(markers) > 1:
        _fail(module, "mcg", "beside .mul1", "at most one marker; delete the one that is not this layer's")
    for marker in markers:
        _check_marker(module, marker, parts[marker])
    if bits != int(bits) and markers != ["mul1"]:
        _fail(module, "trellis", f"K = {bits} with codebook {codebook_of(parts)}", "the mul1 marker: half bits need it")
    for scale, signs, side in (("suh", "su", "in"), ("svh", "sv", "out")):
        size = features[side]
        if scale in parts and signs in parts:
            _fail(module, signs, f"beside .{scale}", f"only one of the two; delete .{signs} if .{scale} is newer")
        if scale in parts:
            _check_dtype(module, scale, parts[scale], torch.float16)
            _check_shape(module, scale, parts[scale], [size])
            _check_finite(module, scale, parts[scale])
        elif signs in parts:
            _check_dtype(module, signs, parts[signs], torch.int16)
            _check_shape(module, signs, parts[signs], [size // 16])
        else:
            _fail(module, scale, "no such tensor", f"{side}-side scales .{scale} (or signs .{signs})")
    if "bias" in parts:
        if parts["bias"].dtype not in (torch.float16, torch.float32):
            _fail(module, "bias", f"dtype {_name(parts['bias'].dtype)}", "float16 (float32 is tolerated)")
        _check_shape(module, "bias", parts["bias"], [features["out"]])


def _check_embedding(module: str, trellis: Tensor, parts: Mapping[str, Tensor]) -> None:
    if "signs" not in parts:
        _fail(module, "signs", "no such tensor", "signs float16 [groups, 256]: a 2-D trellis is an embedding")
    signs = parts["signs"]
    _check_dtype(module, "signs", signs, torch.float16)
    if signs.ndim != 2 or signs.shape[0] == 0 or signs.shape[1] != EMBEDDING_GROUP:
        _fail(module, "signs", f"shape {list(signs.shape)}", "[groups, 256]")
    _check_finite(module, "signs", signs)
    groups, words = signs.shape[0], trellis.shape[1]
    if words not in [groups * (1 + 16 * bits) for bits in range(1, 9)]:
        wanted = f"{groups} groups (as .signs) of 1 + 16*K words each, K = 1..8"
        _fail(module, "trellis", f"shape {list(trellis.shape)}", wanted)
    scales = trellis[:, :: words // groups].contiguous().view(torch.float16)  # [vocab, G]
    if not (scales.is_meta or bool(scales.isfinite().all())):
        _fail(module, "trellis", "a record whose scale is inf or nan", "finite scales; is the file damaged?")


def _check_marker(module: str, name: str, marker: Tensor) -> None:
    _check_dtype(module, name, marker, torch.int32)
    if list(marker.shape) not in ([], [1]):
        _fail(module, name, f"shape {list(marker.shape)}", "a scalar, shape []")
    if not marker.is_meta:
        found = int(marker) & 0xFFFFFFFF
        if found != MARKERS[name]:
            _fail(module, name, f"value 0x{found:08X}", f"0x{MARKERS[name]:08X}, the only multiplier there is")


def _check_dtype(module: str, name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    if tensor.dtype != wanted:
        _fail(module, name, f"dtype {_name(tensor.dtype)}", f"{_name(wanted)}; was the checkpoint cast in bulk?")


def _check_shape(module: str, name: str, tensor: Tensor, wanted: list[int]) -> None:
    if list(tensor.shape) != wanted:
        _fail(module, name, f"shape {list(tensor.shape)}", f"{wanted} to fit the trellis")


def _check_finite(module: str, name: str, tensor: Tensor) -> None:
    if not (tensor.is_meta or bool(tensor.isfinite().all())):
        _fail(module, name, "inf or nan values", "finite values; is the file damaged?")


def _fail(module: str, name: str, found: str, wanted: str) -> NoReturn:
    raise FormatError(f"{module}.{name}: found {found}; wanted {wanted}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# Inside
# ---------------------------------------------------------------------------------------------------------------------


def _window_ends(bits: int | float) -> list[int]:
    """S(t) = floor(K (t+1)): the ring bit behind the window of state t (section 2)."""
    return [round(2 * bits) * (position + 1) // 2 for position in range(TILE_WEIGHTS)]


def _word_pairs(trellis: Tensor) -> Tensor:
    """[..., 16K] int16 -> [..., 16K] int32: pair m = ring bits [16m-16, 16m+16), highest first, cyclic.

    The window that ends at bit S lies in pair (S-1)//16, -S mod 16 bits above its bottom. In ring order the two 16-bit
    halves of each 32-bit word are swapped.
    """
    ring = trellis.int().bitwise_and_(0xFFFF).view(*trellis.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return (ring.roll(1, -1) << 16).bitwise_or_(ring)


@lru_cache(maxsize=64)
def _windows(bits: int | float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(pair index int64 [256], right shift int32 [256, 1]) of each element row*16 + col of a tile."""
    with torch.inference_mode(False):
        ends = torch.tensor(_window_ends(bits), device=device)[torch.argsort(stream_order(device))]
        return (ends - 1) >> 4, (-ends % 16).int()[:, None]


def _channel_scales(parts: Mapping[str, Tensor], scale: str, signs: str) -> Tensor:
    """Scales of one side as float32 [channels]; legacy sign words: bit i of word j is channel 16j+i, 1 means -1."""
    if scale in parts:
        return parts[scale].float()
    shifts = torch.arange(16, dtype=torch.int32, device=parts[signs].device)
    return 1.0 - 2.0 * ((parts[signs].int()[:, None] >> shifts) & 1).flatten().float()


def _decode_embedding(trellis: Tensor, signs: Tensor) -> Tensor:
    """Section 9: group = signs * ((mul1[state] * scale) @ H256 / 16); records of 1 + 16K words, LSB first."""
    groups, device = signs.shape[0], trellis.device
    vocab, record = trellis.shape[0], trellis.shape[1] // signs.shape[0]
    bits = (record - 1) // 16
    table = codebook_table("mul1", device).float()
    rotation = hadamard(EMBEDDING_GROUP, device)
    starts = torch.arange(TILE_WEIGHTS, device=device) * bits
    words, shifts = starts >> 4, (starts & 15).int()
    dense = torch.empty(vocab, groups, EMBEDDING_GROUP, dtype=torch.float32, device=device)
    chunk = max(1, _EMBEDDING_CHUNK // (groups * EMBEDDING_GROUP))
    for row in range(0, vocab, chunk):
        records = trellis[row : row + chunk].reshape(-1, groups, record)
        stream = records[..., 1:].int().bitwise_and_(0xFFFF)  # [rows, G, 16K]
        pairs = (stream.roll(-1, -1) << 16).bitwise_or_(stream)  # a symbol may cross into the next word
        states = (pairs.index_select(-1, words) >> shifts).bitwise_and_((1 << bits) - 1)  # symbols, [rows, G, 256]
        reach = 1  # symbols joined so far: each round joins as many again, until 16 bits are full
        while reach * bits < 16:
            states = states | (states.roll(reach, -1) << (reach * bits))
            reach *= 2
        values = table.index_select(0, (states & 0xFFFF).flatten()).view(-1, groups, EMBEDDING_GROUP)
        scale = records[..., :1].contiguous().view(torch.float16).float()  # [rows, G, 1]
        torch.mul((values * scale) @ rotation, signs.float(), out=dense[row : row + chunk])
    return dense.view(vocab, groups * EMBEDDING_GROUP)


def _halves(patterns: list[int], device: torch.device) -> Tensor:
    return _to_int16(torch.tensor(patterns, device=device)).view(torch.float16)


def _to_int16(words: Tensor) -> Tensor:
    """0..65535 -> the int16 of the same 16 bits; spelled out, since narrowing casts may saturate elsewhere."""
    return (words - ((words & 0x8000) << 1)).to(torch.int16)
