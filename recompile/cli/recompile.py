"""recompile: write the checkpoint that a base variant and an override file describe."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint
from recompile.cli.common import check_json_path, print_json, progress, refuse_outputs
from recompile.cli.options import many_values_command, output_options
from recompile.errors import CheckpointError, RecipeError, UnsupportedError
from recompile.formats.gguf_types import TYPES
from recompile.io.files import write_text
from recompile.io.report import format_columns
from recompile.io.sizes import format_bpw, format_bytes, format_seconds
from recompile.merge.engine_rules import ENGINES
from recompile.merge.explain import reached_aside, resolved_table
from recompile.merge.overlay import Accounting, Overlay, account, build_overlay, quantizable
from recompile.merge.write_gguf import GgufPlan, check_gguf_output, execute_gguf, is_gguf_mix, plan_gguf, verify_gguf
from recompile.merge.write_safetensors import (
    DEFAULT_SHARD_MB,
    WritePlan,
    check_output,
    execute,
    plan_write,
)
from recompile.recipe.recipe import Recipe

if TYPE_CHECKING:
    from recompile.merge.check import Problem, VerifyReport


@dataclass(frozen=True)
class RecompileReport:
    """What `--json` holds."""

    base: str
    out: str | None
    recipe: str | None
    dense: bool
    base_size: Mapping[str, Any]
    size: Mapping[str, Any]
    overridden: Mapping[str, int]  # source -> modules taken from it
    modules: Sequence[Mapping[str, Any]]
    warnings: Sequence[str]
    lowest_correlation: tuple[str, float] | None  # of the probe; None if it did not run
    seconds: float | None
    bytes_per_second: float | None
    verified: VerifyReport | None


@many_values_command(
    "recompile", outputs={"--json": "json_path"}, inputs=("in_dir", "override", "type_sources", "check_dir")
)
@click.option("-i", "--in-dir", "--in_dir", "in_dir", metavar="DIR", help="The variant that is overridden.")
@click.option(
    "-o", "--out-dir", "--out_dir", "out_dir", type=click.Path(path_type=Path), metavar="OUT", help="What is written."
)
@click.option("-or", "--override", "override", metavar="FILE", help="The override file (YAML); none: a plain copy.")
@click.option(
    "-ss",
    "--shard-size",
    "--shard_size",
    "shard_size",
    type=click.IntRange(max=2**31 - 1),
    metavar="MB",
    help=f"Largest size of a file, in MiB; default {DEFAULT_SHARD_MB}, and for GGUF one file.",
)
@click.option(
    "--type-sources",
    multiple=True,
    metavar="TYPE=FILE",
    help="With a recipe of GGUF types as -or: the files of each type, Q4_K=model-Q4_K.gguf ..., or their directory.",
)
@click.option(
    "--emit",
    "emit_as",
    type=click.Choice(["llama-quantize", "ik-custom-q", "thireus"]),
    help="Print the mix as a recipe of another tool (to OUT with -o), and stop. GGUF only.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop. Reads no weight.")
@click.option("--all", "every", is_flag=True, help="With --dry-run: a line for every module.")
@click.option("--verify", "verify_it", is_flag=True, help="Read the result again and compare it with its sources.")
@click.option("--dense", is_flag=True, help="Write decoded weights, for tools that read nothing else.")
@click.option("--allow-unmatched", is_flag=True, help="Go on where a key matches no tensor.")
@click.option("--no-probe", is_flag=True, help="Do not test that the sources were made from the same weights.")
@click.option("--check", "check_dir", metavar="DIR", help="Check a finished checkpoint of any origin; writes nothing.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    help="Refuse to write what this engine does not run; with --check, ask whether it runs DIR.",
)
@click.option(
    "--reencode", is_flag=True, help="Give nvfp4 projections that engines fuse, taken from several sources, one scale."
)
@output_options
def main(
    in_dir: str | None,
    out_dir: Path | None,
    override: str | None,
    shard_size: int | None,
    type_sources: tuple[str, ...],
    emit_as: str | None,
    dry_run: bool,
    every: bool,
    verify_it: bool,
    dense: bool,
    allow_unmatched: bool,
    no_probe: bool,
    check_dir: str | None,
    engine: str | None,
    reencode: bool,
    json_path: Path | None,
    quiet: bool,
) -> None:
    """Write a new checkpoint: the variant -i with the modules that the override file takes from other variants.

    Every tensor is copied byte for byte from its source; config, index and manifest are written to fit. The output
    appears whole or not at all.

    \b
      recompile -i 3bpw -or overrides.yaml --dry-run
      recompile -i 3bpw -o mix -or overrides.yaml --verify
      recompile --check mix --engine vllm
      recompile -i Q3_K.gguf -o MIX.gguf -or overrides.yaml --verify
      recompile -i Q3_K.gguf -or overrides.yaml --emit llama-quantize      # or -i base, for a mix that is to be made
      recompile -i Q3_K.gguf -o MIX.gguf -or custom-q.txt --type-sources IQ4_XS=IQ4_XS.gguf Q6_K=Q6_K.gguf
    """
    check_json_path(json_path)
    if check_dir is not None:
        if verify_it and engine:
            raise click.UsageError("--check DIR takes --verify or --engine, one after the other")
        if in_dir or out_dir or override:
            raise click.UsageError("--check DIR stands alone; leave out -i, -o and -or")
        _check(check_dir, verify_it, json_path, quiet, engine)
        return
    if in_dir is None or (out_dir is None and not dry_run and emit_as is None):
        raise click.UsageError("wanted -i DIR and -o DIR (or --dry-run, or --check DIR); -h explains")
    from recompile.checkpoint.checkpoint import open_checkpoint

    base = open_checkpoint(in_dir)
    if emit_as is not None and override is not None and not type_sources and _is_to_be_made(base, override):
        _emit_made(base, override, emit_as, out_dir)
        return
    recipe = _type_recipe(base, override, type_sources, allow_unmatched)
    overlay = build_overlay(base, recipe or override, allow_unmatched=allow_unmatched)
    if emit_as is not None:
        for warning in overlay.warnings:
            click.echo(f"Warning: {warning}", err=True)
        _emit(overlay, emit_as, out_dir)
        return
    gguf = is_gguf_mix(overlay) and not dense
    plan: WritePlan | GgufPlan
    if gguf:
        plan = plan_gguf(overlay, out_dir or Path("mix.gguf"), shard_size)
        check_gguf_output(plan)
    else:
        if out_dir is not None:
            check_output(overlay, out_dir)
        size = DEFAULT_SHARD_MB if shard_size is None else shard_size
        plan = plan_write(overlay, out_dir or Path(f"{in_dir}-mix"), size, dense=dense, reencode=reencode)
    warnings = [*overlay.warnings, *reached_aside(overlay), *plan.warnings]
    if engine is not None and not dense:
        if isinstance(plan, GgufPlan):
            raise UnsupportedError(f"--engine {engine}: GGUF files are llama.cpp's; leave out --engine")
        warnings += _legal(plan, engine)
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    before = account(overlay.base.modules.values(), quantizable(overlay.checkpoints))
    human = str(json_path) != "-"
    if dry_run:
        if human:
            click.echo(resolved_table(overlay, every=every))
            click.echo()
            click.echo(_sizes(overlay, before, plan))
        if out_dir is not None and not gguf:
            check_output(overlay, out_dir, plan.needed_bytes)
        _print_report(json_path, overlay, out_dir, plan, before, warnings)
        return
    assert out_dir is not None
    if not gguf:
        check_output(overlay, out_dir, plan.needed_bytes)
    lowest = None if no_probe else _probe(overlay)
    began = time.monotonic()
    doing = "decoding" if dense else "copying"
    steps_of = execute_gguf(plan) if isinstance(plan, GgufPlan) else execute(plan)
    with closing(steps_of) as steps, progress(doing, plan.data_bytes, quiet=quiet) as bar:
        for step in steps:
            bar.update(step.done_bytes, step.module)
    seconds = time.monotonic() - began
    report = None
    if verify_it:
        report = _verify_gguf(plan, quiet) if isinstance(plan, GgufPlan) else _verify(str(out_dir), quiet)
    if human:
        click.echo(_sizes(overlay, before, plan))
        click.echo(_written(plan, seconds, report))
    _print_report(json_path, overlay, out_dir, plan, before, warnings, lowest, seconds, report)
    if report is not None:
        _fail_on(report.problems, str(out_dir), "verify")


def _type_recipe(
    base: Checkpoint, override: str | None, type_sources: Sequence[str], allow_unmatched: bool
) -> Recipe | None:
    """The override file read as another tool's recipe of GGUF types, where it is one."""
    from recompile.merge.type_recipes import as_recipe, load_type_recipe, looks_like_type_recipe, open_type_sources

    if override is None or not (type_sources or looks_like_type_recipe(override)):
        if type_sources:
            raise click.UsageError("--type-sources goes with -or FILE, a recipe of GGUF types")
        return None
    if not isinstance(base, GgufCheckpoint):
        raise RecipeError(f"{override}: names GGUF types, and {base.label} is no GGUF file")
    if not type_sources:
        raise RecipeError(
            f"{override}: is a recipe of GGUF types; say which files hold them: --type-sources Q4_K=FILE.gguf ... "
            f"(or a directory of such files)"
        )
    types = load_type_recipe(override)
    return as_recipe(types, base.file, open_type_sources(type_sources), allow_unmatched=allow_unmatched)


def _is_to_be_made(base: Checkpoint, override: str) -> bool:
    """Whether a recipe is of GGUF types that model_quantize would make of a dense base."""
    from recompile.merge.type_recipes import looks_like_type_recipe
    from recompile.quantize.gguf_mix import makes_gguf
    from recompile.recipe.recipe import load_recipe

    if looks_like_type_recipe(override):
        return not base.is_quantized and not isinstance(base, GgufCheckpoint)
    return makes_gguf(load_recipe(override))


def _emit_made(base: Checkpoint, override: str, dialect: str, out: Path | None) -> None:
    """The types that `model_quantize -i BASE -or FILE` would give, as a recipe of another tool."""
    from recompile.merge.type_recipes import emit
    from recompile.quantize.gguf import base_tensors
    from recompile.quantize.gguf_mix import read_mix, types_got

    mix, _, warnings = read_mix(Path(override), base, Path("mix.gguf"))
    for warning in warnings:
        click.echo(f"Warning: {warning}", err=True)
    tensors = base_tensors(base)
    types = types_got(mix.kinds, tensors)
    _warn_of_forks_types(types, dialect)
    _put(emit(types, dialect, f"{base.label} ({override})"), out)


def _emit(overlay: Overlay, dialect: str, out: Path | None) -> None:
    from recompile.merge.type_recipes import emit, types_of

    comment = f"{overlay.label}, {format_bpw(overlay.accounting.bpw)} bpw over quantized modules"
    types = types_of(overlay)
    _warn_of_forks_types(types, dialect)
    _put(emit(types, dialect, comment), out)


def _warn_of_forks_types(types: Mapping[str, str], dialect: str) -> None:
    own = sorted({name for name in types.values() if TYPES[name].fork})
    if own and dialect == "llama-quantize":
        click.echo(f"Warning: {', '.join(own)}: ik_llama.cpp's own, which llama.cpp's llama-quantize refuses", err=True)


def _put(text: str, out: Path | None) -> None:
    if out is None:
        click.echo(text, nl=False)
        return
    same = out.is_file() and out.stat().st_size == len(text.encode()) and out.read_text(encoding="utf-8") == text
    if not same:  # two of the dialects have no place for a mark of this tool, so equal content is one
        context = click.get_current_context()
        refuse_outputs({"-o": out}, [context.params["in_dir"], context.params["override"]])
        write_text(out, text)


# ---- steps -----------------------------------------------------------------------------------------------------------


def _legal(plan: WritePlan, engine: str) -> list[str]:
    """What `engine` does not run of a planned merge: UnsupportedError for errors, the warnings as text."""
    from recompile.merge.check import check_plan

    problems = check_plan(plan, engine)
    errors = [f"{problem}" for problem in problems if problem.severity == "error"]
    if errors:
        more = f"; and {len(errors) - 4} more" if len(errors) > 4 else ""
        raise UnsupportedError(
            f"--engine {engine}: {'; '.join(errors[:4])}{more}. Nothing was written; take such modules from other "
            f"variants (model_optimize --engine {engine} chooses among those that run)"
        )
    return [str(problem) for problem in problems]


def _probe(overlay: Overlay) -> tuple[str, float] | None:
    if overlay.overridden == 0:
        return None
    from recompile.merge.check import check_same_weights

    return check_same_weights(overlay).lowest


def _verify(directory: str, quiet: bool) -> VerifyReport:
    from recompile.merge.check import verify

    with progress("verifying", 1, quiet=quiet) as bar:
        return verify(directory, lambda step: bar.update(step.done_bytes, step.module, step.total_bytes))


def _verify_gguf(plan: GgufPlan, quiet: bool) -> VerifyReport:
    from recompile.merge.check import Problem, VerifyReport

    with progress("verifying", plan.data_bytes, quiet=quiet) as bar:
        found = verify_gguf(plan, lambda step: bar.update(step.done_bytes, step.module))
    problems = tuple(Problem(str(plan.out), problem) for problem in found.problems)
    return VerifyReport(str(plan.out), len(plan.modules), plan.data_bytes, len(plan.modules), (), problems)


def _check(directory: str, verify_it: bool, json_path: Path | None, quiet: bool, engine: str | None) -> None:
    from recompile.merge.check import check_checkpoint

    problems: Sequence[Problem]
    if verify_it:
        report = _verify(directory, quiet)
        problems = report.problems
        if json_path is not None:
            print_json(json_path, report)
        if str(json_path) != "-":
            click.echo(_verified(report))
    else:
        problems = check_checkpoint(directory)
        if engine is not None:
            from recompile.merge.check import check_engine

            problems = [*problems, *check_engine(directory, engine)]
        if json_path is not None:
            print_json(json_path, {"directory": directory, "problems": problems})
    if str(json_path) != "-":
        for problem in problems:
            click.echo(f"{problem.severity}: {problem}")
        if not problems:
            click.echo(f"{directory}: no inconsistency found")
    _fail_on(problems, directory, "check", listed=True)


def _fail_on(problems: Sequence[Problem], directory: str, what: str, listed: bool = False) -> None:
    errors = [problem for problem in problems if problem.severity == "error"]
    if not errors:
        return
    first = "" if listed else f", first {errors[0]}"
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    raise CheckpointError(f"{directory}: {what} found {count}{first}; write or download it again")


# ---- what is printed -------------------------------------------------------------------------------------------------


def _sizes(overlay: Overlay, before: Accounting, plan: WritePlan | GgufPlan) -> str:
    after = plan.accounting

    def row(what: str, figure: str, result: str) -> tuple[str, str, str]:
        return (what, figure, result)

    from recompile.merge.left_dense import left_dense

    table = format_columns(
        [
            row("bits per weight, quantized modules", format_bpw(before.bpw), format_bpw(after.bpw)),
            row("bits per weight, head", format_bpw(before.head_bpw), format_bpw(after.head_bpw)),
            row("bits per weight, embedding", format_bpw(before.embedding_bpw), format_bpw(after.embedding_bpw)),
            row("bits per weight, everything", format_bpw(before.total_bpw), format_bpw(after.total_bpw)),
            row("size", format_bytes(before.total_bytes), format_bytes(after.total_bytes)),
        ],
        ("", overlay.base.label, "result"),
        right=(1, 2),
    )
    counts = _overridden(overlay)
    listed = ", ".join(f"{count} from {source}" for source, count in counts.items())
    taken = f"{sum(counts.values())} of {len(overlay.placements)} modules overridden" + (
        f": {listed}" if listed else ""
    )
    taken += "" if plan.dense else f"\n{left_dense(overlay)}"
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    return f"{table}\n{taken}\n{len(plan.modules)} modules in {files}" + (", decoded" if plan.dense else "")


def _overridden(overlay: Overlay) -> dict[str, int]:
    return dict(Counter(p.source for p in overlay.placements.values() if p.source is not None))


def _written(plan: WritePlan | GgufPlan, seconds: float, report: VerifyReport | None) -> str:
    rate = plan.data_bytes / max(seconds, 1e-9)
    out = shlex.quote(str(plan.out))
    lines = [
        f"Wrote {plan.out}: {format_bytes(plan.data_bytes)} in {format_seconds(seconds)} ({format_bytes(rate)}/s)",
    ]
    if report is not None:
        lines.append(_verified(report))
    lines.append(f"Next: model_diff -ma {out} -mb ORIGINAL    (ORIGINAL: the model before quantization)")
    return "\n".join(lines)


def _verified(report: VerifyReport) -> str:
    text = (
        f"Verified {report.modules} modules against the manifest, {report.compared_with_sources} of them against their "
        f"sources: {'all equal' if report.ok else 'NOT equal'}"
    )
    return "\n".join([text, *(f"  {note}" for note in report.notes)])


def _print_report(
    json_path: Path | None,
    overlay: Overlay,
    out: Path | None,
    plan: WritePlan | GgufPlan,
    before: Accounting,
    warnings: Sequence[str],
    lowest: tuple[str, float] | None = None,
    seconds: float | None = None,
    verified: VerifyReport | None = None,
) -> None:
    if json_path is None:
        return
    modules = [
        {
            "module": m.name,
            "source": m.placement.source,
            "format": m.stored.format,
            "bits_per_weight": m.stored.bits_per_weight,
            "line": m.placement.override.line if m.placement.override else None,
            "key": m.placement.override.key if m.placement.override else None,
        }
        for m in plan.modules
    ]
    report = RecompileReport(
        overlay.base.label,
        str(out) if out is not None else None,
        overlay.recipe.name if overlay.recipe else None,
        plan.dense,
        before.as_dict(),
        plan.accounting.as_dict(),
        _overridden(overlay),
        modules,
        warnings,
        lowest,
        seconds,
        plan.data_bytes / seconds if seconds else None,
        verified,
    )
    print_json(json_path, report)


if __name__ == "__main__":
    main()
