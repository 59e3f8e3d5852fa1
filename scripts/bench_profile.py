"""Every way to profile, on the same rows of SmolLM2: time, ranking, and the KL of the recipes each leads to.

.venv/bin/python scripts/bench_profile.py VARIANTS    # a folder with 2bpw 3bpw 4bpw 6bpw of SmolLM2-135M-Instruct

The part "rows", on 4 rows of 128 tokens:

naive     one full forward a swap (timed on a sample of the swaps)
exact     model_profile --mode exact: only the layers after the swap
sketch    --mode sketch, 16 samples a row, and 8. Goals: 12x faster than exact, Spearman >= 0.97 at 3, 4 and 6 bits,
          recipes within 2 % of exact's; at most 1.25x the time of 16 plain forward and backward passes
diagonal  --mode diagonal: the squared-gradient score, 2 samples a row

The part "time": sketch, diagonal and exact at equal time, sketch and diagonal by what --minutes does: as many rows as
the time allows. Everything on one thread; seconds are those of that thread, so that other load counts little.

The part "speed": seconds a swap of exact and naive alone, exact's of two layers whose mean is that of all.

Writes scripts/bench_results/profile.json; what is in it of the parts not asked for stays. With --work FOLDER, a run
that was stopped goes on (also an unfinished exact profile, whose seconds add up).
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

import make_base  # noqa: E402
from bench_record import birth_certificate, keep  # noqa: E402

from eval.mixes.meter import MixMeter  # noqa: E402
from eval.profile.adaptive_rows import FILLING_SAMPLES, RowLimits, profile_more_rows  # noqa: E402
from eval.profile.exact import Measured, ProfileJob, ProfileOptions, profile_exact  # noqa: E402
from eval.profile.sketch import SketchOptions, profile_sketch  # noqa: E402
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from recompile.costs import Profile, load_profile  # noqa: E402
from recompile.model.rows import read_rows  # noqa: E402
from recompile.model.tokens import Rows  # noqa: E402
from recompile.optimize.choose import Budget, make_problem  # noqa: E402
from recompile.optimize.exact import solve_exact  # noqa: E402

BITS = (2, 3, 4, 6)
BUDGETS = (3.4, 4.4)
LEVEL = "fused"
OPTIONS = ProfileOptions(level=LEVEL)
TOKENS = 128
NAIVE_SAMPLE = 6
MOST_ROWS = 128  # of a mode that fills its time


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@click.command()
@click.argument("variants", type=click.Path(exists=True, path_type=Path))
@click.option("--part", "parts", type=click.Choice(["rows", "time", "speed"]), multiple=True, help="Default: all.")
@click.option("--rows", default=4, show_default=True, help="Rows of 128 tokens that all modes share.")
@click.option("--judge", default=16, show_default=True, help="Rows of 256 tokens that recipes are judged on.")
@click.option("--seconds", default=(60.0, 300.0), multiple=True, help="Equal times.")
@click.option("--work", type=click.Path(path_type=Path), help="Where what is measured is kept; default: nowhere.")
def main(
    variants: Path, parts: tuple[str, ...], rows: int, judge: int, seconds: tuple[float, ...], work: Path | None
) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that seconds spent are kept
    certificate = birth_certificate()
    bench = Bench(variants, rows, judge, work)
    result: dict[str, Any] = json.loads(bench.results.read_text()) if bench.results.exists() else {}
    if "time" in parts or not parts:
        result["equal_time"] = {**certificate, "judged_rows": judge}
        for limit in seconds:
            result["equal_time"][f"{limit:.0f} s"] = equal_time(bench, limit)
            keep(bench.results, result)
    if "speed" in parts or not parts:
        result["seconds_a_swap"] = certificate | seconds_a_swap(bench)
        keep(bench.results, result)
    if "rows" in parts or not parts:
        result["same_rows"] = certificate | {"judged_rows": judge} | same_rows(bench)
        keep(bench.results, result)


def same_rows(bench: Bench) -> dict[str, Any]:
    """Every mode on the rows that they share."""
    exact, exact_s = bench.exact("exact", bench.ids)
    sketch, sketch_s = bench.sketch("sketch", bench.ids, "sketch", 16)
    half, half_s = bench.sketch("sketch-8", bench.ids, "sketch", 8)
    diagonal, diagonal_s = bench.sketch("diagonal", bench.ids, "diagonal", 2)
    naive_s, plain_s = bench.once("naive", bench.naive_seconds), bench.once("plain", lambda: bench.plain_passes(16))
    profiles = {"exact": exact, "sketch": sketch, "sketch of 8 samples": half, "diagonal": diagonal}
    judged = {name: bench.judge(name, profile) for name, profile in profiles.items()}
    return {
        "rows": len(bench.ids),
        "tokens": TOKENS,
        "level": LEVEL,
        "swaps": len(exact.measurements),
        "seconds": {
            "naive": naive_s,
            "exact": exact_s,
            "sketch": sketch_s,
            "sketch of 8 samples": half_s,
            "diagonal": diagonal_s,
        },
        "naive_is": f"extrapolated from {NAIVE_SAMPLE} swaps",
        "plain_16_passes_s": plain_s,
        "exact_over_sketch": exact_s / sketch_s,
        "exact_over_sketch_of_8_samples": exact_s / half_s,
        "naive_over_exact": naive_s / exact_s,
        "sketch_over_plain_16_passes": sketch_s / plain_s,
        "ranking": {name: ranking(exact, profile) for name, profile in profiles.items() if name != "exact"},
        "recipes": compare(judged, "exact"),
    }


def seconds_a_swap(bench: Bench) -> dict[str, Any]:
    """Exact: 4 candidates of 4 groups in layers 7 and 22, without what a run does once. The first wave is left out."""
    ends: list[tuple[int, float]] = []  # (layer, when a swap of it was done)
    with tempfile.TemporaryDirectory() as folder:
        options = ProfileOptions(level=LEVEL, match=tuple(f"model.layers.{layer}.*" for layer in (7, 22)))
        for event in profile_exact(bench.job(bench.ids, Path(folder) / "p.jsonl", options)):
            if isinstance(event, Measured) and event.measurement.group is not None:
                ends.append((int(event.measurement.group.split(".")[2]), time.process_time()))
    first, last = ends[0][1], dict(ends)
    early = [when for layer, when in ends if layer == 7 and when - first > 0.1]  # swaps of one wave end together
    late = [when for layer, when in ends if layer == 22]
    per_layer = ((last[7] - first) / len(early), (last[22] - last[7]) / len(late))
    exact, naive = sum(per_layer) / 2, bench.naive_seconds() / 480
    return {"exact": exact, "naive": naive, "naive_over_exact": naive / exact, "exact_by_layer": per_layer}


def equal_time(bench: Bench, limit: float) -> dict[str, Any]:
    """Every mode with as many rows as it can have in so many seconds."""
    runs, judged = {}, {}
    for name, samples in (("sketch", FILLING_SAMPLES), ("diagonal", 2), ("exact", 0)):
        if name == "exact":
            ids = bench.rows_of(2, max(16, int(limit / (2 * bench.exact_seconds_per_token()))))
            profile, took = bench.exact(f"exact-{limit:.0f}", ids)
        else:
            profile, took = bench.filled(f"{name}-{limit:.0f}", name, samples, limit)
        header = profile.header
        runs[name] = {"seconds": took, "rows": header.rows, "tokens": header.row_tokens, "samples": samples or None}
        judged[name] = bench.judge(f"{name}-{limit:.0f}", profile)
        say(f"{limit:.0f} s: {name} took {took:.0f} s for {header.rows} rows x {header.row_tokens}")
    return {"runs": runs, "recipes": compare(judged, "sketch")}


class Bench:
    results = ROOT / "scripts" / "bench_results" / "profile.json"

    def __init__(self, variants: Path, rows: int, judge: int, work: Path | None) -> None:
        self.base = open_checkpoint(make_base.build())
        self.candidates: list[tuple[int, Checkpoint]] = [(b, open_checkpoint(variants / f"{b}bpw")) for b in BITS]
        self.ids = self.rows_of(rows, TOKENS)
        self.report = read_rows([self.base.path], "report", judge, 256, None, None, None)[0].ids
        self.folder = Path(tempfile.mkdtemp(prefix="bench-profile-")) if work is None else work
        self.folder.mkdir(parents=True, exist_ok=True)
        self.meter: MixMeter | None = None

    def rows_of(self, rows: int, tokens: int) -> torch.Tensor:
        return read_rows([self.base.path], "choose", rows, tokens, None, None, None)[0].ids

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """A number that is measured once a work folder."""
        path = self.folder / f"{name}.seconds"
        if not path.exists():
            path.write_text(str(measure()))
        return float(path.read_text())

    def timed(self, name: str, make: Callable[[Path], Iterator[object]]) -> tuple[Profile, float]:
        """The profile that a profiler leaves at a path, and the seconds of all runs at it so far."""
        path, spent = self.folder / f"{name}.jsonl", self.folder / f"{name}.seconds"
        done = self.folder / f"{name}.done"
        if not done.exists():
            before = float(spent.read_text()) if spent.exists() else 0.0
            began = time.process_time()
            try:
                for _ in make(path):
                    pass
            finally:
                spent.write_text(str(before + time.process_time() - began))
            done.touch()
        say(f"{name}: {float(spent.read_text()):.0f} s")
        return load_profile(path), float(spent.read_text())

    def exact(self, name: str, ids: torch.Tensor) -> tuple[Profile, float]:
        return self.timed(name, lambda path: profile_exact(self.job(ids, path)))

    def job(self, ids: torch.Tensor, path: Path, options: ProfileOptions = OPTIONS) -> ProfileJob:
        return ProfileJob(self.base, 3, self.candidates, ids, path, options)

    def exact_seconds_per_token(self) -> float:
        """Of a whole exact profile, from the swaps of two layers whose mean is the middle."""
        middle = ProfileOptions(level=LEVEL, match=("model.layers.7.*", "model.layers.22.*"))
        ids = self.rows_of(2, 64)
        profile, took = self.timed("middle", lambda path: profile_exact(self.job(ids, path, middle)))
        return took * self.layers / 2 / profile.header.rows / profile.header.row_tokens

    @property
    def layers(self) -> int:
        return int(self.base.config["num_hidden_layers"])

    def sketch(self, name: str, ids: torch.Tensor, mode: str, samples: int) -> tuple[Profile, float]:
        settings = SketchOptions(samples, mode=mode)
        return self.timed(name, lambda path: profile_sketch(self.job(ids, path), settings))

    def filled(self, name: str, mode: str, samples: int, limit: float) -> tuple[Profile, float]:
        """What --minutes does."""
        rows = read_rows([self.base.path], "choose", MOST_ROWS, TOKENS, None, None, None)[0]
        settings, limits = SketchOptions(samples, mode=mode), RowLimits(None, limit / 60)

        def block(some: Rows, first: int, path: Path) -> Iterator[object]:
            job = replace(self.job(some.ids, path), rows_sha256=some.sha256)
            return profile_sketch(job, replace(settings, first_row=first))

        clock = time.process_time
        return self.timed(name, lambda path: profile_more_rows(rows, path, limits, block, settings, clock=clock))

    def plain(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(str(self.base.path), dtype=torch.float32).eval()

    def naive_seconds(self) -> float:
        """One whole forward, with logits and KL, for every swap: the time of a sample of swaps, scaled."""
        from eval.metrics import kl_divergence

        model = self.plain()
        names = [name for name, m in self.candidates[0][1].modules.items() if m.is_quantized]
        random.seed(0)
        swaps = 4 * len({self._group(name) for name in names})
        with torch.inference_mode():
            reference = model(self.ids).logits
            began = time.process_time()
            for name in random.sample(names, NAIVE_SAMPLE):
                weight = model.get_parameter(f"{name}.weight")
                kept = weight.data
                weight.data = random.choice(self.candidates)[1].load(f"{name}.weight").float()
                kl_divergence(reference, model(self.ids).logits).mean(1)
                weight.data = kept
            return (time.process_time() - began) * swaps / NAIVE_SAMPLE

    @staticmethod
    def _group(module: str) -> str:
        from recompile.costs import group_name

        return group_name(module, LEVEL)

    def plain_passes(self, count: int) -> float:
        """Forward and cross-entropy backward with weight gradients, `count` times on the same rows."""
        model = self.plain()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        began = time.process_time()
        for _ in range(count):
            logits = model(self.ids).logits
            with torch.no_grad():
                labels = torch.distributions.Categorical(logits=logits).sample()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            model.zero_grad()
        return time.process_time() - began

    def judge(self, name: str, profile: Profile) -> dict[float, np.ndarray]:
        """KL of every judging row of the recipes that a profile gives, by budget."""
        kept = {budget: self.folder / f"{name}-{len(self.report)}-rows-{budget}.npy" for budget in BUDGETS}
        for budget, path in kept.items():
            if not path.exists():
                np.save(path, self.kl_of_recipe(profile, budget))
        return {budget: np.load(path) for budget, path in kept.items()}

    def kl_of_recipe(self, profile: Profile, budget: float) -> np.ndarray:
        if self.meter is None:
            by_label = {str(b): checkpoint for b, checkpoint in self.candidates}
            self.meter = MixMeter(profile.header, by_label, self.base, self.report)
        choice = solve_exact(make_problem(profile), Budget(bpw=budget).bits(profile)).choice
        return np.array(self.meter.measure(choice))


def ranking(exact: Profile, other: Profile) -> dict[str, dict[str, float]]:
    """Spearman and median ratio against exact, per width."""
    found = {}
    for bits in BITS:
        swaps = [swap for swap in exact.measurements if swap[1] == str(bits)]
        wanted = np.array([exact.measurements[swap].mean for swap in swaps])
        given = np.array([other.measurements[swap].mean for swap in swaps])
        found[str(bits)] = {
            "spearman": float(spearmanr(wanted, given)[0]),
            "median_ratio": float(np.median(given / wanted)),
        }
    return found


def describe(values: np.ndarray) -> dict[str, float]:
    return {"kl": float(values.mean()), "std_error": float(values.std(ddof=1) / len(values) ** 0.5)}


def compare(judged: Mapping[str, Mapping[float, np.ndarray]], against: str) -> dict[str, dict[str, Any]]:
    """KL of every recipe, and its paired difference from one of them with a 95 % interval."""
    found: dict[str, dict[str, Any]] = {}
    for name, by_budget in judged.items():
        for budget, values in by_budget.items():
            entry = describe(values)
            difference = values - judged[against][budget]
            half = 1.96 * float(difference.std(ddof=1) / len(values) ** 0.5)
            entry |= {f"minus_{against}": float(difference.mean()), "half_width_95": half}
            found.setdefault(f"{budget} bpw", {})[name] = entry
    return found


if __name__ == "__main__":
    main()
