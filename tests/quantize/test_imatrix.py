"""Importance matrices: the file, moments of calibration against plain hooks, experts, and the real quantizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import CheckpointError
from recompile.formats.gguf_types import TYPES
from recompile.gguf.container import NewTensor, encode_key, open_gguf, write_gguf
from recompile.gguf.imatrix import Imatrix, InputSums, read_imatrix, write_imatrix
from recompile.model.stream import LayeredModel
from recompile.quantize.activation_stats import InputMoments, collect_moments, make_imatrix
from tests import tiny


def test_importance_by_hand() -> None:
    """Two tokens with inputs (1, 2) and (3, 0): mean squares 5 and 2, means 2 and 1; the second expert saw none."""
    sums = InputSums(
        np.array([[10, 4], [0, 0]], np.float32), np.array([2, 0], np.float32), np.array([[4, 2], [0, 0]], np.float32)
    )
    assert sums.importance().tolist() == [[5, 2], [1, 1]]
    mean = sums.mean()
    assert mean is not None
    assert mean.tolist() == [[2, 1], [0, 0]]


def test_a_file_survives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = Imatrix(
        {
            "blk.0.attn_q.weight": InputSums(rng.random((1, 8), np.float32), np.array([7], np.float32)),
            "blk.0.ffn_up_exps.weight": InputSums(
                rng.random((3, 4), np.float32), np.array([1, 0, 5], np.float32), rng.random((3, 4), np.float32)
            ),
        },
        chunks=3,
        chunk_tokens=64,
        datasets=("text", "more"),
    )
    write_imatrix(tmp_path / "i.gguf", made)
    again = read_imatrix(tmp_path / "i.gguf")
    assert (again.chunks, again.chunk_tokens, again.datasets) == (3, 64, ("text", "more"))
    assert again.entries.keys() == made.entries.keys()
    for name, sums in made.entries.items():
        assert np.array_equal(again.entries[name].sum_squares, sums.sum_squares)
        assert np.array_equal(again.entries[name].counts, sums.counts)
    assert again.entries["blk.0.attn_q.weight"].sums is None
    assert np.array_equal(
        again.entries["blk.0.ffn_up_exps.weight"].importance(), made.entries["blk.0.ffn_up_exps.weight"].importance()
    )
    file = open_gguf(tmp_path / "i.gguf")
    assert file.tensors["blk.0.ffn_up_exps.weight.in_sum2"].ne == (4, 3)  # [in, experts], fastest first
    assert file.tensors["blk.0.ffn_up_exps.weight.counts"].ne == (1, 3)


@pytest.mark.parametrize(
    ("kind", "tensors", "says"),
    [
        ("model", {"a.in_sum2": [[1.0]], "a.counts": [[1.0]]}, 'wanted "imatrix"'),
        ("imatrix", {"a.in_sum2": [[1.0]]}, "no a.counts"),
        ("imatrix", {"a.in_sum2": [[-1.0]], "a.counts": [[1.0]]}, "negative or not finite"),
        ("imatrix", {"a.in_sum2": [[1.0]], "a.counts": [[1.0], [2.0]]}, "its counts 2"),
        ("imatrix", {"a.counts": [[1.0]]}, "holds no"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, kind: str, tensors: dict[str, list[list[float]]], says: str) -> None:
    def tensor(name: str, values: list[list[float]]) -> NewTensor:
        array = np.array(values, "<f4")
        return NewTensor(name, TYPES["F32"], tuple(reversed(array.shape)), lambda: [array.tobytes()])

    write_gguf(tmp_path / "x.gguf", [encode_key("general.type", kind)], [tensor(*item) for item in tensors.items()])
    with pytest.raises(CheckpointError, match=says):
        read_imatrix(tmp_path / "x.gguf")


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe"])
def test_moments_are_those_of_plain_hooks(architecture: str) -> None:
    """Row by row; the moments of every module are sums over the very inputs that its linear call gets."""
    checkpoint = open_checkpoint(tiny.base(architecture, dtype=torch.float32))
    model = LayeredModel.of(checkpoint)
    ids = tiny.rows(3, 12)
    found: dict[str, InputMoments] = {}
    for moments in collect_moments(model, ids, head=True):
        found |= {module: m for m in moments for module in m.modules}
    plain = tiny.plain_model(checkpoint.path)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and "experts" not in name:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())
            )
    with torch.no_grad():
        for row in ids:
            plain(row[None])
    assert seen.keys() <= found.keys()
    for name, inputs in seen.items():
        x = torch.stack([value.reshape(-1, value.shape[-1]) for value in inputs])  # [rows, tokens, in]
        assert found[name].tokens.tolist() == [12, 12, 12]
        torch.testing.assert_close(found[name].sums, x.sum(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[name].sum_squares, x.square().sum(1), rtol=1e-4, atol=1e-4)
    experts = [moments for module, moments in found.items() if ".experts.0." in module]
    assert bool(experts) == (architecture == "qwen3-moe")
    assert all(0 < int(moments.tokens.sum()) < 36 for moments in experts)


def test_experts_share_one_entry() -> None:
    checkpoint = open_checkpoint(tiny.base("qwen3-moe", dtype=torch.float32))
    layers = list(collect_moments(LayeredModel.of(checkpoint), tiny.rows(3, 12)))
    made = make_imatrix(checkpoint.config, layers, 12, ["rows"])
    entry = next(sums for name, sums in made.entries.items() if "ffn_down_exps" in name)
    experts, top = checkpoint.config["num_experts"], checkpoint.config["num_experts_per_tok"]
    assert entry.sum_squares.shape[0] == experts
    assert entry.counts.sum() == 3 * 12 * top  # every token goes to so many experts
    assert made.entries["blk.0.attn_q.weight"].counts.tolist() == [36]
    assert np.array_equal(
        made.entries["blk.0.attn_q.weight"].sum_squares, made.entries["blk.0.attn_v.weight"].sum_squares
    )
