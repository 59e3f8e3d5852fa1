#!/usr/bin/env python3
"""A recipe and a calibration from a model's own trace against those from text: SmolLM2-135M-Instruct at one size.

    .venv/bin/python scripts/bench_trace.py --work /tmp/bench-trace

The base answers prompts (model_trace). Candidates are profiled (a sketch) and a recipe is chosen on the choose rows of
the trace or of the default text; each recipe is built with GPTQ calibrated on the calibrate rows of the same source
(--crossed: of either); one more is calibrated on as few tokens of text as the trace has responses, one on the prompts
of the trace too. The builds are measured on report rows of the trace, at the positions of responses, and on report rows
of the text. With --work a run that was stopped goes on. Writes scripts/bench_results/trace.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import make_base  # noqa: E402
from bench_record import RESULTS, birth_certificate, keep  # noqa: E402

import recompile  # noqa: E402
from eval.run_diff import ManyDiffs  # noqa: E402
from recompile.model.rows import RowOptions  # noqa: E402

OUT = RESULTS / "trace.json"
SOURCES = ("text", "trace")
EQUAL = "recipe text, calibrated text, as few tokens"
PROMPTS = "recipe trace, calibrated trace, prompts too"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Bench:
    def __init__(self, base: Path, work: Path, settings: dict[str, Any]) -> None:
        self.base, self.work, self.settings = base, work, settings
        self.trace = work / "trace.safetensors"

    def timed(self, name: str, made: Path, make: Any) -> None:
        if made.exists():
            return
        say(name)
        make()

    def rows(self, source: str) -> dict[str, Any]:
        return {"length": self.settings["length"], **({"trace": self.trace} if source == "trace" else {})}

    def run(self) -> dict[str, Any]:
        s = self.settings
        how = {"rows": s["prompts"], "tokens": s["tokens"], "batch_size": 16}
        self.timed("trace", self.trace, lambda: recompile.trace(self.base, self.trace, **how))
        recipes = {source: self.recipe(source) for source in SOURCES}
        builds = {}
        for recipe, (path, _) in recipes.items():
            for calibration in SOURCES if s["crossed"] else (recipe,):
                name = f"recipe {recipe}, calibrated {calibration}"
                builds[name] = self.work / f"{recipe}-{calibration}"
                self.timed(
                    f"build: {name}",
                    builds[name],
                    lambda made=builds[name], path=path, calibration=calibration: recompile.quantize(
                        self.base, made, recipe=path, rows=s["calibrate_rows"], **self.rows(calibration)
                    ),
                )
        judged = {source: self.judged(source, builds) for source in SOURCES}
        more = {
            "equal": {EQUAL: self.equal(recipes["text"][0])},
            "prompts": {PROMPTS: self.prompts(recipes["trace"][0])},
        }
        for source, found in judged.items():
            for name, build in more.items():
                found["builds"] |= self.judged(source, build, name)["builds"]
        return {
            **s,
            "model": self.base.name,
            "predicted_kl": {source: predicted for source, (_, predicted) in recipes.items()},
            "same_choices": self.same_choices(),
            "calibrated_tokens": {
                "text": s["calibrate_rows"] * s["length"],
                "trace": self.trace_tokens(),
                EQUAL: self.equal_rows * s["length"],
                PROMPTS: self.trace_tokens("all"),
            },
            "judged": judged,
        }

    def judged(self, source: str, builds: dict[str, Path], name: str = "judged") -> dict[str, Any]:
        """Kept in a file, as the builds are."""
        kept = self.work / f"{name}-{source}.json"
        if not kept.exists():
            say(f"judging on {source}: {', '.join(builds)}")
            given = {"trace": self.trace} if source == "trace" else {"length": self.settings["length"]}
            found = recompile.diff_many(list(builds.values()), self.base, rows=self.settings["report_rows"], **given)
            kept.write_text(json.dumps(table(list(builds), found)))
        return dict(json.loads(kept.read_text()))

    def trace_tokens(self, positions: str = "response") -> int:
        """Of the trace, whose inputs count in the Hessians."""
        where = RowOptions(
            self.settings["calibrate_rows"], self.settings["length"], trace=self.trace, positions=positions
        )
        counted = where.read([self.base], "calibrate")[0].counted
        assert counted is not None, "of a trace"
        return int(counted.sum())

    @property
    def equal_rows(self) -> int:
        """Of text, with about as many tokens as the calibration on the trace counts."""
        return round(self.trace_tokens() / self.settings["length"])

    def equal(self, recipe: Path) -> Path:
        made = self.work / "text-equal"
        how = {"rows": self.equal_rows, "length": self.settings["length"]}
        self.timed(f"build: {EQUAL}", made, lambda: recompile.quantize(self.base, made, recipe=recipe, **how))
        return made

    def prompts(self, recipe: Path) -> Path:
        made = self.work / "trace-prompts"
        how = {"rows": self.settings["calibrate_rows"], "positions": "all", **self.rows("trace")}
        self.timed(f"build: {PROMPTS}", made, lambda: recompile.quantize(self.base, made, recipe=recipe, **how))
        return made

    def recipe(self, source: str) -> tuple[Path, float]:
        s = self.settings
        profile, recipe = self.work / f"{source}.jsonl", self.work / f"{source}.yaml"
        how = {"mode": "sketch", "samples": s["draws"], "rows": s["rows"], "importance_rows": s["rows"]}
        self.timed(
            f"profile: {source}",
            self.work / f"{source}.done",
            lambda: recompile.profile(self.base, candidates=[s["candidates"]], out=profile, **how, **self.rows(source)),
        )
        (self.work / f"{source}.done").touch()
        found = recompile.optimize(profile, recipe, bits=s["bits"], solver="exact", check=False)
        self.choices = getattr(self, "choices", {}) | {source: dict(found.written.solution.choice)}
        return recipe, found.written.predicted_kl_nats

    def same_choices(self) -> float:
        """Share of the groups for which both recipes take the same bits."""
        one, other = (self.choices[source] for source in SOURCES)
        return sum(one[group] == other[group] for group in one) / len(one)


def table(names: list[str], found: ManyDiffs) -> dict[str, Any]:
    """Every build's KL, and that less the one of text alone, paired over rows."""
    first = found.diffs[0].report
    builds = {}
    for n, (name, diff) in enumerate(zip(names, found.diffs, strict=True)):
        report = diff.report
        builds[name] = {
            "bpw": diff.overlay.accounting.bpw,
            "kl": report.kl.mean,
            "std_error": report.kl.std_error,
            "top1": report.top_k_agreement[0].mean,
            **({"less_text": found.pair(n, 0).difference.mean, "interval_95": found.pair(n, 0).interval} if n else {}),
        }
        say(f"  {name}: KL {report.kl}")
    return {
        "rows": first.rows,
        "tokens": first.tokens,
        "source": first.rows_source,
        "role": first.rows_role,
        "positions": first.positions,
        "builds": builds,
    }


@click.command()
@click.option("--bits", default=3.5, show_default=True)
@click.option("--candidates", default="2,3,4,6", show_default=True)
@click.option("--prompts", default=96, show_default=True)
@click.option("--tokens", default=96, show_default=True, help="Of a response at most.")
@click.option("--rows", default=8, show_default=True, help="To profile on.")
@click.option("--draws", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--calibrate-rows", default=24, show_default=True)
@click.option("--report-rows", default=16, show_default=True)
@click.option("--crossed", is_flag=True, help="Each recipe calibrated on both sources.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what is made; kept.")
def main(work: Path | None, **settings: Any) -> None:
    torch.set_num_threads(1)
    certificate = birth_certificate()
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        keep(OUT, {**certificate, **Bench(Path(make_base.build()), folder, settings).run()})


if __name__ == "__main__":
    main()
