"""ReportData -> Markdown to paste on a model page: what was measured, the recipe, how it was made."""

from __future__ import annotations

import re
import shlex

from eval.report.data import ReportData
from eval.report.pictures import shown_choice
from recompile.io.printable import printable
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Choice, make_recipe, predict
from recompile.optimize.problem import Solution
from recompile.recipe.recipe import dump_recipe

RECIPE_LINES = 60  # a page is read, not run: a longer recipe belongs in a file


def card(data: ReportData) -> str:
    """A table of the measured builds and of the recipe that the explorer opens with, and the recipe itself."""
    header = data.profile.header
    choice = shown_choice(data)
    bits = data.bits_of(choice)
    mean, error = predict(data.profile, choice)
    rows = []
    for one in sorted(data.measured, key=lambda one: (one.bpw is None, one.bpw or 0.0)):
        rows.append(
            (
                one.name,
                "–" if one.bpw is None else f"{one.bpw:.2f}",
                "–" if one.total_bytes is None else _size(one.total_bytes),
                _with_error(one.kl_nats, one.std_error),
                _number(one.quantiles.get("p99")),
                "–" if one.perplexity is None else f"{one.perplexity:.3f}",
                "–" if one.same_top_token is None else f"{100 * one.same_top_token:.1f} %",
            )
        )
    if not any(one.choice == choice for one in data.measured):
        size = (f"{data.bpw(bits):.2f}", _size(data.total_bytes(bits)))
        rows.append(("this recipe (predicted)", *size, _with_error(mean, error), "–", "–", "–"))
    names = ("build", "bits per weight", "size", "KL, nats/token", "99th percentile", "perplexity", "same top token")
    lines = [f"## {_cell(data.title)}: measured against the unquantized model", ""]
    lines += [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    lines += [f"| {' | '.join(_cell(text) for text in row)} |" for row in rows]
    measured = data.measured[0] if data.measured else None
    if measured is not None:
        lines += [
            "",
            f"KL(reference \\|\\| build), mean ± one standard error over {measured.rows} rows of {measured.row_tokens} "
            f"tokens ({_cell(measured.rows_source)}). Bits per weight are over quantized modules, scales included; the "
            f"size is that of all tensors.",
        ]
    lines += [
        "",
        f"The mix was chosen from a KL profile ({_cell(header.method)}, level {_cell(header.level)}, {header.rows} "
        f"rows of {header.row_tokens} tokens), which predicts {_with_error(mean, error)} nats per token for it.",
        "",
        "### Recipe",
        "",
    ]
    text = recipe_text(data, choice).splitlines()
    fence = "`" * (max((len(run) for line in text for run in re.findall(r"`+", line)), default=2) + 1)
    fence = max(fence, "```", key=len)
    more = len(text) - RECIPE_LINES
    text = [printable(line) for line in text]
    shown = text if more <= 0 else [*text[:RECIPE_LINES], f"# ... {more} more lines"]
    base = shlex.quote(printable(header.candidate(header.base).model_dir))
    lines += [f"{fence}yaml", *shown, fence, "", f"{fence}", f"recompile -i {base} -o OUT -or overrides.yaml", fence]
    return "\n".join([*lines, "", f"<!-- made_by: model_report {_cell(data.profile_name)} -->"]) + "\n"


def recipe_text(data: ReportData, choice: dict[str, str]) -> str:
    """The override file of a choice, as model_optimize writes it."""
    bits = data.bits_of(choice)
    mean, error = predict(data.profile, choice)
    solution = Solution(choice, bits, mean, mean, 0.0, "greedy", bits)
    chosen = Choice(solution, data.profile, Budget(bpw=data.bpw(bits)), mean, error)
    recipe, comments = make_recipe(chosen, {"made_by": f"model_report {data.profile_name}"})
    return dump_recipe(recipe, comments)


def _cell(text: str) -> str:
    """Text in a Markdown table: no mark-up, no line break, no cell border."""
    flat = printable(" ".join(str(text).split()))
    flat = flat if len(flat) <= 80 else f"{flat[:79]}…"
    return re.sub(r"([\\`*_\[\]<>|~#$])", r"\\\1", flat).replace("&", "&amp;")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
