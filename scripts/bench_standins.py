#!/usr/bin/env python3
"""How well candidates made on the fly stand in for real variants: ranks of costs, and KL of the recipes they give.

    .venv/bin/python scripts/bench_standins.py VARIANTS    # a folder with 2bpw 3bpw 4bpw 6bpw of SmolLM2-135M-Instruct

Both ladders are profiled by the sketch on the same rows with the same draws. Spearman is over all tensors, per width.
Recipes chosen from either profile are then measured on the real variants, on other rows; the interval is paired.
With --work a run that was stopped goes on. Writes scripts/bench_results/standins.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import make_base  # noqa: E402
from bench_record import RESULTS, birth_certificate, keep  # noqa: E402

from eval.diff import DiffReport, compare_many  # noqa: E402
from eval.metrics import paired_difference  # noqa: E402
from eval.profile.exact import ProfileJob, ProfileOptions  # noqa: E402
from eval.profile.sketch import SketchOptions, profile_sketch  # noqa: E402
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from recompile.costs import Profile  # noqa: E402
from recompile.merge.overlay import Overlay  # noqa: E402
from recompile.model.rows import read_rows  # noqa: E402
from recompile.optimize.choose import Budget, choose  # noqa: E402
from recompile.quantize.calibrate import input_power  # noqa: E402
from recompile.quantize.lazy_variant import load_importance, make_variant, save_importance  # noqa: E402

BITS = (2, 3, 4, 6)
REAL = "variants"


@click.command()
@click.argument("variants", type=click.Path(exists=True, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), help="Where what is measured is kept; default: nowhere.")
@click.option("--budgets", multiple=True, type=float, default=(3.4, 4.4), show_default=True)
@click.option("--rows", default=8, show_default=True, help="Rows of 128 tokens that are profiled.")
@click.option("--samples", default=16, show_default=True, help="Draws a row.")
@click.option("--judge", default=12, show_default=True, help="Rows of 256 tokens that recipes are judged on.")
def main(variants: Path, work: Path | None, budgets: Sequence[float], rows: int, samples: int, judge: int) -> None:
    torch.set_num_threads(1)
    result = birth_certificate() | {"rows": rows, "row_tokens": 128, "samples": samples, "judged_rows": judge}
    if work is None:
        work = Path(tempfile.mkdtemp(prefix="bench-standins-"))
    work.mkdir(parents=True, exist_ok=True)
    base = open_checkpoint(make_base.build())

    def rows_for(role: str, count: int, length: int) -> torch.Tensor:
        return read_rows([base.path], role, count, length, None, None, None)[0].ids

    power = load_importance(work / "p")
    if power is None:
        power = input_power(base, rows_for("calibrate", 16, 512))  # model_profile's own
        save_importance(power, work / "p")
    ladders: dict[str, list[tuple[Any, Checkpoint]]] = {
        REAL: [(bits, open_checkpoint(variants / f"{bits}bpw")) for bits in BITS],
        "stand-ins": [(bits, make_variant(base, {"bits": bits}, power)) for bits in BITS],
    }
    profiles: dict[str, Profile] = {}
    for name, offered in ladders.items():
        started = time.monotonic()
        path, options = work / f"{name.replace(' ', '-')}.jsonl", ProfileOptions(level="tensor")
        ids = rows_for("choose", rows, 128)
        *_, profile = profile_sketch(ProfileJob(base, 3, offered, ids, path, options), SketchOptions(samples))
        assert isinstance(profile, Profile), "the profile comes last"
        profiles[name] = profile
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    result["ranks"] = {name: ranks(profiles[REAL], found) for name, found in profiles.items() if name != REAL}
    result["recipes_on_the_real_variants"] = judged(
        profiles, ladders[REAL], base, budgets, rows_for("report", judge, 256)
    )
    keep(RESULTS / "standins.json", result)


def ranks(real: Profile, other: Profile) -> dict[str, dict[str, float]]:
    """Spearman and median ratio of a ladder's costs against the real variants', per width."""
    found = {}
    for bits in map(str, BITS):
        wanted = [real.measurements[group.name, bits].mean for group in real.header.groups]
        given = [other.measurements[group.name, bits].mean for group in real.header.groups]
        ratios = torch.tensor(given) / torch.tensor(wanted)
        found[bits] = {
            "spearman": round(float(spearmanr(wanted, given).statistic), 4),
            "median_ratio": round(float(ratios.median()), 3),
        }
    return found


def judged(
    profiles: dict[str, Profile],
    variants: list[tuple[Any, Checkpoint]],
    base: Checkpoint,
    budgets: Sequence[float],
    ids: torch.Tensor,
) -> dict[str, dict[str, dict[str, Any]]]:
    """KL of each profile's recipe of each budget, made of the real variants, and how far it is from the real one's."""
    checkpoints = {str(bits): checkpoint for bits, checkpoint in variants}
    wanted = [(budget, name) for budget in budgets for name in profiles]
    mixes = []
    for budget, name in wanted:
        choice = choose(profiles[name], Budget(bpw=budget), "exact").solution.choice
        mixes.append(Overlay.of_choice(profiles[REAL].header, checkpoints, choice))
    reports = [event for event in compare_many(mixes, base, ids) if isinstance(event, DiffReport)]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (budget, name), report in zip(wanted, reports, strict=True):
        own = reports[wanted.index((budget, REAL))]
        mean, interval = paired_difference(torch.tensor(report.kl_rows), torch.tensor(own.kl_rows))
        found.setdefault(f"{budget} bpw", {})[f"from {name}"] = {
            "kl": report.kl.mean,
            "std_error": report.kl.std_error,
            "minus_from_variants": mean.mean,
            "interval_95": list(interval),
        }
    return found


if __name__ == "__main__":
    main()
