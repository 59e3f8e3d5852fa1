#!/usr/bin/env python3
"""CPU seconds and memory of planning at 10,000, 45,000 and 135,000 modules: opening two checkpoints, resolving a
recipe, planning the merge, printing the dry run; and of choosing a recipe and making a report from a profile that has
every matrix of every expert as a group.

    python scripts/bench_scale.py [--sizes 56 256 768] [--work DIR]

Checkpoints are DeepSeek-V3's 61 layers with that many experts, headers alone (holes for data); every row runs in a
process of its own. Writes scripts/bench_results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LAYERS = 61
RECIPE = """sources: [{{id: 4, model_dir: "{source}"}}]
overrides:
  - {{key: "*.self_attn.*", source: 4}}
  - {{key: "model.layers.3.*", source: 4}}
  - {{key: "*.shared_experts.*", source: 4}}
  - {{key: "model.layers.*.mlp.experts.1*", source: 4}}
"""


class Clock:
    """CPU seconds of this process, stage by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def run(self, stage: str, action: Callable[[], Any]) -> Any:
        result = action()
        now = time.process_time()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now
        return result

    def row(self, **facts: int) -> dict[str, Any]:
        total = round(sum(self.seconds.values()), 2)
        return {**facts, "cpu_seconds": self.seconds, "total_cpu_seconds": total, "peak_rss_mib": peak_rss_mib()}


def peak_rss_mib() -> int:
    """Of this process alone; what getrusage tells begins with the parent's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def dry_run(work: Path, experts: int) -> dict[str, Any]:
    """What `recompile -i 3bpw -or FILE --dry-run` does."""
    from tests.sparse import moe_checkpoint

    base, source = (moe_checkpoint(work / f"{experts}-{bits}bpw", LAYERS, experts, bits) for bits in (3, 4))
    recipe = work / f"{experts}.yaml"
    recipe.write_text(RECIPE.format(source=source))
    return in_a_process("--dry-run-of", str(base), str(recipe))


def dry_run_here(base: Path, recipe: Path) -> dict[str, Any]:
    clock = Clock()
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.merge.explain import resolved_table
    from recompile.merge.overlay import build_overlay
    from recompile.merge.plan_safetensors import plan_write

    opened = clock.run("open", lambda: open_checkpoint(base))
    clock.run("modules", lambda: opened.modules)
    overlay = clock.run("overlay, with the source's opening", lambda: build_overlay(opened, recipe))
    plan = clock.run("plan", lambda: plan_write(overlay, base.parent / "out"))
    clock.run("table", lambda: resolved_table(overlay))
    return clock.row(modules=len(plan.modules), tensors=len(opened.tensors), shards=len(plan.shards))


def choose_and_report(work: Path, experts: int) -> dict[str, Any]:
    """What `model_optimize -b 3.5` and `model_report` do."""
    from recompile.costs import open_journal
    from tests.profiles import make_profile

    path = work / f"{experts}.jsonl"
    profile = make_profile("expert", LAYERS, experts=experts)
    with open_journal(path, profile.header) as journal:
        assert profile.control is not None
        journal.append([profile.control, *profile.measurements.values()])
    return in_a_process("--report-of", str(path))


def report_here(path: Path) -> dict[str, Any]:
    clock = Clock()
    from eval.report.data import gather
    from eval.report.page import render
    from recompile.costs import load_profile
    from recompile.optimize.budget import Budget
    from recompile.optimize.choose import choose, make_recipe
    from recompile.recipe.recipe import dump_recipe

    profile = clock.run("read the profile", lambda: load_profile(path))
    choice = clock.run("choose, exact", lambda: choose(profile, Budget(bpw=3.5), "exact"))
    clock.run("write the recipe", lambda: dump_recipe(*make_recipe(choice, {})))
    data = clock.run("gather the report", lambda: gather(path))
    clock.run("render the page", lambda: render(data))
    return clock.row(groups=len(profile.header.groups), measurements=len(profile.measurements))


def in_a_process(*words: str) -> dict[str, Any]:
    run = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[56, 256, 768], help="experts a layer")
    parser.add_argument(
        "--work", type=Path, help="where checkpoints and profiles are made; default: a temporary folder"
    )
    parser.add_argument("--dry-run-of", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--report-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry_run_of:
        print(json.dumps(dry_run_here(*options.dry_run_of)))
        return
    if options.report_of:
        print(json.dumps(report_here(options.report_of)))
        return
    from bench_record import RESULTS, birth_certificate, keep

    result = birth_certificate()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        for name, make in (("dry_run", dry_run), ("choose_and_report", choose_and_report)):
            result[name] = []
            for experts in options.sizes:
                row = make(work, experts)
                count = row.get("modules") or row["groups"]
                row["cpu_seconds_per_10k"] = round(row["total_cpu_seconds"] / count * 10_000, 2)
                result[name].append(row)
                print(name, row)
    keep(RESULTS / "scale.json", result)


if __name__ == "__main__":
    main()
