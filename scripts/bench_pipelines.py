#!/usr/bin/env python3
"""Whole pipelines at equal file sizes, judged on the same rows: what people publish today beside `model_auto`.

    .venv/bin/python scripts/bench_pipelines.py gguf --size-of Q3_K_M --work DIR
    .venv/bin/python scripts/bench_pipelines.py compressed-tensors --size-of 4 --work DIR

gguf: llama-quantize's presets with an imatrix (made here by ggml's own encoders: scripts/bench_gguf.py holds the bytes
equal), and `model_auto --for llama.cpp` at the size of the named one, as built and healed. SmolLM2's base comes from a
Q4_1 file here, so blocks of 32 with a minimum (Q4_1, Q4_K) find its own grid again, in presets and mixes alike: they
look better than on a model that was never quantized.
compressed-tensors: uniform GPTQ in groups of 64, and `model_auto --for transformers` at its size.

All builds are measured on report rows that nothing else used and on text of another kind, paired over rows. A run that
was stopped goes on with the same --work. Rewrites the entries of its family, model and size in
scripts/bench_results/pipelines.json; docs/pipelines.md shows them (scripts/make_docs.py).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import make_base  # noqa: E402
import make_tiny_models  # noqa: E402
from bench_record import RESULTS, birth_certificate, keep  # noqa: E402

import recompile  # noqa: E402
from eval.diff import DiffOptions, DiffReport, measure_many  # noqa: E402
from eval.heal import heal_rows  # noqa: E402
from eval.metrics import paired_difference  # noqa: E402
from recompile.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from recompile.model.rows import RowOptions  # noqa: E402

OUT = RESULTS / "pipelines.json"
OURS = "model_auto"


@dataclass(frozen=True)
class Family:
    """peers: name -> build, the one whose size ours may have first; ours: arguments of `recompile.auto`."""

    peers: Callable[[Path, Path, str, Mapping[str, Any]], dict[str, Path]]
    ours: Mapping[str, Any]
    file: str  # the name of our output


LADDER = (
    "Q2_K",
    "Q3_K_S",
    "IQ4_XS",
    "Q3_K_M",
    "IQ4_NL",
    "Q3_K_L",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_M",
    "Q6_K",
)  # by size, about
SLACK = 1.002  # a peer may be so much larger than the size that ours keeps


def presets(base: Path, work: Path, size: str, rows: Mapping[str, Any]) -> dict[str, Path]:
    """llama-quantize's preset of that name first, then those around it that are no larger."""
    at = LADDER.index(size)
    made = {}
    for name in (size, *LADDER[max(0, at - 2) : at], *LADDER[at + 1 : at + 2]):
        path = work / "presets" / f"{base.name}-{name}.gguf"
        if not path.exists():
            recompile.quantize(
                base, work / "presets", bits=(name,), format="gguf", tokenizer_from=make_base.find_gguf(), **rows
            )
        made[f"{name}, imatrix (llama-quantize)"] = path
    limit = SLACK * next(iter(made.values())).stat().st_size
    return {name: path for name, path in made.items() if path.stat().st_size <= limit}


def uniform(base: Path, work: Path, size: str, rows: Mapping[str, Any]) -> dict[str, Path]:
    out = work / "uniform"
    if not (out / f"{size}bpw").exists():
        recompile.quantize(base, out, bits=(size,), **rows)
    return {f"GPTQ, {size} bits everywhere": out / f"{size}bpw"}


FAMILIES = {
    "gguf": Family(presets, {"engine": "llama.cpp"}, "MIX.gguf"),
    "compressed-tensors": Family(uniform, {"engine": "transformers"}, "mix"),
}


def base_of(model: str) -> Path:
    return Path(make_base.build()) if model == "smollm2" else Path(make_tiny_models.build()[model])


def run_one(family: str, model: str, size: str, settings: Mapping[str, Any], work: Path) -> dict[str, Any]:
    base, kind = base_of(model), FAMILIES[family]
    work = work / family / model
    calibration = {"rows": settings["calibrate_rows"], "length": settings["length"]}
    seconds: dict[str, float] = {}
    began = time.monotonic()
    builds = kind.peers(base, work, size, calibration)
    seconds["peers"] = round(time.monotonic() - began, 1)
    largest = open_checkpoint(next(iter(builds.values()))).size_bytes
    given = dict(kind.ours)
    if family == "gguf":
        given["tokenizer_from"] = make_base.find_gguf()
    mix = work / f"{size}-mix" / kind.file
    mix.parent.mkdir(parents=True, exist_ok=True)
    report = recompile.auto(
        base,
        mix,
        size=largest,
        rounding="one-sided",
        rows=settings["rows"],
        length=settings["length"],
        samples=settings["samples"],
        calibration_rows=settings["calibrate_rows"],
        search_minutes=settings["search_minutes"],
        verify=False,
        **given,
    )
    builds[f"{OURS}: mix, feedback"] = mix
    seconds["mix"] = round(sum(report.seconds.values()), 1)
    if settings["heal_minutes"] > 0:  # what model_auto --heal does last
        healed = mix.with_name(f"healed-{kind.file}")
        began = time.monotonic()
        if not healed.exists():
            judges = {"rows": settings["rows"], "length": settings["length"]}
            recompile.heal(mix, base, healed, minutes=settings["heal_minutes"], **judges)
        builds[f"{OURS}: mix, feedback, healed"] = healed
        seconds["healing"] = round(time.monotonic() - began, 1)
    return {
        "family": family,
        "model": model,
        "size": size,
        "settings": dict(settings),
        "seconds": seconds,
        "largest_bytes": largest,
        "builds": judged(base, builds, settings),
    }


def judged(base: Path, builds: Mapping[str, Path], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """KL of every build on report rows and on text of another kind, and paired with the best peer."""
    reference = open_checkpoint(base)
    opened = {name: open_checkpoint(path) for name, path in builds.items()}
    where = RowOptions(settings["rows"], settings["length"])
    rows, vocab = heal_rows(reference, next(iter(opened.values())), where, settings["length"])
    found: dict[str, list[DiffReport]] = {}
    for kind, ids in (("text", rows.report), ("other_text", rows.second)):
        found[kind] = measure_many(list(opened.values()), reference, ids, DiffOptions(vocab=vocab))
    peers = [number for number, name in enumerate(opened) if not name.startswith(OURS)]
    best = min(peers, key=lambda number: found["text"][number].kl.mean)
    told = []
    for number, (name, build) in enumerate(opened.items()):
        entry: dict[str, Any] = {"build": name, "bytes": build.size_bytes}
        for kind, reports in found.items():
            report, rival = reports[number], reports[best]
            mean, interval = paired_difference(torch.tensor(report.kl_rows), torch.tensor(rival.kl_rows))
            entry[kind] = {
                "kl_nats": report.kl.mean,
                "std_error": report.kl.std_error,
                "p99": report.kl_quantiles.p99,
                "same_top_token": report.top_k_agreement[0].mean,
                "ratio_to_best_peer": report.kl.mean / rival.kl.mean if rival.kl.mean > 0 else math.nan,
                "less_best_peer": mean.mean,
                "interval_95": list(interval),
            }
        told.append(entry)
    return told


@click.command(context_settings={"show_default": True})
@click.argument("family", type=click.Choice(list(FAMILIES)))
@click.option("--model", type=click.Choice(["smollm2", "tiny-dense", "tiny-moe"]), default="smollm2")
@click.option("--size-of", "size", required=True, help="The peer whose size our mix may have: a preset, or bits.")
@click.option("--rows", default=16, help="Of every role: to profile, choose, accept and report on.")
@click.option("--length", default=256)
@click.option("--samples", default=8)
@click.option("--calibrate-rows", default=48)
@click.option("--search-minutes", default=5.0)
@click.option("--heal-minutes", default=10.0, help="0: no healing.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for builds; kept.")
def main(family: str, model: str, size: str, work: Path | None, **settings: Any) -> None:
    """Whole pipelines of one family at the size of one peer."""
    certificate = birth_certificate()
    with tempfile.TemporaryDirectory() as scratch:
        entry = {**certificate, **run_one(family, model, size, settings, work or Path(scratch))}
    del entry["threads"]
    kept = json.loads(OUT.read_text())["runs"] if OUT.exists() else []
    key = ("family", "model", "size")
    others = [run for run in kept if [run[name] for name in key] != [entry[name] for name in key]]
    keep(OUT, {"runs": [*others, entry]})
    for build in entry["builds"]:
        text, other = build["text"], build["other_text"]
        print(
            f"{build['build']:36} {build['bytes'] / 2**20:8.1f} MiB  {text['kl_nats']:.4f} +- {text['std_error']:.4f} "
            f"({text['ratio_to_best_peer']:.2f} x)  {other['kl_nats']:.4f} ({other['ratio_to_best_peer']:.2f} x)"
        )


if __name__ == "__main__":
    main()
