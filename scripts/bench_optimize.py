"""Which optimizer makes the best recipe at equal bytes: ours and the baselines that people use, one judge for all.

    python scripts/bench_optimize.py --variants DIR --work DIR            # all methods, all budgets
    python scripts/bench_optimize.py ... --budgets 3.4 --methods uniform exact local --report-rows 12

DIR holds 2bpw, 3bpw, ... of one base. modelopt's own search joins with --modelopt ENV/bin/python, the Python of an
environment that has it (scripts/modelopt_choice.py says how to make one). Profiles, scores and choices are kept in
--work and not made again. Searches use rows of the role "choose"; the judge uses rows of the role "report" (three and
more domains), which nothing else sees. Every choice is checked to be within its budget. Methods are functions from
(Bench, budget in bits) to a choice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bench_record  # noqa: E402

from eval.diff import DiffOptions  # noqa: E402
from eval.metrics import paired_difference  # noqa: E402
from eval.mixes.evaluator import MixEvaluator  # noqa: E402
from eval.mixes.mixes_file import MixesFile  # noqa: E402
from eval.mixes.oracle import MixOracle  # noqa: E402
from eval.profile.exact import Measured, ProfileJob, ProfileOptions, profile_exact  # noqa: E402
from eval.profile.sketch import SketchOptions, profile_sketch, samples_beside, squared_gradient_scores  # noqa: E402
from eval.search.initial_recipes import better_start  # noqa: E402
from eval.search.job import Search  # noqa: E402
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from recompile.costs import Profile  # noqa: E402
from recompile.model.rows import RowOptions, read_rows  # noqa: E402
from recompile.optimize.baselines import make_baselines  # noqa: E402
from recompile.optimize.budget import Budget  # noqa: E402
from recompile.optimize.choose import Rules, limits_of, make_problem, prepare_problem  # noqa: E402
from recompile.optimize.exact import solve_exact  # noqa: E402
from recompile.optimize.greedy import solve_greedy  # noqa: E402
from recompile.optimize.limits import Row  # noqa: E402
from recompile.optimize.problem import Problem, evaluate, prepare, reachable_range, with_costs  # noqa: E402
from recompile.optimize.solvers import SOLVERS  # noqa: E402

BITS_KEPT = 0.69  # exponent of a gain in exllamav3's choice: gain ** 0.69 per bit
SWAP_ROWS = 1  # of exllamav3's measured swaps: about the time of the searches, once for all budgets
Choice = Mapping[str, str]


@dataclass(frozen=True)
class Settings:
    level: str
    mode: str  # of the profile that greedy, exact, local and the others start from
    search_rows: int
    gradient_rows: int  # of the squared-gradient score, which is quick: more rows in about the time of the sketch
    length: int
    samples: int
    minutes: float  # for every method that searches with the models
    device: str = "cpu"


class Bench:
    """Checkpoints, rows and profiles, each made when first asked for and kept on disk."""

    def __init__(
        self,
        base: Path,
        variants: Path,
        bits: Sequence[str],
        work: Path,
        settings: Settings,
        modelopt: Path | None = None,
    ) -> None:
        self.work, self.settings, self.variants = work, settings, variants
        self.modelopt = modelopt  # the Python of an environment that has it
        self._oracle: MixOracle | None = None
        self.reference = open_checkpoint(base)
        self.checkpoints = {label: open_checkpoint(variants / f"{label}bpw") for label in bits}
        self.base = "3" if "3" in self.checkpoints else next(iter(self.checkpoints))
        work.mkdir(parents=True, exist_ok=True)

    def rows(self, role: str, count: int) -> torch.Tensor:
        found, _ = read_rows([self.reference.path], role, count, self.settings.length, None, None, None)
        return found.ids

    def rows_of(self, mode: str) -> torch.Tensor:
        if mode == "exact":
            return self.rows("choose", SWAP_ROWS)
        return self.rows("choose", self.settings.gradient_rows) if mode == "diagonal" else self.search_ids

    @cached_property
    def search_ids(self) -> torch.Tensor:
        return self.rows("choose", self.settings.search_rows)

    def profile(
        self,
        mode: str,
        context: str = "clean",
        base: str | None = None,
        checkpoints: Mapping[str, Checkpoint] | None = None,
    ) -> Profile:
        """A profile of all variants, from `<work>/profile-....jsonl` as far as it is there."""
        checkpoints = checkpoints or self.checkpoints
        base = base or self.base
        kind = "" if checkpoints is self.checkpoints else "-other"
        path = self._path(mode, context, base, kind)
        options = ProfileOptions(level=self.settings.level, context=context, device=self.settings.device)
        candidates = [(int(label), checkpoint) for label, checkpoint in checkpoints.items()]
        order = sorted(candidates, key=lambda entry: str(entry[0]) != base)
        job = ProfileJob(self.reference, int(base), order, self.rows_of(mode), path, options)
        if mode == "exact":
            events = profile_exact(job)
        else:
            sketch = SketchOptions(samples=self.settings.samples, mode=mode)
            events = profile_sketch(job, sketch)  # type: ignore[assignment]
        began, last = time.monotonic(), 0.0
        found: object = None
        for found in events:
            if isinstance(found, Measured) and time.monotonic() - last > 20:
                last = time.monotonic()
                say(f"  {path.name}: {found.done} of {found.total} swaps, {last - began:.0f} s")
        assert isinstance(found, Profile), "a profiler ends with the profile"
        return found

    @cached_property
    def main(self) -> Profile:
        return self.profile(self.settings.mode)

    @cached_property
    def scores(self) -> Mapping[tuple[str, str], float] | None:
        header = self.main.header
        sketch = samples_beside(self._path(self.settings.mode, "clean", self.base), header)
        return None if sketch is None else squared_gradient_scores(sketch, header.row_tokens)

    def _path(self, mode: str, context: str, base: str, kind: str = "") -> Path:
        return self.work / f"profile-{mode}-{context}-{base}-{self.settings.level}{kind}.jsonl"

    @cached_property
    def problem(self) -> Problem:
        return prepare(prepare_problem(self.main, Rules()))

    @cached_property
    def mixes(self) -> MixEvaluator:
        options = DiffOptions(device=self.settings.device)
        return MixEvaluator(self.main.header, self.checkpoints, self.reference, options=options, holds=True)

    def with_costs(self, costs: Mapping[tuple[str, str], float]) -> Problem:
        """The judge's sizes with costs of another origin."""
        return with_costs(self.problem, lambda group, option: costs[group.name, option.source])

    def oracle(self, ids: torch.Tensor) -> MixOracle:
        if self._oracle is None:
            models = self.main.header, self.checkpoints, self.reference
            self._oracle = MixOracle(*models, ids, pool=ids, options=DiffOptions(device=self.settings.device))
        return self._oracle

    def limits(self, bits: int) -> list[Row]:
        budget = Budget(bpw=bits / max(1, self.main.counted_weights))
        return limits_of(self.main, self.problem, budget, Rules(), bits)


# ---- methods ---------------------------------------------------------------------------------------------------------


def uniform(bench: Bench, bits: int) -> Choice:
    """The largest variant within the budget."""
    return _rival(bench, bits, lambda name: name.startswith("uniform") and "," not in name)


def attention_plus_1(bench: Bench, bits: int) -> Choice:
    """The largest variant, attention one rung up from the first layer on, then the rest."""
    return _rival(bench, bits, lambda name: "attention" in name)


def first_last(bench: Bench, bits: int) -> Choice:
    return _rival(bench, bits, lambda name: "first and last" in name)


def _rival(bench: Bench, bits: int, wanted: Callable[[str], bool]) -> Choice:
    recipe = solve_exact(bench.problem, bits).choice
    for baseline in make_baselines(bench.main, bench.problem, recipe, bench.limits(bits)):
        if baseline.within is not None and wanted(baseline.name):
            return baseline.within
    return recipe  # the same mix as the recipe, which is why it is no baseline


def weight_error(bench: Bench, bits: int) -> Choice:
    """Knapsack on the squared error of the weights, as AutoRound's and others' data-free scores."""
    path = bench.work / f"weight-error-{bench.settings.level}.json"
    if not path.exists():
        found: dict[str, dict[str, float]] = {}
        for group in bench.main.header.groups:
            found[group.name] = dict.fromkeys(bench.checkpoints, 0.0)
            for module in group.modules:
                dense = bench.reference.load(f"{module}.weight").float()
                for label, checkpoint in bench.checkpoints.items():
                    error = checkpoint.load(f"{module}.weight").float() - dense
                    found[group.name][label] += float(error.double().square().sum())
        path.write_text(json.dumps(found))
    table = json.loads(path.read_text())
    costs = {(name, label): cost for name, of in table.items() for label, cost in of.items()}
    return solve_exact(bench.with_costs(costs), bits).choice


def exllamav3_greedy(bench: Bench, bits: int) -> Choice:
    """exllamav3's way: what each swap gains in a quantized base, best gain ** 0.69 per bit first, once through. The
    base is the largest variant within the budget, as its users choose theirs."""
    whole = {label: evaluate(bench.problem, {g.name: label for g in bench.problem.groups})[0] for label in
             bench.checkpoints}  # fmt: skip
    base = max((label for label in whole if whole[label] <= bits), key=int)
    profile = bench.profile("exact", "base", base)
    problem = prepare(make_problem(profile))
    choice = {group.name: base for group in problem.groups}
    left = bits - evaluate(problem, choice)[0]
    steps = []
    for group in problem.groups:
        here = group.option(base)
        assert here is not None
        for option in group.options:
            gain, added = here.cost - option.cost, option.bits - here.bits
            if gain > 0 and added > 0:
                steps.append((gain**BITS_KEPT / added, group.name, option))
    for _, name, option in sorted(steps, key=lambda step: -step[0]):
        group = next(group for group in problem.groups if group.name == name)
        now = group.option(choice[name])
        assert now is not None
        if option.bits > now.bits and option.cost < now.cost and option.bits - now.bits <= left:
            left -= option.bits - now.bits
            choice[name] = option.source
    return choice


def greedy(bench: Bench, bits: int) -> Choice:
    return solve_greedy(bench.problem, bits).choice


def exact(bench: Bench, bits: int) -> Choice:
    return solve_exact(bench.problem, bits).choice


def squared_gradient(bench: Bench, bits: int) -> Choice:
    """Knapsack on grad^2 x output-error^2, with the judge's quantizer."""
    return solve_exact(prepare(make_problem(bench.profile("diagonal"))), bits).choice


def squared_gradient_symmetric(bench: Bench, bits: int) -> Choice:
    """The same score with a symmetric quantizer that spans max|w| with 2^(b-1) - 1 levels a side; the judge's sizes."""
    made = {label: open_checkpoint(_symmetric(bench, label)) for label in bench.checkpoints}
    profile = bench.profile("diagonal", checkpoints=made)
    costs = {(g.name, label): cost.kl_nats for g in profile.header.groups for label in g.bits
             if (cost := profile.cost(g.name, label)) is not None}  # fmt: skip
    return solve_exact(bench.with_costs(costs), bits).choice


def _symmetric(bench: Bench, label: str) -> Path:
    from safetensors.torch import load_file, save_file

    from recompile.formats.packed_int import IntScheme, pack

    source, out = bench.checkpoints[label], bench.work / f"symmetric-{label}bpw"
    if out.exists():
        return out
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source.path, partial)
    (file,) = partial.glob("*.safetensors")
    tensors = load_file(file)
    for module in source.modules.values():
        if not module.is_quantized:
            continue
        weight = bench.reference.load(f"{module.name}.weight").float()
        groups = tensors[f"{module.name}.weight_scale"].shape[1]
        zeros = tensors.get(f"{module.name}.weight_zero_point")  # of a variant with zero points: they become 0
        scheme = IntScheme(int(label), weight.shape[1] // groups, zeros is None)
        blocks = weight.reshape(weight.shape[0], groups, -1)
        scale = (blocks.abs().amax(-1) / (2 ** (int(label) - 1) - 1)).clamp(min=1e-8).bfloat16()
        codes = (blocks / scale.float()[..., None]).round().clamp(scheme.code_min, scheme.code_max)
        zero_point = None if zeros is None else torch.zeros_like(scale, dtype=torch.int8)
        parts = pack(codes.reshape(weight.shape).to(torch.int8), scale, zero_point, scheme)
        tensors |= {f"{module.name}.{part}": value for part, value in parts.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    partial.rename(out)
    return out


def evolutionary(bench: Bench, bits: int) -> Choice:
    """Level-switch mutations, KL fitness on growing minibatches, from the exact choice: EvoPress's search, our rows."""
    rng, limits = random.Random(0), bench.limits(bits)
    problem, rows = bench.problem, len(bench.search_ids)
    best = [next(n for n, o in enumerate(g.options) if o.source == source)
            for g, source in zip(problem.groups, solve_exact(problem, bits).choice.values(), strict=True)]  # fmt: skip
    sizes = [sorted(range(len(g.options)), key=lambda n: g.options[n].bits) for g in problem.groups]

    def mutate() -> list[int]:
        while True:
            child = list(best)
            for _ in range(rng.choice([1, 1, 2, 3])):
                for step in (1, -1):
                    group = rng.randrange(len(child))
                    at = sizes[group].index(child[group]) + step
                    if 0 <= at < len(sizes[group]):
                        child[group] = sizes[group][at]
            if child != best and all(row.used(child) <= row.limit for row in limits):
                return child

    def named(numbers: Sequence[int]) -> Choice:
        return {g.name: g.options[n].source for g, n in zip(problem.groups, numbers, strict=True)}

    until = time.monotonic() + 60 * bench.settings.minutes
    while time.monotonic() < until:
        alive = [best, *(mutate() for _ in range(15))]
        for keep, count in ((6, max(1, rows // 8)), (2, max(1, rows // 3)), (1, rows)):
            some = bench.search_ids[rng.sample(range(rows), count)]
            found = bench.mixes.kl_rows([named(child) for child in alive], some)
            order = sorted(range(len(alive)), key=lambda place: sum(found[place]))
            alive = [alive[place] for place in order[:keep]]
            if time.monotonic() > until:
                return named(best)
        best = alive[0]
    return named(best)


def by_modelopt(grouped: bool) -> Callable[[Bench, int], Choice]:
    """NVIDIA modelopt's `auto_quantize` in its own environment: squared gradients, its symmetric integers, its solver.

    grouped: q, k, v and gate, up of a layer share a format, as modelopt has it unless told otherwise.
    """

    def run(bench: Bench, bits: int) -> Choice:
        level = bench.settings.level
        if bench.modelopt is None or level not in ("tensor", "fused"):
            raise click.ClickException("modelopt wants --modelopt ENV/bin/python, and --level tensor or fused")
        fused = grouped or level == "fused"
        kind = f"modelopt-{'groups' if fused else 'single'}"
        modules = [module for group in bench.main.header.groups for module in group.modules]
        smallest = bench.checkpoints[min(bench.checkpoints, key=int)]
        request = {
            "base": str(bench.reference.path),
            "ids": bench.rows_of("diagonal").tolist(),
            "group_size": smallest.scheme(smallest.modules[modules[0]]).group_size,
            "bits": {
                label: {module: 8 * checkpoint.modules[module].size_bytes for module in modules}
                for label, checkpoint in bench.checkpoints.items()
            },
            "fused": fused,
            "state": str((bench.work / f"{kind}-{bench.settings.gradient_rows}.pth").absolute()),
            "budget_bits": bits - bench.problem.fixed_bits,
        }
        asked, answered = (bench.work / f"{kind}-{bits}-{what}.json" for what in ("request", "answer"))
        asked.write_text(json.dumps(request))
        command = [str(bench.modelopt), str(ROOT / "scripts" / "modelopt_choice.py"), str(asked), str(answered)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        with (bench.work / f"{kind}-{bits}.log").open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads})
        if done.returncode:
            raise click.ClickException(f"modelopt failed ({done.returncode}); {log.name} says why")
        answer = json.loads(answered.read_text())
        by_module = answer["choice"]
        counts = {label: list(by_module.values()).count(label) for label in bench.checkpoints}
        say(f"  {kind}: {counts} modules by bits, effective_bits {answer['effective_bits']:.4f}")
        return {group.name: by_module[group.modules[0]] for group in bench.main.header.groups}

    return run


def by_search(name: str) -> Callable[[Bench, int], Choice]:
    """A solver of the command that needs the models, given the same time and rows as the others."""

    def run(bench: Bench, bits: int) -> Choice:
        settings = bench.settings
        budget = Budget(bpw=bits / max(1, bench.main.counted_weights))
        measured = MixesFile(bench.work / f"mixes-{name}-{settings.level}-{settings.mode}.json")
        search = Search(
            profile=bench.main,
            problem=bench.problem,
            budget_bits=bits,
            limits=limits_of(bench.main, bench.problem, budget, Rules(), bits),
            start=solve_exact(bench.problem, bits).choice,
            reference=bench.reference,
            checkpoints=bench.checkpoints,
            where=RowOptions(settings.search_rows, settings.length),
            steps=None,
            minutes=settings.minutes,
            journal=bench.work / f"{name}-{bits}-{settings.level}.jsonl",
            measured=measured,
            device=settings.device,
            scores=bench.scores,
        )
        with closing(measured):
            return SOLVERS[name].load()(better_start(search) if name == "refine" else search)

    return run


METHODS: dict[str, Callable[[Bench, int], Choice]] = {
    "uniform": uniform,
    "attention+1": attention_plus_1,
    "first-last+2": first_last,
    "weight-error": weight_error,
    "exllamav3-greedy": exllamav3_greedy,
    "greedy": greedy,
    "exact": exact,
    "squared-gradient": squared_gradient,
    "squared-gradient-symmetric": squared_gradient_symmetric,
    "modelopt": by_modelopt(grouped=True),
    "modelopt-ungrouped": by_modelopt(grouped=False),
    "evolutionary": evolutionary,
    **{name: by_search(name) for name in SOLVERS if SOLVERS[name].runs_models},
}


# ---- the judge -------------------------------------------------------------------------------------------------------


def judge(bench: Bench, choices: Mapping[str, Choice], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """KL of every choice on rows that no search has seen: float64 [rows], nats per token."""
    known: dict[str, torch.Tensor] = {}
    found = {}
    for name, choice in choices.items():
        key = json.dumps(dict(choice), sort_keys=True)
        if key not in known:
            path = bench.work / f"judged-{hashlib.sha256((key + str(ids.tolist())).encode()).hexdigest()[:16]}.json"
            if not path.exists():
                path.write_text(json.dumps(bench.oracle(ids).measure(choice)))
            known[key] = torch.tensor(json.loads(path.read_text()), dtype=torch.float64)
        found[name] = known[key]
    return found


def say(text: str) -> None:
    click.echo(text, err=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--base", type=click.Path(path_type=Path), help="The dense model; default SmolLM2-135M-Instruct.")
@click.option("--variants", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--bits", default="2 3 4 6", show_default=True, help="Variants to use, by their names.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("bench-optimize"), show_default=True)
@click.option("--budgets", default="2.9 3.4 4.0 4.4 5.0", show_default=True, help="Bits per weight.")
@click.option("--methods", help=f"Default: {' '.join(METHODS)}; the modelopt ones with --modelopt.")
@click.option("--modelopt", type=click.Path(path_type=Path, exists=True), help="A Python that has nvidia-modelopt.")
@click.option("--level", type=click.Choice(["tensor", "fused", "block", "layer"]), default="tensor", show_default=True)
@click.option("--mode", type=click.Choice(["exact", "sketch", "diagonal"]), default="sketch", show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--search-rows", default=12, show_default=True)
@click.option("--gradient-rows", default=24, show_default=True, help="Rows of the squared-gradient scores.")
@click.option("--report-rows", default=40, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--minutes", default=6.0, show_default=True, help="For every method that searches with the models.")
@click.option("--device", default="cpu", show_default=True, help="Of profiles, searches and the judge.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Result file; default scripts/bench_results/optimize.json."
)
def main(
    base: Path | None,
    variants: Path,
    bits: str,
    work: Path,
    budgets: str,
    methods: str | None,
    modelopt: Path | None,
    level: str,
    mode: str,
    samples: int,
    search_rows: int,
    gradient_rows: int,
    report_rows: int,
    length: int,
    minutes: float,
    device: str,
    out: Path | None,
) -> None:
    """Compare optimizers at equal bytes on one model."""
    if base is None:
        import make_base

        base = Path(make_base.build())
    certificate = bench_record.birth_certificate() | {"threads": torch.get_num_threads()}
    settings = Settings(level, mode, search_rows, gradient_rows, length, samples, minutes, device)
    bench = Bench(base, variants, bits.split(), work, settings, modelopt)
    chosen = [name for name in METHODS if modelopt is not None or not name.startswith("modelopt")]
    if methods is not None:
        chosen = methods.split()
    report_ids = bench.rows("report", report_rows)
    for bpw in budgets.split():
        budget = math.floor(float(bpw) * bench.main.counted_weights + 1e-6)
        low, high = reachable_range(bench.problem)
        if not low <= budget <= high:
            raise click.ClickException(f"{bpw} bpw is out of reach; {low} to {high} bits are reachable")
        choices: dict[str, Choice] = {}
        seconds: dict[str, float] = {}
        for name in chosen:
            path = work / f"choice-{name}-{bpw}-{level}-{mode}.json"
            if path.exists():
                kept = json.loads(path.read_text())
                choices[name], seconds[name] = kept["choice"], kept["seconds"]
            else:
                began = time.monotonic()
                choices[name] = dict(METHODS[name](bench, budget))
                seconds[name] = time.monotonic() - began
                path.write_text(json.dumps({"choice": choices[name], "seconds": seconds[name]}))
            size = evaluate(bench.problem, choices[name])[0]
            assert size <= budget, f"{name} is over its budget: {size} > {budget} bits"
            say(f"{bpw} bpw, {name}: {seconds[name]:.1f} s")
        reports = judge(bench, choices, report_ids)
        best = min(reports, key=lambda name: float(reports[name].mean()))
        table: dict[str, dict[str, object]] = {}
        for name, rows in sorted(reports.items(), key=lambda entry: float(entry[1].mean())):
            difference, interval = paired_difference(rows, reports[best])
            size = evaluate(bench.problem, choices[name])[0]
            error = float(rows.std()) / len(rows) ** 0.5
            table[name] = {
                "kl": float(rows.mean()),
                "std_error": error,
                "bpw": size / bench.main.counted_weights,
                "against_best": difference.mean,
                "against_best_interval": list(interval),
                "seconds": seconds[name],
            }
            click.echo(
                f"{bpw} bpw  {name:28} KL {float(rows.mean()):.4f} ± {error:.4f}  "
                f"{size / bench.main.counted_weights:.4f} bpw  "
                f"{difference.mean:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}] against {best}"
            )
        target = out or bench_record.RESULTS / "optimize.json"
        result = json.loads(target.read_text()) if target.exists() else {}  # tables that are not asked for stay
        result[f"{bpw} bpw, level {level}"] = certificate | {
            "model": bench.reference.label.rsplit("/", 1)[-1],
            "settings": vars(bench.settings) | {"report_rows": len(report_ids), "bits": bits},
            "results": table,
        }
        bench_record.keep(target, result)


if __name__ == "__main__":
    main()
