#!/usr/bin/env python3
"""The pages of docs/ that are made: commands.md from every --help, report-schema.md from the reports, pipelines.md from
scripts/bench_results/pipelines.json.

python scripts/make_docs.py            # writes them
python scripts/make_docs.py --check    # exit code 1 where a page is not what the code says
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import sys
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMANDS = (
    "model_auto",
    "model_quantize",
    "model_profile",
    "model_optimize",
    "model_diff",
    "recompile",
    "recompile engines",
    "model_heal",
    "model_trace",
    "model_report",
)
# Report -> (module, class); nested classes of the same package are followed.
REPORTS = (
    ("model_diff --json", "eval.diff", "DiffReport"),
    ("model_diff -ma A -ma B --json: one of `pairs`", "eval.run_diff", "PairedKl"),
    ("model_diff --divergence: `divergence`", "eval.divergence", "Divergence"),
    ("model_diff -cqs: one of `cache_sweep`", "eval.cache_sweep", "CachePoint"),
    ("model_diff --attribute: `attribution`", "eval.attribution", "Attribution"),
    ("model_diff --engine vllm, transformers, mlx --json", "eval.engines.judged_diff", "JudgedReport"),
    ("model_diff --json: `size`", "recompile.merge.overlay", "Accounting"),
    ("model_heal --json", "eval.heal", "HealReport"),
    ("model_trace --json", "eval.trace.run", "TraceReport"),
)
MADE = "<!-- made by scripts/make_docs.py; do not edit -->"


def commands_page() -> str:
    import click

    lines = ["# Commands", "", MADE, "", "What every command prints for `--help`. Exit codes: 0 done; 1 one message on"]
    lines += ["stderr says what was wrong (2 for options that do not exist); 130 interrupted.", ""]
    lines += [f"- [{name}](#{name.replace(' ', '-')})" for name in COMMANDS]
    for name in COMMANDS:
        command = importlib.import_module(f"recompile.cli.{name.rpartition(' ')[2]}").main
        context = click.Context(command, info_name=name, max_content_width=110, terminal_width=110)
        context.help_option_names = ["-h", "--help"]
        lines += ["", f"## {name}", "", "```text", command.get_help(context).strip(), "```"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def schema_page() -> str:
    from eval.metrics import METRICS_VERSION

    lines = ["# JSON reports", "", MADE, ""]
    lines += [
        f"Fields of what `--json` writes, version {METRICS_VERSION} (`metrics_version` in a report of `model_diff`).",
        "KL is in nats per token. A field is never renamed or given another meaning without a new version; new ones",
        "may be added. Numbers that are not finite are written as null, for example the SQNR of equal states.",
    ]
    described: set[str] = set()
    for title, module, name in REPORTS:
        lines += ["", f"## {title}", ""]
        lines += _class_lines(module, name, described)
    return "\n".join(lines) + "\n"


def pipelines_page() -> str:
    """Whole pipelines beside each other, from the newest result file."""
    lines = ["# Whole pipelines at equal file sizes", "", MADE, ""]
    lines += [
        "Made by `scripts/bench_pipelines.py`: its head says what every row is, and its result file",
        "(`scripts/bench_results/pipelines.json`) has commands, versions, dates and the machine. KL(base || build) in",
        "nats per token on report rows, ± one standard error over rows; ratio and paired difference [95 %] are to the",
        'best peer of the table. "Other text" is of a kind that nothing calibrated, chose or tuned on.',
        "SmolLM2's base comes from a Q4_1 file: GGUF types with blocks of 32 and a minimum find its own grid again, in",
        "presets and in mixes, and look better than on a model that was never quantized.",
    ]
    for run in json.loads((ROOT / "scripts" / "bench_results" / "pipelines.json").read_text())["runs"]:
        lines += _pipeline_lines(run)
    return "\n".join(lines) + "\n"


def _told(value: Any) -> str:
    return (
        " and ".join(map(_told, value)) if isinstance(value, list) else f"{value:g}" if value != str(value) else value
    )


def _pipeline_lines(run: Mapping[str, Any]) -> list[str]:
    settings = ", ".join(f"{name.replace('_', ' ')} {_told(value)}" for name, value in run["settings"].items())
    lines = [
        "",
        f"## {run['family']}, {run['model']}, the size of {run['size']} ({run['date']})",
        "",
        f"{settings}.",
        "",
    ]
    lines += [
        "| build | MiB | KL | p99 | same top token | to the best peer | KL, other text | to the best peer | CPU s |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    for build in run["builds"]:
        text, other = build["text"], build["other_text"]
        cells = [
            build["build"],
            f"{build['bytes'] / 2**20:.1f}",
            f"{text['kl_nats']:.4f} ± {text['std_error']:.4f}",
            f"{text['p99']:.3f}",
            f"{100 * text['same_top_token']:.1f} %",
            _beside(text),
            f"{other['kl_nats']:.4f} ± {other['std_error']:.4f}",
            _beside(other),
            "" if build["cpu_seconds"] is None else f"{build['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    peers = f"Peers: {', '.join(run['peers'])}. " if run["peers"] else ""
    return [*lines, "", f"{peers}Load {run['load_1m']} when it began; times of a processor, of one core."]


def _beside(found: Mapping[str, Any]) -> str:
    low, high = found["interval_95"]
    if low == high == 0:
        return "the best peer"
    return f"{found['ratio_to_best_peer']:.2f} x, {found['less_best_peer']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _class_lines(module: str, name: str, described: set[str]) -> list[str]:
    """The table of one dataclass, and of those that its fields hold and that no table has described yet."""
    described.add(name)
    doc, fields, imported = _fields(module, name)
    lines = [f"**{name}**: {doc}", "", "| field | type | |", "| --- | --- | --- |"]
    lines += [f"| `{field}` | {_cell(kind)} | {_cell(comment)} |" for field, kind, comment in fields]
    for _, kind, _ in fields:
        for inner in re.findall(r"[A-Z]\w+", kind):
            where = imported.get(inner)
            if where is not None and inner not in described:
                lines += ["", *_class_lines(where, inner, described)]
    return lines


def _fields(module: str, name: str) -> tuple[str, list[tuple[str, str, str]], Mapping[str, str]]:
    """Docstring, (field, annotation, comment) of a dataclass, and where the classes its module knows are defined."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    source = path.read_text()
    tree = ast.parse(source)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    known = {node.name: module for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("eval", "recompile"):
            known.update({alias.name: node.module for alias in node.names if alias.name[0].isupper()})
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = [
        (node.target.id, ast.unparse(node.annotation), comments.get(node.end_lineno or 0, ""))
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    return " ".join((ast.get_docstring(found) or "").split("\n\n")[0].split()), fields, known


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"commands.md": commands_page, "report-schema.md": schema_page, "pipelines.md": pipelines_page}


def main() -> int:
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / "docs" / name, make()
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    print(f"docs: {', '.join(stale) or 'nothing'} {'is stale' if '--check' in sys.argv else 'written'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
