"""`model_optimize --frontier`: a folder with a recipe a budget, the Pareto table, and its plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.search.optimize import (
    OptimizeOptions,
    check_activations,
    open_sources,
    rules_of,
    say_of_experts,
    tensor_names,
    used_before,
    write_recipe,
)
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import Profile, load_profile
from recompile.errors import ArgumentError, OutputError
from recompile.events import Note, OnEvent, ignore
from recompile.io.files import write_text, write_with
from recompile.io.report import PICTURE_METADATA, to_json
from recompile.model.used_rows import check_apart
from recompile.optimize.choose import profile_sha256
from recompile.optimize.pareto import Frontier, parse_grid, solve_frontier
from recompile.optimize.solvers import BY_COSTS

ITS_OWN = "{frontier} has its own budgets, and needs {solver} exact or greedy; leave {bits}, {size} and {start} out"
MEASURED_TOGETHER = 6  # mixes whose hidden states are held at the same time
GIB = 2**30


@dataclass(frozen=True)
class FrontierRow:
    """One line of the table: a recipe, or a uniform variant."""

    name: str
    recipe: str | None  # file name
    budget_bpw: float | None
    bpw: float
    total_bytes: int
    gib: float
    predicted_kl_nats: float
    predicted_std_error: float | None
    measured_kl_nats: float | None
    measured_std_error: float | None
    gap: float | None
    nested: bool | None
    dominated: bool | None


def make_table(frontier: Frontier, measured: Mapping[str, tuple[float, float | None]]) -> list[FrontierRow]:
    """Recipes and uniform variants, sizes rising. measured: name -> (KL, standard error)."""
    rows = []
    for point in frontier.points:
        choice, bpw = point.choice, point.choice.budget.bpw
        name = f"{bpw:g}bpw"
        kl, error = measured.get(name, (None, None))
        rows.append(
            FrontierRow(
                name, f"{name}.yaml", bpw, choice.bpw, choice.total_bytes, choice.total_bytes / GIB,
                choice.predicted_kl_nats, choice.predicted_std_error, kl, error, choice.solution.gap, point.is_nested,
                point.dominated,
            )
        )  # fmt: skip
    for variant in frontier.uniform:
        name = f"uniform {variant.label}"
        kl, error = measured.get(name, (None, None))
        rows.append(
            FrontierRow(
                name, None, None, variant.bpw, variant.total_bytes, variant.total_bytes / GIB,
                variant.predicted_kl_nats, variant.predicted_std_error, kl, error, None, None, None,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row.total_bytes, row.recipe is not None))


@dataclass(frozen=True)
class FrontierReport:
    """A folder of recipes, and its table."""

    folder: Path
    profile_sha256: str
    solver: str
    grid: str
    left_out_bpw: tuple[float, ...]
    reachable_bpw: tuple[float, ...]  # least, most
    rows: tuple[FrontierRow, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "profile_sha256": self.profile_sha256,
            "solver": self.solver,
            "grid": self.grid,
            "left_out_bpw": list(self.left_out_bpw),
            "reachable_bpw": list(self.reachable_bpw),
            "rows": list(self.rows),
        }


def frontier_files(folder: Path, grid: str) -> list[Path]:
    """Every file that `write_frontier` may write. Raises RecompileError for what is no grid."""
    recipes = [f"{bpw:g}bpw.yaml" for bpw in parse_grid(grid)]
    pictures = [f"frontier.{kind}" for kind in PICTURE_METADATA]
    return [folder / name for name in (*recipes, "frontier.csv", "frontier.json", *pictures)]


def write_frontier(
    profile_path: Path, folder: Path, grid: str, options: OptimizeOptions, on_event: OnEvent = ignore
) -> FrontierReport:
    """Write a recipe for every budget of a grid ("LOW:HIGH:STEP", bits per weight), with table and plot.

    options: constraints and solver; with `check` every recipe is measured. Raises as `optimize_recipe` does.
    """
    profile = load_profile(profile_path)
    checkpoints = open_sources(profile, profile_path, on_event)
    if options.activations:
        check_activations(options, checkpoints)
    solver = options.solver if options.solver is not None else "exact"
    if solver not in BY_COSTS:
        raise ArgumentError(ITS_OWN)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; {{grid}} writes a folder")
    rules = rules_of(options, checkpoints)
    say_of_experts(rules, profile, on_event)
    found = solve_frontier(profile, parse_grid(grid), solver, rules)
    names = tensor_names(checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    for point in found.points:
        path = folder / f"{point.choice.budget.bpw:g}bpw.yaml"
        write_recipe(path, point.choice, names, f"model_optimize --frontier {grid}")
    measured: dict[str, tuple[float, float | None]] = {}
    if options.check:
        if checkpoints is None:
            raise ArgumentError("{check}: the sources are not available")
        measured = measure_frontier(found, profile, checkpoints, options, profile_path, on_event)
    table = tuple(make_table(found, measured))
    report = FrontierReport(
        folder, profile_sha256(profile), solver, grid, tuple(found.left_out), tuple(found.reachable), table
    )
    write_tables(report)
    draw(folder, table, f"{Path(profile.header.reference).name}: KL against size", on_event)
    return report


def measure_frontier(
    frontier: Frontier,
    profile: Profile,
    checkpoints: Mapping[str, Checkpoint],
    options: OptimizeOptions,
    path: Path,
    on_event: OnEvent = ignore,
) -> dict[str, tuple[float, float | None]]:
    """name -> (KL, standard error) of every recipe and uniform variant, on rows of the role "accept"; path: of the
    profile."""
    from eval.diff import DiffOptions
    from eval.mixes.evaluator import MixEvaluator
    from recompile.model.devices import compute_device

    reference = open_checkpoint(profile.header.reference)
    rows, vocab = options.where.read([reference.path, *(c.path for c in checkpoints.values())], "accept")
    check_apart(rows, "accept", used_before(path, profile, checkpoints), on_event)
    rows = rows.by_length()
    how = DiffOptions(device=compute_device(options.device), vocab=vocab)
    evaluator = MixEvaluator(profile.header, checkpoints, reference, options=how)
    mixes = [(f"{p.choice.budget.bpw:g}bpw", p.choice.solution.choice) for p in frontier.points]
    mixes += [(f"uniform {variant.label}", variant.choice) for variant in frontier.uniform]
    measured: dict[str, tuple[float, float | None]] = {}
    for start in range(0, len(mixes), MEASURED_TOGETHER):
        part = mixes[start : start + MEASURED_TOGETHER]
        what = f"measuring {part[0][0]} to {part[-1][0]}"
        reports = evaluator.reports([choice for _, choice in part], rows, on_event, what)
        measured |= {name: (r.kl.mean, r.kl.std_error) for (name, _), r in zip(part, reports, strict=True)}
    return measured


def write_tables(report: FrontierReport) -> None:
    """frontier.csv and frontier.json."""
    text = io.StringIO()
    columns = list(FrontierRow.__dataclass_fields__)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in report.rows:
        writer.writerow(["" if (value := getattr(row, name)) is None else value for name in columns])
    write_text(report.folder / "frontier.csv", text.getvalue())
    write_text(report.folder / "frontier.json", to_json(report.as_dict()))


def draw(folder: Path, table: Sequence[FrontierRow], title: str, on_event: OnEvent = ignore) -> list[Path]:
    """frontier.png and frontier.svg: KL against GiB. Returns what was drawn; nothing, with a Note, where matplotlib is
    not installed."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        on_event(Note("no plot: matplotlib is not installed (pip install 'recompile[report]')"))
        return []
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    recipes = [row for row in table if row.recipe is not None]
    uniform = [row for row in table if row.recipe is None]
    for rows, style, label in ((recipes, "o-", "recipes"), (uniform, "s", "uniform variants")):
        is_measured = all(row.measured_kl_nats is not None for row in rows)
        if not rows:
            continue
        kls = [_kl(row, is_measured) for row in rows]
        errors = [(row.measured_std_error if is_measured else row.predicted_std_error) or 0.0 for row in rows]
        sizes = [row.gib for row in rows]
        said = f"{label}, {'measured' if is_measured else 'predicted'}"
        axes.errorbar(sizes, kls, yerr=errors, fmt=style, capsize=2, markersize=4 if style == "o-" else 7, label=said)
        if is_measured and label == "recipes":
            axes.plot(sizes, [row.predicted_kl_nats for row in rows], ":", color="grey", label="recipes, predicted")
        for row, kl in zip(rows, kls, strict=True):
            if row.recipe is None:
                axes.annotate(row.name, (row.gib, kl), xytext=(6, 4), textcoords="offset points", fontsize=8)
    if all(_kl(row, row.measured_kl_nats is not None) > 0 for row in table):
        axes.set_yscale("log")
    axes.set_xlabel("size of all tensors, GiB")
    axes.set_ylabel("KL(reference || recipe), nats per token")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    drawn = []
    for ending, metadata in PICTURE_METADATA.items():
        path = folder / f"frontier.{ending}"
        with matplotlib.rc_context({"svg.hashsalt": "recompile"}):  # or its ids are drawn by chance
            write_with(path, partial(figure.savefig, metadata=metadata))
        drawn.append(path)
    return drawn


def _kl(row: FrontierRow, measured: bool) -> float:
    return row.measured_kl_nats if measured and row.measured_kl_nats is not None else row.predicted_kl_nats
