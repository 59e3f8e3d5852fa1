"""How far a rounded module is from what was to be rounded, in its weights and in its outputs on calibration rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recompile.quantize.calibrate import InputStatistics
from recompile.quantize.encoder import Encoded
from recompile.quantize.quantize_report import ModuleReport


def output_power(weight: Tensor, hessian: Tensor | None) -> float | None:
    """tr(W H W'), W [out, in], H [in, in]: the squared outputs over all calibration tokens; None without a Hessian."""
    return None if hessian is None else float(torch.einsum("oi,oi->", weight @ hessian, weight))


def measure(name: str, weight: Tensor, made: Encoded, group: InputStatistics, power: float | None) -> ModuleReport:
    """How one module came out; weight [out, in] is what was to be rounded, power its `output_power`."""
    error = weight - made.dense.to(weight.dtype)
    size = sum(value.numel() * value.element_size() for value in made.parts.values())
    noise, signal = float(error.double().norm()), float(weight.double().norm())
    ratio = noise / signal if signal else 0.0
    wrong = output_power(error, group.hessian)
    output = None if wrong is None or power is None else wrong / power if power else 0.0
    unseen = "" if group.hessian is not None else "no calibration token reached it: made without a Hessian"
    sqnr = -20 * math.log10(ratio) if ratio else None
    note = group.note or unseen
    return ModuleReport(name, weight.numel(), size, ratio, sqnr, output, group.tokens, True, note, made.rounding)
