"""Speed and error of ik_llama.cpp's codecs on one core: a table on stdout, the same as JSON for the record.

    python scripts/bench_ik.py [--out scripts/bench_results/ik.json] [--side 1024] [--encode-rows 256]

Times are CPU seconds of one thread, best of three: on a shared machine they say more than the clock does. Encoding is
compiled beforehand and counts everything that `quantize` does; MB are those of the float32 input. "reference" is the
fork's own encoder: its errors come with the vectors, its speeds (one thread, another machine) from the format spec. Of
types whose codes stand for several weights (IQ2_KL, IQ*_KT) it runs here, where `recompile engines install
ik_llama.cpp` has put it: errors are weighted by importance, of gaussian rows and of rows with outliers; its first
encoding of a type, which makes its tables, is not counted.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from bench_record import RESULTS, birth_certificate, keep

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.engines.builds import EngineError, find_engine  # noqa: E402
from recompile.formats import ik, ik_codebooks  # noqa: E402
from recompile.formats.gguf_types import find_type  # noqa: E402

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


def fork_encoder() -> Callable[[str, np.ndarray, np.ndarray], torch.Tensor] | None:
    """The fork's encoder: type, float32 [rows, columns], importance [columns] -> uint8 [rows, row bytes]."""
    try:
        library = ctypes.CDLL(str(find_engine("ik_llama.cpp").library.with_name("libggml.so")))
    except (EngineError, OSError):
        return None
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def encode(name: str, weight: np.ndarray, importance: np.ndarray) -> torch.Tensor:
        kind, (rows, columns) = find_type(name), weight.shape
        made = np.zeros((rows, kind.row_bytes(columns)), np.uint8)
        library.ggml_quantize_init(kind.type_id)
        given = weight.ctypes.data, made.ctypes.data, 0, rows, columns, importance.ctypes.data
        library.ggml_quantize_chunk(kind.type_id, *given)
        return torch.from_numpy(made)

    return encode


def bench_codebook(name: str, rows: int) -> dict[str, Any]:
    """Encoding speed, and weighted squared error over the rows' weighted square, beside the fork's own encoder's."""
    rng, fork = np.random.default_rng(0), fork_encoder()
    importance = np.exp(rng.standard_normal(1024)).astype(np.float32)
    gaussian = (rng.standard_normal((rows, 1024)) * 0.02).astype(np.float32)
    sizes = 0.02 * np.exp(0.5 * rng.standard_normal((rows, 1)))
    outliers = (rng.standard_t(4, (rows, 1024)) * sizes).astype(np.float32)
    found: dict[str, Any] = {}

    def error(packed: torch.Tensor, weight: np.ndarray) -> float:
        decoded = ik_codebooks.dequantize(name, packed, weight.shape).double().numpy()
        return float((importance * (decoded - weight) ** 2).sum() / (importance * weight.astype(float) ** 2).sum())

    for kind, weight in (("gaussian", gaussian), ("outliers", outliers)):
        own = partial(ik_codebooks.quantize, name, torch.from_numpy(weight), torch.from_numpy(importance))
        found[kind] = {"relative_error": float(f"{error(own(), weight):.4g}")}
        found[f"{kind}_m_weights_per_s"] = float(f"{weight.size / cpu_seconds(own) / 1e6:.3g}")
        if fork is not None:
            theirs = partial(fork, name, weight, importance)
            found[kind]["forks"] = float(f"{error(theirs(), weight):.4g}")
            found[kind]["ratio"] = round(found[kind]["relative_error"] / found[kind]["forks"], 3)
            found[f"{kind}_forks_m_weights_per_s"] = float(f"{weight.size / cpu_seconds(theirs) / 1e6:.3g}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "ik.json")
    parser.add_argument("--side", type=int, default=1024, help="decode this square matrix; a multiple of 256")
    parser.add_argument("--encode-rows", type=int, default=256, help="encode this many rows of 1024")
    parser.add_argument("--codebook-rows", type=int, default=16, help="encode this many rows of 1024 of IQ2_KL, IQ*_KT")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    types: dict[str, dict[str, Any]] = {}
    for name in ik.TYPES:
        decode = bench_decode(name, arguments.side)
        types[name] = {"decode_m_weights_per_s": decode, "encode": bench_encode(name, arguments.encode_rows)}
        print(f"{name}: decode {decode} M weights/s  encode {types[name]['encode']}", flush=True)
    codebooks = {name: bench_codebook(name, arguments.codebook_rows) for name in ik_codebooks.TYPES}
    for name, row in codebooks.items():
        print(f"{name}: encode {row}", flush=True)
    result = {**birth_certificate(), "types": types, "codebook_types": codebooks}
    keep(arguments.out, result)


if __name__ == "__main__":
    main()
