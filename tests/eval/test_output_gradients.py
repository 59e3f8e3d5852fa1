"""E[g g^T] at the outputs of maps: against plain transformers and autograd, and what a directory of it gives back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.passes.fisher import DRAWS, FisherCotangents, draw_labels
from eval.passes.output_gradients import GradientOptions, OutputGradients, held_out_rows, measure_outputs
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import CheckpointError, MismatchError, RecompileError
from recompile.model.stream import LayeredModel
from recompile.quantize.output_statistics import (
    ABOUT,
    GradientSums,
    StatisticsWriter,
    StoredStatistics,
    open_statistics,
)
from tests import tiny

CPU = torch.device("cpu")
FLOAT32 = GradientOptions(samples=2, dtype=torch.float32)


def measure(base: Path, ids: Tensor, path: Path, options: GradientOptions = FLOAT32) -> StoredStatistics:
    *_, last = measure_outputs(open_checkpoint(base), ids, path, options, rows_sha256="r")
    assert isinstance(last, StoredStatistics)
    return last


def plain_gradients(base: Path, ids: Tensor, samples: int, modules: list[str]) -> dict[str, Tensor]:
    """[samples, rows, tokens, out] by transformers' own forward and autograd, from the same labels."""
    model = tiny.plain_model(base)
    outputs: dict[str, Tensor] = {}
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
    logits = model(input_ids=ids, use_cache=False).logits
    drawer = FisherCotangents(LayeredModel.of(open_checkpoint(base)), {}, (), samples)
    draws = [drawer._draw(row, ids.shape[1]) for row in range(len(ids))]
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for sample in range(samples):
        target = torch.zeros_like(logits)
        for row, (uniform, signs) in enumerate(draws):
            p = logits[row].detach().softmax(-1)
            labels = draw_labels(p, uniform)[sample]  # [tokens, draws]
            one_hot = torch.nn.functional.one_hot(labels, p.shape[-1]).float() - p[:, None]
            target[row] = (signs[sample][..., None] * one_hot).sum(1)
        gradients = torch.autograd.grad(logits, [outputs[name] for name in modules], target, retain_graph=True)
        for name, gradient in zip(modules, gradients, strict=True):
            found[name].append(gradient)
    return {name: torch.stack(values) for name, values in found.items()}


def test_it_is_what_plain_autograd_gives(tmp_path: Path) -> None:
    base, ids = tiny.base("llama"), tiny.rows(5, 12)
    stored = measure(base, ids, tmp_path / "stats")
    names = [f"model.layers.{layer}.{leaf}" for layer in (0, 3) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
    assert held_out_rows(5) == {4}
    for name, gradient in plain_gradients(base, ids, 2, names).items():
        found = stored.of(name, CPU)
        assert found is not None
        assert (found.tokens, found.held_out_tokens) == (2 * 4 * 12, 2 * 12)
        for share, rows in ((found.fit, slice(0, 4)), (found.held_out, slice(4, 5))):
            g = gradient[:, rows].flatten(0, 2)
            wanted = g.t() @ g / len(g)
            root = wanted.diagonal().sqrt()
            assert ((share - wanted).abs() / (root * root[:, None])).max() < 2e-3, "float16 correlations"
            assert torch.allclose(share.diagonal(), wanted.diagonal(), rtol=1e-4)
    assert DRAWS > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_those_of_the_gradients_in_any_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows of a matrix at a time; small gradients, whose squares float16 does not hold."""
    monkeypatch.setattr("eval.passes.output_gradients.MOMENT_ROWS", 24)
    seen = OutputGradients(frozenset({1}))
    g = (1e-5 * torch.randn(2, 6, 16, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    for rows in (slice(0, 3), slice(3, 6)):
        seen.see([("m", slice(10, 50))], g[:, rows], rows)
    found = seen.take()["m"]
    for have, rows in ((found.fit, [0, 2, 3, 4, 5]), (found.held_out, [1])):
        flat = g[:, rows, :, 10:].double().flatten(0, 2)
        wanted = flat.T @ flat
        assert have.dtype == torch.float32
        assert float((have - wanted).abs().max()) < 4e-3 * float(wanted.max())


@pytest.mark.parametrize("architecture", ["qwen2-moe", "llama-bias"])
def test_every_map_has_its_own(tmp_path: Path, architecture: str) -> None:
    base = tiny.base(architecture)
    stored = measure(base, tiny.rows(9, 16), tmp_path / "stats")
    checkpoint = open_checkpoint(base)
    linear = {
        name: module.shape
        for name, module in checkpoint.modules.items()
        if ".layers." in name and module.shape is not None and len(module.shape) == 2 and "gate" not in name[-6:]
    }
    routed = {name for name in linear if ".experts." in name}
    assert set(linear) - set(stored.modules) <= routed, "an expert may get no token"
    assert len(routed & set(stored.modules)) > len(routed) // 2 or not routed
    for name in stored.modules:
        found = stored.of(name, CPU)
        assert found is not None
        shape = linear[name]
        assert shape is not None
        assert found.fit.shape == found.held_out.shape == (shape[0], shape[0])
        assert torch.linalg.eigvalsh(found.fit.double()).min() > -0.01 * found.fit.diagonal().mean()


def test_a_directory_is_opened_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    assert open_statistics(path) is None
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    writer = StatisticsWriter(path, {"base": "abc"})
    dead = torch.zeros(6, 6)
    writer.add(0, {"a": GradientSums(x.t() @ x, x[:9].t() @ x[:9], 50, 9), "dead": GradientSums(dead, dead, 5, 5)})
    assert open_statistics(path) is None, "not whole yet"
    writer.finish()
    stored = open_statistics(path)
    assert stored is not None
    assert set(stored.modules) == {"a"}
    found = stored.of("a", CPU)
    assert found is not None
    assert torch.allclose(found.fit, x.t() @ x / 50, atol=2e-3)
    assert stored.of("dead", CPU) is None
    stored.check_base("abc", "base")
    with pytest.raises(MismatchError, match="another model"):
        stored.check_base("other", "base")
    with pytest.raises(CheckpointError, match="not finite"):
        writer.add(1, {"b": GradientSums(torch.full((2, 2), torch.nan), torch.eye(2), 1, 1)})
    (path / "layer-00000.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="measure anew"):
        stored.of("a", CPU)
    (path / ABOUT).write_text(json.dumps({"version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        open_statistics(path)
    (path / ABOUT).unlink()
    (path / "model.bin").write_text("x")
    with pytest.raises(CheckpointError, match="directory of their own"):
        open_statistics(path)


def test_one_row_cannot_be_shared_out(tmp_path: Path) -> None:
    with pytest.raises(RecompileError, match="at least 2 rows"):
        measure(tiny.base("llama"), tiny.rows(1, 8), tmp_path / "stats")


def test_a_memory_cap_that_cannot_be_kept_is_told_before(tmp_path: Path) -> None:
    with pytest.raises(RecompileError, match="too little"):
        measure(tiny.base("llama"), tiny.rows(4, 8), tmp_path / "stats", GradientOptions(max_memory_bytes=1 << 20))
    assert not (tmp_path / "stats").exists()
