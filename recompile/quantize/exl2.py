"""EXL2 encoder: GPTQ with an act-order permutation, or round to nearest, in any mix of bit widths.

Written from the EXL2 format spec, sections 8 to 10. Axes as in `recompile.formats.exl2`: K in_features, N padded
out_features, G groups. The weight is worked on as [K, N], packed row order, in float32.

Two things differ from section 10 and lower the error:

* Every column chooses its own scale code. The spec derives all codes from the column maxima and searches one factor
  for the whole group; here the error of each column is sampled over a range of steps, and the group's scale maximum
  and all codes are chosen together from those curves.
* The error is the squared one, each row weighted by what GPTQ will charge for it, not the 3.5th power.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.exl2 import OUT_MULTIPLE, ROW_MULTIPLE, WIDTHS, pack, storage_bits, stored_scale
from recompile.quantize.two_sided import OutputStatistics, RoundingGrid, round_where_better


@dataclass(frozen=True)
class Layout:
    """How the rows of a layer are shared between bit widths (EXL2 format spec, section 9)."""

    bits: tuple[int, ...]  # widths, falling: the order of the packed rows
    props: tuple[float, ...]  # fraction of the rows for each width, summing to 1
    group_size: tuple[int, ...]  # rows of a group for each width, a multiple of 32

    def __post_init__(self) -> None:
        if not self.bits or not len(self.bits) == len(self.props) == len(self.group_size):
            raise FormatError(f"{self}: wanted as many bits as props and group sizes, at least one")
        if any(b not in WIDTHS for b in self.bits) or any(a <= b for a, b in pairwise(self.bits)):
            raise FormatError(f"{self}: found bits {self.bits}; wanted falling widths out of {WIDTHS}")
        if any(p < 0 for p in self.props) or abs(sum(self.props) - 1) > 1e-3:
            raise FormatError(f"{self}: found props that sum to {sum(self.props):g}; wanted fractions that sum to 1")
        if any(size <= 0 or size % ROW_MULTIPLE for size in self.group_size):
            raise FormatError(f"{self}: found group sizes {self.group_size}; wanted multiples of {ROW_MULTIPLE}")


# ---- layouts -------------------------------------------------------------------------------------------------------

# The width combinations that the converter uses (EXL2 format spec, section 9).
_COMBINATIONS = (
    (8,), (8, 6), (8, 6, 5), (8, 5, 4), (8, 4, 3), (8, 4), (6,), (6, 5), (6, 4), (6, 3, 2),
    (5,), (5, 4), (5, 3), (4,), (4, 3), (4, 2), (3, 2),
)  # fmt: skip
_GROUP_SIZES = (32, 64, 128)
_LEADING_SHARE = 0.05  # rows for the widest of three widths, as in the converter's own three-width settings

# Layouts within this distance of the closest one count as equally close; the expected error then decides.
_BPW_TIE = 0.005

# Mean squared error over mean square of N(0, 1) weights, rounded to nearest by this encoder: bits -> group size.
# Only used to compare layouts of equal size.
_EXPECTED_ERROR: dict[int, dict[int, float]] = {
    2: {32: 0.139, 64: 0.145, 128: 0.147},
    3: {32: 0.0332, 64: 0.0367, 128: 0.0389},
    4: {32: 0.00818, 64: 0.00953, 128: 0.0105},
    5: {32: 0.0021, 64: 0.00248, 128: 0.00284},
    6: {32: 0.000535, 64: 0.000637, 128: 0.000735},
    8: {32: 3.39e-05, 64: 4.09e-05, 128: 4.79e-05},
}


def plan_groups(layout: Layout, in_features: int) -> tuple[tuple[int, int], ...]:
    """The groups that a layout gives to a layer (EXL2 format spec, section 9).

    in_features: K, a multiple of 32
    returns:     (bits, rows) of every group, in packed row order; the rows sum to K. A small share is rounded up to
                 a whole group; the last group is cut to the rows that are left.
    raises:      FormatError if K is not a multiple of 32
    """
    _check_in_features(in_features)
    groups: list[tuple[int, int]] = []
    remaining = in_features
    last = len(layout.bits) - 1
    for i, (bits, prop, size) in enumerate(zip(layout.bits, layout.props, layout.group_size, strict=True)):
        rows = remaining if i == last else min(in_features * prop, remaining)
        count = math.ceil(rows / size - 1e-6)  # the margin: 0.1 * 1280 / 128 must be one group, whatever its last bit
        for _ in range(count):
            groups.append((bits, min(size, remaining)))
            remaining -= groups[-1][1]
    return tuple(groups)


def layout_bits_per_weight(layout: Layout, in_features: int, out_features: int) -> float:
    """Stored bits per weight of a layer without bias, padding counted as weights (EXL2 format spec, section 13)."""
    padded = _padded(out_features)
    return storage_bits(in_features, padded, plan_groups(layout, in_features)) / (in_features * padded)


@lru_cache(maxsize=4096)
def layout_for_bits(target_bits: float, in_features: int, out_features: int) -> Layout:
    """The layout whose stored size comes closest to a number of bits per weight.

    target_bits:  wanted bits per weight, scales, group table and permutation included, e.g. 2.5, 3.0, 4.25
    in_features:  K, a multiple of 32
    out_features: the true or the padded one
    returns:      one of the converter's width combinations (EXL2 format spec, section 9). Out of those within 0.005
                  bits of the closest, the one with the least expected error; a target out of reach gives the smallest
                  or the largest layout.
    raises:       FormatError if K is not a multiple of 32 or the target is not a positive number
    """
    _check_in_features(in_features)
    if not (math.isfinite(target_bits) and target_bits > 0):
        raise FormatError(f"target_bits: found {target_bits}; wanted a positive number of bits per weight")
    candidates = [
        (abs(layout_bits_per_weight(layout, in_features, out_features) - target_bits), layout)
        for layout in _candidates(target_bits, in_features, out_features)
    ]
    closest = min(distance for distance, _ in candidates)
    ties = [layout for distance, layout in candidates if distance <= closest + _BPW_TIE]
    return min(ties, key=lambda layout: (_expected_error(layout, in_features), layout.bits, layout.group_size))


def _candidates(target_bits: float, in_features: int, out_features: int) -> list[Layout]:
    """The layouts of the menu next to the target: every combination and group size, shares solved for the target."""
    sizes = [size for size in _GROUP_SIZES if size <= in_features]
    found: list[Layout] = []
    for bits in _COMBINATIONS:
        if len(bits) == 1:
            found += [Layout(bits, (1.0,), (size,)) for size in sizes]
            continue
        choices = {(size,) * len(bits) for size in sizes} | {(sizes[0],) + (sizes[-1],) * (len(bits) - 1)}
        for group_size in sorted(choices):
            leading: tuple[float, ...] = ()
            if len(bits) == 3:
                first = math.ceil(in_features * _LEADING_SHARE / group_size[0]) * group_size[0]
                leading = (first / in_features,)
            most = int(in_features * (1 - sum(leading)) / group_size[len(leading)] + 1e-6)
            if most < 1:
                continue
            low, high = (
                layout_bits_per_weight(
                    _with_count(count, bits, leading, group_size, in_features), in_features, out_features
                )
                for count in (1, most)
            )
            # The size is linear in the number of groups, so the two counts around the target are the closest ones.
            wanted = 1 + (most - 1) * (target_bits - low) / (high - low) if high > low else 1.0
            counts = {min(max(count, 1), most) for count in (math.floor(wanted), math.ceil(wanted))}
            found += [_with_count(count, bits, leading, group_size, in_features) for count in sorted(counts)]
    return found


def _with_count(
    count: int, bits: tuple[int, ...], leading: tuple[float, ...], group_size: tuple[int, ...], in_features: int
) -> Layout:
    """Fixed leading shares, `count` groups of the next width, and the rest for the last."""
    share = count * group_size[len(leading)] / in_features
    return Layout(bits, (*leading, share, max(0.0, 1.0 - sum(leading) - share)), group_size)


def _expected_error(layout: Layout, in_features: int) -> float:
    """Relative squared error to expect of a layout, every row counting the same.

    The first rows have the largest activations, yet GPTQ charges them no more than the last ones: their error is
    spread over all later rows. On an act-order Hessian with a wide diagonal this flat count ranked layouts of one size
    as their measured loss does; weights that fall from first to last row favoured a wide first group, and lost.
    """
    total = 0.0
    for bits, rows in plan_groups(layout, in_features):
        size = min(_GROUP_SIZES, key=lambda known: abs(known - rows))
        total += rows * _EXPECTED_ERROR[bits][size]
    return total / in_features


# ---- scales --------------------------------------------------------------------------------------------------------

# Steps tried for a column, as fractions of the step at which its largest weight just fits: below 0.3 even 2-bit
# codes clip too much, above 1.2 no column gains.
_STEP_RANGE = (0.3, 1.2)
_STEPS = 24
# Scale maxima tried for a group, as fractions of its largest step.
_MAX_RANGE = (0.4, 1.2)
_MAXIMA = 24
# Scale codes tried for a column, relative to the one that covers its largest weight.
_CODE_OFFSETS = (-5, -4, -3, -2, -1, 0, 1, 2)
# Weights handled at a time: float32 temporaries of 0.5 MiB stay in the L2 cache.
_BLOCK_WEIGHTS_CPU = 1 << 17
_BLOCK_WEIGHTS_OTHER = 1 << 25
_FLOAT16_MAX = 65504.0


def _column_error(x: Tensor, step: Tensor, row_weight: Tensor, bits: int) -> Tensor:
    """Weighted squared error of rounding every column with one step.

    x:          float32 [g, rows, N]
    step:       float32 [g, N]; where it is 0 (a stored step that underflowed) the error is infinite: any other wins
    row_weight: float32 [g, rows]
    returns:    float32 [g, N]
    """
    zero = 2 ** (bits - 1)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    in_steps = x * inverse.unsqueeze(1)
    squared = in_steps.round().clamp_(-zero, zero - 1).sub_(in_steps).square_()
    error = torch.matmul(row_weight.unsqueeze(1), squared).squeeze(1) * step.square()
    return torch.where(step > 0, error, torch.inf)


def _error_curves(x: Tensor, base: Tensor, row_weight: Tensor, bits: int) -> Tensor:
    """Error of every column at _STEPS steps from 0.3 to 1.2 times `base`, evenly spaced in logarithm: [steps, g, N]."""
    low, high = _STEP_RANGE
    ratios = [low * (high / low) ** (j / (_STEPS - 1)) for j in range(_STEPS)]
    return torch.stack([_column_error(x, base * ratio, row_weight, bits) for ratio in ratios])


def _fit_scales(x: Tensor, row_weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Choose the scale maximum and the scale codes of some groups of one shape.

    x:          float32 [g, rows, N]
    row_weight: float32 [g, rows], what a squared error in that row costs
    returns:    scale_max float16 [g], scale_codes uint8 [g, N] in 1 .. 16
    """
    groups, rows, _ = x.shape
    budget = _BLOCK_WEIGHTS_CPU if x.device.type == "cpu" else _BLOCK_WEIGHTS_OTHER
    width = max(1, budget // (groups * rows))
    base = (x.abs().amax(1) + 1e-12) / ((2**bits - 1) / 2)  # [g, N] section 10, step 1
    top = base.amax(1, keepdim=True)  # [g, 1]
    curves = torch.cat(
        [
            _error_curves(xs.contiguous(), bs, row_weight, bits)
            for xs, bs in zip(x.split(width, 2), base.split(width, 1), strict=True)
        ],
        dim=2,
    )  # [steps, g, N]

    covering = (16 * (base / top).sqrt()).round()  # section 10, step 2
    offsets = torch.tensor(_CODE_OFFSETS, dtype=torch.float32, device=x.device).view(-1, 1, 1)
    codes = (covering + offsets).clamp_(1, 16)  # [codes, g, N]
    low, high = _STEP_RANGE
    per_step = math.log(high / low) / (_STEPS - 1)
    # position of a code's step on the column's curve, for a scale maximum of `top`
    position = ((codes / 16).square() * top / base / low).log() / per_step
    best_error = torch.full((groups, 1), math.inf, device=x.device)
    best_max = torch.zeros_like(best_error)
    best_codes = torch.ones_like(base)
    for i in range(_MAXIMA):
        ratio = _MAX_RANGE[0] * (_MAX_RANGE[1] / _MAX_RANGE[0]) ** (i / (_MAXIMA - 1))
        at = (position + math.log(ratio) / per_step).clamp_(0, _STEPS - 1)
        left = at.floor().clamp_(max=_STEPS - 2)
        index = left.long()
        interpolated = torch.lerp(curves.gather(0, index), curves.gather(0, index + 1), at - left)  # [codes, g, N]
        column_error, choice = interpolated.min(0)  # [g, N]
        error = column_error.sum(1, keepdim=True)  # [g, 1]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_max = torch.where(better, top * ratio, best_max)
        best_codes = torch.where(better, codes.gather(0, choice.unsqueeze(0)).squeeze(0), best_codes)

    # The curves are samples, and the stored step is rounded: settle between neighbouring codes by the true error.
    scale_max = best_max.squeeze(1).clamp(max=_FLOAT16_MAX).half()  # [g]
    near = [(best_codes + d).clamp(1, 16) for d in (0, -1, 1)]
    true = []
    for candidate in near:
        step = stored_scale(candidate, scale_max).float()
        true.append(
            torch.cat(
                [
                    _column_error(xs, ss, row_weight, bits)
                    for xs, ss in zip(x.split(width, 2), step.split(width, 1), strict=True)
                ],
                dim=1,
            )
        )
    choice = torch.stack(true).argmin(0, keepdim=True)
    return scale_max, torch.stack(near).gather(0, choice).squeeze(0).to(torch.uint8)


# ---- quantizing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Feedback:
    """What GPTQ needs of a Hessian; the same for every bitrate.

    With H = R R^T, R upper triangular, the loss tr(E^T H E) of an error E [K, N] is the sum over c of
    R[c,c]^2 * |E[c] + sum over r < c of factor[c,r] * E[r]|^2. Rows are quantized in order, so each term is made small
    by quantizing row c to the weight plus that sum. This is the update of section 10, step 4, without the inverse.
    """

    perm: Tensor  # int64 [K], packed row -> input channel, falling Hessian diagonal
    factor: Tensor  # float32 [K, K], lower triangular: R[r, c] / R[c, c] at [c, r]
    cost: Tensor  # float32 [K]: R[c, c]^2, what a squared rounding error of row c costs


def _feedback(hessian: Tensor, damping: float) -> _Feedback:
    diagonal = hessian.diagonal()
    perm = torch.argsort(diagonal, descending=True, stable=True)
    extra = max(damping * float(diagonal.mean()), 1e-5)  # section 10, step 2
    backwards = perm.flip(0)  # the reversed matrix's lower factor, reversed again, is the upper factor
    reversed_hessian = hessian[backwards.unsqueeze(1), backwards]
    for _ in range(10):
        reversed_hessian.diagonal().add_(extra)
        lower, info = torch.linalg.cholesky_ex(reversed_hessian)
        if int(info) == 0:
            break
    else:
        raise FormatError(
            f"hessian: not positive definite after adding {10 * extra:g} to its diagonal; wanted X^T X of finite inputs"
        )
    pivots = lower.diagonal()
    factor = (lower / pivots).t().flip(0, 1).contiguous()
    return _Feedback(perm, factor, pivots.flip(0).square())


def _quantize_gptq(rows: Tensor, feedback: _Feedback, groups: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """rows float32 [K, N] in packed order -> codes uint8 [K, N], scale_codes uint8 [G, N], scale_max float16 [G]."""
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    errors = torch.empty_like(rows)  # weight - decoded weight
    scale_codes, scale_max = [], []
    first = 0
    for bits, count in groups:
        end, zero = first + count, 2 ** (bits - 1)
        aim = torch.addmm(rows[first:end], feedback.factor[first:end, :first], errors[:first])
        cost = feedback.cost[first:end]
        group_max, group_codes = _fit_scales(aim.unsqueeze(0), (cost / cost.mean()).unsqueeze(0), bits)
        step = stored_scale(group_codes, group_max).float().squeeze(0)  # [N]
        inverse = torch.where(step > 0, 1 / step, 0.0)  # no step: every code is the zero point
        group_errors = errors[first:end]
        for r in range(count):
            row = aim[r]
            if r:
                row = torch.addmv(row, group_errors[:r].t(), feedback.factor[first + r, first : first + r])
            signed = (row * inverse).round_().clamp_(-zero, zero - 1)
            # The error is that of the decoded float16, so later rows also make up for its rounding.
            torch.sub(rows[first + r], (signed * step).half(), out=group_errors[r])
            codes[first + r] = signed.add_(zero)
        scale_codes.append(group_codes)
        scale_max.append(group_max)
        first = end
    return codes, torch.cat(scale_codes), torch.cat(scale_max)


def _quantize_nearest(rows: Tensor, groups: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """As `_quantize_gptq`, every weight rounded by itself; groups of one shape are handled together."""
    columns = rows.shape[1]
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    budget = _BLOCK_WEIGHTS_CPU if rows.device.type == "cpu" else _BLOCK_WEIGHTS_OTHER
    scale_codes, scale_max = [], []
    first, g = 0, 0
    while g < len(groups):
        bits, count = groups[g]
        together = 1
        while (
            g + together < len(groups)
            and groups[g + together] == groups[g]
            and (together + 1) * count * columns <= budget
        ):
            together += 1
        end, zero = first + together * count, 2 ** (bits - 1)
        x = rows[first:end].view(together, count, columns)
        group_max, group_codes = _fit_scales(x, torch.ones(together, count, device=rows.device), bits)
        step = stored_scale(group_codes, group_max).float()  # [together, N]
        inverse = torch.where(step > 0, 1 / step, 0.0)
        signed = (x * inverse.unsqueeze(1)).round_().clamp_(-zero, zero - 1)
        codes[first:end] = signed.add_(zero).view(-1, columns)
        scale_codes.append(group_codes)
        scale_max.append(group_max)
        first, g = end, g + together
    return codes, torch.cat(scale_codes), torch.cat(scale_max)


def quantize_exl2(
    weight: Tensor,
    hessian: Tensor | None,
    layout: Layout,
    bias: Tensor | None = None,
    damping: float = 0.12,
) -> dict[str, Tensor]:
    """Quantize one linear layer to EXL2 (EXL2 format spec, section 10).

    weight:  [out_features, in_features], any float dtype, finite; in_features a multiple of 32
    hessian: [in_features, in_features], any float dtype: a positive multiple of X^T X over the layer's inputs X, for
             GPTQ; None rounds to nearest and keeps the rows in order
    layout:  widths, shares and group sizes, e.g. from `layout_for_bits`
    bias:    [out_features] or None, stored as float16
    damping: fraction of the Hessian's mean diagonal added to its diagonal
    returns: the parts of `recompile.formats.exl2`, on the device of `weight`; out_features padded to a multiple of 32
             with columns that decode to 0
    raises:  FormatError if in_features is not a multiple of 32 (the module must stay dense), or for shapes that do not
             fit, values that are not finite, or a Hessian that stays indefinite
    """
    return quantize_exl2_many(weight, hessian, [layout], bias, damping)[0]


@torch.no_grad()
def quantize_exl2_many(
    weight: Tensor,
    hessian: Tensor | None,
    layouts: Sequence[Layout],
    bias: Tensor | None = None,
    damping: float = 0.12,
    outputs: OutputStatistics | None = None,
    notes: list[str] | None = None,
) -> list[dict[str, Tensor]]:
    """Quantize one linear layer to several layouts; the permutation and the Cholesky factor are computed once.

    weight: [out_features, in_features]; other arguments and errors as for `quantize_exl2`; one dict of parts for every
    layout, in order.
    outputs: of gradients at the layer's outputs: codes are then rounded once more, two-sided, on the scales that GPTQ
    chose, and kept where that is better on held-out rows; notes: gets a line a layout on what was done
    """
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise FormatError(f"weight: found {weight.dtype} {list(weight.shape)}; wanted floats [out, in]")
    out_features, in_features = weight.shape
    _check_in_features(in_features)
    _check_finite("weight", weight)
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if largest > _FLOAT16_MAX:
        raise FormatError(
            f"weight: holds {largest:.6g}, and EXL2 decodes to float16, at most {_FLOAT16_MAX:.0f}; keep this module "
            f"dense, or take another format"
        )
    padded_bias = None if bias is None else _pad_bias(bias, out_features)
    rows = torch.zeros((in_features, _padded(out_features)), dtype=torch.float32, device=weight.device)
    rows[:, :out_features] = weight.t()

    if hessian is None:
        perm = torch.arange(in_features, device=weight.device)
        return [_pack(_quantize_nearest(rows, plan), plan, perm, padded_bias) for plan in _plans(layouts, in_features)]
    if hessian.shape != (in_features, in_features) or not hessian.is_floating_point():
        raise FormatError(
            f"hessian: found {hessian.dtype} {list(hessian.shape)}; wanted floats [{in_features}, {in_features}]"
        )
    _check_finite("hessian", hessian)
    feedback = _feedback(hessian.to(weight.device, torch.float32), damping)
    rows = rows.index_select(0, feedback.perm)
    plans = _plans(layouts, in_features)
    made = [_quantize_gptq(rows, feedback, plan) for plan in plans]
    if outputs is not None:
        inputs = hessian.to(weight.device, torch.float32)
        made = [
            _round_two_sided(found, plan, feedback.perm, weight.float(), inputs, damping, outputs, notes)
            for found, plan in zip(made, plans, strict=True)
        ]
    return [_pack(found, plan, feedback.perm, padded_bias) for found, plan in zip(made, plans, strict=True)]


def _round_two_sided(
    quantized: tuple[Tensor, ...],
    groups: Sequence[tuple[int, int]],
    perm: Tensor,
    weight: Tensor,
    hessian: Tensor,
    damping: float,
    outputs: OutputStatistics,
    notes: list[str] | None,
) -> tuple[Tensor, ...]:
    """The same scales with codes rounded two-sided, where that is better; weight [out, in]."""
    codes, scale_codes, scale_max = quantized
    out_features, device = len(weight), weight.device
    rows = torch.tensor([count for _, count in groups], device=device)
    bits = torch.tensor([width for width, _ in groups], device=device)
    of_packed = torch.repeat_interleave(torch.arange(len(groups), device=device), rows)  # packed row -> group
    group = torch.empty_like(of_packed)
    group[perm] = of_packed
    step = stored_scale(scale_codes, scale_max).float()[:, :out_features].t()  # [out, G]
    zero = (2 ** (bits - 1)).float().expand_as(step)
    scale = torch.where(step > 0, step, 1.0)  # no step: every code is the zero point, which stays
    low, high = (torch.where(step > 0, limit, 0.0) for limit in (-zero, zero - 1))
    before = torch.empty(weight.shape, device=device)
    before[:, perm] = codes[:, :out_features].t().float() - zero[:, of_packed]
    grid = RoundingGrid(scale.contiguous(), group, low.contiguous(), high.contiguous())
    ((levels, done),) = round_where_better(weight, hessian, outputs, [grid], [before], damping)
    if notes is not None:
        notes.append(done.note())
    if done.rounding == "one-sided":
        return quantized
    codes = codes.clone()
    codes[:, :out_features] = (levels[:, perm] + zero[:, of_packed]).t().to(torch.uint8)
    return codes, scale_codes, scale_max


def _plans(layouts: Sequence[Layout], in_features: int) -> list[tuple[tuple[int, int], ...]]:
    return [plan_groups(layout, in_features) for layout in layouts]


def _pack(
    quantized: tuple[Tensor, ...], groups: Sequence[tuple[int, int]], perm: Tensor, bias: Tensor | None
) -> dict[str, Tensor]:
    codes, scale_codes, scale_max = quantized
    return pack(codes, scale_codes, scale_max, groups, perm, bias)


def _padded(out_features: int) -> int:
    return -(-out_features // OUT_MULTIPLE) * OUT_MULTIPLE


def _pad_bias(bias: Tensor, out_features: int) -> Tensor:
    if bias.shape != (out_features,):
        raise FormatError(f"bias: found {list(bias.shape)}; wanted [{out_features}]")
    padded = torch.zeros(_padded(out_features), dtype=torch.float16, device=bias.device)
    padded[:out_features] = bias
    _check_finite("bias as float16", padded)
    return padded


def _check_in_features(in_features: int) -> None:
    if in_features <= 0 or in_features % ROW_MULTIPLE:
        raise FormatError(
            f"weight: found in_features = {in_features}; EXL2 wants a multiple of {ROW_MULTIPLE}: "
            f"this module must stay dense"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise FormatError(f"{name}: found values that are not finite; wanted finite numbers")
