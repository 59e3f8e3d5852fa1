"""ReportData -> Markdown to paste on a model page: what was measured, the recipe, how it was made."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import recompile
from eval.report.data import Measured, ReportData
from eval.report.pictures import shown_choice
from recompile.io.printable import printable
from recompile.io.report import role_in_words, with_error
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Choice, make_recipe, predict
from recompile.optimize.problem import Solution
from recompile.recipe.recipe import dump_recipe

GROUPS_IN_CARD = 8  # of an attribution, the most expensive ones
RECIPE_LINES = 60  # a page is read, not run: a longer recipe belongs in a file


def card(data: ReportData) -> str:
    """A table of the measured builds and of the recipe that the explorer opens with, and the recipe itself."""
    choice = shown_choice(data)
    predicted = with_error(*predict(data.profile, choice), ".4f")
    lines = [f"## {_cell(data.title)}: measured against the unquantized model", ""]
    lines += [*_builds_table(data, choice, predicted), *_paired_lines(data), *_measured_lines(data)]
    for one in data.measured:
        lines += [line for table in DETAILS for line in table(one)]
    lines += [*_chosen_lines(data, predicted), *_recipe_lines(data, choice)]
    lines += ["", f"Recipe sha256: `{recipe_sha256(data, choice)}`. recompile {recompile.__version__}."]
    return "\n".join([*lines, "", f"<!-- made_by: model_report {_cell(data.profile_name)} -->"]) + "\n"


def _builds_table(data: ReportData, choice: dict[str, str], predicted: str) -> list[str]:
    extra = [name for name, value in EXTRA_COLUMNS.items() if any(value(one) is not None for one in data.measured)]
    rows: list[tuple[str, ...]] = []
    for one in sorted(data.measured, key=lambda one: (one.bpw is None, one.bpw or 0.0)):
        rows.append(
            (
                one.name,
                "–" if one.bpw is None else f"{one.bpw:.2f}",
                "–" if one.total_bytes is None else _size(one.total_bytes),
                with_error(one.kl_nats, one.std_error, ".4f"),
                _number(one.quantiles.get("median")),
                _number(one.quantiles.get("p99")),
                "–" if one.perplexity is None else f"{one.perplexity:.3f}",
                "–" if one.same_top_token is None else f"{100 * one.same_top_token:.1f} %",
                *("–" if (value := EXTRA_COLUMNS[name](one)) is None else value for name in extra),
            )
        )
    if not any(one.choice == choice for one in data.measured):
        bits = data.bits_of(choice)
        size = (f"{data.bpw(bits):.2f}", _size(data.total_bytes(bits)))
        rows.append(("this recipe (predicted)", *size, predicted, *["–"] * (4 + len(extra))))
    names = ["build", "bits per weight", "size", "KL, nats/token", "median", "99th percentile", "perplexity"]
    names += ["same top token", *extra]
    head = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    return head + [f"| {' | '.join(_cell(text) for text in row)} |" for row in rows]


def _measured_lines(data: ReportData) -> list[str]:
    """What the table's numbers are."""
    if not data.measured:
        return []
    measured = data.measured[0]
    return [
        "",
        f"KL(reference \\|\\| build), mean ± one standard error over {measured.rows} rows of {measured.row_tokens} "
        f"tokens ({_cell(measured.rows_source, 160)}). Bits per weight are over quantized modules, scales "
        f"included; the size is that of all tensors."
        + ("" if measured.noise_floor is None else f" Noise floor {measured.noise_floor:.1e} nats."),
    ]


def _chosen_lines(data: ReportData, predicted: str) -> list[str]:
    """How the mix was chosen."""
    header = data.profile.header
    return [
        "",
        f"The mix was chosen from a KL profile ({_cell(header.method)}, level {_cell(header.level)}, {header.rows} "
        f"rows of {header.row_tokens} tokens, {_cell(header.rows_source, 160)}"
        f"{role_in_words(header.rows_role, header.positions)}), which predicts {predicted} nats per token "
        f"for it.",
    ]


def _recipe_lines(data: ReportData, choice: dict[str, str]) -> list[str]:
    """The override file, and the command that makes the mix."""
    header = data.profile.header
    text = recipe_text(data, choice).splitlines()
    fence = "`" * (max((len(run) for line in text for run in re.findall(r"`+", line)), default=2) + 1)
    fence = max(fence, "```", key=len)
    more = len(text) - RECIPE_LINES
    text = [printable(line) for line in text]
    shown = text if more <= 0 else [*text[:RECIPE_LINES], f"# ... {more} more lines"]
    if header.candidate(header.base).spec is None:
        source = shlex.quote(printable(header.candidate(header.base).model_dir))
        command = f"recompile -i {source} -o OUT -or overrides.yaml"
    else:
        source = shlex.quote(printable(header.reference))
        command = f"model_quantize -i {source} -o OUT -or overrides.yaml"
    return ["", "### Recipe", "", f"{fence}yaml", *shown, fence, "", f"{fence}", command, fence]


# Columns that only some reports have, each with what stands in it.
EXTRA_COLUMNS: Mapping[str, Callable[[Measured], str | None]] = {
    "head, bits": lambda one: None if one.head_bpw is None else f"{one.head_bpw:.2f}",
    "embedding, bits": lambda one: None if one.embedding_bpw is None else f"{one.embedding_bpw:.2f}",
    "RMS Δp": lambda one: None if one.delta_p_rms is None else f"{100 * one.delta_p_rms:.2f} %",
    "flips where sure": lambda one: None if one.sure_flips is None else f"{100 * one.sure_flips:.2f} %",
    "greedy runs part": lambda one: (
        None if one.divergence_median is None else f"after {one.divergence_median:g} tokens"
    ),
}


def _table(title: str, one: Measured, names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Nothing where there are no rows."""
    if not rows:
        return []
    head = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    body = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return ["", f"{_cell(one.name)}, {title}:", "", *head, *body]


def _slices(title: str, first: str, one: Measured, slices: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            str(part["name"]),
            str(part["tokens"]),
            with_error(part["kl"]["mean"], part["kl"]["std_error"], ".4f"),
            f"{100 * part['same_top']['mean']:.1f} %",
        )
        for part in slices
    ]
    return _table(title, one, (first, "tokens", "KL, nats/token", "same top token"), rows)


def _by_origin(one: Measured) -> list[str]:
    return _slices("by kind of text", "rows from", one, one.by_origin)


def _by_position(one: Measured) -> list[str]:
    return _slices("by length of context", "position", one, one.by_position)


def _caches(one: Measured) -> list[str]:
    rows = [
        (
            f"{cache.name} ({cache.engine})",
            f"{cache.bits:.2f}",
            f"{cache.bytes_per_token:.0f}",
            with_error(cache.kl, cache.std_error, ".4f"),
            with_error(cache.difference, cache.difference_error, "+.4f"),
        )
        for cache in one.cache_sweep
    ]
    names = ("keys, values", "bits a value", "bytes a token", "KL, nats/token", "more than without")
    return _table("with a quantized KV cache", one, names, rows)


def _attributed(one: Measured) -> list[str]:
    found = one.attribution or {"groups": []}
    rows = [
        (
            group["group"],
            f"{group['bits_per_weight']:.2f}",
            f"{group['kl']:.5f}",
            "–" if group["noise"] is None else f"{group['noise']:.5f}",
        )
        for group in found["groups"][:GROUPS_IN_CARD]
    ]
    names = ("its own error alone", "bits per weight", "KL, nats/token", "KL of noise of that size")
    return _table("where the error comes from", one, names, rows)


# What follows the table of builds, of every build whose report has it.
DETAILS: tuple[Callable[[Measured], list[str]], ...] = (_by_origin, _by_position, _caches, _attributed)


def _paired_lines(data: ReportData) -> list[str]:
    """Every build's KL less that of the first mix, over the rows that both ran on; nothing without a mix."""
    mix = next((one for one in data.measured if one.choice is not None and one.uniform is None), None)
    lines = []
    for one in data.measured:
        if mix is None or one is mix or one.rows_sha256 != mix.rows_sha256 or len(one.kl_rows) != len(mix.kl_rows):
            continue
        if len(mix.kl_rows) > 1:
            mean, low, high = paired_interval(mix.kl_rows, one.kl_rows)
            pair = f"{_cell(mix.name)} less {_cell(one.name)}"
            lines.append(f"- {pair}: {mean:+.4f} nats per token, 95 % {low:+.4f} to {high:+.4f}")
    return ["", "Paired over the same rows:", "", *lines] if lines else []


def paired_interval(left: Sequence[float], right: Sequence[float]) -> tuple[float, float, float]:
    """Mean of left - right over rows, and its 95 % interval (Student's t); two rows or more."""
    from scipy.stats import t as student

    differences = [a - b for a, b in zip(left, right, strict=True)]
    mean = statistics.fmean(differences)
    half = float(student.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def recipe_sha256(data: ReportData, choice: dict[str, str]) -> str:
    """Of the override file's text, as `recipe_text` gives it."""
    return hashlib.sha256(recipe_text(data, choice).encode()).hexdigest()


def recipe_text(data: ReportData, choice: dict[str, str]) -> str:
    """The override file of a choice, as model_optimize writes it."""
    bits = data.bits_of(choice)
    mean, error = predict(data.profile, choice)
    solution = Solution(choice, bits, mean, mean, 0.0, "greedy", bits)
    chosen = Choice(solution, data.profile, Budget(bpw=data.bpw(bits)), mean, error)
    recipe, comments = make_recipe(chosen, {"made_by": f"model_report {data.profile_name}"})
    return dump_recipe(recipe, comments)


def _cell(text: str, most: int = 80) -> str:
    """Text in a Markdown table: no mark-up, no line break, no cell border."""
    flat = printable(" ".join(str(text).split()))
    flat = flat if len(flat) <= most else f"{flat[: most - 1]}…"
    return re.sub(r"([\\`*_\[\]<>|~#$])", r"\\\1", flat).replace("&", "&amp;")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
