"""`model_optimize --frontier`: a folder with a recipe a budget, the Pareto table, and its plot."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recompile.cli.common import follow_comparison, format_columns, to_plain
from recompile.cli.options import compute_device
from recompile.io.files import write_with

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.cli.verify import RowOptions
    from recompile.costs import Profile
    from recompile.optimize.pareto import Frontier

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


def measure_frontier(
    frontier: Frontier,
    profile: Profile,
    checkpoints: Mapping[str, Checkpoint],
    where: RowOptions,
    quiet: bool,
) -> dict[str, tuple[float, float | None]]:
    """name -> (KL, standard error) of every recipe and uniform variant, on rows of the role "accept"."""
    from eval.diff import DiffOptions, compare_many
    from eval.search.acceptance import mix_of
    from recompile.checkpoint.checkpoint import open_checkpoint

    header = profile.header
    reference = open_checkpoint(header.reference)
    rows, vocab = where.read([reference.path, *(c.path for c in checkpoints.values())], "accept")
    options = DiffOptions(device=compute_device(where.device), vocab=vocab)
    mixes = [(f"{p.choice.budget.bpw:g}bpw", p.choice.solution.choice) for p in frontier.points]
    mixes += [(f"uniform {variant.label}", variant.choice) for variant in frontier.uniform]
    measured: dict[str, tuple[float, float | None]] = {}
    for start in range(0, len(mixes), MEASURED_TOGETHER):
        part = mixes[start : start + MEASURED_TOGETHER]
        sources = [mix_of(header, checkpoints, choice) for _, choice in part]
        events = compare_many(sources, reference, rows.ids, options)
        reports = follow_comparison(events, f"measuring {part[0][0]} to {part[-1][0]}", len(part), quiet)
        measured |= {name: (r.kl.mean, r.kl.std_error) for (name, _), r in zip(part, reports, strict=True)}
    return measured


def write_tables(folder: Path, table: Sequence[FrontierRow], report: Mapping[str, Any], write: Any) -> None:
    """frontier.csv and frontier.json; `write(path, text)` replaces a file as a whole."""
    import json

    text = io.StringIO()
    columns = list(FrontierRow.__dataclass_fields__)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in table:
        writer.writerow(["" if (value := getattr(row, name)) is None else value for name in columns])
    write(folder / "frontier.csv", text.getvalue())
    content = to_plain({**report, "rows": list(table)})
    write(folder / "frontier.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def draw(folder: Path, table: Sequence[FrontierRow], title: str) -> list[Path]:
    """frontier.png and frontier.svg: KL against GiB. Returns what was drawn; nothing, with a word on stderr, where
    matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("Note: no plot: matplotlib is not installed (pip install 'recompile[report]')", err=True)
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
    for ending in ("png", "svg"):
        path = folder / f"frontier.{ending}"
        metadata = {"Date": None} if ending == "svg" else None  # no date in the file: equal tables give equal bytes
        write_with(path, partial(figure.savefig, metadata=metadata))
        drawn.append(path)
    return drawn


def _kl(row: FrontierRow, measured: bool) -> float:
    return row.measured_kl_nats if measured and row.measured_kl_nats is not None else row.predicted_kl_nats


def describe_table(table: Sequence[FrontierRow]) -> str:
    is_measured = any(row.measured_kl_nats is not None for row in table)
    lines = []
    for row in table:
        notes = [word for word, applies in (("nested", row.nested), ("dominated", row.dominated)) if applies]
        line = [
            row.name,
            f"{row.bpw:.4f}",
            f"{row.gib:.4f}",
            _with_error(row.predicted_kl_nats, row.predicted_std_error),
        ]
        if is_measured:
            line.append(_with_error(row.measured_kl_nats, row.measured_std_error))
        lines.append((*line, ", ".join(notes)))
    header = ("recipe", "bpw", "GiB", "predicted KL", *(["measured KL"] if is_measured else []), "")
    return format_columns(lines, header, range(1, len(header) - 1))


def _with_error(kl: float | None, error: float | None) -> str:
    if kl is None:
        return "-"
    return f"{kl:.6f}" + (f" ± {error:.6f}" if error is not None else "")
