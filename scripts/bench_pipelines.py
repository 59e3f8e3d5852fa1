#!/usr/bin/env python3
"""Whole pipelines at equal file sizes, judged on the same rows: what people publish today beside `model_auto`.

    .venv/bin/python scripts/bench_pipelines.py gguf --size-of Q3_K_M --work DIR
    .venv/bin/python scripts/bench_pipelines.py compressed-tensors --size-of 3 --work DIR
    .venv/bin/python scripts/bench_pipelines.py mlx --size-of 3.5 --work DIR

gguf: llama-quantize's presets with an imatrix (made here by ggml's own encoders: scripts/bench_gguf.py holds the bytes
equal), and `model_auto --for llama.cpp` at the size of the named one, as built and healed. SmolLM2's base comes from a
Q4_1 file here, so blocks of 32 with a minimum (Q4_1, Q4_K) find its own grid again, in presets and mixes alike: they
look better than on a model that was never quantized.
compressed-tensors: llm-compressor's GPTQ and AWQ and AutoRound, symmetric groups of 64, and `model_auto --for
transformers` at the size of the first; "3.5" is a hand-made mix of 3 and 4 bits, and AutoRound's own choice.
mlx: mlx-lm's quantization, plain and tuned by DWQ, and its dynamic quantization ("3": groups of 64 store 3.5 bits,
"3.5" stores 4 and has dynamic quantization alone); and `model_auto --for mlx`.

Peers run in pinned environments of their own (scripts/peers.py) on the same calibration rows. All builds are measured
on report rows that nothing else used and on text of another kind, paired over rows. A run that was stopped goes on with
the same --work. Rewrites the entries of its family, model and size in scripts/bench_results/pipelines.json;
docs/pipelines.md shows them (scripts/make_docs.py).
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import make_base  # noqa: E402
import make_tiny_models  # noqa: E402
from bench_record import RESULTS, birth_certificate, keep  # noqa: E402
from peers import PEERS, Built, build, timed  # noqa: E402

import recompile  # noqa: E402
from eval.diff import DiffOptions, DiffReport, measure_many  # noqa: E402
from eval.heal_rows import heal_rows  # noqa: E402
from eval.metrics import paired_difference  # noqa: E402
from recompile.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from recompile.formats import mlx_config  # noqa: E402
from recompile.model.rows import RowOptions  # noqa: E402

OUT = RESULTS / "pipelines.json"
OURS = "model_auto"


@dataclass(frozen=True)
class Base:
    """What a peer starts from: the model, our calibration rows as token ids [rows, length], the bench's settings."""

    path: Path
    ids: Tensor
    settings: Mapping[str, Any]

    def build(self, peer: str, work: Path, name: str, **settings: Any) -> Built:
        return build(peer, self.path, self.ids, work / "peers" / name, **settings)

    def bits_of(self, build: Path) -> float:
        """Stored bits a weight, scales included, of the modules that a build has quantized."""
        modules = [module for module in open_checkpoint(build).modules.values() if module.is_quantized]
        return 8 * sum(module.size_bytes for module in modules) / sum(module.numel for module in modules)


@dataclass(frozen=True)
class Family:
    """peers: (base, folder, size) -> builds, the one whose size ours may have first; ours: arguments of
    `recompile.auto`; file: the name of our output."""

    peers: Callable[[Base, Path, str], dict[str, Built]]
    ours: Mapping[str, Any]
    file: str
    environments: tuple[str, ...] = ()  # of the peers that are installed


# llama-quantize's presets by size, about
LADDER = ("Q2_K", "Q3_K_S", "IQ4_XS", "Q3_K_M", "IQ4_NL", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
GROUP = 64
AUTO_ROUND: Mapping[str, Mapping[str, Any]] = {"SignRound": {}, "SignRoundV2": {"enable_alg_ext": True}}
SLACK = 1.002  # a peer may be so much larger than the size that ours keeps


def presets(base: Base, work: Path, size: str) -> dict[str, Built]:
    """llama-quantize's preset of that name first, then those around it that are no larger."""
    at = LADDER.index(size)
    made = {}
    for name in (size, *LADDER[max(0, at - 2) : at], *LADDER[at + 1 : at + 2]):
        path = work / "presets" / f"{base.path.name}-{name}.gguf"
        rows, length = base.ids.shape
        given = {"format": "gguf", "tokenizer_from": make_base.find_gguf(), "rows": rows, "length": length}
        make = partial(recompile.quantize, base.path, path.parent, bits=(name,), **given)
        made[f"{name}, imatrix (llama-quantize)"] = timed(path, make)
    limit = SLACK * next(iter(made.values())).path.stat().st_size
    return {name: built for name, built in made.items() if built.path.stat().st_size <= limit}


def integers(base: Base, work: Path, size: str) -> dict[str, Built]:
    """Symmetric groups of 64: one bitrate everywhere, or, of a half ("3.5"), the mix of most recipes made by hand
    (value, output and down projections one bit more) and AutoScheme's choice of as many bits."""
    low, half = int(float(size)), float(size) % 1 > 0
    groups = [{"targets": ["Linear"], "bits": low}]
    if half:
        groups = [{"targets": [r"re:.*\.(v_proj|o_proj|down_proj)$"], "bits": low + 1}, *groups]
    made = {}
    for method in ("gptq", "awq"):
        name = f"llm-compressor, {method.upper()}" + (", hand mix" if half else "")
        given = {"method": method, "group_size": GROUP, "symmetric": True, "groups": groups}
        made[name] = base.build("llm-compressor", work, f"llm-compressor-{method}-{size}", **given)
    for name, options in AUTO_ROUND.items():
        scheme: dict[str, Any] = {
            "scheme": {"bits": low, "group_size": GROUP, "sym": True, "data_type": "int", "act_bits": 16}
        }
        if half:
            bits = base.bits_of(made["llm-compressor, GPTQ, hand mix"].path)  # the size of the hand mix
            scheme = {"schemes": [f"W{width}A16G{GROUP}" for width in (low, low + 1)], "bits": bits}
        given = {"format": "auto_round", "batch_size": 8, "options": {"iters": base.settings["iters"], **options}}
        folder = f"auto-round-{name}-{base.settings['iters']}-{size}"
        made[f"AutoRound, {name}" + (", AutoScheme" if half else "")] = base.build(
            "auto-round", work, folder, **given, **scheme
        )
    return made


def mlx(base: Base, work: Path, size: str) -> dict[str, Built]:
    """mlx-lm's own: one bitrate everywhere (not of a half), its dynamic quantization at as many bytes, and the first of
    them tuned by DWQ."""
    low, half = int(float(size)), float(size) % 1 > 0
    config = json.loads((base.path / "config.json").read_text())
    # without them mlx-lm runs, and tunes, a base of transformers 5's with a wrong rotary base
    given = {"bits": low, "group_size": GROUP, "batch_size": 4, "config": mlx_config.loader_fields(config)}
    stored = float(size) + 0.5  # groups of 64 store half a bit of scales and biases a weight
    widths = (low, low + 1) if half else (low - 1, low + 1)
    dynamic = {**given, "bits": widths[0], "high_bits": widths[1], "target_bpw": stored}
    kinds = {"dynamic": dynamic} if half else {"uniform": given, "dynamic": dynamic}
    made = {}
    for plain, asked in kinds.items():
        made[f"mlx-lm, {plain}"] = base.build("mlx-lm", work, f"{plain}-{size}", method=plain, **asked)
    plain, tuned = ("dynamic", "dynamic-dwq") if half else ("uniform", "dwq")
    for rate in base.settings["dwq_rates"]:
        tuning = {"method": tuned, "learning_rate": rate, "passes": base.settings["dwq_passes"]}
        folder = f"{tuned}-{rate:g}-{base.settings['dwq_passes']}-{size}"
        made[f"mlx-lm, {plain}, DWQ at {rate:g}"] = base.build("mlx-lm", work, folder, **kinds[plain], **tuning)
    return made


FAMILIES = {
    "gguf": Family(presets, {"engine": "llama.cpp"}, "MIX.gguf"),
    "compressed-tensors": Family(integers, {"engine": "transformers"}, "mix", ("llm-compressor", "auto-round")),
    "mlx": Family(mlx, {"engine": "mlx"}, "mix", ("mlx-lm",)),
}


def base_of(model: str) -> Path:
    return Path(make_base.build()) if model == "smollm2" else Path(make_tiny_models.build()[model])


def run_one(family: str, model: str, size: str, settings: Mapping[str, Any], work: Path) -> dict[str, Any]:
    base, kind = base_of(model), FAMILIES[family]
    work = work / family / model
    calibration, _ = RowOptions(settings["calibrate_rows"], settings["length"]).read([base], "calibrate")
    peers = kind.peers(Base(base, calibration.ids, settings), work, size)
    largest = open_checkpoint(next(iter(peers.values())).path).size_bytes
    given = dict(kind.ours)
    if family == "gguf":
        given["tokenizer_from"] = make_base.find_gguf()
    mix = work / f"{size}-mix" / kind.file
    mix.parent.mkdir(parents=True, exist_ok=True)
    judges = {"rows": settings["rows"], "length": settings["length"]}
    searched = {name: settings[name] for name in ("samples", "search_minutes")}
    calibrated = {"calibration_rows": settings["calibrate_rows"], "rounding": settings["rounding"]}
    whole = partial(recompile.auto, base, mix, size=largest, verify=False, **judges, **searched, **calibrated, **given)
    ours = {f"{OURS}: mix, {settings['rounding']}": timed(mix, whole)}
    if settings["heal_minutes"] > 0:  # what model_auto --heal does last
        healed = mix.with_name(f"healed-{kind.file}")
        tuned = partial(recompile.heal, mix, base, healed, minutes=settings["heal_minutes"], **judges)
        ours[f"{next(iter(ours))}, healed"] = timed(healed, tuned)
    made = {**peers, **ours}
    return {
        "family": family,
        "model": model,
        "size": size,
        "settings": dict(settings),
        "peers": [PEERS[name].version for name in kind.environments],
        "largest_bytes": largest,
        "builds": judged(base, made, settings),
    }


def judged(base: Path, builds: Mapping[str, Built], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """KL of every build on report rows and on text of another kind, and paired with the best peer."""
    reference = open_checkpoint(base)
    opened = {name: open_checkpoint(built.path) for name, built in builds.items()}
    where = RowOptions(settings["rows"], settings["length"])
    rows, vocab = heal_rows(reference, next(iter(opened.values())), where, settings["length"])
    found: dict[str, list[DiffReport]] = {}
    for kind, ids in (("text", rows.report), ("other_text", rows.second)):
        found[kind] = measure_many(list(opened.values()), reference, ids, DiffOptions(vocab=vocab))
    peers = [number for number, name in enumerate(opened) if not name.startswith(OURS)]
    best = min(peers, key=lambda number: found["text"][number].kl.mean)
    told = []
    for number, (name, checkpoint) in enumerate(opened.items()):
        entry: dict[str, Any] = {"build": name, "bytes": checkpoint.size_bytes, "cpu_seconds": builds[name].cpu_seconds}
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
@click.option("--rounding", type=click.Choice(["one-sided", "two-sided"]), default="one-sided", help="Of ours.")
@click.option("--auto-round-iters", "iters", default=200, help="Of every block.")
@click.option("--dwq-passes", default=1, help="Over the calibration rows.")
@click.option("--dwq-rates", multiple=True, type=float, default=(1e-6, 1e-5), help="Learning rates, a build each.")
@click.option("--search-minutes", default=5.0)
@click.option("--heal-minutes", default=13.0, help="In all, judging included; 0: no healing.")
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
    for told in entry["builds"]:
        text, other = told["text"], told["other_text"]
        print(
            f"{told['build']:36} {told['bytes'] / 2**20:8.1f} MiB  {text['kl_nats']:.4f} +- {text['std_error']:.4f} "
            f"({text['ratio_to_best_peer']:.2f} x)  {other['kl_nats']:.4f} ({other['ratio_to_best_peer']:.2f} x)"
        )


if __name__ == "__main__":
    main()
