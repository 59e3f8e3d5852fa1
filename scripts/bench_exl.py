"""Speed and error of the EXL2 and EXL3 codecs on one core: a table on stdout, the same as JSON for the record.

    python scripts/bench_exl.py [--out scripts/bench_results/exl.json] [--side 1024] [--encode-side 512]

Times are CPU seconds of one thread, best of three for decoding: on a shared machine they say more than the clock does.
Encoding is timed once per K, compiled beforehand, over everything that `quantize_exl3` does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import torch
from bench_record import RESULTS, birth_certificate, keep
from safetensors import safe_open
from torch import Tensor

from recompile.formats import exl2, exl3
from recompile.quantize.exl2 import Layout, quantize_exl2
from recompile.quantize.exl3 import quantize_exl3, viterbi

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "vectors"
EXL2_WIDTHS = (2, 3, 4, 5, 6, 8)
EXL3_ENCODE_BITS = (2, 3, 4)
SPEC_MSE = {2: (0.066, 0.068), 3: (0.0175, 0.0175), 4: (0.0045, 0.0045)}  # EXL3 format spec, section 8
ROUNDS = 3


def cpu_seconds(action: Callable[[], object], rounds: int = 1) -> float:
    """Least CPU time of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


def random_exl3(bits: int | float, side: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (side // 16, side // 16, int(16 * bits))
    return {
        "trellis": torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16),
        "suh": torch.randn(side, generator=generator).half(),
        "svh": torch.randn(side, generator=generator).half(),
        "mul1": torch.tensor(exl3.MARKERS["mul1"] - (1 << 32), dtype=torch.int32),
    }


def bench_decode(side: int) -> dict[str, dict[str, float]]:
    """M weights per second of `dequantize`, by format and width."""
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0)) * 0.02
    cases: dict[str, dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]]] = {"exl2": {}, "exl3": {}}
    for width in EXL2_WIDTHS:
        parts = quantize_exl2(weight, None, Layout((width,), (1.0,), (128,)))
        cases["exl2"][str(width)] = (exl2.dequantize, parts)
    for bits in exl3.BITS:
        cases["exl3"][str(bits)] = (exl3.dequantize, random_exl3(bits, side))
    speeds: dict[str, dict[str, float]] = {}
    for name, widths in cases.items():
        speeds[name] = {}
        for width_name, (decode, parts) in widths.items():
            decode(parts)  # tables are built once
            seconds = cpu_seconds(partial(decode, parts), ROUNDS)
            speeds[name][width_name] = round(side * side / seconds / 1e6, 1)
    return speeds


def relative_errors(decoded: Tensor, weight: Tensor, hessian: Tensor | None = None) -> tuple[float, float]:
    """|E|^2 / |W|^2 and tr(E H E^T) / tr(W H W^T); the second is the first where there is no Hessian."""
    weight = weight.double()
    error = decoded[: weight.shape[0], : weight.shape[1]].double() - weight
    mse = (error.square().sum() / weight.square().sum()).item()
    if hessian is None:
        return mse, mse
    metric = hessian.double()
    return mse, (((error @ metric) * error).sum() / ((weight @ metric) * weight).sum()).item()


def bench_exl3_encode(side: int) -> dict[str, dict[str, Any]]:
    """CPU seconds per million weights, of the trellis search alone and of all, and the error on N(0, 1) weights."""
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(1))
    tiles = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    results: dict[str, dict[str, Any]] = {}
    for bits in EXL3_ENCODE_BITS:
        viterbi(tiles[:1], "mcg", bits)  # compiled, or read from numba's cache
        search = cpu_seconds(partial(viterbi, tiles, "mcg", bits), ROUNDS)
        start = time.process_time()
        parts = quantize_exl3(weight, None, bits, "mcg")
        whole = time.process_time() - start
        low, high = SPEC_MSE[bits]
        mse = relative_errors(exl3.dequantize(parts), weight)[0]
        results[str(bits)] = {
            "search_s_per_m_weights": round(search / tiles.numel() * 1e6, 1),
            "encode_s_per_m_weights": round(whole / weight.numel() * 1e6, 1),
            "relative_mse": float(f"{mse:.4g}"),
            "spec_relative_mse": [low, high],
            "within_3_percent_of_spec": 0.97 * low <= mse <= 1.03 * high,
        }
    return results


def bench_exl2_encode() -> dict[str, dict[str, float]]:
    """Errors of our GPTQ on the encode vectors, beside the figures that the vectors carry."""
    results: dict[str, dict[str, float]] = {}
    for path in sorted(VECTORS.glob("exl2_enc_*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            weight, hessian = file.get_tensor("W").t(), file.get_tensor("H")
        layout = Layout(*(tuple(json.loads(metadata[key])) for key in ("bits", "bits_prop", "group_size")))
        mse, hessian_error = relative_errors(exl2.dequantize(quantize_exl2(weight, hessian, layout)), weight, hessian)
        results[path.stem] = {
            "relative_mse": float(f"{mse:.4g}"),
            "vector_relative_mse": float(f"{float(metadata['gptq_rel_mse']):.4g}"),
            "relative_hessian_error": float(f"{hessian_error:.4g}"),
            "vector_relative_hessian_error": float(f"{float(metadata['gptq_rel_herr']):.4g}"),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "exl.json")
    parser.add_argument("--side", type=int, default=1024, help="decode this square matrix; a multiple of 128")
    parser.add_argument("--encode-side", type=int, default=512, help="encode this square matrix as EXL3")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)

    result: dict[str, Any] = {
        **birth_certificate(),
        "decode_m_weights_per_s": bench_decode(arguments.side),
        "exl3_encode": bench_exl3_encode(arguments.encode_side),
        "exl2_encode": bench_exl2_encode(),
    }
    for name, speeds in result["decode_m_weights_per_s"].items():
        print(f"{name} decode, M weights/s: " + "  ".join(f"{width} bit {speed}" for width, speed in speeds.items()))
    for section in ("exl3_encode", "exl2_encode"):
        for case, figures in result[section].items():
            print(f"{section} {case}: " + "  ".join(f"{name} {value}" for name, value in figures.items()))
    keep(arguments.out, result)


if __name__ == "__main__":
    main()
