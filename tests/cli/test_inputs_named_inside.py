"""Models that a recipe, a profile or a report names are inputs as those of options are: `--force` replaces none."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import OutputError
from recompile.io.files import write_json
from tests import tiny
from tests.commands import refusal, run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, 3bpw and 4bpw; r.yaml takes attention from 4bpw; v.jsonl is a profile, d.json a report of that mix."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny.base("llama-2"), folder / "base")
    for bits, made in tiny.variants("llama-2", (3, 4)).items():
        shutil.copytree(made, folder / f"{bits}bpw")
    source = f"{{id: 4, model_dir: {folder}/4bpw}}"
    (folder / "r.yaml").write_text(f"sources:\n  - {source}\noverrides:\n  - {{key: '*.self_attn.*', source: 4}}\n")
    for command, *arguments in (
        ("model_profile", "-mb", folder / "base", "-i", folder / "3bpw", "-s", folder / "4bpw", "--mode", "sketch",
         "--samples", 2, "-o", folder / "v.jsonl"),
        ("model_diff", "-ma", folder / "3bpw", "-mb", folder / "base", "-or", folder / "r.yaml", "--json",
         folder / "d.json"),
    ):  # fmt: skip
        run(main_of(command), *arguments, "-r", 2, "-l", 16, "--quiet")
    return folder


def main_of(command: str) -> object:
    return importlib.import_module(f"recompile.cli.{command}").main


# command, arguments, the file that it would destroy
CASES: Mapping[str, tuple[str, str, str]] = {
    "merge, json": ("recompile", "-i 3bpw -or r.yaml -o mix --json 4bpw/config.json", "4bpw/config.json"),
    "emit": ("recompile", "-i 3bpw -or r.yaml --emit llm-compressor -o 4bpw/config.json", "4bpw/config.json"),
    "logits": (
        "model_diff", "-ma 3bpw -mb base -or r.yaml -r 2 -l 16 -sla 4bpw/model.safetensors", "4bpw/model.safetensors"
    ),
    "quantize, json": (
        "model_quantize", "-i base -or r.yaml -o mix2 -r 2 -l 16 --json 4bpw/config.json", "4bpw/config.json"
    ),
    "recipe over the base": (
        "model_optimize", "v.jsonl --no-check --solver exact -b 3.5 -o base/config.json", "base/config.json"
    ),
    "recipe over weights": (
        "model_optimize", "v.jsonl --no-check --solver exact -b 3.5 -o 4bpw/model.safetensors", "4bpw/model.safetensors"
    ),
    "recipe's json": (
        "model_optimize", "v.jsonl --no-check --solver exact -b 3.5 -o o.yaml --json 4bpw/config.json",
        "4bpw/config.json",
    ),
    "card": ("model_report", "v.jsonl --card base/config.json", "base/config.json"),
    "page": ("model_report", "v.jsonl -o 4bpw/model.safetensors", "4bpw/model.safetensors"),
    "card of a recipe": ("model_report", "v.jsonl --recipe r.yaml --card 4bpw/config.json", "4bpw/config.json"),
    "card of a report": ("model_report", "v.jsonl d.json --card 3bpw/config.json", "3bpw/config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_force_replaces_no_model_that_a_file_names(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, arguments, file = CASES[name]
    monkeypatch.chdir(work)
    before = (work / file).read_bytes()
    said = refusal(main_of(command), *arguments.split(), "--force")
    assert "is a file of the input" in said
    assert "never written over" in said
    assert (work / file).read_bytes() == before
    assert not (work / "mix").exists(), "it is told before anything starts"


def test_what_was_read_is_not_written_over_whatever_named_it(tmp_path: Path) -> None:
    """The last guard, of the writer of all files; what is being built is written as often as it is read."""
    for name in ("model", "model.building"):
        shutil.copytree(tiny.base("llama-2"), tmp_path / name)
        open_checkpoint(tmp_path / name)
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(OutputError, match="is a file of the input"):
        write_json(tmp_path / "model" / "config.json", {})
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    write_json(tmp_path / "model" / "new.json", {})
    write_json(tmp_path / "model.building" / "config.json", {})


REFUSED: Mapping[str, tuple[str, str, str]] = {
    "the whole reference": ("model_diff", "-ma 3bpw -mb base -r 2 -l 16 -kb 5", "--keep-b 5: the model has 4 stages"),
    "greedy runs beyond the context": (
        "model_diff", "-ma 3bpw -mb base -r 2 -l 16 --divergence 2x100000", "are more than the model's context of"
    ),
    "healed beside another base": (
        "model_heal", "-i 3bpw -mb other -o healed -r 2 -l 16 --tokens 64", "was not made from the weights of"
    ),
    "healed into its input": ("model_heal", "-i 3bpw -mb base -o 3bpw", "is an input (3bpw), which is never"),
    "healed into a file of its base": (
        "model_heal", "-i 3bpw -mb base -o base/config.json", "is a file of the input base"
    ),
    "json in the place of the output": (
        "recompile", "-i 3bpw -or r.yaml -o mix --json mix", "is what -o writes as well"
    ),
    "emit, json": ("recompile", "-i 3bpw -or r.yaml --emit llm-compressor --json e.json", "--json: not with --emit"),
    "emit, dry run": ("recompile", "-i 3bpw -or r.yaml --emit llm-compressor --dry-run", "--dry-run: not with --emit"),
    "MLX of a GGUF type": ("recompile", "-i base -or types.yaml --emit mlx", "is no scheme of MLX's"),
    "llm-compressor of a GGUF type": (
        "recompile", "-i base -or types.yaml --emit llm-compressor", "is no scheme of compressed-tensors"
    ),
    "an endless frontier": ("model_optimize", "v.jsonl --frontier inf:inf:1 --no-check -o fr", "wanted 0 < LOW"),
    "an endless step": ("model_optimize", "v.jsonl --frontier 2:3:inf --no-check -o fr", "wanted 0 < LOW"),
    "a frontier in an input": ("model_optimize", "v.jsonl --frontier 3:4:1 --no-check -o 4bpw", "is an input"),
    "a Python that is none": (
        "model_diff", "--engine transformers --engine-lib /bin/true -ma 3bpw -mb base -r 2 -l 16",
        "the engine's process ended",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_without_a_word_is_refused(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, arguments, says = REFUSED[name]
    monkeypatch.chdir(work)
    if not (work / "other").exists():
        shutil.copytree(tiny.base("llama-2", seed=7), work / "other")
    (work / "types.yaml").write_text("sources: [{id: q, type: Q4_0}]\noverrides: [{key: '*', source: q}]\n")
    said = refusal(main_of(command), *arguments.split(), "--quiet")
    assert says in said
    assert "unforeseen" not in said
    assert not (work / "healed").exists()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("kl", "mean"), -1.0, "kl.mean: -1.0, wanted a KL"),
        (("kl", "std_error"), -1.0, "kl.std_error: -1.0, wanted a number of 0 or more"),
        (("score_candidate", "perplexity"), -5, "score_candidate.perplexity: -5, wanted"),
        (("by_position",), [None], "by_position[0]: null, wanted an object"),
        (("by_origin", 0, "same_top"), None, "by_origin[0].same_top: null, wanted an object"),
    ],
)
def test_a_report_with_impossible_figures_is_refused(
    place: tuple[str | int, ...], value: object, says: str, work: Path, tmp_path: Path
) -> None:
    report = json.loads((work / "d.json").read_text())
    inner = report
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "m.json").write_text(json.dumps(report))
    assert says in refusal(main_of("model_report"), work / "v.jsonl", tmp_path / "m.json", "--card", "-")
