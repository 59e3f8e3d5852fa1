"""model_auto: from a base model to the best mix at a size in one resumable command.

Its stages are the other commands: model_profile (a sketch, candidates made on the fly), model_optimize (the recipe,
measured beside its rivals), model_quantize -or (one calibrated pass straight to the mix; with --variants: recompile),
and a comparison with the nearest uniform build on rows of the role "report". OUT.work/ holds what each stage left, so
that the same command goes on where it was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recompile.cli.common import check_json_path, print_json, progress
from recompile.cli.options import check_made, device_options, made_options, many_values_command, output_options
from recompile.errors import JournalError, OutputError, RecompileError
from recompile.io.files import read_json, write_json
from recompile.io.report import format_columns
from recompile.io.sizes import format_bpw, format_bytes
from recompile.model.devices import compute_device
from recompile.model.rows import read_rows

if TYPE_CHECKING:
    from eval.diff import DiffReport
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.costs import Candidate, Profile

STATE = "auto.json"


@many_values_command(
    "model_auto", outputs={"--json": "json_path"}, inputs=("in_dir", "variants", "tokenizer_from", "text")
)
@click.option("-i", "--in-dir", "--in_dir", required=True, help="The dense base model.")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The mix; stages go to OUT.work/.")
@click.option("-b", "--bits", type=float, help="Budget: bits per weight over quantized modules.")
@click.option("--total-bpw", type=float, help="Budget: bits per weight over everything.")
@click.option("--size", help="Budget: size of the weights, e.g. 4.2GiB.")
@click.option(
    "--candidates",
    multiple=True,
    help="Bits and schemes on offer, made on the fly [default: 2,3,4,5,6,8]; or GGUF types: Q3_K,IQ4_XS,Q6_K, with "
    "-o MIX.gguf.",
)
@click.option("--tokenizer-from", metavar="X.gguf", help="GGUF: the file whose tokenizer keys the mix gets.")
@click.option(
    "--variants",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Merge these directories instead (any format): the first is the one that recipes start from.",
)
@made_options
@click.option("--level", default="fused", show_default=True, help="What is chosen together, as in model_profile.")
@click.option(
    "--samples",
    type=click.IntRange(2, 65536),
    default=16,
    show_default=True,
    help="Random draws per row of the profile.",
)
@click.option("--solver", help="As in model_optimize; its own default if left out.")
@click.option("--minutes", type=float, help="For a solver that measures.")
@click.option("-r", "--rows", default=16, show_default=True, help="Rows to profile on; as many others verify.")
@click.option("-l", "--length", default=512, show_default=True, help="Tokens in a row.")
@click.option("--calibration-rows", default=64, show_default=True, help="Rows to quantize with.")
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text file in place of the default text.")
@click.option("--dataset", help="A data set of the `datasets` library, e.g. wiki2.")
@click.option("--max-memory", help="For the profile: never use more memory than this, e.g. 8GiB.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Also make and measure a uniform build.")
@device_options
@output_options
def main(
    in_dir: str,
    out: Path,
    bits: float | None,
    total_bpw: float | None,
    size: str | None,
    candidates: tuple[str, ...],
    format_name: str,
    tokenizer_from: str | None,
    variants: tuple[Path, ...],
    group_size: str,
    asym: bool,
    level: str,
    samples: int,
    solver: str | None,
    minutes: float | None,
    rows: int,
    length: int,
    calibration_rows: int,
    text: Path | None,
    dataset: str | None,
    max_memory: str | None,
    verify: bool,
    device: str,
    dtype: str | None,
    json_path: Path | None,
    quiet: bool,
) -> None:
    """Profile, choose, build and verify: the best mix of a size, in one command that goes on where it was stopped.

    \b
    Examples:
      model_auto -i base -o mix -b 3.5
      model_auto -i base -o mix --size 4.2GiB --variants 3bpw 2bpw 4bpw 6bpw
      model_auto -i base -o mix -b 3.5 --format exl2 --candidates 2,2.5,3,4,5,6
      model_auto -i base -o MIX.gguf -b 4.5 --candidates Q3_K,IQ4_XS,Q4_K,Q5_K,Q6_K --tokenizer-from X.gguf
    """
    check_json_path(json_path)
    budget = _arguments({"-b": bits, "--total-bpw": total_bpw, "--size": size})
    if len(budget) != 2:
        raise RecompileError("give one budget: -b 3.5, --total-bpw 4 or --size 4.2GiB")
    if variants and candidates:
        raise RecompileError("--variants and --candidates exclude each other: variants are there, candidates are made")
    if len(variants) == 1:
        raise RecompileError("--variants: one variant leaves nothing to choose; give two or more")
    from recompile.checkpoint.checkpoint import open_checkpoint

    base = open_checkpoint(in_dir)
    offered = list(candidates) or ["2,3,4,5,6,8"]
    exl = format_name if format_name != "compressed-tensors" else None
    if exl and variants:
        raise RecompileError("--variants are in a format of their own; leave --format out")
    check_made(format_name)
    gguf = not variants and exl is None and _are_gguf_types(offered, out)
    settings: dict[str, Any] = {
        "base": base.identity,
        "budget": budget,
        "offered": [open_checkpoint(path).identity for path in variants] or [*offered, group_size, str(asym)],
        "level": level,
        "samples": samples,
        "solver": [solver, minutes],
        "rows": [rows, length, calibration_rows, str(text), dataset],
        "dtype": dtype,
        **({"format": exl} if exl else {}),
        **({"tokenizer_from": open_checkpoint(tokenizer_from).identity} if tokenizer_from else {}),
    }
    work = out.with_name(f"{out.name}.work")
    stages = Stages(work, settings, out)
    profile, recipe = work / "profile.jsonl", work / "overrides.yaml"
    texts = _arguments({"--text": text, "--dataset": dataset})
    running = ["-d", device, *(["--quiet"] if quiet else [])]
    rounding = ["-g", group_size, *(["--asym"] if asym else [])] if not gguf and exl is None else []
    form = [] if exl is None else ["--format", exl]

    def make_profile() -> None:
        from recompile.cli.model_profile import main as command

        start, *others = variants or (None,)
        weighed = ["--importance-rows", calibration_rows] if gguf else []
        there = ["-i", start, "-s", *others] if variants else ["--candidates", *offered, *form, *rounding, *weighed]
        measure = ["--mode", "sketch", "--samples", samples, "--level", level, "-r", rows, "-l", length]
        more = _arguments({"--dtype": dtype, "--max-memory": max_memory})
        _run(command, ["-mb", in_dir, *there, *measure, *more, "-o", profile, *texts, *running])

    def make_recipe() -> None:
        from recompile.cli.model_optimize import main as command

        how = _arguments({"--solver": solver, "--minutes": minutes})
        _run(command, [profile, *budget, "-o", recipe, *how, "-r", rows, "-l", length, *texts, *running])

    def build() -> None:
        if variants:
            from recompile.cli.recompile import main as command

            quietly = ["--quiet"] if quiet else []
            _run(command, ["-i", variants[0], "-o", out, "-or", recipe, *quietly])
        else:
            quantize(["-o", out, "-or", recipe])

    def quantize(what: Sequence[object]) -> None:
        from recompile.cli.model_quantize import main as command

        shape = ["-r", calibration_rows, "-l", length, *_arguments({"--dtype": dtype})]
        if gguf:  # with the importance that the candidates were made with
            from recompile.quantize.lazy_variant import importance_file

            shape += [*_arguments({"--tokenizer-from": tokenizer_from}), "--imatrix", importance_file(profile)]
        _run(command, ["-i", in_dir, *what, *rounding, *shape, *texts, *running])

    def measure() -> dict[str, Any]:
        from recompile.costs import load_profile

        found = load_profile(profile)
        rivals: list[Checkpoint] = [open_checkpoint(path) for path in variants]
        mix = open_checkpoint(out)
        if verify and not variants:
            uniform = uniform_candidate(found, mix.size_bytes)
            rate, scheme = uniform.label, "scheme" in (uniform.spec or {})
            how = ["--scheme", rate] if scheme else ["-b", rate, *(["--format", "gguf"] if gguf else form)]
            quantize(["-o", work / "uniform", *how])
            stem = base.path.resolve().name.removesuffix(".gguf")
            name = f"{stem}-{rate}.gguf" if gguf else rate if scheme else f"{rate}bpw"
            rivals = [open_checkpoint(work / "uniform" / name)]
        result = compare_builds(base, mix, rivals, rows, length, text, dataset, device, quiet)
        shutil.rmtree(work / "uniform", ignore_errors=True)
        return result

    stages.run("profile", make_profile)
    stages.run("recipe", make_recipe)
    stages.run("build", build)
    report = {**stages.run("verify", measure), "seconds": stages.seconds, "recipe": str(recipe), "out": str(out)}
    if str(json_path) != "-":
        click.echo(_describe(report))
    if json_path is not None:
        print_json(json_path, report)


class Stages:
    """What is done already, in `work/auto.json`. Raises OutputError where it was done with other settings."""

    def __init__(self, work: Path, settings: Mapping[str, Any], out: Path) -> None:
        self._path = work / STATE
        self._settings = json.loads(json.dumps(settings))
        self._done: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            state = read_json(self._path, error=JournalError)
            check_state(self._path, state)
            changed = [key for key, value in self._settings.items() if state["settings"].get(key) != value]
            if changed:
                raise OutputError(
                    f"{work}: was begun with other settings ({', '.join(changed)}); remove it and {out} to start "
                    f"again, or choose another -o"
                )
            self._done = state["done"]
        elif out.exists():
            raise OutputError(f"{out}: exists and was not made by model_auto; remove it, or choose another -o")
        else:
            try:
                work.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"{work}: cannot be made: {error.strerror or error}") from error
            self._save()

    @property
    def seconds(self) -> dict[str, float]:
        return {name: stage["seconds"] for name, stage in self._done.items()}

    def run(self, name: str, stage: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Run a stage unless it is done; returns what it returned, then or now."""
        if name in self._done:
            click.echo(f"{name}: done before", err=True)
        else:
            click.echo(f"{name} ...", err=True)
            started = time.monotonic()
            result = stage() or {}
            self._done[name] = {
                "seconds": round(time.monotonic() - started, 1),
                "result": json.loads(json.dumps(result)),
            }
            self._save()
        return dict(self._done[name]["result"])

    def _save(self) -> None:
        write_json(self._path, {"settings": self._settings, "done": self._done})


def check_state(path: Path, state: Any) -> None:
    """Raise JournalError unless a state file has the shape that `Stages` gives it."""
    shaped = isinstance(state, dict) and isinstance(state.get("settings"), dict) and isinstance(state.get("done"), dict)
    if not shaped or not all(
        isinstance(stage, dict)
        and isinstance(stage.get("seconds"), (int, float))
        and isinstance(stage.get("result"), dict)
        for stage in state["done"].values()
    ):
        raise JournalError(f"{path}: not the state of a model_auto run; remove its folder to start again")


def _arguments(options: Mapping[str, object]) -> list[object]:
    """The options that were given, as command-line arguments."""
    return [part for name, value in options.items() if value is not None for part in (name, value)]


def _run(command: click.Command, arguments: Sequence[object]) -> None:
    """Run another command of ours; what it prints goes to stderr, its errors and Ctrl-C end this one too."""
    with contextlib.redirect_stdout(sys.stderr):
        code = command.main([str(argument) for argument in arguments], command.name, standalone_mode=False)
    if isinstance(code, int) and code:
        raise SystemExit(code)


def uniform_candidate(profile: Profile, size_bytes: int) -> Candidate:
    """The largest uniform candidate that takes no more than `size_bytes`, or the smallest there is."""
    header = profile.header
    totals = {
        candidate.label: header.fixed_bits
        + header.other_bits
        + sum(group.bits[candidate.label] for group in header.groups)
        for candidate in header.candidates
    }
    fitting = [label for label, total in totals.items() if total <= 8 * size_bytes]
    return header.candidate(max(fitting, key=lambda x: totals[x]) if fitting else min(totals, key=lambda x: totals[x]))


def _are_gguf_types(offered: Sequence[str], out: Path) -> bool:
    """Whether candidates are GGUF types. Raises RecompileError where some are and some are not, or `out` is no file's
    name."""
    from recompile.quantize.gguf_mix import check_out
    from recompile.quantize.lazy_variant import parse_candidates, spec_of

    kinds = {next(iter(spec_of(name)[1])) for name in parse_candidates(offered)}
    if "type" in kinds and len(kinds) > 1:
        raise RecompileError("--candidates: GGUF types and other forms are never in one build; give one kind")
    if "type" in kinds:
        check_out(out)
    return "type" in kinds


def compare_builds(
    reference: Checkpoint,
    mix: Checkpoint,
    rivals: Sequence[Checkpoint],
    rows: int,
    length: int,
    text: Path | None,
    dataset: str | None,
    device: str,
    quiet: bool,
) -> dict[str, Any]:
    """The mix and other builds against the reference on rows of the role "report", paired by row."""
    import torch

    from eval.diff import DiffOptions, DiffReport, LayerDrift, compare_many
    from eval.metrics import paired_difference
    from recompile.merge.overlay import account, quantizable

    found, vocab = read_rows([reference.path, mix.path], "report", rows, length, text, dataset, None)
    builds = [mix, *rivals]
    options = DiffOptions(device=compute_device(device), vocab=vocab)
    reports: list[DiffReport] = []
    with progress("verifying", 1, unit="steps", quiet=quiet) as bar:
        done = 0
        for event in compare_many(
            builds, reference, found.ids, options, rows_source=found.source, rows_sha256=found.sha256
        ):
            if isinstance(event, LayerDrift):
                done += 1
                bar.update(done, event.name, event.total * len(builds))
            elif isinstance(event, DiffReport):
                reports.append(event)
    counted = quantizable(builds)
    told = []
    for build, report in zip(builds, reports, strict=True):
        sizes = account(build.modules.values(), counted)
        entry: dict[str, Any] = {
            "build": build.label,
            "bpw": sizes.bpw,
            "total_bytes": sizes.total_bytes,
            "kl_nats": report.kl.mean,
            "kl_std_error": report.kl.std_error,
            "perplexity": report.score_candidate.perplexity,
        }
        if build is not mix:
            mean, interval = paired_difference(torch.tensor(reports[0].kl_rows), torch.tensor(report.kl_rows))
            entry |= {"mix_minus_this_nats": mean.mean, "interval_95": list(interval)}
        told.append(entry)
    return {
        "builds": told,
        "reference_perplexity": reports[0].score_reference.perplexity,
        "rows": len(found.ids),
        "row_tokens": found.ids.shape[1],
        "rows_sha256": found.sha256,
        "rows_source": found.source,
    }


def _describe(report: Mapping[str, Any]) -> str:
    rows, verdicts = [], []
    mix = report["builds"][0]
    for entry in report["builds"]:
        error = f" ± {entry['kl_std_error']:.4f}" if entry["kl_std_error"] is not None else ""
        versus = ""
        if entry is not mix:
            low, high = entry["interval_95"]
            versus = f"{entry['mix_minus_this_nats']:+.4f} [{low:+.4f}, {high:+.4f}]"
            smaller = entry["total_bytes"] <= mix["total_bytes"]
            if smaller and low > 0:
                verdicts.append(f"{entry['build']} is not larger and measures better with confidence: use it instead.")
            elif smaller and high >= 0:
                verdicts.append(f"The mix is not better than {entry['build']} with confidence: more -r rows may tell.")
        rows.append(
            (
                entry["build"],
                format_bpw(entry["bpw"]),
                format_bytes(entry["total_bytes"]),
                f"{entry['kl_nats']:.4f}{error}",
                f"{entry['perplexity']:.3f}",
                versus,
            )
        )
    header = ("build", "bpw", "size", "KL(base || build), nats/token", "perplexity", "mix - this [95 %]")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    lines = [
        format_columns(rows, header, range(1, 6)),
        f"on {report['rows']} rows x {report['row_tokens']} tokens that nothing else used",
        *verdicts,
        f"Stages: {seconds}. Recipe: {report['recipe']}",
    ]
    return "\n".join(lines)
