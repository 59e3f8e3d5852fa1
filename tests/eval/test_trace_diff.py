"""model_diff on a trace: figures of response positions are those of plain transformers on every row by itself, and
padding counts in nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import recompile
from eval.diff import DiffOptions, DiffReport, compare
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main as model_diff
from recompile.errors import ArgumentError, MismatchError, RecompileError
from recompile.model.trace import Trace, read_trace, save_trace
from tests import tiny, traces
from tests.commands import refusal, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trace.safetensors of the talking model, 3bpw and 4bpw of it, and 3bpw-dense for transformers."""
    folder = tmp_path_factory.mktemp("traced")
    prompts = traces.write_prompts(folder / "prompts.jsonl", copies=2)
    recompile.trace(traces.model(), folder / "trace.safetensors", prompts=prompts, tokens=12)
    build = tiny.quantize(traces.model(), folder, (3, 4))[3]
    tiny.dense_copy(open_checkpoint(build), folder / "3bpw-dense", build)
    return folder


def plain_rows(folder: Path, trace: Trace) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ids [tokens], reference's and candidate's logits [tokens, vocab]) of every row without padding, float64."""
    models = [tiny.plain_model(path) for path in (traces.model(), folder / "3bpw-dense")]
    found = []
    for row, length in enumerate(trace.lengths.tolist()):
        ids = trace.ids[row : row + 1, :length]
        z_b, z_a = (tiny.plain_logits(model, ids)[0].double() for model in models)
        found.append((ids[0], z_b, z_a))
    return found


@pytest.mark.parametrize("positions", ["response", "all"])
def test_figures_are_those_of_plain_logits_on_every_row(folder: Path, positions: str) -> None:
    found = recompile.diff(folder / "3bpw", traces.model(), trace=folder / "trace.safetensors", positions=positions)
    report = found.report
    trace = read_trace(folder / "trace.safetensors").of_role("report")
    trace = trace._rows(trace.lengths.sort(stable=True).indices.tolist())
    kls, same, labels, probabilities = [], [], [], []
    for row, (ids, z_b, z_a) in enumerate(plain_rows(folder, trace)):
        first = int(trace.response[row].nonzero()[0]) - 1 if positions == "response" else 0
        last = len(ids) - 1 if positions == "response" else len(ids)
        kls.append(tiny.plain_kl(z_b, z_a)[first:last])
        same.append((z_a.argmax(-1) == z_b.argmax(-1))[first:last])
        log_b, log_a = (z.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[first : len(ids) - 1, 0] for z in (z_b, z_a))
        labels.append(torch.stack([log_b, log_a]))
        probabilities.append(z_b.softmax(-1).amax(-1)[first:last])
    kl, top = torch.cat(kls), torch.cat(same).double()
    count = len(kl)
    assert report.rows == len(kls) >= 4
    assert report.tokens == count
    assert report.unlabelled_tokens == (0 if positions == "response" else report.rows)
    assert float(kl.mean()) > 0.003
    assert report.kl.mean == pytest.approx(float(kl.mean()), abs=1e-6)
    residual = torch.stack([row.sum() - kl.mean() * len(row) for row in kls])
    error = math.sqrt(float((residual**2).sum()) * len(kls) / (len(kls) - 1)) / count
    assert report.kl.std_error == pytest.approx(error, rel=1e-3)
    assert report.kl_rows == pytest.approx([float(row.mean()) for row in kls], abs=1e-6)
    assert report.kl_quantiles.p99 == pytest.approx(float(kl.quantile(0.99)), abs=1e-5)
    assert report.kl_quantiles.max == pytest.approx(float(kl.max()), abs=1e-5)
    assert report.top_k_agreement[0].mean == pytest.approx(float(top.mean()))
    logs = torch.cat(labels, 1)
    for score, log in zip((report.score_reference, report.score_candidate), logs, strict=True):
        assert score.perplexity == pytest.approx(math.exp(-float(log.mean())), rel=1e-5)
    change = logs[1].exp() - logs[0].exp()
    assert report.delta_p is not None
    assert report.delta_p.mean.mean == pytest.approx(float(change.mean()), abs=1e-6)
    assert report.delta_p.rms.mean == pytest.approx(float((change**2).mean()) ** 0.5, abs=1e-6)
    sure = torch.cat(probabilities) > 0.9
    assert report.sure_flips is not None
    assert report.sure_flips.tokens == int(sure.sum())
    assert sum(bin.tokens for bin in report.kl_by_confidence) == count
    assert report.kl_histogram is not None
    assert report.kl_histogram.below + sum(report.kl_histogram.counts) + report.kl_histogram.above == count
    kinds = trace.about.kinds
    assert [part.name for part in report.by_origin] == list(dict.fromkeys(kinds))
    for part in report.by_origin:
        rows = [row for row, kind in zip(kls, kinds, strict=True) if kind == part.name]
        assert (part.rows, part.tokens) == (len(rows), sum(map(len, rows)))
        assert part.kl.mean == pytest.approx(float(torch.cat(rows).mean()), abs=1e-6)
    assert (report.rows_role, report.positions) == ("report", positions)


# ---- padding ---------------------------------------------------------------------------------------------------------

LENGTHS = (20, 100, 150, 250)  # two widths: 128 and 250


def report_of(architecture: str, ids: Tensor, counted: Tensor, lengths: tuple[int, ...]) -> DiffReport:
    options = DiffOptions(batch=2, lengths=lengths, counted=counted, origins=("a", "b", "a", "b")[: len(ids)])
    candidate, reference = (
        open_checkpoint(tiny.variants(architecture, (3,))[3]),
        open_checkpoint(tiny.base(architecture)),
    )
    *_, report = compare(candidate, reference, ids, options)
    assert isinstance(report, DiffReport)
    return report


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen2-moe", "gemma2"])
def test_padding_counts_in_nothing(architecture: str) -> None:
    ids = tiny.rows(len(LENGTHS), max(LENGTHS))
    padding = torch.arange(max(LENGTHS))[None] >= torch.tensor(LENGTHS)[:, None]
    counted = ~padding & (torch.arange(max(LENGTHS)) >= 7)
    whole = report_of(architecture, ids.masked_fill(padding, 0), counted, LENGTHS)
    other = report_of(architecture, ids.masked_fill(padding, 77), counted, LENGTHS)
    assert dataclasses.asdict(whole) == dataclasses.asdict(other)
    alone = [
        report_of(architecture, ids[row : row + 1, :length], counted[row : row + 1, :length], (length,))
        for row, length in enumerate(LENGTHS)
    ]
    assert whole.tokens == sum(report.tokens for report in alone) == sum(LENGTHS) - 4 * 7
    assert whole.kl_rows == pytest.approx([report.kl.mean for report in alone], abs=1e-6)
    assert whole.kl_quantiles.max == pytest.approx(max(report.kl_quantiles.max for report in alone), abs=1e-5)
    for n, layer in enumerate(whole.layers):
        mean = sum(report.layers[n].drift.relative_error for report in alone) / len(alone)
        assert layer.drift.relative_error == pytest.approx(mean, rel=1e-4)
    assert len(whole.routing) == len(alone[0].routing) == (2 if architecture == "qwen2-moe" else 0)
    for n, routing in enumerate(whole.routing):
        loads = [sum(counts) for counts in zip(*(report.routing[n].load for report in alone), strict=True)]
        assert routing.load == pytest.approx(loads, abs=1)
        kept = sum(report.routing[n].same_experts.mean * report.tokens for report in alone)
        assert routing.same_experts.mean == pytest.approx(kept / whole.tokens, abs=0.01)


def test_rows_without_padding_are_as_before() -> None:
    """The same rows given as a trace would, all counted, and as plain rows."""
    ids = tiny.rows(4, 40)
    plain, padded = (
        report_of("qwen2-moe", ids, counted, lengths)
        for counted, lengths in ((None, ()), (torch.ones(4, 40, dtype=torch.bool), (40,) * 4))
    )
    assert padded.kl.mean == pytest.approx(plain.kl.mean, abs=1e-7)
    assert padded.tokens == plain.tokens == 160
    assert padded.unlabelled_tokens == plain.unlabelled_tokens == 4
    assert padded.routing == plain.routing
    assert padded.layers == plain.layers


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_which_data_and_role(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "diff.json"
    options = ("-mb", traces.model(), "--trace", folder / "trace.safetensors", "--json", out, "--quiet")
    said = run(model_diff, "-ma", folder / "3bpw", *options)
    rows = read_trace(folder / "trace.safetensors").counts["report"]
    assert f"{rows} rows of at most" in said
    assert "tokens of responses counted" in said
    assert "trace.safetensors, written by talking at temperature 1, seed 0, role report" in said
    found = json.loads(out.read_text())
    assert (found["rows_role"], found["positions"], found["rows"]) == ("report", "response", rows)
    run(model_diff, "-ma", folder / "3bpw", *options, "-r", 2)
    assert json.loads(out.read_text())["rows"] == 2
    said = run(model_diff, "-ma", folder / "3bpw", "-ma", folder / "4bpw", *options)
    assert "role report" in said
    assert len(json.loads(out.read_text())["pairs"]) == 1
    hashes = {
        recompile.diff(
            folder / "3bpw", traces.model(), trace=folder / "trace.safetensors", positions=positions
        ).report.rows_sha256
        for positions in ("response", "all")
    }
    assert len(hashes) == 2  # so that builds are paired on the same positions only
    said = run(model_diff, "-ma", folder / "3bpw", "-mb", traces.model(), "-r", 2, "-l", 16, "--quiet")
    assert "role report" in said


def test_what_does_not_go_with_a_trace(folder: Path, tmp_path: Path) -> None:
    given = ("-ma", folder / "3bpw", "-mb", traces.model(), "--trace", folder / "trace.safetensors")
    text = tmp_path / "t.txt"
    text.write_text("words")
    assert "--trace takes the place of --text" in refusal(model_diff, *given, "--text", text)
    for option in (["--gen-prompt"], ["--divergence", "2x4"], ["--save-input-ids", tmp_path / "x"]):
        assert f"{option[0]}: goes with rows of one length, not with those of --trace" in refusal(
            model_diff, *given, *option
        )
    assert "--positions goes with --trace" in refusal(model_diff, *given[:4], "--positions", "all")
    with pytest.raises(ArgumentError, match='positions "some": wanted response or all'):
        recompile.diff(folder / "3bpw", traces.model(), trace=folder / "trace.safetensors", positions="some")


def test_another_tokenizer_and_an_empty_role_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny.copy_of(traces.model(), tmp_path / "other")
    for file in other.glob("tokenizer*"):
        file.unlink()
    tiny.write_tokenizer(other, first=3)
    with pytest.raises(MismatchError, match="was written with another tokenizer"):
        recompile.diff(other, other, trace=folder / "trace.safetensors")
    trace = read_trace(folder / "trace.safetensors")
    save_trace(trace.of_role("calibrate"), tmp_path / "calibrate.safetensors")
    with pytest.raises(RecompileError, match=r'no row has the role "report" \(calibrate: \d+, choose: 0'):
        recompile.diff(folder / "3bpw", traces.model(), trace=tmp_path / "calibrate.safetensors")


def test_groups_by_themselves_and_caches_count_responses_alone(folder: Path, tmp_path: Path) -> None:
    """A group costs what the base with that group alone does, weighed by tokens as a report's KL is."""
    base, trace = traces.model(), folder / "trace.safetensors"
    found = recompile.diff(folder / "3bpw", base, trace=trace, rows=4, attribute="layer", cache_quant="f16")
    assert found.attribution is not None
    assert found.report.cache is not None
    each = found.attribution.groups[0]
    lines = "".join(f"  - {{key: '{module}.*', source: a}}\n" for module in each.modules)
    recipe = tmp_path / "one.yaml"
    recipe.write_text(f"sources: [{{id: a, model_dir: '{folder / '3bpw'}'}}]\noverrides:\n{lines}")
    alone = recompile.diff(base, base, recipe=recipe, trace=trace, rows=4).report
    assert each.kl_rows == pytest.approx(alone.kl_rows, rel=1e-3, abs=1e-7)
    assert each.kl.mean == pytest.approx(alone.kl.mean, rel=1e-3)
    assert each.kl.std_error == pytest.approx(alone.kl.std_error, rel=1e-2)
