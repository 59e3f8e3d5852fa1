"""Speed and error of the IQ*_K codecs on one core: a table on stdout, the same as JSON for the record.

    python scripts/bench_ik.py [--out scripts/bench_results/ik.json] [--side 1024] [--encode-rows 256]

Times are CPU seconds of one thread, best of three: on a shared machine they say more than the clock does. Encoding is
compiled beforehand and counts everything that `quantize` does; MB are those of the float32 input. "reference" is the
fork's own encoder: its errors come with the vectors, its speeds (one thread, another machine) from the format spec.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from bench_record import RESULTS, birth_certificate, keep

from recompile.formats import ik

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "vectors"
REFERENCE_MB_PER_S = {"IQ3_K": 30, "IQ4_K": 9, "IQ4_KS": 9, "IQ4_KSS": 0.3}
ROUNDS = 3


def cpu_seconds(action: Callable[[], object]) -> float:
    """Least CPU time of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


def bench_decode(name: str, side: int) -> float:
    """M weights per second of `dequantize`, random bytes."""
    shape = (side, ik.TYPES[name].row_bytes(side))
    packed = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    decode = partial(ik.dequantize, name, packed, (side, side))
    decode()  # tables are built once
    return round(side * side / cpu_seconds(decode) / 1e6, 1)


def bench_encode(name: str, rows: int) -> dict[str, Any]:
    """Speed on gaussian rows of 1024, and RMSE over RMS of 64 of them beside the reference's."""
    bulk = (np.random.default_rng(0).standard_normal((rows, 1024)) * 0.02).astype(np.float32)
    weight = torch.from_numpy(bulk)
    ik.quantize(name, weight[:1])  # compiled, or read from numba's cache
    speed = bulk.nbytes / 1e6 / cpu_seconds(lambda: ik.quantize(name, weight))
    with np.load(VECTORS / f"ik_{name.lower()}.npz") as vector:
        seed = int(str(vector["bulk_seed_note"]).partition("(")[2].partition(")")[0])
        bars = {bar: float(vector[f"bulk_rel_rmse_{bar}"]) for bar in ("uniform", "none")}
    bulk = (np.random.default_rng(seed).standard_normal((64, 1024)) * 0.02).astype(np.float32)
    decoded = ik.dequantize(name, ik.quantize(name, torch.from_numpy(bulk)), bulk.shape).double().numpy()
    error = np.sqrt(((decoded - bulk) ** 2).mean() / (bulk.astype(np.float64) ** 2).mean())
    found: dict[str, Any] = {
        "mb_per_s": round(speed, 1),
        "relative_rmse": float(f"{error:.5g}"),
        "reference_relative_rmse": {bar: float(f"{value:.5g}") for bar, value in bars.items()},
    }
    if name in REFERENCE_MB_PER_S:
        found["reference_mb_per_s"] = REFERENCE_MB_PER_S[name]
        found["times_reference_speed"] = round(speed / REFERENCE_MB_PER_S[name], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "ik.json")
    parser.add_argument("--side", type=int, default=1024, help="decode this square matrix; a multiple of 256")
    parser.add_argument("--encode-rows", type=int, default=256, help="encode this many rows of 1024")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    types: dict[str, dict[str, Any]] = {}
    for name in ik.TYPES:
        decode = bench_decode(name, arguments.side)
        types[name] = {"decode_m_weights_per_s": decode, "encode": bench_encode(name, arguments.encode_rows)}
        print(f"{name}: decode {decode} M weights/s  encode {types[name]['encode']}", flush=True)
    result = {
        **birth_certificate(),
        "types": types,
    }
    keep(arguments.out, result)


if __name__ == "__main__":
    main()
