"""model_diff's library half: what it reports equals what plain transformers logits say, and what is measured over an
overlay is what is measured on the directory written from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.diff import DiffOptions, DiffReport, LayerDrift, RowsCompared, compare, compare_many
from recompile.checkpoint.checkpoint import WeightSource, open_checkpoint
from recompile.errors import CheckpointError, MismatchError, NotFiniteError, OutputError
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from tests import tiny


def report_of(
    candidate: WeightSource, reference: WeightSource, ids: Tensor, options: DiffOptions | None = None
) -> DiffReport:
    *events, report = compare(candidate, reference, ids, options)
    stages = [event for event in events if isinstance(event, LayerDrift)]
    assert isinstance(report, DiffReport)
    assert tuple(stages) == report.layers
    assert events[len(stages) :] == [RowsCompared(row + 1, len(ids)) for row in range(len(ids))]
    return report


def figures(report: DiffReport) -> dict[str, object]:
    """Everything that was measured; labels of the two sides left out."""
    values = report.as_dict()
    for key in ("candidate", "reference"):
        values.pop(key)
    return values


def write_recipe(path: Path, sources: dict[int, Path], lines: list[tuple[str, int]]) -> Path:
    text = "sources:\n" + "".join(f"  - {{id: {n}, model_dir: '{where}'}}\n" for n, where in sources.items())
    text += "overrides:\n" + "".join(f"  - {{key: '{key}', source: {n}}}\n" for key, n in lines)
    path.write_text(text)
    return path


# ---- against the plain way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen2-moe", "gemma2"])
def test_figures_are_those_of_plain_logits(architecture: str, tmp_path: Path) -> None:
    reference = open_checkpoint(tiny.base(architecture))
    candidate = open_checkpoint(tiny.variants(architecture, (3,))[3])
    ids, top = tiny.rows(4, 40), 3
    report = report_of(candidate, reference, ids, DiffOptions(batch=2, top_k=top))
    copy = tiny.dense_copy(candidate, tmp_path / "dense", candidate.path)
    z_a = tiny.plain_logits(tiny.plain_model(copy), ids, 2).double()
    z_b = tiny.plain_logits(tiny.plain_model(reference.path), ids, 2).double()
    kl, back = tiny.plain_kl(z_b, z_a), tiny.plain_kl(z_a, z_b)
    assert float(kl.mean()) > 0.003, "a variant that loses nothing would prove nothing"
    # the logits are equal to the bit; what is left is float32 softmax against float64
    assert report.kl.mean == pytest.approx(float(kl.mean()), abs=1e-6)
    assert report.kl_reverse.mean == pytest.approx(float(back.mean()), abs=1e-6)
    assert report.kl_rows == pytest.approx(kl.mean(1).tolist(), abs=1e-6)
    assert report.kl.std_error == pytest.approx(float(kl.mean(1).std()) / 2, abs=1e-6)  # 4 rows of equal length
    assert report.kl_quantiles.max == pytest.approx(float(kl.max()), abs=1e-5)
    assert report.kl_quantiles.median == pytest.approx(float(kl.flatten().quantile(0.5)), abs=1e-6)
    for score, z in ((report.score_candidate, z_a), (report.score_reference, z_b)):
        nll = -z.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        assert score.nll.mean == pytest.approx(float(nll.mean()), abs=1e-6)
        assert score.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-6)
        ranks = (z[:, :-1] > z[:, :-1].gather(-1, ids[:, 1:, None])).sum(-1)
        assert score.label_in_top_k == pytest.approx([float((ranks < k).double().mean()) for k in range(1, top + 1)])
    same = (z_a.topk(top).indices == z_b.topk(top).indices).cumprod(-1)
    assert [m.mean for m in report.top_k_agreement] == pytest.approx(
        [float(same[..., k].double().mean()) for k in range(top)]
    )
    assert report.tokens == ids.numel()
    assert report.unlabelled_tokens == 4
    assert (report.rows, report.row_tokens, report.vocab) == (4, 40, tiny.VOCAB)
    assert sum(b.tokens for b in report.kl_by_confidence) == report.tokens
    assert not report.identical


def test_drift_is_that_of_the_hidden_states() -> None:
    reference = open_checkpoint(tiny.base("llama"))
    candidate = open_checkpoint(tiny.variants("llama", (3,))[3])
    ids = tiny.rows(2, 16)
    report = report_of(candidate, reference, ids)
    assert [stage.name for stage in report.layers] == ["embedding", *(f"model.layers.{n}" for n in range(4)), "norm"]
    assert [stage.index for stage in report.layers] == list(range(6))
    assert {stage.total for stage in report.layers} == {6}
    model = tiny.plain_model(reference.path)
    with torch.inference_mode():
        states_b = model(input_ids=ids, output_hidden_states=True).hidden_states  # embedding, 3 layers, after the norm
        for name in candidate.modules:
            if candidate.modules[name].is_quantized:
                model.get_submodule(name).weight.copy_(candidate.load(f"{name}.weight"))
        states_a = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert report.layers[0].drift.relative_error == 0.0
    assert report.layers[0].drift.sqnr_db == math.inf
    for stage, a, b in zip([*report.layers[1:4], report.layers[5]], states_a[1:], states_b[1:], strict=True):
        error, size = (a - b).double().flatten(1), b.double().flatten(1)
        ratio = error.norm(dim=1) / size.norm(dim=1)
        assert stage.drift.relative_error == pytest.approx(float(ratio.mean()), rel=1e-5)
        assert stage.drift.sqnr_db == pytest.approx(float(-20 * ratio.log10().mean()), abs=1e-4)
        largest = (error.abs().amax(1) / size.norm(dim=1)).max()
        assert stage.drift.max_difference == pytest.approx(float(largest), rel=1e-5)
        cosine = 1 - torch.nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1))
        assert stage.drift.cosine_error == pytest.approx(float(cosine.mean()), abs=1e-6)  # 1 - a float32


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "qwen3-moe", "gemma3"])
def test_a_directory_against_itself_is_identical(architecture: str) -> None:
    directory = tiny.base(architecture)
    report = report_of(open_checkpoint(directory), open_checkpoint(directory), tiny.rows(3, 21), DiffOptions(batch=2))
    assert report.identical
    assert report.kl.mean == 0.0
    assert report.kl_reverse.mean == 0.0
    assert report.kl_quantiles.max == 0.0
    assert set(report.kl_rows) == {0.0}
    assert all(agreement.mean == 1.0 for agreement in report.top_k_agreement)
    assert report.score_candidate == report.score_reference
    assert all(stage.drift.relative_error == 0.0 for stage in report.layers)
    assert report.noise_floor < 1e-6  # another row length changes the order of float32 sums, nothing else


def test_a_quantized_directory_against_itself_is_identical() -> None:
    directory = tiny.variants("llama", (3,))[3]
    assert report_of(open_checkpoint(directory), open_checkpoint(directory), tiny.rows(1, 8)).identical


def test_quantized_against_quantized() -> None:
    found = tiny.variants("llama", (3, 4))
    three, four, base = (open_checkpoint(path) for path in (found[3], found[4], tiny.base("llama")))
    ids = tiny.rows(2, 16)
    against_each_other = report_of(three, four, ids).kl.mean
    assert 0 < report_of(four, base, ids).kl.mean < report_of(three, base, ids).kl.mean
    assert against_each_other > 0


def test_which_side_is_the_reference() -> None:
    three, base, ids = (
        open_checkpoint(tiny.variants("llama", (3,))[3]),
        open_checkpoint(tiny.base("llama")),
        tiny.rows(2, 16),
    )
    there, back = report_of(three, base, ids), report_of(base, three, ids)
    assert there.kl.mean == back.kl_reverse.mean != back.kl.mean
    assert there.score_candidate == back.score_reference


# ---- the invariant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "lines"),
    [
        ("llama", [("model.layers.*.self_attn.*", 4), ("model.layers.2.*", 2), ("*.down_proj.*", 6)]),
        ("llama-tied", [("model.layers.0.*", 6), ("*.v_proj.*", 4)]),
        ("qwen2-moe", [("*.shared_expert.*", 6), ("*.experts.2.*", 4), ("*.layers.1.self_attn.*", 2)]),
    ],
)
def test_an_overlay_measures_as_the_directory_written_from_it(
    architecture: str, lines: list[tuple[str, int]], tmp_path: Path
) -> None:
    found = tiny.variants(architecture, (2, 3, 4, 6))
    recipe = write_recipe(tmp_path / "mix.yaml", {n: path for n, path in found.items() if n != 3}, lines)
    base, reference, ids = open_checkpoint(found[3]), open_checkpoint(tiny.base(architecture)), tiny.rows(3, 24)
    overlay = build_overlay(base, recipe)
    assert overlay.overridden
    for _ in execute(plan_write(overlay, tmp_path / "out")):
        pass
    measured, written = report_of(overlay, reference, ids), report_of(open_checkpoint(tmp_path / "out"), reference, ids)
    assert figures(written) == figures(measured)  # every figure, to the last bit
    assert measured.kl.mean != report_of(base, reference, ids).kl.mean


def test_many_candidates_measure_as_each_alone() -> None:
    found, base, ids = tiny.variants("llama", (2, 3, 4)), open_checkpoint(tiny.base("llama")), tiny.rows(3, 16)
    candidates = [open_checkpoint(found[n]) for n in (2, 4)]
    events = list(compare_many(candidates, base, ids, DiffOptions(batch=2)))
    reports = [event for event in events if isinstance(event, DiffReport)]
    assert events[-2:] == reports
    assert reports == [report_of(candidate, base, ids, DiffOptions(batch=2)) for candidate in candidates]


# ---- options ---------------------------------------------------------------------------------------------------------


def test_keep_b_puts_the_references_state_after_the_first_stages() -> None:
    """Stages are the embedding, the layers and the norm, as exllamav3 counts modules."""
    three, base, ids = (
        open_checkpoint(tiny.variants("llama", (3,))[3]),
        open_checkpoint(tiny.base("llama")),
        tiny.rows(2, 16),
    )
    kl = []
    for keep in range(7):
        report = report_of(three, base, ids, DiffOptions(keep_reference=keep))
        kl.append(report.kl.mean)
        clean = [stage.drift.relative_error == 0.0 for stage in report.layers]
        assert clean[:5] == [stage < max(keep, 1) for stage in range(5)]  # the embedding is not quantized
        assert clean[5] is (keep >= 5)  # the norm is not either, and passes on what it gets
    assert kl[0] == kl[1]
    assert kl[1] > kl[2] > kl[4] > kl[5] == kl[6] == 0.0


def test_batches_make_no_difference_beyond_rounding() -> None:
    three, base, ids = (
        open_checkpoint(tiny.variants("llama", (3,))[3]),
        open_checkpoint(tiny.base("llama")),
        tiny.rows(5, 16),
    )
    one, all_together = (report_of(three, base, ids, DiffOptions(batch=n)) for n in (1, 5))
    assert one.kl.mean == pytest.approx(all_together.kl.mean, abs=1e-6)
    assert len(one.kl_rows) == len(all_together.kl_rows) == 5
    assert one.kl_rows == pytest.approx(all_together.kl_rows, abs=1e-6)


def test_a_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    three, base, ids = (
        open_checkpoint(tiny.variants("llama", (3,))[3]),
        open_checkpoint(tiny.base("llama")),
        tiny.rows(2, 16),
    )
    ids = ids % 200
    report = report_of(three, base, ids, DiffOptions(vocab=200))
    copy = tiny.dense_copy(three, tmp_path / "dense", three.path)
    z_a, z_b = (tiny.plain_logits(tiny.plain_model(path), ids)[..., :200] for path in (copy, base.path))
    assert report.kl.mean == pytest.approx(float(tiny.plain_kl(z_b, z_a).mean()), abs=1e-6)
    assert report.vocab == 200
    assert report.kl.mean != report_of(three, base, ids).kl.mean


def test_logits_are_saved(tmp_path: Path) -> None:
    three, base, ids = (
        open_checkpoint(tiny.variants("llama", (3,))[3]),
        open_checkpoint(tiny.base("llama")),
        tiny.rows(3, 300),
    )
    options = DiffOptions(
        batch=2, save_candidate_logits=tmp_path / "a.safetensors", save_reference_logits=tmp_path / "b.safetensors"
    )
    report = report_of(three, base, ids, options)
    saved = {}
    for side in "ab":
        with safe_open(tmp_path / f"{side}.safetensors", framework="pt") as file:
            assert list(file.keys()) == ["logits"]
            saved[side] = file.get_tensor("logits")
        assert saved[side].dtype == torch.float32
        assert saved[side].shape == (3, 300, tiny.VOCAB)
    wanted = tiny.plain_logits(tiny.plain_model(base.path), ids, 2)
    torch.testing.assert_close(saved["b"], wanted, rtol=1e-5, atol=1e-5)  # the head ran on chunks of 256 tokens
    assert float(tiny.plain_kl(saved["b"], saved["a"]).mean()) == pytest.approx(report.kl.mean, abs=1e-6)
    assert not list(tmp_path.glob("*.recompile-partial"))


def test_logits_that_cannot_be_saved_are_one_error(tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base("llama-2"))
    (tmp_path / "file").write_text("no folder")
    options = DiffOptions(save_reference_logits=tmp_path / "file" / "logits.safetensors")
    with pytest.raises(OutputError, match=r"logits\.safetensors: cannot be written"):
        report_of(base, base, tiny.rows(1, 4), options)


def test_an_interrupted_run_leaves_no_logits(tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base("llama-2"))
    events = compare(base, base, tiny.rows(1, 4), DiffOptions(save_reference_logits=tmp_path / "b.safetensors"))
    next(events)
    events.close()
    assert list(tmp_path.iterdir()) == []


# ---- what is left out, and what is refused ---------------------------------------------------------------------------


def test_one_token_that_overflows_stops_the_comparison(tmp_path: Path) -> None:
    """Feature 0 is kept for token 7 alone; where the last MLP multiplies it by 3e38, that token alone overflows."""
    paths = []
    for name, column in (("calm", 1.0), ("huge", 3e38)):
        paths.append(tiny.copy_of(tiny.base("llama-2", torch.float32), tmp_path / name))
        tensors = load_file(paths[-1] / "model.safetensors")
        tensors["model.embed_tokens.weight"][:, 0] = 0
        tensors["model.embed_tokens.weight"][7] = 1000 * torch.eye(tiny.HIDDEN)[0]
        for writer in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj"):
            tensors[f"model.layers.{writer}.weight"][0] = 0
        tensors["model.layers.1.mlp.up_proj.weight"][:, 0] = column
        save_file(tensors, paths[-1] / "model.safetensors")
    calm, huge = (open_checkpoint(path) for path in paths)
    ids = tiny.rows(3, 10).clamp(min=8)
    ids[1, 4] = 7
    for candidate, reference in ((huge, calm), (calm, huge)):
        for batch in (1, 2, 3):
            with pytest.raises(NotFiniteError, match=r"huge: layer 1, row 2: hidden states are NaN or infinite"):
                report_of(candidate, reference, ids, DiffOptions(batch=batch))
    report = report_of(huge, calm, tiny.rows(3, 10).clamp(min=8))
    assert report.kl_rows == (0.0, 0.0, 0.0), "without that token the two are one model"


def test_a_type_too_narrow_is_an_error_and_no_perfect_score(tmp_path: Path) -> None:
    """States of 2e5 fit float32 and bfloat16; in float16 both models' are infinite, so that a comparison of the rest
    would find no difference."""
    paths = {}
    for name, base in (("base", tiny.base("llama")), ("3bpw", tiny.variants("llama", (3,))[3])):
        paths[name] = tiny.copy_of(base, tmp_path / name)
    tensors = load_file(paths["base"] / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].mul_(3e4)
    save_file(tensors, paths["base"] / "model.safetensors", {"format": "pt"})
    base, candidate = open_checkpoint(paths["base"]), open_checkpoint(paths["3bpw"])
    ids = tiny.rows(2, 32)
    wide = report_of(candidate, base, ids)
    assert wide.kl.mean > 0.01
    assert report_of(candidate, base, ids, DiffOptions(dtype=torch.bfloat16)).kl.mean == pytest.approx(
        wide.kl.mean, rel=0.2
    )
    for one, other in ((candidate, base), (base, candidate), (base, base)):
        with pytest.raises(NotFiniteError, match=r"base: layer 1, row 1: .* in float16.*use a wider dtype"):
            report_of(one, other, ids, DiffOptions(dtype=torch.float16))


def test_logits_that_overflow_name_the_head(tmp_path: Path) -> None:
    """States are whole there, and only the product with the head is not."""
    path = tiny.copy_of(tiny.base("llama-2", torch.float32), tmp_path / "loud")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][5] = 3e38
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    loud, calm = open_checkpoint(path), open_checkpoint(tiny.base("llama-2", torch.float32))
    with pytest.raises(NotFiniteError, match=r"loud: the head, row \d: logits are NaN or infinite"):
        report_of(loud, calm, tiny.rows(2, 10))


def test_nan_weights_stop_with_the_tensor_named(tmp_path: Path) -> None:
    directory = tiny.copy_of(tiny.base("llama-2"), tmp_path / "damaged")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        report_of(open_checkpoint(directory), open_checkpoint(tiny.base("llama-2")), tiny.rows(1, 4))


@pytest.mark.parametrize("ids", [torch.tensor([[1, tiny.VOCAB]]), torch.tensor([[1, -1]])])
def test_ids_of_another_vocabulary_are_refused(ids: Tensor) -> None:
    base = open_checkpoint(tiny.base("llama-2"))
    with pytest.raises(MismatchError, match="vocabulary from 0 to 255"):
        report_of(base, base, ids)


@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (4,)])
def test_rows_without_a_next_token_are_refused(shape: tuple[int, ...]) -> None:
    base = open_checkpoint(tiny.base("llama-2"))
    with pytest.raises(MismatchError, match="token rows are"):
        report_of(base, base, torch.zeros(shape, dtype=torch.int64))


def test_models_of_other_sizes_are_refused() -> None:
    with pytest.raises(MismatchError, match="layers 2 against 4"):
        report_of(open_checkpoint(tiny.base("llama-2")), open_checkpoint(tiny.base("llama")), tiny.rows(1, 4))


def test_the_report_is_one_plain_value() -> None:
    base = open_checkpoint(tiny.base("llama-2"))
    report = report_of(base, base, tiny.rows(1, 4))
    assert dataclasses.asdict(report) == report.as_dict()
    assert report.kl.std_error is None, "one row has no spread"
