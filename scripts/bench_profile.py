"""Every way to profile, on the same rows of SmolLM2: time, ranking, and the KL of the recipes each leads to.

.venv/bin/python scripts/bench_profile.py VARIANTS    # a folder with 2bpw 3bpw 4bpw 6bpw of SmolLM2-135M-Instruct

naive     one full forward a swap (timed on a sample of the swaps)
exact     model_profile --mode exact: only the layers after the swap, candidates together
sketch    --mode sketch, 16 samples a row. Goals: 12x faster than exact, Spearman >= 0.97 at 3, 4 and 6 bits, recipes
          within 2 % of exact's; at most 1.25x the time of 16 plain forward and backward passes
diagonal  --mode diagonal: the squared-gradient score, 2 samples a row

Then sketch, diagonal and exact once more at equal wall time: as many rows as the time allows. Everything on one thread.
Writes scripts/bench_results/profile.json.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Mapping
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

from eval.profile import ProfileOptions, profile_exact  # noqa: E402
from eval.refine import MixOracle  # noqa: E402
from eval.sketch import SketchOptions, profile_sketch  # noqa: E402
from recompile.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from recompile.cli.options import read_rows  # noqa: E402
from recompile.costs import Profile  # noqa: E402
from recompile.optimize.choose import Budget, make_problem  # noqa: E402
from recompile.optimize.exact import solve_exact  # noqa: E402

BITS = (2, 3, 4, 6)
BUDGETS = (3.4, 4.4)
LEVEL = "fused"
TOKENS = 128
NAIVE_SAMPLE = 6


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@click.command()
@click.argument("variants", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=4, show_default=True, help="Rows of 128 tokens that all modes share.")
@click.option("--judge", default=16, show_default=True, help="Rows of 256 tokens that recipes are judged on.")
@click.option("--seconds", default=(60.0, 300.0), multiple=True, help="Equal wall times.")
def main(variants: Path, rows: int, judge: int, seconds: tuple[float, ...]) -> None:
    torch.set_num_threads(1)
    result = birth_certificate()
    bench = Bench(variants, rows, judge)
    exact, exact_s = bench.exact(bench.ids)
    sketch, sketch_s = bench.sketch(bench.ids, "sketch", 16)
    diagonal, diagonal_s = bench.sketch(bench.ids, "diagonal", 2)
    naive_s = bench.naive_seconds()
    plain_s = bench.plain_passes(16)
    judged = {"exact": bench.judge(exact), "sketch": bench.judge(sketch), "diagonal": bench.judge(diagonal)}
    uniform = {str(b): bench.kl({group.name: str(b) for group in exact.header.groups}) for b in (3, 4)}
    result |= {
        "rows": rows,
        "tokens": TOKENS,
        "level": LEVEL,
        "swaps": len(exact.measurements),
        "seconds": {"naive": naive_s, "exact": exact_s, "sketch": sketch_s, "diagonal": diagonal_s},
        "naive_is": f"extrapolated from {NAIVE_SAMPLE} swaps",
        "plain_16_passes_s": plain_s,
        "exact_over_sketch": exact_s / sketch_s,
        "naive_over_exact": naive_s / exact_s,
        "sketch_over_plain_16_passes": sketch_s / plain_s,
        "ranking": {name: ranking(exact, p) for name, p in (("sketch", sketch), ("diagonal", diagonal))},
        "judged_rows": judge,
        "uniform": {bits: describe(values) for bits, values in uniform.items()},
        "recipes": compare(judged, "exact"),
        "equal_time": {},
    }
    keep(bench.results, result)
    for limit in seconds:
        found = {}
        for name, per_row in (
            ("exact", exact_s / rows),
            ("sketch", sketch_s / rows / 2),
            ("diagonal", diagonal_s / rows),
        ):
            count = max(1, int(limit / per_row))
            tokens = TOKENS
            if count * per_row > limit:  # not even one row: a shorter one
                count, tokens = 2, max(16, int(TOKENS * limit / per_row / 2))
            ids = bench.more_rows(count, tokens)
            samples = 8 if name == "sketch" else 2
            profile, took = bench.exact(ids) if name == "exact" else bench.sketch(ids, name, samples)
            found[name] = {"seconds": took, "rows": len(ids), "tokens": tokens, "recipes": bench.judge(profile)}
            say(f"{limit:.0f} s: {name} {took:.0f} s")
        recipes = compare({name: entry.pop("recipes") for name, entry in found.items()}, "sketch")
        result["equal_time"][f"{limit:.0f}"] = {"runs": found, "recipes": recipes}
        keep(bench.results, result)


class Bench:
    results = ROOT / "scripts" / "bench_results" / "profile.json"

    def __init__(self, variants: Path, rows: int, judge: int) -> None:
        self.base = open_checkpoint(make_base.build())
        self.candidates: list[tuple[int, Checkpoint]] = [(b, open_checkpoint(variants / f"{b}bpw")) for b in BITS]
        self.ids = self.more_rows(rows, TOKENS)
        self.report = read_rows([self.base.path], "report", judge, 256, None, None, None)[0].ids
        self.folder = Path(tempfile.mkdtemp(prefix="bench-profile-"))
        self.count = 0
        self.oracle: MixOracle | None = None

    def more_rows(self, rows: int, tokens: int) -> torch.Tensor:
        return read_rows([self.base.path], "choose", rows, tokens, None, None, None)[0].ids

    def _path(self) -> Path:
        self.count += 1
        return self.folder / f"{self.count}.jsonl"

    def exact(self, ids: torch.Tensor) -> tuple[Profile, float]:
        began = time.perf_counter()
        *_, profile = profile_exact(self.base, 3, self.candidates, ids, self._path(), ProfileOptions(level=LEVEL))
        took = time.perf_counter() - began
        say(f"exact: {took:.0f} s")
        assert isinstance(profile, Profile), "the profile comes last"
        return profile, took

    def sketch(self, ids: torch.Tensor, mode: str, samples: int) -> tuple[Profile, float]:
        began = time.perf_counter()
        options = SketchOptions(samples, mode=mode)
        *_, profile = profile_sketch(
            self.base, 3, self.candidates, ids, self._path(), ProfileOptions(level=LEVEL), options
        )
        took = time.perf_counter() - began
        say(f"{mode}, {samples} samples: {took:.0f} s")
        assert isinstance(profile, Profile), "the profile comes last"
        return profile, took

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
            began = time.perf_counter()
            for name in random.sample(names, NAIVE_SAMPLE):
                weight = model.get_parameter(f"{name}.weight")
                kept = weight.data
                weight.data = random.choice(self.candidates)[1].load(f"{name}.weight").float()
                kl_divergence(reference, model(self.ids).logits).mean(1)
                weight.data = kept
            return (time.perf_counter() - began) * swaps / NAIVE_SAMPLE

    @staticmethod
    def _group(module: str) -> str:
        from recompile.costs import group_name

        return group_name(module, LEVEL)

    def plain_passes(self, count: int) -> float:
        """Forward and cross-entropy backward with weight gradients, `count` times on the same rows."""
        model = self.plain()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        began = time.perf_counter()
        for _ in range(count):
            logits = model(self.ids).logits
            with torch.no_grad():
                labels = torch.distributions.Categorical(logits=logits).sample()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
            model.zero_grad()
        return time.perf_counter() - began

    def kl(self, choice: Mapping[str, str]) -> np.ndarray:
        """KL of every judging row."""
        assert self.oracle is not None, "made with the first recipe"
        return np.array(self.oracle.measure(choice))

    def judge(self, profile: Profile) -> dict[float, np.ndarray]:
        if self.oracle is None:
            by_label = {str(b): checkpoint for b, checkpoint in self.candidates}
            self.oracle = MixOracle(profile.header, by_label, self.base, self.report, self.report)
        problem = make_problem(profile)
        found = {}
        for budget in BUDGETS:
            found[budget] = self.kl(solve_exact(problem, Budget(bpw=budget).bits(profile)).choice)
        return found


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
