"""model_heal on GGUF files: what moves inside blocks, its gradient, and the file that is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.diff import DiffReport, compare
from eval.heal import Healing, HealOptions, HealReport, heal
from eval.heal_output import write_healed
from eval.heal_rows import HealRows
from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.cli.model_heal import main as model_heal
from recompile.formats.gguf_types import TYPES, GgufType
from recompile.gguf.container import NewTensor, encode_key, open_gguf, write_gguf
from recompile.model.used_rows import HEAL_KEY, UsedRows, recorded_rows
from recompile.quantize.gguf import plan_variants
from recompile.quantize.gguf_build import build_variants
from recompile.quantize.movable import Movable, MovedBuild, find_movables
from recompile.quantize.movable_gguf import FIELDS, FieldMovable
from tests import tiny
from tests.commands import refusal
from tests.eval.test_heal import TOKENS, make_rows, slope_along
from tests.quantize.test_gguf_variants import tokenizer_file
from tests.stream import architectures

WIDTH = 256
OPTIONS = HealOptions(
    tokens=24 * TOKENS, batch_tokens=4 * TOKENS, check_every=2, learning_rate=0.01, dtype=torch.float32
)


def drawn(kind: GgufType, rows: int) -> Tensor:
    """Rows of random codes and random scales between 0.02 and 0.1, minima of both signs."""
    noise = np.random.default_rng(kind.type_id)
    raw = torch.from_numpy(noise.integers(0, 256, (rows, kind.row_bytes(WIDTH)), dtype=np.uint8))
    for place in FIELDS[kind.name]:
        shape = place.read(kind, raw).shape
        value = torch.from_numpy(noise.uniform(0.02, 0.1, shape))
        if place.added:
            value = value * torch.from_numpy(noise.choice([-1.0, 1.0], shape))
        place.write(kind, raw, value.to(place.dtype))
    return raw


def one_tensor(kind: GgufType, path: Path) -> GgufCheckpoint:
    """A llama's query map alone: its rows are reordered by heads."""
    records = [
        encode_key("general.architecture", "llama"),
        encode_key("llama.block_count", 1),
        encode_key("llama.context_length", 128),
        encode_key("llama.embedding_length", WIDTH),
        encode_key("llama.feed_forward_length", WIDTH),
        encode_key("llama.attention.head_count", 4),
        encode_key("llama.attention.head_count_kv", 4),
        encode_key("llama.attention.layer_norm_rms_epsilon", 1e-5),
        encode_key("tokenizer.ggml.tokens", ["a", "b"]),
    ]
    raw = drawn(kind, 16).numpy().tobytes()
    embedding = NewTensor("token_embd.weight", TYPES["F32"], (WIDTH, 2), lambda: [bytes(8 * WIDTH)])
    query = NewTensor("blk.0.attn_q.weight", kind, (WIDTH, 16), lambda: [raw])
    write_gguf(path, records, [embedding, query])
    found = open_checkpoint(path)
    assert isinstance(found, GgufCheckpoint)
    return found


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_s_gradient_is_what_doubling_it_does(name: str, tmp_path: Path) -> None:
    """<G, W> is linear in every field, and doubling is exact: <G, W(2 f)> - <G, W(f)> = f d<G, W>/df."""
    build = one_tensor(TYPES[name], tmp_path / "m.gguf")
    tensor = "model.layers.0.self_attn.q_proj.weight"
    movables = find_movables(build)
    assert {movable.tensor for movable in movables.values()} == {tensor}
    assert len(movables) == len(FIELDS[name])
    weight = build.load(tensor).float()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for movable in movables.values():
        found = movable.gradient(weight, gradient)
        assert found.shape == movable.start.shape
        for place in (0, found.numel() // 2, found.numel() - 1):
            doubled = torch.zeros_like(movable.start)
            log_two, step = float(np.log(2)), float(movable.start.flatten()[place]) / movable.unit
            doubled.view(-1)[place] = step if movable.added else log_two
            movable.delta = doubled
            after = MovedBuild(build, movables).load(tensor).float()
            movable.delta = torch.zeros_like(doubled)
            change = float(((after - weight).double() * gradient).sum())
            expected = float(found.flatten()[place]) * (step if movable.added else 1.0)
            assert expected == pytest.approx(change, rel=5e-3, abs=5e-3), place


def base_of(architecture: str) -> Checkpoint:
    return open_checkpoint(architectures.checkpoint("gpt2") if architecture == "gpt2" else tiny.base(architecture))


def made(folder: Path, kind: str, architecture: str = "llama", damaged: bool = False) -> Checkpoint:
    """damaged: every scale is 20 % off, up or down, so that there is something to heal at 4 bits."""
    base = base_of(architecture)
    words = open_gguf(tokenizer_file(folder / "words.gguf", base.config["vocab_size"]))
    for _ in build_variants(plan_variants(base, folder, [kind], stem="m", tokenizer_from=words)):
        pass
    build = open_checkpoint(folder / f"m-{kind}.gguf")
    if damaged:
        movables = {name: m for name, m in find_movables(build).items() if isinstance(m, FieldMovable) and not m.added}
        generator = torch.Generator().manual_seed(1)
        for movable in movables.values():
            movable.delta = 0.2 * torch.randn(movable.start.shape, generator=generator).sign()
        write_healed(build, movables, folder / "damaged.gguf", {})
        build = open_checkpoint(folder / "damaged.gguf")
    return build


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "gemma2", "gpt2"])
def test_gradients_are_those_of_finite_differences(kind: str, architecture: str, tmp_path: Path) -> None:
    """Along a random direction of each field, and of norms and biases."""
    build, rows = made(tmp_path, kind, architecture), make_rows()
    if architecture == "gpt2":  # whose weights are [in, out]
        rows = HealRows(*(architectures.rows(24, TOKENS) for _ in range(5)))
    work = Healing(build, base_of(architecture), tmp_path / "out.gguf", rows, OPTIONS)
    ids = work.rows.train[: work.batch_rows]
    wanted = work.teacher_states(ids)
    found: dict[str, Tensor] = {}
    work.adam.step = lambda movables, gradients, rate: found.update(gradients)  # type: ignore[method-assign]
    for movable in work.movables.values():
        movable.dtype = torch.float32 if movable.is_vector else movable.dtype
    work.step(ids, wanted)
    gradients = dict(found)
    assert set(work.movables) == set(gradients)
    generator = torch.Generator().manual_seed(5)
    direction = {name: torch.randn(m.start.shape, generator=generator) for name, m in work.movables.items()}
    kinds: dict[str, set[str]] = {}
    for name in gradients:
        kinds.setdefault("vector" if work.movables[name].is_vector else name.partition(":")[2], set()).add(name)
    assert len(kinds) >= (2 if kind == "Q4_0" else 3)

    for label, names in kinds.items():
        step = 0.05 if label == "m" else 4e-3  # float16 fields round at 5e-4 of their size, and minima are large
        slope = slope_along({name: direction[name] for name in names}, work, ids, wanted, step)
        predicted = sum(float((gradients[name] * direction[name]).sum()) for name in names)
        size = sum(float(gradients[name].square().sum()) for name in names) ** 0.5
        assert slope == pytest.approx(predicted, abs=0.1 * size + 1e-3), label


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [pytest.param("Q4_0", "llama", marks=pytest.mark.sweep), ("Q4_1", "gemma2"), ("Q4_0", "qwen2-moe")],
)
def test_what_is_written_is_what_was_measured(kind: str, architecture: str, tmp_path: Path) -> None:
    build, base = made(tmp_path, kind, architecture, damaged=True), open_checkpoint(tiny.base(architecture))
    out, rows = tmp_path / "healed.gguf", replace(make_rows(), used=(UsedRows("calibrate", ("a", "b")),))
    *_, report = heal(build, base, out, rows, OPTIONS)
    assert isinstance(report, HealReport)
    assert report.kept
    assert report.report.after < report.report.before
    healed = open_checkpoint(out)
    assert isinstance(healed, GgufCheckpoint)
    assert {n: (i.dtype, i.shape) for n, i in healed.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in build.tensors.items()
    }
    moving = find_movables(build)
    by_tensor: dict[str, list[Movable]] = {}
    for movable in moving.values():
        by_tensor.setdefault(movable.tensor, []).append(movable)
    changed = 0
    for name, info in build.tensors.items():
        before, after = read_tensor(info), read_tensor(healed.tensors[name])
        if not torch.equal(before, after):
            changed += 1
            fields = [movable for movable in by_tensor[name] if isinstance(movable, FieldMovable)]
            for movable in fields:  # with the fields of before in it, every byte is what it was
                after = movable.in_file(info, after)
            assert not fields or torch.equal(before, after), name
    assert changed
    *_, measured = compare(healed, base, rows.report)
    assert isinstance(measured, DiffReport)
    assert measured.kl_rows == pytest.approx(report.kl_rows["report"], rel=1e-4)
    assert json.loads(healed.file.value(HEAL_KEY))["best_step"] == report.best_step
    assert [(used.role, used.documents) for _, used in recorded_rows([out])] == [("calibrate", ("a", "b"))]
    assert not list(tmp_path.glob("*.healing"))
    assert not list(tmp_path.glob("*.recompile-partial"))


def test_the_name_of_the_output_is_that_of_a_gguf_file(tmp_path: Path) -> None:
    build = made(tmp_path, "Q4_0")
    said = refusal(
        model_heal, "-i", build.path, "-mb", tiny.base("llama"), "-o", tmp_path / "out", "-l", 16, "-r", 2, "--quiet"
    )
    assert "name it out.gguf" in said
