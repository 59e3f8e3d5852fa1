"""The scales of AWQ and SmoothQuant, from a layer's weights and the statistics of its inputs.

Written from J. Lin et al., "AWQ: Activation-aware Weight Quantization" (2023), and G. Xiao et al., "SmoothQuant"
(2022). With W' = W diag(s) and x' = x / s the map is the same and rounds differently. A scale has one value a channel
of the producer (see smoothing_mappings.py); columns of the consumers that read one channel share its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recompile.quantize.calibrate import InputStatistics
from recompile.quantize.smoothing_mappings import Fold

GRID = 20  # exponents that AWQ tries: 0, 1/20, ..., 19/20
SMALLEST = 1e-4  # of a scale
SCALINGS = ("awq", "smoothquant")

Rounding = Callable[[str, Tensor], Tensor]  # (module, weight [out, in]) -> what its quantized form decodes to


def scaled_statistics(found: InputStatistics, scale: Tensor) -> InputStatistics:
    """The statistics of inputs divided by scale, float32 [in]."""
    return replace(
        found,
        hessian=None if found.hessian is None else found.hessian / scale / scale[:, None],
        largest=None if found.largest is None else found.largest / scale,
        absolute=None if found.absolute is None else found.absolute / scale,
    )


def smoothquant_scale(
    fold: Fold, weights: Mapping[str, Tensor], statistics: Mapping[str, InputStatistics], strength: float
) -> Tensor | None:
    """s_j = max|x_j|^strength / max|W_j|^(1 - strength), float32 [channels]; None where no token was seen.

    weights: the consumers' [out, in]; the maxima are over all of them and over all columns of a channel
    """
    seen = [statistics[name].largest for name in fold.consumers if statistics[name].largest is not None]
    if not seen:
        return None
    inputs = _over_channels(fold, torch.stack([value for value in seen if value is not None]).amax(0), "amax")
    columns = torch.stack([weights[name].abs().amax(0) for name in fold.consumers]).amax(0)
    widest = _over_channels(fold, columns.float(), "amax")
    scale = inputs.clamp(min=1e-5) ** strength / widest.clamp(min=1e-5) ** (1 - strength)
    return scale.clamp(min=1e-5)


@dataclass(frozen=True)
class AwqChoice:
    """exponent: the best alpha, 0 = no scaling; losses: of every alpha tried, relative to the first."""

    scale: Tensor  # float32 [channels]
    exponent: float
    losses: tuple[float, ...]


def awq_scale(
    fold: Fold,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, InputStatistics],
    round_weight: Rounding,
    finish: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> AwqChoice | None:
    """The best of s = mean|x|^alpha over a grid of alphas; None where no token was seen.

    Best is the least sum over consumers of the squared error of their outputs on the calibration rows,
    tr(E H E^T) with E = Q(W diag(s)) diag(s)^-1 - W. alpha = 0 is among those tried, so it is never worse than rounding
    without scales. Scales are divided by sqrt(max * min), as there.
    weights: the consumers' [out, in]; finish: turns a scale, float32 [channels], into the one that will be stored,
    before it is tried
    """
    counted = {name: statistics[name] for name in fold.consumers if statistics[name].hessian is not None}
    if not counted:
        return None
    tokens = max(found.tokens for found in counted.values())
    main = next(found for found in counted.values() if found.tokens == tokens)
    assert main.absolute is not None
    power = _over_channels(fold, main.absolute / main.tokens, "mean").clamp(min=SMALLEST)
    best: tuple[float, Tensor, float] | None = None
    losses: list[float] = []
    for step in range(GRID):
        alpha = step / GRID
        scale = power**alpha
        scale = finish((scale / (scale.max() * scale.min()).sqrt()).clamp(min=SMALLEST))
        columns = scale[fold.channels]
        loss = 0.0
        for name, found in counted.items():
            assert found.hessian is not None, name
            weight = weights[name].float()
            error = round_weight(name, weight * columns) / columns - weight
            loss += float(((error @ found.hessian) * error).sum())
        losses.append(loss)
        if best is None or loss < best[0]:
            best = (loss, scale, alpha)
    assert best is not None
    first = losses[0] or 1.0
    return AwqChoice(best[1], best[2], tuple(loss / first for loss in losses))


def powers_of_two(scale: Tensor) -> Tensor:
    """The nearest powers of two, any shape: stored floats carry them without rounding."""
    return torch.exp2(scale.log2().round())


def _over_channels(fold: Fold, columns: Tensor, how: str) -> Tensor:
    """Values of columns [in] -> of channels [channels], the mean or the largest of those that read one."""
    count = int(fold.channels.max()) + 1
    if len(columns) == count:
        return columns
    made = torch.zeros(count, dtype=columns.dtype, device=columns.device)
    return made.scatter_reduce(0, fold.channels, columns, how, include_self=False)
