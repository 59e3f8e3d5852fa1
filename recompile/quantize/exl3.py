"""EXL3 encoder: a dense weight (and Hessian) to trellis, suh, svh, marker and bias (EXL3 format spec, section 8).

Read top to bottom: scale and rotate the weight until it looks Gaussian, search each 16x16 tile for the best path
through the trellis, with a Hessian feeding errors back (LDLQ), then fit the scales once more by least squares. The
decoder uses only what is stored, so all choices here are free; the two Hadamard rotations are not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recompile.errors import CheckpointError, UnsupportedError
from recompile.formats.exl3 import (
    BITS,
    BLOCK,
    MARKERS,
    TILE,
    TILE_WEIGHTS,
    codebook_table,
    hadamard,
    matrix_to_tiles,
    pack_states,
    tiles_to_matrix,
)
from recompile.quantize.two_sided import MatrixRounding, OutputStatistics, choose_damping

# Standard deviation of the rotated weight at which Gaussian data is coded best, by codebook and K. Measured on 64 tiles
# (parabola through the best three of eight values); the optimum is flat, and `_search_gain` refines it per tensor.
_MASKED_STD = {1: 1.40, 1.5: 1.28, 2: 1.23, 2.5: 1.19, 3: 1.17, 3.5: 1.15, 4: 1.11, 5: 1.06, 6: 0.99, 7: 0.95, 8: 0.90}
_MUL1_STD = {1: 1.10, 1.5: 1.02, 2: 0.98, 2.5: 0.96, 3: 0.93, 3.5: 0.90, 4: 0.90, 5: 0.87, 6: 0.85, 7: 0.82, 8: 0.77}
TARGET_STD: dict[str, dict[int | float, float]] = {"3inst": _MASKED_STD, "mcg": _MASKED_STD, "mul1": _MUL1_STD}

DAMPING = 0.025  # of the Hessian's mean diagonal, added to it
_ROTATED_DAMPING = 1e-4  # the same once more after rotation: padded and dead inputs leave it singular
_GAIN_STEP = 1.1  # ratio of neighbouring gains that the search tries
_GAIN_TILES = (16, 48)  # sampled at least and at most; the same tiles for every gain, so differences are exact
_REFIT_ROUNDS = 2
_UNREACHED = 1e30  # cost of a start node that is not allowed


@torch.no_grad()
def quantize_exl3(
    weight: Tensor,
    hessian: Tensor | None = None,
    bits: int | float = 4,
    codebook: str = "mcg",
    seed: int = 0,
    bias: Tensor | None = None,
    refit: bool = True,
    outputs: OutputStatistics | None = None,
    notes: list[str] | None = None,
) -> dict[str, Tensor]:
    """Encode one linear as EXL3 (EXL3 format spec, section 8). Same arguments, same parts, on one kind of device.

    weight:   [out, in], any float dtype, finite; sizes need not be multiples of 128
    hessian:  [in, in] sum or mean of x x^T over calibration tokens, any scale; None: plain squared error, no feedback
    bits:     K = 1..8, or 1.5, 2.5, 3.5 (these need the mul1 codebook)
    codebook: "3inst", "mcg" or "mul1"
    seed:     of the random signs and of the tiles sampled for the gain search
    bias:     [out] or None; stored as float16
    refit:    fit suh and svh to the weight by least squares once the trellis is fixed
    outputs:  of gradients at the layer's outputs; with a Hessian the trellis is then searched once more with errors fed
              back on both sides, and kept where that is better on held-out rows
    notes:    gets a line on what that did
    returns:  trellis int16 [in'/16, out'/16, 16*K], suh float16 [in'], svh float16 [out'], marker int32 [] (not for
              3inst), bias float16 [out'] if given; in' and out' are padded up to multiples of 128
    raises UnsupportedError for a K or codebook that EXL3 does not have; CheckpointError for values that are not finite,
    values beyond float16, a Hessian that is not positive semidefinite, or shapes that do not fit.
    """
    bits = _checked_bits(bits, codebook)
    _check_inputs(weight, hessian, bias)
    device = weight.device
    target = _padded(weight.float().t())  # [in', out']
    rows, columns = target.shape
    su, sv = _searched_scales(target, codebook, bits, seed)
    rotated = _rotate(target, su, sv)

    metric = None if hessian is None else _damped(hessian.to(device), rows)
    if metric is None:
        states = viterbi(matrix_to_tiles(rotated).view(-1, TILE_WEIGHTS), codebook, bits)
        states = states.view(rows // TILE, columns // TILE, TILE_WEIGHTS)
    else:
        states = _ldlq(rotated, _feedback(metric, su), codebook, bits)
    table = codebook_table(codebook, device).float()
    scales = (su, sv)
    if refit:
        scales = _refit(target, tiles_to_matrix(table[states]), su, sv, metric)
    if outputs is not None and metric is not None:
        two_sided = _TwoSided(target, rotated, metric, (su, sv), codebook, bits, refit)
        states, scales = two_sided.better_of(states, scales, outputs, [] if notes is None else notes)
    su, sv = scales

    _check_finite_scales(su.half(), sv.half())
    parts = {"trellis": pack_states(states, bits), "suh": su.half(), "svh": sv.half()}
    if codebook != "3inst":
        value = MARKERS[codebook]
        parts[codebook] = torch.tensor(value - (1 << 32), dtype=torch.int32)
    if bias is not None:
        parts["bias"] = pad(bias.half(), (0, columns - bias.shape[0]))
    return {name: part.to(device) for name, part in parts.items()}


def _searched_scales(target: Tensor, codebook: str, bits: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """su [in'] and sv [out'] that make a weight [in', out'] Gaussian, as large as the codebook likes it; exact in
    float16."""
    rows, columns = target.shape
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same signs on every device
    signs = (torch.randint(0, 2, (rows + columns,), generator=generator) * 2 - 1).to(target.device, torch.float32)
    su, sv = _initial_scales(target, signs[:rows], signs[rows:], TARGET_STD[codebook][bits])
    rotated = _rotate(target, su, sv)
    _check_finite_scales(su, sv)
    gain = _search_gain(rotated, codebook, bits, generator)
    su, sv = _balance(su / gain, sv)
    su, sv = su.half().float(), sv.half().float()
    _check_finite_scales(su, sv)
    return su, sv


# ---------------------------------------------------------------------------------------------------------------------
# Trellis search
# ---------------------------------------------------------------------------------------------------------------------


def viterbi(targets: Tensor, codebook: str, bits: int | float) -> Tensor:
    """Best states of each tile: numba on the CPU where it is installed, `viterbi_torch` elsewhere.

    targets: float32 [tiles, 256] in stream order, finite
    returns: int32 [tiles, 256], states that obey the overlap rule cyclically
    """
    table = codebook_table(codebook, targets.device).float()
    search = _numba_search() if targets.device.type == "cpu" else None
    if search is None:
        return viterbi_torch(targets, table, bits)
    return torch.from_numpy(search(targets.numpy(), table.numpy(), bits))


def viterbi_torch(targets: Tensor, table: Tensor, bits: int | float, memory_bytes: int = 1 << 29) -> Tensor:
    """Tail-biting Viterbi in two passes, batched over tiles, on any device (EXL3 format spec, section 8).

    At position t the node is the 16-D(t) bits carried over from the state before; D(t) bits are new. With entering cost
    C, out of each node o that the next step may use (its D' = D(t+1)):

        C'[o] = min over k of C[s >> D] + (table[s] - target[t])^2,   s = k << (16 - D') | o

    Pass 1 starts at position 128 with all nodes free, to learn the node entered at position 0; pass 2 runs 0..255 with
    start and end pinned to it. All costs are kept, and the way back recomputes the few candidates of one node a step.

    targets:      float32 [tiles, 256], stream order, finite
    table:        float32 [65536], value of each state
    memory_bytes: bound on the kept costs; tiles are searched in batches that fit
    returns:      int32 [tiles, 256]
    """
    low = int(bits)
    high = round(2 * bits) - low  # new bits at even and at odd positions: they differ for half K
    tile_bytes = 4 * ((TILE_WEIGHTS + 1) << (16 - low)) + 4 * (1 << 17)
    batch = max(1, memory_bytes // tile_bytes)
    return torch.cat([_search_batch(part, table, low, high) for part in targets.split(batch)])


def _search_batch(targets: Tensor, table: Tensor, low: int, high: int) -> Tensor:
    tiles, device = targets.shape[0], targets.device
    costs = torch.empty(TILE_WEIGHTS + 1, tiles, 1 << (16 - low), dtype=torch.float32, device=device)
    candidates = torch.empty(tiles, 1 << 16, dtype=torch.float32, device=device)
    states = torch.empty(tiles, TILE_WEIGHTS, dtype=torch.int64, device=device)

    def forward(start: int) -> None:
        for step in range(TILE_WEIGHTS):
            d_in, d_out = (low, high) if step % 2 == 0 else (high, low)
            torch.sub(table, targets[:, (start + step) % TILE_WEIGHTS, None], out=candidates)
            candidates.square_()
            by_node = candidates.view(tiles, -1, 1 << d_in)
            by_node += costs[step, :, : 1 << (16 - d_in), None]
            by_symbol = candidates.view(tiles, 1 << d_out, -1)
            costs[step + 1, :, : 1 << (16 - d_out)] = by_symbol.amin(1)

    def backward(start: int, node: Tensor, stop: int) -> Tensor:
        for step in reversed(range(stop, TILE_WEIGHTS)):
            d_in, d_out = (low, high) if step % 2 == 0 else (high, low)
            position = (start + step) % TILE_WEIGHTS
            symbols = torch.arange(1 << d_out, device=device) << (16 - d_out)
            choices = symbols | node[:, None]  # [tiles, 2^d_out]
            cost = (table[choices] - targets[:, position, None]).square_() + costs[step].gather(1, choices >> d_in)
            states[:, position] = choices.gather(1, cost.argmin(1, keepdim=True))[:, 0]
            node = states[:, position] >> d_in
        return node

    half = TILE_WEIGHTS // 2
    costs[0] = 0
    forward(half)
    node = backward(half, costs[TILE_WEIGHTS, :, : 1 << (16 - low)].argmin(1), half)
    costs[0] = _UNREACHED
    costs[0].scatter_(1, node[:, None], 0.0)
    forward(0)
    backward(0, node, 0)
    return states.int()


@lru_cache(maxsize=1)
def _numba_search() -> Callable[[Any, Any, int | float], Any] | None:
    """The compiled CPU search, or None (said once) if numba is not installed."""
    try:
        from recompile.quantize.exl3_viterbi_cpu import viterbi_cpu
    except ImportError:
        message = (
            "numba is not installed: EXL3 encoding on the CPU is some 20 times slower; pip install 'recompile[exl3]'"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return None
    return viterbi_cpu


# ---------------------------------------------------------------------------------------------------------------------
# Scales and rotation
# ---------------------------------------------------------------------------------------------------------------------


def _rotate_rows(matrix: Tensor) -> Tensor:
    """(I x Hn) @ matrix, per 128 rows. matrix: [in', any]."""
    blocks = matrix.view(-1, BLOCK, matrix.shape[1])
    return torch.matmul(hadamard(BLOCK, matrix.device).to(matrix.dtype), blocks).view_as(matrix)


def _rotate_columns(matrix: Tensor) -> Tensor:
    """matrix @ (I x Hn), per 128 columns. matrix: [any, out']."""
    return (matrix.view(-1, BLOCK) @ hadamard(BLOCK, matrix.device).to(matrix.dtype)).view_as(matrix)


def _rotate(target: Tensor, su: Tensor, sv: Tensor) -> Tensor:
    """What the trellis has to say: Hn (target / su / sv) Hn, [in', out']. Rows and columns with scale 0 count as 0."""
    scaled = target * _inverse(su)[:, None] * _inverse(sv)
    return _rotate_columns(_rotate_rows(scaled))


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _initial_scales(target: Tensor, row_signs: Tensor, column_signs: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Signed su [in'], sv [out'] after which each 128-block of the rotated weight has about standard deviation `std`.

    A zero row or column (padding) gets scale 0. The rotation spreads what is left of its block over all of it, which
    the square root of the block's live share makes good.
    """
    column_rms = target.square().mean(0).sqrt()  # [out']
    sv = column_rms / column_rms[column_rms > 0].mean() if bool(column_rms.any()) else column_rms
    sv = sv * _live_share(column_rms).sqrt()
    row_rms = (target * _inverse(sv)).square().mean(1).sqrt()  # [in']
    su = row_rms / std * _live_share(row_rms).sqrt()
    return su * row_signs, sv * column_signs


def _live_share(rms: Tensor) -> Tensor:
    """Share of non-zero channels in the 128-block of each channel, [channels]."""
    return (rms > 0).view(-1, BLOCK).float().mean(1).repeat_interleave(BLOCK)


def _balance(su: Tensor, sv: Tensor) -> tuple[Tensor, Tensor]:
    """Move a power of two between the scales if float16 would hold su badly (weights far from unit size)."""
    live = su[su != 0].abs()
    if live.numel() == 0:
        return su, sv
    size = float(live.log2().mean())
    if -9 <= size <= 9:  # float16 is at full precision from 2^-14 to 2^15; rows differ, so leave room
        return su, sv
    shift = 2.0 ** round(size / 2)
    return su / shift, sv * shift


def _search_gain(rotated: Tensor, codebook: str, bits: int | float, generator: torch.Generator) -> float:
    """Factor on the rotated weight at which sampled tiles are coded best: a walk in steps, then a parabola."""
    tiles = matrix_to_tiles(rotated).view(-1, TILE_WEIGHTS)
    count = min(max(tiles.shape[0] // 16, _GAIN_TILES[0]), _GAIN_TILES[1])
    sample = torch.randperm(tiles.shape[0], generator=generator)[:count].to(tiles.device)
    tiles = tiles[sample]
    if not bool(tiles.any()):
        return 1.0
    table = codebook_table(codebook, tiles.device).float()

    def log_error(step: int) -> float:
        gain = _GAIN_STEP**step
        coded = table[viterbi(tiles * gain, codebook, bits)] / gain
        return math.log(float((coded - tiles).square().mean()) + 1e-30)

    errors = {step: log_error(step) for step in (-1, 0, 1)}
    best = min(errors, key=errors.__getitem__)
    while abs(best) < 7:  # gains 0.5 .. 1.9; one side of the best is still untried only while the walk goes on
        untried = [step for step in (best - 1, best + 1) if step not in errors]
        if not untried:
            break
        errors[untried[0]] = log_error(untried[0])
        best = min(errors, key=errors.__getitem__)
    if best - 1 in errors and best + 1 in errors:
        left, middle, right = errors[best - 1], errors[best], errors[best + 1]
        curvature = left - 2 * middle + right
        if curvature > 0:
            return _GAIN_STEP ** (best + 0.5 * (left - right) / curvature)
    return _GAIN_STEP**best


# ---------------------------------------------------------------------------------------------------------------------
# LDLQ: error feedback through the Hessian
# ---------------------------------------------------------------------------------------------------------------------


def _damped(hessian: Tensor, size: int) -> Tensor:
    """Symmetric, damped and padded with zeros to [size, size], mean diagonal 1, float64."""
    metric = hessian.double()
    metric = (metric + metric.t()) / 2
    diagonal = metric.diagonal().mean()
    if not float(diagonal) > 0:
        raise CheckpointError("hessian: found a diagonal that is not positive on average; wanted sums of x x^T")
    metric = metric / diagonal
    metric.diagonal().add_(DAMPING)
    return pad(metric, (0, size - metric.shape[0], 0, size - metric.shape[0]))


def _turned(metric: Tensor, scale: Tensor) -> Tensor:
    """Hn diag(scale) metric diag(scale) Hn, float64: a metric of the weight's rows or columns, of the rotated weight.

    The signs and sizes of the scale both belong in: then an error counts as it does in the layer's output.
    """
    scale = scale.double()
    return _rotate_columns(_rotate_rows(metric * scale[:, None] * scale))


def _feedback(metric: Tensor, su: Tensor, dampings: Sequence[float] = (_ROTATED_DAMPING, 1e-2, 1.0)) -> Tensor:
    """Block-16 unit lower factor L, L D L^T = Hn diag(su) metric diag(su) Hn: float32 [in', in'].

    dampings: of the mean diagonal after rotation; the first with which it can be factored
    """
    rotated = _turned(metric, su)
    size = rotated.shape[0]
    mean = rotated.diagonal().mean().clamp(min=1e-300)
    for damping in dampings:
        damped = rotated / mean
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            break
    else:
        raise CheckpointError("hessian: found a matrix that is not positive semidefinite; wanted sums of x x^T")
    columns = factor.view(size, size // TILE, TILE).transpose(0, 1)  # [bands, in', 16]
    diagonal = torch.stack([columns[band, band * TILE : (band + 1) * TILE] for band in range(size // TILE)])
    lower = torch.linalg.solve_triangular(diagonal, columns, upper=False, left=False)
    return lower.transpose(0, 1).reshape(size, size).float()


def _ldlq(rotated: Tensor, lower: Tensor, codebook: str, bits: int | float) -> Tensor:
    """Quantize bands of 16 inputs from last to first; band i aims at X_i + sum_{j>i} L[j,i]^T (X_j - Q_j).

    returns: int32 [in'/16, out'/16, 256]
    """
    rows, columns = rotated.shape
    table = codebook_table(codebook, rotated.device).float()
    error = torch.zeros_like(rotated)
    states = torch.empty(rows // TILE, columns // TILE, TILE_WEIGHTS, dtype=torch.int32, device=rotated.device)
    for band in reversed(range(rows // TILE)):
        start, end = band * TILE, (band + 1) * TILE
        target = rotated[start:end] + lower[end:, start:end].t() @ error[end:]
        states[band] = viterbi(matrix_to_tiles(target)[0], codebook, bits)
        error[start:end] = rotated[start:end] - tiles_to_matrix(table[states[band : band + 1]])
    return states


@dataclass(frozen=True)
class _TwoSided:
    """The search with errors weighed by what becomes of the outputs too (`two_sided.py` has the maths).

    In the rotated weight an error E [in', out'] costs tr(Hin E Hout E^T), both sides turned as the weight is. With
    block-16 unit lower factors, Hin ~ L D L^T and Hout ~ M C M^T, tile (i, j) aims at X_ij + A_ij + S_ij:

        A = sum over i' > i of L[i', i]^T E[i', j],    S = sum over j' > j of (L^T E)[i, j'] M[j', j]

    Tiles need only those below and to the right of them, so all with i + j alike are searched together.
    """

    target: Tensor  # [in', out'], as stored
    rotated: Tensor  # [in', out']
    metric: Tensor  # [in', in'] float64, damped, of the inputs
    scales: tuple[Tensor, Tensor]  # su, sv, before they were refitted
    codebook: str
    bits: int | float
    refit: bool

    def better_of(
        self, states: Tensor, scales: tuple[Tensor, Tensor], outputs: OutputStatistics, notes: list[str]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The states and scales given, which are one-sided, or better ones; better on the rows held out."""
        su, sv = self.scales
        size = len(sv)
        fit, held_out = (
            pad(matrix.to(sv.device).double(), (0, size - len(matrix), 0, size - len(matrix)))
            for matrix in (outputs.fit, outputs.held_out)
        )
        turned = [_turned(matrix, sv).float() for matrix in (fit, held_out)]
        damping, _ = choose_damping(OutputStatistics(turned[0], turned[1], outputs.tokens, outputs.held_out_tokens))
        if damping is None:
            notes.append(MatrixRounding("one-sided", reason="no damping of its output side is expected to gain").note())
            return states, scales
        lower_out = _feedback(fit, sv, (damping, 10 * damping))
        found = self._search(_feedback(self.metric, su), lower_out)
        inner = tiles_to_matrix(codebook_table(self.codebook, su.device).float()[found])
        tried = [self.scales, *([_refit(self.target, inner, su, sv, self.metric)] if self.refit else [])]
        one_sided = self._error(states, scales, held_out)
        errors = [self._error(found, pair, held_out) for pair in tried]
        best = min(range(len(tried)), key=errors.__getitem__)
        ratio = errors[best] / one_sided if one_sided > 0 else 1.0
        if ratio < 1:
            notes.append(MatrixRounding("two-sided", damping, ratio).note())
            return found, tried[best]
        why = f"two-sided has {ratio:.3f} x its error on held-out rows"
        notes.append(MatrixRounding("one-sided", damping, ratio, why).note())
        return states, scales

    def _error(self, states: Tensor, scales: tuple[Tensor, Tensor], held_out: Tensor) -> float:
        """tr(Hin E Hout E^T) of the weight as it would be stored."""
        su, sv = (scale.half().float() for scale in scales)
        inner = tiles_to_matrix(codebook_table(self.codebook, su.device).float()[states])
        error = (self.target - su[:, None] * _rotate_columns(_rotate_rows(inner)) * sv).double()
        return float(((self.metric @ error) * (error @ held_out)).sum())

    def _search(self, lower_in: Tensor, lower_out: Tensor) -> Tensor:
        rows, columns = self.rotated.shape
        bands, stacks = rows // TILE, columns // TILE
        table = codebook_table(self.codebook, self.rotated.device).float()
        error, carried = torch.zeros_like(self.rotated), torch.zeros_like(self.rotated)  # E and L^T E
        states = torch.empty(bands, stacks, TILE_WEIGHTS, dtype=torch.int32, device=self.rotated.device)
        for step in reversed(range(bands + stacks - 1)):
            places = [(band, step - band) for band in range(max(0, step - stacks + 1), min(bands, step + 1))]
            pulls, targets = [], []
            for band, stack in places:
                i, j = slice(band * TILE, (band + 1) * TILE), slice(stack * TILE, (stack + 1) * TILE)
                pull = lower_in[i.stop :, i].t() @ error[i.stop :, j]
                pulls.append(pull)
                targets.append(self.rotated[i, j] + pull + carried[i, j.stop :] @ lower_out[j.stop :, j])
            tiles = matrix_to_tiles(torch.cat(targets))  # [places, 1, 256]
            found = viterbi(tiles[:, 0], self.codebook, self.bits)
            coded = tiles_to_matrix(table[found[:, None]]).view(len(places), TILE, TILE)
            for number, (band, stack) in enumerate(places):
                i, j = slice(band * TILE, (band + 1) * TILE), slice(stack * TILE, (stack + 1) * TILE)
                states[band, stack] = found[number]
                error[i, j] = self.rotated[i, j] - coded[number]
                carried[i, j] = error[i, j] + pulls[number]
        return states


# ---------------------------------------------------------------------------------------------------------------------
# Scales once more
# ---------------------------------------------------------------------------------------------------------------------


def _refit(target: Tensor, inner: Tensor, su: Tensor, sv: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least-squares su and sv for a fixed trellis: min tr(N E^T metric E N), E = target - diag(su) M diag(sv).

    M = Hn Q Hn. N = 1/sv as given, so that every output counts by its relative error: unweighted, one outlier output
    would bend su to itself at the cost of all others. metric None means the identity. In turn: given su, each sv[c] is
    one ratio; given sv, su solves (metric * (M' M'^T)) su = rowsum(M' * (metric T')), * elementwise, with M' and T' the
    columns of M diag(sv) and of the target times N. Each turn can only lower the error.
    """
    turned = _rotate_columns(_rotate_rows(inner))  # M, [in', out']
    live_rows, live_columns = su != 0, sv != 0
    balance = _inverse(sv)  # N, [out']
    weight = None if metric is None else metric.float()
    weighted_target = target if weight is None else weight @ target

    def fit_sv(su: Tensor) -> Tensor:
        scaled = turned * su[:, None]
        weighted = scaled if weight is None else weight @ scaled
        sv = (scaled * weighted_target).sum(0) / (scaled * weighted).sum(0)
        return torch.where(live_columns & sv.isfinite(), sv, 0.0)

    def fit_su(sv: Tensor) -> Tensor:
        scaled = turned * (sv * balance) * live_rows[:, None]
        right = (scaled * weighted_target * balance).sum(1)
        if metric is None:
            su = right / scaled.square().sum(1)
        else:
            system = metric * (scaled @ scaled.t()).double()
            system.diagonal()[~live_rows] = 1.0
            su = torch.linalg.solve(system, right.double()).float()
        return torch.where(live_rows & su.isfinite(), su, 0.0)

    for _ in range(_REFIT_ROUNDS):
        su = fit_su(fit_sv(su))
    su = su.half().float()  # as stored; sv then makes good what rounding did
    return su, fit_sv(su)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _checked_bits(bits: int | float, codebook: str) -> int | float:
    if codebook not in TARGET_STD:
        raise UnsupportedError(f"codebook {codebook!r}: EXL3 has {', '.join(TARGET_STD)}")
    if bits not in BITS:
        raise UnsupportedError(f"{bits} bits per weight: EXL3 has K = {', '.join(map(str, BITS))}")
    if bits == int(bits):
        return int(bits)
    if codebook != "mul1":
        raise UnsupportedError(f'{bits} bits per weight with codebook {codebook}: EXL3 has half bits with "mul1" only')
    return bits


def _check_inputs(weight: Tensor, hessian: Tensor | None, bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise CheckpointError(f"weight: found {weight.dtype} {list(weight.shape)}; wanted floats [out, in]")
    columns, rows = weight.shape
    if hessian is not None and list(hessian.shape) != [rows, rows]:
        raise CheckpointError(f"hessian: found shape {list(hessian.shape)}; wanted [{rows}, {rows}] to fit the weight")
    if bias is not None and list(bias.shape) != [columns]:
        raise CheckpointError(f"bias: found shape {list(bias.shape)}; wanted [{columns}] to fit the weight")
    for name, tensor in (("weight", weight), ("hessian", hessian), ("bias", bias)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name}: found inf or nan; wanted finite values")
    if bias is not None and not bool(bias.half().isfinite().all()):
        raise CheckpointError("bias: found values beyond 65504; EXL3 stores it as float16")


def _check_finite_scales(su: Tensor, sv: Tensor) -> None:
    if not bool(su.isfinite().all() and sv.isfinite().all()):
        raise CheckpointError("weight: found values too large for float16 scales; wanted weights of usual size")


def _padded(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    return pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK)).contiguous()
