"""GGUF codecs and merging on one core, against the `gguf` package, `libgguf` and `cp`: a table, and JSON to keep.

    python scripts/bench_gguf.py [--out scripts/bench_results/gguf.json] [--side 1024] [--types Q4_K IQ4_KSS ...]
                                 [--merge-mb 512]

Decoding and encoding are CPU seconds of one thread, best of three; MB are those of packed bytes (decoding) and of
float32 input (encoding). libgguf is what encodes llama.cpp's types for us, so its column shows what our checks cost;
the fork's encoder speeds (one thread, another machine) are from the format spec. Merging is wall time beside `cp` +
fsync of the same bytes, hashing and fsync included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import torch
from bench_record import RESULTS, birth_certificate, keep
from gguf import GGMLQuantizationType, quants

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.formats import gguf, ik
from recompile.formats.gguf_encode import ENCODABLE, quantize_rows
from recompile.formats.gguf_types import TYPES
from recompile.gguf.container import NewTensor, encode_key, write_gguf
from recompile.merge.overlay import build_overlay
from recompile.merge.write_gguf import execute_gguf, plan_gguf
from recompile.recipe.recipe import parse_recipe

FORK_MB_PER_S = {"IQ3_K": 30, "IQ4_K": 9, "IQ4_KS": 9, "IQ4_KSS": 0.3}
ROUNDS = 3
ENCODE_ROWS = 64


def cpu_seconds(action: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Least CPU time of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


def bench_type(name: str, side: int) -> dict[str, Any]:
    """MB/s of one type, ours and theirs; None where they do not have it."""
    row = TYPES[name]
    packed = np.random.default_rng(0).integers(0, 256, (side, row.row_bytes(side)), dtype=np.uint8)
    data = torch.from_numpy(packed)
    gguf.dequantize_rows(row, data[:1], side)  # tables are built once
    mb = packed.size / 1e6
    found: dict[str, Any] = {"type": name, "decode": mb / cpu_seconds(lambda: gguf.dequantize_rows(row, data, side))}
    if name in GGMLQuantizationType.__members__ and name != "Q1_0":
        kind = GGMLQuantizationType[name]
        with np.errstate(all="ignore"):
            quants.dequantize(packed[:1], kind)
            found["decode_gguf"] = mb / cpu_seconds(lambda: quants.dequantize(packed, kind))
    if name not in ENCODABLE:
        return found
    weight = torch.randn((ENCODE_ROWS, side), generator=torch.Generator().manual_seed(0))
    counts = torch.ones(side)
    quantize_rows(row, weight[:1], counts)
    mb = 4 * weight.numel() / 1e6
    found["encode"] = mb / cpu_seconds(lambda: quantize_rows(row, weight, counts))
    if name in ik.TYPES:
        found["encode_fork"] = FORK_MB_PER_S.get(name)
    elif name != "Q6_0":
        source, imatrix = weight.numpy(), counts.numpy()
        found["encode_libgguf"] = mb / cpu_seconds(lambda: libgguf.quantize_rows(source, row.type_id, imatrix))
    return found


def bench_merge(megabytes: int) -> dict[str, float]:
    """Seconds to merge two files of that size, and to copy one with cp and flush it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = TYPES["Q8_0"]
        count = max(2, megabytes // 8)
        raw = np.random.default_rng(0).integers(0, 256, kind.row_bytes(4096) * 1900, dtype=np.uint8).tobytes()
        records = [encode_key("general.architecture", "llama-like")]  # names stay as they are
        tensors = [NewTensor(f"blk.{i}.w.weight", kind, (4096, 1900), lambda: [raw]) for i in range(count)]
        for file in ("a.gguf", "b.gguf"):
            write_gguf(folder / file, records, tensors)
        recipe = f"sources: [{{id: 1, model_dir: {folder}/b.gguf}}]\noverrides: [{{key: '*1.w.weight', source: 1}}]\n"
        best = {"merge_s": float("inf"), "cp_s": float("inf")}
        for turn in range(ROUNDS):
            start = time.perf_counter()
            mix = build_overlay(open_checkpoint(folder / "a.gguf"), parse_recipe(recipe))
            for _ in execute_gguf(plan_gguf(mix, folder / f"mix{turn}.gguf")):
                pass
            best["merge_s"] = min(best["merge_s"], time.perf_counter() - start)
            (folder / f"mix{turn}.gguf").unlink()
            start = time.perf_counter()
            subprocess.run(["cp", "--reflink=never", folder / "a.gguf", folder / "copy.gguf"], check=True)
            with (folder / "copy.gguf").open("rb") as copied:
                os.fsync(copied.fileno())
            best["cp_s"] = min(best["cp_s"], time.perf_counter() - start)
            (folder / "copy.gguf").unlink()
        best["mib"] = round((folder / "a.gguf").stat().st_size / 2**20, 1)
        return {key: round(value, 3) for key, value in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gguf.json")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--types", nargs="+", default=sorted(gguf.DECODABLE - {"F32", "F16", "BF16"}))
    parser.add_argument("--merge-mb", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = birth_certificate()
    columns = ("decode", "decode_gguf", "encode", "encode_libgguf", "encode_fork")
    print("MB/s     " + "".join(f"{column:>16}" for column in columns))
    rows = []
    for name in options.types:
        row = bench_type(name, options.side)
        rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
        cells = (f"{row[c]:16.1f}" if row.get(c) is not None else f"{'-':>16}" for c in columns)
        print(f"{name:9}" + "".join(cells), flush=True)
    merge = bench_merge(options.merge_mb)
    print(f"merge {merge['mib']} MiB: {merge['merge_s']} s, cp + fsync {merge['cp_s']} s")
    keep(options.out, record | {"types": rows, "merge": merge})


if __name__ == "__main__":
    main()
