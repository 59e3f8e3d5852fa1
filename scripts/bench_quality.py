#!/usr/bin/env python3
"""What rounding and healing gain at equal bytes: round to nearest, GPTQ, two-sided, healed GPTQ, healed two-sided.

    .venv/bin/python scripts/bench_quality.py tiny-dense tiny-moe            # the trained tiny models
    .venv/bin/python scripts/bench_quality.py smollm2 --bits 3 --heal-tokens 60000

One calibration pass makes the first three builds from the same Hessians, with symmetric integer groups; healing starts
from the finished builds. All are measured on report rows that nothing else used, and on text of another kind, paired
over rows. With --work a run that was stopped goes on. Rewrites the entries of its models and bits in
scripts/bench_results/quality.json.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

from eval.diff import DiffOptions, DiffReport, compare_many  # noqa: E402
from eval.heal import HealOptions, HealReport, Paired, heal  # noqa: E402
from eval.heal_rows import HealRows, heal_rows  # noqa: E402
from eval.passes.output_gradients import GradientOptions, measure_outputs  # noqa: E402
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from recompile.merge.overlay import build_overlay  # noqa: E402
from recompile.model.rows import RowOptions  # noqa: E402
from recompile.quantize.encoder import Encoded  # noqa: E402
from recompile.quantize.encoders import IntEncoder  # noqa: E402
from recompile.quantize.output_statistics import StoredStatistics, open_statistics  # noqa: E402
from recompile.quantize.pipeline import BuildOptions, quantize_model  # noqa: E402

OUT = RESULTS / "quality.json"
METHODS = ("rtn", "gptq", "two-sided")
HEALED = {"healed": "gptq", "both": "two-sided"}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@dataclass
class Methods:
    """An encoder (recompile.quantize.pipeline.Encoder) of one bitrate by every method, from one Hessian."""

    encoders: Mapping[str, IntEncoder]
    seconds: dict[str, float]

    @property
    def names(self) -> list[str]:
        return list(self.encoders)

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        return next(iter(self.encoders.values())).why_not(module, shape)

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        made = []
        for name, encoder in self.encoders.items():
            began = cpu_seconds()
            made += encoder.encode(weights, hessian, biases)
            self.seconds[name] = self.seconds.get(name, 0.0) + cpu_seconds() - began
        return made

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored

    def quantization_config(self, variant: int, report: Any, dense: Sequence[str]) -> dict[str, Any]:
        return list(self.encoders.values())[variant].quantization_config(0, report, dense)

    def description(self) -> dict[str, Any]:
        return {name: encoder.description() for name, encoder in self.encoders.items()}


def base_of(model: str) -> Path:
    if model == "smollm2":
        return Path(make_base.build())
    return Path(make_tiny_models.build()[model])


def statistics_of(base: Checkpoint, ids: Tensor, sha256: str, path: Path) -> tuple[StoredStatistics, float]:
    found = open_statistics(path)
    if found is not None:
        found.check_base(base.identity, base.label)
        return found, float("nan")
    began = cpu_seconds()
    for event in measure_outputs(base, ids, path, GradientOptions(), rows_sha256=sha256):
        found = event if isinstance(event, StoredStatistics) else found
    assert found is not None, "the pass ends with its statistics"
    return found, cpu_seconds() - began


def kl_rows(
    builds: Mapping[str, Path], base: Checkpoint, ids: Tensor, vocab: int | None
) -> dict[str, tuple[float, ...]]:
    candidates = [build_overlay(open_checkpoint(path), None) for path in builds.values()]
    reports = [e for e in compare_many(candidates, base, ids, DiffOptions(vocab=vocab)) if isinstance(e, DiffReport)]
    return {name: report.kl_rows for name, report in zip(builds, reports, strict=True)}


def run_one(model: str, bits: int, settings: Mapping[str, Any], work: Path) -> dict[str, Any]:
    base = open_checkpoint(base_of(model))
    directory = work / model
    where = RowOptions(settings["rows"], settings["length"])
    rows, vocab = heal_rows(base, base, where, settings["heal_tokens"] or 4 * settings["length"])
    calibrate, _ = RowOptions(settings["calibrate_rows"], settings["calibrate_length"]).read([base.path], "calibrate")
    statistics, seconds_of_pass = statistics_of(base, calibrate.ids, calibrate.sha256, directory / "stats")
    group = settings["group_size"]
    encoders = {
        "rtn": IntEncoder((bits,), group, method="rtn"),
        "gptq": IntEncoder((bits,), group),
        "two-sided": IntEncoder((bits,), group, outputs=statistics),
    }
    encoder = Methods(encoders, {})
    folder = directory / f"{bits}bit"
    if not all((folder / name).exists() for name in METHODS):
        for _ in quantize_model(base, folder, encoder, calibrate.ids, BuildOptions(rows_sha256=calibrate.sha256)):
            pass
    notes = [
        module["rounding"]
        for module in json.loads((folder / "two-sided" / "quantize_report.json").read_text())["variant"]["modules"]
        if module["quantized"]
    ]
    builds = {name: folder / name for name in METHODS}
    healing: dict[str, Any] = {}
    if settings["heal_tokens"]:
        for name in settings["heal"]:
            source = HEALED[name]
            healing[name] = healed(folder / name, folder / source, base, rows, vocab, settings["heal_tokens"])
            if (folder / name).exists():
                builds[name] = folder / name
    found: dict[str, Any] = {
        "model": model,
        "bits": bits,
        **settings,
        "rows_source": rows.source,
        "second_source": rows.second_source,
        "two_sided_matrices": sum(note.startswith("two-sided") for note in notes),
        "matrices": len(notes),
        "cpu_seconds": {
            "output_gradients": round(seconds_of_pass, 1) if seconds_of_pass == seconds_of_pass else None,
            "rounding": {name: round(value, 1) for name, value in encoder.seconds.items()},
        },
        "healing": healing,
    }
    for label, ids in (("report", rows.report), ("second", rows.second)):
        measured = kl_rows(builds, base, ids, vocab)
        found[label] = {}
        for name, values in measured.items():
            pair = Paired.of(measured["gptq"], values)
            found[label][name] = {
                "kl": pair.after,
                "of_gptq": pair.ratio,
                "difference": pair.gain,
                "std_error": pair.std_error,
            }
            print(f"{model} {bits} bit, {label}: {name:10} {pair.after:.5f}  {pair.ratio:.3f} x GPTQ", file=sys.stderr)
    return found


def healed(out: Path, source: Path, base: Checkpoint, rows: HealRows, vocab: int | None, tokens: int) -> dict[str, Any]:
    began = cpu_seconds()
    if out.exists():
        return {"kept": True}
    options = HealOptions(tokens=tokens, vocab=vocab)
    *_, last = heal(open_checkpoint(source), base, out, rows, options)
    assert isinstance(last, HealReport)
    return {
        "kept": last.kept,
        "steps": last.steps,
        "best_step": last.best_step,
        "learning_rate": last.learning_rate,
        "cpu_seconds": round(cpu_seconds() - began, 1),
        "accept": asdict(last.accept),
    }


@click.command()
@click.argument("models", nargs=-1, type=click.Choice(["tiny-dense", "tiny-moe", "smollm2"]), required=True)
@click.option("--bits", multiple=True, type=int, default=(2, 3, 4))
@click.option("--group-size", default=64, show_default=True)
@click.option("--rows", default=16, show_default=True, help="Report rows, and as many of the other kind of text.")
@click.option("--length", default=128, show_default=True)
@click.option("--calibrate-rows", default=48, show_default=True)
@click.option("--calibrate-length", default=256, show_default=True)
@click.option("--heal-tokens", default=60_000, show_default=True, help="0: no healing.")
@click.option("--heal", multiple=True, type=click.Choice(list(HEALED)), default=tuple(HEALED), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for builds and statistics; kept.")
def main(models: tuple[str, ...], bits: tuple[int, ...], work: Path | None, **settings: Any) -> None:
    torch.set_num_threads(1)
    certificate = birth_certificate()
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            for rate in bits:
                entry = {**certificate, **run_one(model, rate, settings, work or Path(scratch))}
                kept = json.loads(OUT.read_text())["runs"] if OUT.exists() else []
                others = [run for run in kept if (run["model"], run["bits"]) != (model, rate)]
                keep(OUT, {"runs": [*others, entry]})


if __name__ == "__main__":
    main()
