"""An optimized mix of GGUF types against the presets of llama.cpp's own quantizer, in llama.cpp, on SmolLM2.

    .venv/bin/python scripts/bench_gguf_mix.py --work DIR              # about half an hour on one quiet core
    .venv/bin/python scripts/bench_gguf_mix.py --work DIR --chunks 8   # coarser

DIR keeps every step: an interrupted run goes on. Writes scripts/bench_results/gguf_mix.json.

One calibration pass gives one importance matrix (an imatrix file). With it the candidates are made on the fly for a
sketch profile, the mix is written, and the engine's own quantizer makes its presets from the same BF16 file: the
comparison is of the choice of types alone. KL(BF16 || file) is from the engine's logits, on chunks that nothing else
used, each file paired with the mix chunk by chunk.

The base comes from a Q4_1 file, so that its linear weights lie on a grid of 4 bits with a minimum for every 32: Q4_1
and Q5_1 are nearly lossless there and prove nothing. They are no candidates and no presets here, though presets of K
types hold some Q5_1, since that is what Q5_K becomes on rows of 576; the mix may not. --grid-types adds them to both.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
CANDIDATES = (
    "Q4_0", "IQ4_NL", "Q5_0", "Q8_0", "MXFP4",  # blocks of 32, which every row takes
    "Q2_K", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K",  # of 256: on this model down_proj alone
)  # fmt: skip
GRID_TYPES = ("Q4_1", "Q5_1")
PRESETS = {"Q3_K_M": 12, "Q3_K_L": 13, "Q4_0": 2, "IQ4_NL": 25, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_0": 8, "Q5_K_S": 16}
GRID_PRESETS = {"Q4_1": 3}
BPW = 4.75


def run(command: str, *arguments: object) -> None:
    """One of the project's commands, as a user gives it."""
    code = f"from recompile.cli.{command} import main; main()"
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=ROOT)


def make_presets(work: Path, reference: Path, imatrix: Path, presets: dict[str, int]) -> dict[str, Path]:
    """llama_model_quantize with the importance of the imatrix file."""
    from eval.engines.builds import find_engine
    from eval.engines.process import Engine
    from recompile.gguf.imatrix import read_imatrix

    entries = read_imatrix(imatrix).entries
    importance = {name: sums.sum_squares / sums.counts[:, None] for name, sums in entries.items()}
    made = {}
    with Engine(find_engine("llama.cpp"), threads=1) as engine:
        for name, number in presets.items():
            made[name] = work / f"preset-{name}.gguf"
            if not made[name].exists():
                engine.quantize(reference, made[name].with_suffix(".partial"), number, importance=importance)
                made[name].with_suffix(".partial").rename(made[name])
    return made


def measure(work: Path, reference: Path, files: dict[str, Path], chunks: int) -> dict[str, Any]:
    """KL of every file in the engine; kept in DIR, one file after another."""
    import json

    from eval.engines.builds import find_engine
    from eval.engines.engine_diff import (
        EngineOptions,
        EngineReport,
        compare_with_engine,
        report_text,
        tokenize_with_engine,
    )
    from recompile.model import texts

    installed = find_engine("llama.cpp")
    source = texts.default_text()
    cut = tokenize_with_engine(installed, reference, report_text(source), 512, chunks, threads=1)
    found = {}
    for name, path in files.items():
        kept = work / f"engine-{name}-{chunks}.json"
        if not kept.exists():
            *_, report = compare_with_engine(
                installed, path, reference, cut, EngineOptions(text=source.name, threads=1)
            )
            assert isinstance(report, EngineReport)
            kept.write_text(
                json.dumps(
                    {
                        "bytes": path.stat().st_size,
                        "kl_nats": report.kl.kl.mean,
                        "kl_std_error_over_chunks": report.kl.kl.std_error,
                        "kl_chunks": report.kl.rows,
                        "perplexity": report.tool.perplexity.value,
                        "engine": report.engine,
                        "tokens_sha256": report.tokens_sha256,
                    }
                )
            )
        found[name] = json.loads(kept.read_text())
        click.echo(f"{name}: {found[name]['kl_nats']:.5f}", err=True)
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--base", type=click.Path(path_type=Path), default=Path("~/.cache/recompile/SmolLM2-135M-Instruct"))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keeps files, profile and recipe.")
@click.option("--chunks", default=24, show_default=True, help="Of 512 tokens, half of which count.")
@click.option("--profile-rows", default=12, show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--preset", "chosen", multiple=True, type=click.Choice([*PRESETS]), help="Only these, any number.")
@click.option("--grid-types", is_flag=True, help="Q4_1 and Q5_1 as candidates, Q4_1 as a preset.")
def main(
    base: Path, work: Path, chunks: int, profile_rows: int, samples: int, chosen: tuple[str, ...], grid_types: bool
) -> None:
    """The mix at 4.75 bits per weight against presets of no fewer bytes."""
    import torch
    from bench_record import RESULTS, birth_certificate, keep
    from make_base import find_gguf

    from eval.metrics import paired_difference

    base, work = base.expanduser(), work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    certificate = birth_certificate()
    reference, imatrix, profile = work / f"{base.name}-BF16.gguf", work / "imatrix.gguf", work / "profile.jsonl"
    recipe, mix = work / "mix.yaml", work / "mix.gguf"
    if not (reference.exists() and imatrix.exists()):
        run(
            "model_quantize", "-i", base, "-o", work, "--format", "gguf", "-b", "BF16", "--tokenizer-from", find_gguf(),
            "--save-imatrix", imatrix, "-r", 24, "-l", 384, "--quiet",
        )  # fmt: skip
    names = [*CANDIDATES, *(GRID_TYPES if grid_types else ())]
    if not mix.exists():
        run(
            "model_profile", "-mb", base, "--candidates", ",".join(names), "-i", "Q4_0", "--imatrix", imatrix,
            "--level", "tensor", "--mode", "sketch", "--samples", samples, "-r", profile_rows, "-l", 256, "-o", profile,
        )  # fmt: skip
        # Q5_K is Q5_1 where its blocks do not fit: one of the grid types
        ban = () if grid_types else ("--ban", "*=Q5_K")
        run("model_optimize", profile, "--target-bpw", BPW, "-o", recipe, "--solver", "exact", "--no-check", *ban)
        run(
            "model_quantize", "-i", base, "-o", mix, "-or", recipe, "--tokenizer-from", find_gguf(), "--imatrix",
            imatrix, "--quiet",
        )  # fmt: skip
    asked = {name: number for name, number in PRESETS.items() if not chosen or name in chosen}
    presets = make_presets(work, reference, imatrix, {**asked, **(GRID_PRESETS if grid_types else {})})
    size = mix.stat().st_size
    larger = {name: path for name, path in presets.items() if path.stat().st_size >= size}
    nearest = min(larger, key=lambda name: larger[name].stat().st_size)
    found = measure(work, reference, {"mix": mix, **larger}, chunks)
    own = torch.tensor(found["mix"]["kl_chunks"])
    for name in larger:
        difference, interval = paired_difference(own, torch.tensor(found[name]["kl_chunks"]))
        found[name] |= {"mix_minus_this_nats": difference.mean, "interval_95": list(interval)}
    click.echo(f"\nmix: {size} bytes, KL {found['mix']['kl_nats']:.5f}; the nearest preset of no fewer is {nearest}")
    for name in sorted(larger, key=lambda name: larger[name].stat().st_size):
        low, high = found[name]["interval_95"]
        click.echo(
            f"{name}: {found[name]['bytes']} bytes, KL {found[name]['kl_nats']:.5f}; mix - this "
            f"{found[name]['mix_minus_this_nats']:+.5f} [{low:+.5f}, {high:+.5f}]"
        )
    keep(
        RESULTS / ("gguf_mix_grid.json" if grid_types else "gguf_mix.json"),
        {
            **certificate,
            "bpw": BPW,
            "candidates": names,
            "chunks": chunks,
            "nearest_preset_of_no_fewer_bytes": nearest,
            "smaller_presets": {n: p.stat().st_size for n, p in presets.items() if n not in larger},
            "files": found,
        },
    )


if __name__ == "__main__":
    main()
