"""Measured mixes of schemes against hand recipes and single schemes at equal stored bytes, on SmolLM2-135M-Instruct.

    .venv/bin/python scripts/bench_schemes.py --work DIR --load            # about half an hour on one quiet core
    .venv/bin/python scripts/bench_schemes.py --work DIR --report-rows 8   # coarser

DIR keeps variants, profile, recipes and what was measured: an interrupted run goes on. Writes
scripts/bench_results/schemes.json.

Candidates w4a16-g64, w8a16, fp8-channel, nvfp4 and mxfp4 from one calibration pass by GPTQ; a profile of every fused
set; the optimizer at 4.75 and 5.5 stored bits per weight and at the bytes of the hand recipes "down_proj at 8 bits, the
rest at 4" (int8 and fp8; the rest w4a16-g64 or nvfp4). Beside them w4a16-g64 by other methods: RTN, AWQ, AWQ with GPTQ.
KL on report rows, every pair compared on the same rows. With --load, the mixes are written and their logits in
transformers compared with ours.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
SCHEMES = ("w4a16-g64", "nvfp4", "mxfp4", "w8a16", "fp8-channel")
BASE_SCHEME = "w4a16-g64"
BUDGETS = (4.75, 5.5)
HAND = {  # name -> schemes of down_proj and of the rest
    "hand: down_proj int8": ("w8a16", "w4a16-g64"),
    "hand: down_proj fp8": ("fp8-channel", "w4a16-g64"),
    "hand: down_proj int8, rest nvfp4": ("w8a16", "nvfp4"),
}
METHODS = ("rtn", "awq", "awq+gptq")  # of w4a16-g64, besides GPTQ
BATCH = 4  # builds measured between two saves


def run(command: str, *arguments: str | Path) -> None:
    """One of the project's commands, as a user gives it."""
    code = f"from recompile.cli.{command} import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT)


def hand_recipe(path: Path, eight: Path) -> Path:
    path.write_text(
        f"sources:\n  - {{id: 8, model_dir: {eight}}}\noverrides:\n  - {{key: '*.down_proj.*', source: 8}}\n"
    )
    return path


def build_method(base: Path, work: Path, method: str, rows: int, length: int) -> Path:
    """BASE_SCHEME by another method than GPTQ."""
    made = work / f"variants-{method}" / BASE_SCHEME
    if not made.exists():
        settings = ("--scheme", BASE_SCHEME, "--method", method, "-r", str(rows), "-l", str(length))
        run("model_quantize", "-i", base, "-o", made.parent, *settings)
    return made


def build(base: Path, work: Path, rows: int, length: int) -> dict[str, Path]:
    variants = {name: work / "variants" / name for name in SCHEMES}
    missing = [name for name, path in variants.items() if not path.exists()]
    if missing:
        run(
            "model_quantize",
            "-i",
            base,
            "-o",
            work / "variants",
            "--scheme",
            *missing,
            "-r",
            str(rows),
            "-l",
            str(length),
        )
    return variants


def optimize(profile: Path, bpw: float, recipe: Path) -> Path:
    run("model_optimize", profile, "-b", f"{bpw:.6f}", "-o", recipe, "--solver", "exact", "--no-check")
    return recipe


def measure(base: Path, candidates: Mapping[str, Any], rows: int, length: int, kept: Path) -> dict[str, Any]:
    """KL, bits and bytes of every candidate (Overlays), and each mix against all others on the same rows.

    kept: a file of what was measured before, by the candidate's placements and the rows
    """
    import torch

    from eval.diff import DiffOptions, DiffReport, compare_many
    from eval.metrics import paired_difference
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.model.rows import read_rows

    found, vocab = read_rows([base], "report", rows, length, None, None, None)
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    keys = {name: f"{found.sha256} {_identity(overlay)}" for name, overlay in candidates.items()}
    missing = [name for name, key in keys.items() if key not in known]
    for start in range(0, len(missing), BATCH):
        names = missing[start : start + BATCH]
        events = compare_many(
            [candidates[name] for name in names],
            open_checkpoint(base),
            found.ids,
            DiffOptions(vocab=vocab),
            rows_source=found.source,
            rows_sha256=found.sha256,
        )
        for name, report in zip(names, (e for e in events if isinstance(e, DiffReport)), strict=True):
            known[keys[name]] = {
                "kl": report.kl.mean,
                "kl_std_error": report.kl.std_error,
                "kl_rows": list(report.kl_rows),
                "perplexity": report.score_candidate.perplexity,
                "same_top_token": report.top_k_agreement[0].mean,
            }
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(known))
        partial.replace(kept)
        click.echo(f"measured {', '.join(names)}", err=True)
    measured = {name: known[key] for name, key in keys.items()}
    table = {
        name: {
            "bpw": overlay.accounting.bpw,
            "total_bytes": overlay.accounting.total_bytes,
            **{key: value for key, value in measured[name].items() if key != "kl_rows"},
        }
        for name, overlay in candidates.items()
    }
    pairs = []
    for mix in (name for name in candidates if name.startswith("measured")):
        for other in candidates:
            if other == mix:
                continue
            left, right = (torch.tensor(measured[name]["kl_rows"]) for name in (mix, other))
            difference, interval = paired_difference(left, right)
            pairs.append(
                {
                    "mix": mix,
                    "against": other,
                    "ratio": measured[mix]["kl"] / measured[other]["kl"],
                    "difference_nats": difference.mean,
                    "interval_95": list(interval),
                    "no_more_bytes": table[mix]["total_bytes"] <= table[other]["total_bytes"],
                }
            )
    return {
        "rows": len(found.ids),
        "row_tokens": found.ids.shape[1],
        "rows_sha256": found.sha256,
        "builds": table,
        "pairs": pairs,
    }


def _identity(overlay: Any) -> str:
    """What an overlay is made of."""
    lines = [f"{name} {p.checkpoint.fingerprint}" for name, p in sorted(overlay.placements.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def load_in_transformers(base: Path, overlay: Any, out: Path, tokens: int = 64) -> float:
    """Largest difference of logits, relative to their range: the written mix in transformers against our decoding.
    Both in float32, or in bfloat16 where the mix holds 4-bit floats, which the loader runs in that only."""
    import torch
    from transformers import AutoModelForCausalLM

    from recompile.merge.plan_safetensors import plan_write
    from recompile.merge.write_safetensors import execute
    from recompile.model.rows import read_rows
    from recompile.model.stream import dense_names

    if not out.exists():
        for _ in execute(plan_write(overlay, out)):
            pass
    dtype = torch.bfloat16 if any("fp4" in name for name in overlay.formats) else torch.float32
    found, _ = read_rows([base], "report", 1, tokens, None, None, None)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)(found.ids).logits.float()
        dense = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        state = {name: overlay.load(name).to(dtype) for name in dense_names(overlay)}
        dense.load_state_dict(state, strict=False)
        ours = dense(found.ids).logits.float()
    return float((theirs - ours).abs().max() / (ours.max() - ours.min()))


def markdown(result: Mapping[str, Any]) -> str:
    """The README's table."""
    lines = [
        "| build | stored bpw | size | KL(base \\|\\| build), nats/token | same top token |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(result["builds"].items(), key=lambda item: item[1]["total_bytes"]):
        error = row["kl_std_error"]
        lines.append(
            f"| {name} | {row['bpw']:.3f} | {row['total_bytes'] / 2**20:.1f} MiB | {row['kl']:.4f}"
            + (f" ± {error:.4f}" if error is not None else "")
            + f" | {100 * row['same_top_token']:.1f} % |"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--base", type=click.Path(path_type=Path), default=Path("~/.cache/recompile/SmolLM2-135M-Instruct"))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keeps variants, profile and recipes.")
@click.option("--calibration-rows", default=16, show_default=True)
@click.option("--profile-rows", default=8, show_default=True)
@click.option("--samples", default=8, show_default=True, help="Draws a row of the sketch profile.")
@click.option("--report-rows", default=16, show_default=True)
@click.option("--length", default=384, show_default=True, help="Tokens in a row, everywhere.")
@click.option("--load", is_flag=True, help="Also write the mixes and compare their logits in transformers.")
def main(
    base: Path,
    work: Path,
    calibration_rows: int,
    profile_rows: int,
    samples: int,
    report_rows: int,
    length: int,
    load: bool,
) -> None:
    """Measured mixes against hand recipes and single schemes."""
    from bench_record import RESULTS, birth_certificate, keep

    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.merge.overlay import build_overlay

    base, work = base.expanduser(), work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    certificate = birth_certificate()
    variants = build(base, work, calibration_rows, length)
    profile = work / "profile.jsonl"
    others = [path for name, path in variants.items() if name != BASE_SCHEME]
    run(
        "model_profile", "-mb", base, "-i", variants[BASE_SCHEME], "-s", *others, "-o", profile,
        "--mode", "sketch", "--samples", str(samples), "-r", str(profile_rows), "-l", str(length),
    )  # fmt: skip
    opened = {name: open_checkpoint(path) for name, path in variants.items()}
    four = opened[BASE_SCHEME]
    candidates = {name: build_overlay(checkpoint, None) for name, checkpoint in opened.items()}
    for method in METHODS:
        made = build_method(base, work, method, calibration_rows, length)
        candidates[f"{BASE_SCHEME} by {method}"] = build_overlay(open_checkpoint(made), None)
    for number, (name, (eight, rest)) in enumerate(HAND.items()):
        candidates[name] = build_overlay(opened[rest], hand_recipe(work / f"hand-{number}.yaml", variants[eight]))
    sizes = {round(candidates[name].accounting.bpw, 3): candidates[name].accounting.bpw for name in HAND}
    for bpw in (*BUDGETS, *sizes.values()):
        recipe = optimize(profile, bpw, work / f"measured-{bpw:.3f}.yaml")
        candidates[f"measured mix for {bpw:.2f}"] = build_overlay(four, recipe)
    result = measure(base, candidates, report_rows, length, work / "measured.json")
    if load:
        result["transformers"] = {
            name: load_in_transformers(base, overlay, work / name.replace(" ", "-"))
            for name, overlay in candidates.items()
            if name.startswith("measured")
        }
    keep(RESULTS / "schemes.json", {**certificate, **result})
    click.echo(markdown(result))
    for pair in result["pairs"]:
        low, high = pair["interval_95"]
        click.echo(f"{pair['mix']} / {pair['against']}: {pair['ratio']:.3f}, difference {low:.4f} to {high:.4f} nats")
    click.echo(json.dumps(result.get("transformers", {})))


if __name__ == "__main__":
    main()
