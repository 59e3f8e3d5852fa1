"""EXL2: rows of 2, 3, 4, 5, 6 and 8 bit codes in one linear layer, with 4-bit scale codes and a row permutation.

Written from the EXL2 format spec. Axes used below:

    K  in_features, a multiple of 32          N  out_features padded to a multiple of 32
    G  groups of rows that share one width    R  32-bit rows of `q_weight`
    "packed row": a row in stored order; `q_invperm` maps an input channel to its packed row

Everything is plain torch and runs on the device of the parts. Only the group table (2 * G small integers) is read by
Python; no code runs once per element, row or column.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from recompile.errors import FormatError

FORMAT = "exl2"  # the row that this file is the code of
PARTS = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
WIDTHS = (8, 6, 5, 4, 3, 2)  # bits per code, in the only order that the engine reads
OUT_MULTIPLE = 32  # out_features is padded to this
ROW_MULTIPLE = 32  # rows of a group come in blocks of this many: the bit stream realigns there
MAX_IN_FEATURES = 65536  # the engine keeps row numbers as uint16

# The bit stream of 32 codes is `bits` words. It is cut into equal units that hold whole codes, so that every code of a
# unit sits at a fixed shift and none straddles two units: bits -> unit bits.
_UNIT_BITS = {2: 32, 3: 24, 4: 32, 5: 20, 6: 24, 8: 32}

# Weights decoded at a time. CPU: about 6 MiB of temporaries, small enough for the caches and large enough that a layer
# of six widths is not bound by the cost of calling torch. Elsewhere: enough to fill a GPU, with temporaries of 12 bytes
# per weight near 0.8 GiB.
_BLOCK_WEIGHTS_CPU = 1 << 19
_BLOCK_WEIGHTS_OTHER = 1 << 26


@dataclass(frozen=True)
class Group:
    """Consecutive packed rows that share a bit width and one `q_scale_max`."""

    bits: int  # bits per code, one of WIDTHS
    first_row: int  # first 32-bit row of the group in q_weight
    rows: int  # packed rows (weights per column), a multiple of 32


@dataclass(frozen=True)
class _Run:
    """Consecutive groups of one width: decoded as one tensor."""

    bits: int
    first_word: int  # 32-bit row of q_weight
    end_word: int
    first_row: int  # packed row
    end_row: int


def group_layout(parts: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """The groups of one module, in stored order (EXL2 format spec, section 3).

    parts:  the tensors of PARTS; only the shape of q_weight, int32 [32-bit rows, out], and q_groups, int16
            [2 * groups], are read
    raises: FormatError if the table is illegal (unknown width, rows not a multiple of 32, wrong first row)
    """
    return _read_groups("tensor", parts)


def check_parts(module: str, parts: Mapping[str, Tensor]) -> None:
    """Check everything about one module's parts that can be checked without its source weights.

    module: name used in messages, e.g. "model.layers.3.mlp.down_proj"
    parts:  the tensors of PARTS as `dequantize` takes them, "bias" [out] optionally; other names are ignored (the spec
            says so of `q_perm`)
    raises: FormatError naming the tensor, what was found and what was wanted. Besides the rules that decoding needs
            (EXL2 format spec, sections 3 and 7) these are the engine's: widths in the order 8 6 5 4 3 2 and at most
            65536 input channels; without them the engine decodes garbage and says nothing.
    """
    groups = _check_structure(module, parts)
    for g, (previous, group) in enumerate(pairwise(groups), start=1):
        if group.bits > previous.bits:
            raise FormatError(
                f"{module}.q_groups: group {g} has {group.bits} bits after a group of {previous.bits} bits; wanted "
                f"widths that never increase (8 6 5 4 3 2), the engine decodes any other order to garbage"
            )
    in_features = parts["q_invperm"].shape[0]
    if in_features > MAX_IN_FEATURES:
        raise FormatError(
            f"{module}.q_invperm: found {in_features} input channels; wanted at most {MAX_IN_FEATURES}, the engine "
            f"cuts row numbers to 16 bits"
        )


def take_rows(parts: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """The parts of output features first..last of [out, in] alone; both are multiples of 32, or the end."""
    return {
        **parts,
        "q_weight": parts["q_weight"][:, first:last].contiguous(),
        "q_scale": parts["q_scale"][:, first // 8 : last // 8].contiguous(),
    }


@torch.no_grad()
def dequantize(parts: Mapping[str, Tensor], scheme: object | None = None, *, module: str = "tensor") -> Tensor:
    """Decode one module to its dense weight, bit for bit as the engine does (EXL2 format spec, sections 4 to 7).

    parts:   q_weight int32 [R, N], q_scale int32 [G, N/8], q_scale_max float16 [G], q_groups int16 [2*G],
             q_invperm int32 [K]; a bias is checked and not used
    scheme:  ignored; every format has this argument
    module:  name used in messages
    returns: float16 [N, K], contiguous, in the original channel order. N is the padded out_features: the caller, who
             knows the true one, crops the rows
    raises:  FormatError if the parts contradict each other or the format. The two rules of `check_parts` that only
             the engine needs are not asked for: any order of widths decodes.
    """
    groups = _check_structure(module, parts)
    q_weight, invperm = parts["q_weight"], parts["q_invperm"]
    in_features, out_features = invperm.shape[0], q_weight.shape[1]
    device = q_weight.device
    scale = stored_scale(unpack_scale_codes(parts["q_scale"]), parts["q_scale_max"]).float()  # [G, N]
    block_group = _block_groups(groups, device)  # [K/32]
    runs = list(_runs(groups))
    tables = {bits: _unit_tables(bits, device) for bits in {run.bits for run in runs}}

    dense = torch.empty((out_features, in_features), dtype=torch.float16, device=device)
    budget = _BLOCK_WEIGHTS_CPU if device.type == "cpu" else _BLOCK_WEIGHTS_OTHER
    step = min(out_features, max(OUT_MULTIPLE, budget // in_features // OUT_MULTIPLE * OUT_MULTIPLE))
    # Temporaries are made once: fresh memory for each would cost more in page faults than the arithmetic does.
    longest = max(run.end_row - run.first_row for run in runs)
    signed_buffer = torch.empty(longest * step, dtype=torch.int32, device=device)
    weight_buffer = torch.empty(longest * step, dtype=torch.float32, device=device)
    packed_buffer = torch.empty(2, in_features * step, dtype=torch.float16, device=device)
    for first in range(0, out_features, step):
        columns = slice(first, min(first + step, out_features))
        width = columns.stop - first  # N', columns of this block
        packed, ordered = packed_buffer[:, : in_features * width].view(2, in_features, width)
        for run in runs:
            flip, shift = tables[run.bits]
            words = q_weight[run.first_word : run.end_word, columns].reshape(-1, run.bits, width)
            units = _words_to_units(words, run.bits) ^ flip  # [blocks, units, N']: every code becomes code - z, signed
            shape = (units.shape[0], units.shape[1], shift.shape[0], width)  # blocks, units, codes, N'
            # The left shift puts a code at the top of its word, the arithmetic right shift brings it down signed.
            signed = signed_buffer[: math.prod(shape)].view(shape)
            torch.bitwise_left_shift(units.unsqueeze(2), shift, out=signed)
            signed.bitwise_right_shift_(32 - run.bits)
            weight = weight_buffer[: signed.numel()].view(-1, ROW_MULTIPLE, width)
            weight.copy_(signed.view_as(weight))
            blocks = slice(run.first_row // ROW_MULTIPLE, run.end_row // ROW_MULTIPLE)
            block_scale = scale[:, columns].index_select(0, block_group[blocks])  # [blocks, N']
            # float32 holds code * scale exactly (8 + 11 bits), so the one rounding is the cast to float16.
            weight.mul_(block_scale.unsqueeze(1))
            packed[run.first_row : run.end_row].copy_(weight.view(-1, width))
        torch.index_select(packed, 0, invperm, out=ordered)
        dense[columns].copy_(ordered.t())
    return dense


def unpack_codes(parts: Mapping[str, Tensor]) -> Tensor:
    """The unsigned codes of one module (EXL2 format spec, section 4).

    parts:   as for `dequantize`
    returns: uint8 [K, N], packed row order, each in 0 .. 2^bits - 1
    raises:  FormatError as `dequantize`
    """
    groups = _check_structure("tensor", parts)
    q_weight = parts["q_weight"]
    out_features = q_weight.shape[1]
    codes = torch.empty((sum(g.rows for g in groups), out_features), dtype=torch.uint8, device=q_weight.device)
    for run in _runs(groups):
        _, shift = _unit_tables(run.bits, q_weight.device)
        units = _words_to_units(
            q_weight[run.first_word : run.end_word].reshape(-1, run.bits, out_features), run.bits
        ).unsqueeze(2)
        unsigned = ((units << shift) >> (32 - run.bits)) & (2**run.bits - 1)  # [blocks, units, codes, N]
        codes[run.first_row : run.end_row] = unsigned.view(-1, out_features).to(torch.uint8)
    return codes


def unpack_scale_codes(q_scale: Tensor) -> Tensor:
    """Scale codes of every group and column (EXL2 format spec, section 5: column 0 in the lowest nibble).

    q_scale: int32 [G, N/8]
    returns: uint8 [G, N], values 1 .. 16 (the stored nibble + 1)
    """
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=q_scale.device)
    nibbles = (q_scale.unsqueeze(-1) >> shift) & 15  # the mask drops the sign bits that the shift drew in
    return (nibbles + 1).view(q_scale.shape[0], -1).to(torch.uint8)


def stored_scale(scale_codes: Tensor, scale_max: Tensor) -> Tensor:
    """The step between codes, rounded as the engine rounds it (EXL2 format spec, section 5, exact fp16 arithmetic).

    scale_codes: [G, N] any integer dtype, 1 .. 16
    scale_max:   float16 [G]
    returns:     float16 [G, N], subnormals kept; 0 where scale_max / 256 underflows
    """
    smallest = (scale_max.float() * 2.0**-8).half()  # [G]; the rounding matters: usually subnormal
    squared = scale_codes.float().square()  # at most 256, exact in float32 as is its product with a float16
    return (squared * smallest.float().unsqueeze(1)).half()


def pack(
    codes: Tensor,
    scale_codes: Tensor,
    scale_max: Tensor,
    groups: Sequence[tuple[int, int]],
    perm: Tensor,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The stored parts of one module (EXL2 format spec, section 8); loses nothing.

    codes:       uint8 [K, N], packed row order, 0 .. 2^bits - 1
    scale_codes: uint8 [G, N], 1 .. 16
    scale_max:   float16 [G]
    groups:      (bits, rows) of every group, widths in the order 8 6 5 4 3 2
    perm:        integer [K], the original input channel of every packed row
    bias:        float16 [N] or None
    returns:     the tensors of PARTS (and "bias"), contiguous, on the device of `codes`
    raises:      FormatError if the arguments do not make a module that the engine can read
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise FormatError(f"codes: found {_describe(codes)}; wanted uint8 [in_features, out_features]")
    in_features, out_features = codes.shape
    if perm.dim() != 1 or perm.dtype not in (torch.int32, torch.int64) or perm.shape[0] != in_features:
        raise FormatError(f"perm: found {_describe(perm)}; wanted int32 or int64 [{in_features}]")
    if scale_codes.dtype != torch.uint8 or scale_codes.shape != (len(groups), out_features):
        raise FormatError(
            f"scale_codes: found {_describe(scale_codes)}; wanted uint8 [{len(groups)}, {out_features}]: "
            f"a row for every group"
        )
    if not bool(((scale_codes >= 1) & (scale_codes <= 16)).all()):
        raise FormatError("scale_codes: found a value outside 1 .. 16")
    _check_out_features("codes", out_features)
    layout = _lay_out(groups, in_features)
    device = codes.device

    q_weight = torch.empty((sum(_words(g) for g in layout), out_features), dtype=torch.int32, device=device)
    for run in _runs(layout):
        rows = codes[run.first_row : run.end_row]
        if int(rows.max()) >= 2**run.bits:
            raise FormatError(f"codes: found {int(rows.max())} in a group of {run.bits} bits")
        units = _codes_to_units(rows, run.bits)
        q_weight[run.first_word : run.end_word] = _units_to_words(units, run.bits).view(-1, out_features)

    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=device)
    nibbles = (scale_codes.to(torch.int32) - 1).view(len(layout), out_features // 8, 8)
    table = torch.tensor([value for g in layout for value in (g.bits, g.first_row)], dtype=torch.int32)
    parts = {
        "q_weight": q_weight,
        # Fields do not overlap, so the wrapping sum is a bitwise or.
        "q_scale": (nibbles << shift).sum(-1, dtype=torch.int32),
        "q_scale_max": scale_max.contiguous(),
        "q_groups": table.to(torch.int16).to(device),
        "q_invperm": torch.argsort(perm).to(torch.int32),
    }
    if bias is not None:
        parts["bias"] = bias.contiguous()
    # argsort makes a permutation of anything, so a repeated channel in `perm` must be looked for here.
    _check_permutation("perm", perm)
    check_parts("packed module", parts)
    return parts


def storage_bits(
    in_features: int, out_features: int, groups: Sequence[tuple[int, int]], *, has_bias: bool = False
) -> int:
    """Bits that one module takes in a file, headers aside (EXL2 format spec, section 13).

    in_features:  K
    out_features: the true one or the padded one; the padded one is stored
    groups:       (bits, rows) of every group
    """
    padded = -(-out_features // OUT_MULTIPLE) * OUT_MULTIPLE
    weight_bits = sum(bits * rows for bits, rows in groups) * padded
    scale_bits = len(groups) * (4 * padded + 16)
    table_bits = len(groups) * 32
    return weight_bits + scale_bits + table_bits + 32 * in_features + (16 * padded if has_bias else 0)


# ---- groups ----------------------------------------------------------------------------------------------------------


def _words(group: Group) -> int:
    """32-bit rows that a group takes."""
    return group.rows * group.bits // 32


def _lay_out(groups: Sequence[tuple[int, int]], in_features: int) -> tuple[Group, ...]:
    """Groups with their first rows; raises FormatError for what cannot be stored."""
    layout: list[Group] = []
    first_row = 0
    for g, (bits, rows) in enumerate(groups):
        if bits not in WIDTHS:
            raise FormatError(f"groups[{g}]: found {bits} bits; wanted one of {_LEGAL_WIDTHS}")
        if rows <= 0 or rows % ROW_MULTIPLE:
            raise FormatError(f"groups[{g}]: found {rows} rows; wanted a positive multiple of {ROW_MULTIPLE}")
        layout.append(Group(bits, first_row, rows))
        first_row += rows * bits // 32
    total = sum(g.rows for g in layout)
    if total != in_features:
        raise FormatError(f"groups: found {total} rows in all; wanted in_features = {in_features}")
    if layout and layout[-1].first_row > 0xFFFF:
        raise FormatError(f"groups: the last group starts at 32-bit row {layout[-1].first_row}; wanted at most 65535")
    return tuple(layout)


def _runs(groups: Sequence[Group]) -> Iterator[_Run]:
    """Neighbouring groups of one width, joined: at most six for a file that the engine can read."""
    first_row = 0
    for bits, members in groupby(groups, key=lambda g: g.bits):
        run = list(members)
        rows = sum(g.rows for g in run)
        yield _Run(bits, run[0].first_row, run[-1].first_row + _words(run[-1]), first_row, first_row + rows)
        first_row += rows


def _block_groups(groups: Sequence[Group], device: torch.device) -> Tensor:
    """The group of every block of 32 packed rows: int64 [K/32]."""
    blocks = torch.tensor([g.rows // ROW_MULTIPLE for g in groups])
    return torch.repeat_interleave(torch.arange(len(groups)), blocks).to(device)


# ---- bit streams -----------------------------------------------------------------------------------------------------


def _as_int32(bits: int) -> int:
    """The int32 that has the given 32-bit pattern."""
    return bits - (1 << 32) if bits >> 31 else bits


def _unit_tables(bits: int, device: torch.device) -> tuple[int, Tensor]:
    """How to take a unit apart.

    returns: the pattern that flips the top bit of every code in a unit, which turns an unsigned code into the two's
             complement of code - 2^(bits-1); and the left shifts int32 [codes, 1] that put each code at the top of
             a 32-bit word
    """
    codes = _UNIT_BITS[bits] // bits
    flip = sum(1 << (bits * j + bits - 1) for j in range(codes))
    shift = 32 - bits - bits * torch.arange(codes, dtype=torch.int32)
    return _as_int32(flip), shift.view(-1, 1).to(device)


def _words_to_units(words: Tensor, bits: int) -> Tensor:
    """Cut the streams of 32 codes into units of whole codes.

    words:   int32 [blocks, bits, N]
    returns: int32 [blocks, units, N]; bits above the unit are not cleared
    """
    unit_bits = _UNIT_BITS[bits]
    if unit_bits == 32:
        return words
    units = []
    for offset in range(0, 32 * bits, unit_bits):
        word, shift = divmod(offset, 32)
        unit = words[:, word] >> shift
        if shift + unit_bits > 32:
            low = (1 << (32 - shift)) - 1  # clears the sign bits that the shift drew in
            unit = (unit & low) | (words[:, word + 1] << (32 - shift))
        units.append(unit)
    return torch.stack(units, dim=1)


def _codes_to_units(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, N] -> int32 [blocks, units, N], the first code in the lowest bits."""
    per_unit = _UNIT_BITS[bits] // bits
    fields = codes.view(-1, 32 // per_unit, per_unit, codes.shape[1])
    units = fields[:, :, 0].to(torch.int32)
    for j in range(1, per_unit):
        units |= fields[:, :, j].to(torch.int32) << (bits * j)
    return units


def _units_to_words(units: Tensor, bits: int) -> Tensor:
    """int32 [blocks, units, N] -> int32 [blocks, bits, N]; the inverse of `_words_to_units`."""
    unit_bits = _UNIT_BITS[bits]
    if unit_bits == 32:
        return units
    words = units.new_zeros((units.shape[0], bits, units.shape[2]))
    for k, offset in enumerate(range(0, 32 * bits, unit_bits)):
        word, shift = divmod(offset, 32)
        words[:, word] |= units[:, k] << shift
        if shift + unit_bits > 32:
            words[:, word + 1] |= units[:, k] >> (32 - shift)
    return words


# ---- checks ----------------------------------------------------------------------------------------------------------

_LEGAL_WIDTHS = ", ".join(str(bits) for bits in sorted(WIDTHS))
_DTYPES = {
    "q_weight": (torch.int32, 2, "[rows, out_features]"),
    "q_scale": (torch.int32, 2, "[groups, out_features / 8]"),
    "q_scale_max": (torch.float16, 1, "[groups]"),
    "q_groups": (torch.int16, 1, "[2 * groups]"),
    "q_invperm": (torch.int32, 1, "[in_features]"),
    "bias": (torch.float16, 1, "[out_features]"),
}


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _check_out_features(name: str, out_features: int) -> None:
    if out_features == 0 or out_features % OUT_MULTIPLE:
        raise FormatError(
            f"{name}: found {out_features} columns (out_features); wanted a positive multiple of {OUT_MULTIPLE}, padded"
        )


def _check_permutation(name: str, perm: Tensor) -> None:
    """perm: integer [K], K > 0."""
    count = perm.shape[0]
    lowest, highest = (int(value) for value in torch.aminmax(perm))
    if lowest < 0 or highest >= count:
        raise FormatError(
            f"{name}: found values {lowest} .. {highest}; wanted a permutation of 0 .. {count - 1} "
            f"(in_features = {count})"
        )
    seen = torch.zeros(count, dtype=torch.bool, device=perm.device)
    seen[perm.long()] = True
    if not bool(seen.all()):
        raise FormatError(
            f"{name}: found {count - int(seen.sum())} values twice or more; wanted a permutation of 0 .. {count - 1}"
        )


def _read_groups(module: str, parts: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """Read and check q_groups against the rows of q_weight (EXL2 format spec, section 3)."""
    _check_presence(module, parts, ("q_weight", "q_groups"))
    name = f"{module}.q_groups"
    table, total_words = parts["q_groups"], parts["q_weight"].shape[0]
    if table.shape[0] == 0 or table.shape[0] % 2:
        raise FormatError(f"{name}: found {table.shape[0]} values; wanted pairs (bits, first row), at least one")
    values = [int(value) & 0xFFFF for value in table.tolist()]  # stored as int16, meant as uint16
    widths, starts = values[0::2], values[1::2]
    if starts[0] != 0:
        raise FormatError(f"{name}: the first group starts at 32-bit row {starts[0]}; wanted 0")
    groups = []
    for g, (bits, start, end) in enumerate(zip(widths, starts, [*starts[1:], total_words], strict=True)):
        if bits not in WIDTHS:
            raise FormatError(f"{name}: group {g} has {bits} bits; wanted one of {_LEGAL_WIDTHS}")
        if not start < end <= total_words:
            raise FormatError(
                f"{name}: group {g} covers 32-bit rows {start} to {end} of {total_words}; wanted rising first rows "
                f"that end at the {total_words} rows of {module}.q_weight"
            )
        rows, rest = divmod((end - start) * 32, bits)
        if rest or rows % ROW_MULTIPLE:
            raise FormatError(
                f"{name}: group {g} has {end - start} 32-bit rows of {bits}-bit codes, {(end - start) * 32 / bits:g} "
                f"weights; wanted a multiple of {ROW_MULTIPLE} weights"
            )
        groups.append(Group(bits, start, rows))
    return tuple(groups)


def _check_presence(module: str, parts: Mapping[str, Tensor], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise FormatError(
            f"{module}: missing {', '.join(f'{module}.{name}' for name in missing)}; wanted all of {', '.join(PARTS)}"
        )
    for name in names:
        dtype, dims, shape = _DTYPES[name]
        tensor = parts[name]
        if tensor.dtype != dtype or tensor.dim() != dims:
            wanted = str(dtype).removeprefix("torch.")
            raise FormatError(f"{module}.{name}: found {_describe(tensor)}; wanted {wanted} {shape}")


def _check_structure(module: str, parts: Mapping[str, Tensor]) -> tuple[Group, ...]:
    """Everything that decoding relies on (EXL2 format spec, section 7); returns the groups."""
    _check_presence(module, parts, PARTS)
    q_weight, q_scale, scale_max, invperm = (
        parts[name] for name in ("q_weight", "q_scale", "q_scale_max", "q_invperm")
    )
    devices = {str(parts[name].device) for name in PARTS}
    if len(devices) > 1:
        raise FormatError(f"{module}: found tensors on {', '.join(sorted(devices))}; wanted all on one device")
    out_features = q_weight.shape[1]
    _check_out_features(f"{module}.q_weight", out_features)
    groups = _read_groups(module, parts)
    if q_scale.shape != (len(groups), out_features // 8):
        raise FormatError(
            f"{module}.q_scale: found {list(q_scale.shape)}; wanted [{len(groups)}, {out_features // 8}] for "
            f"{len(groups)} groups of {module}.q_groups and out_features = {out_features}"
        )
    if scale_max.shape[0] != len(groups):
        raise FormatError(
            f"{module}.q_scale_max: found {scale_max.shape[0]} values; wanted {len(groups)}, one for every group of "
            f"{module}.q_groups"
        )
    if not bool(torch.isfinite(scale_max).all()):
        raise FormatError(f"{module}.q_scale_max: found a value that is not finite; wanted finite scales")
    rows = sum(g.rows for g in groups)
    if rows != invperm.shape[0]:
        raise FormatError(
            f"{module}.q_invperm: found {invperm.shape[0]} values; wanted {rows}, the rows of weights that "
            f"{module}.q_groups describes"
        )
    _check_permutation(f"{module}.q_invperm", invperm)
    if "bias" in parts:
        _check_presence(module, parts, ("bias",))
        if parts["bias"].shape[0] != out_features:
            raise FormatError(
                f"{module}.bias: found {parts['bias'].shape[0]} values; wanted {out_features}, padded as the weight"
            )
    return groups
