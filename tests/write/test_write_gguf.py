"""Merging GGUF files: bytes, keys, splits, experts, what is refused, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from recompile.checkpoint.checkpoint import GgufCheckpoint, open_checkpoint
from recompile.cli.recompile import main
from recompile.errors import CheckpointError, OutputError, RecompileError, UnsupportedError
from recompile.gguf.container import open_gguf
from recompile.merge.overlay import Overlay, build_overlay
from recompile.merge.write_gguf import check_hashes, execute_gguf, plan_gguf, verify_gguf
from recompile.recipe.recipe import parse_recipe
from tests.gguf_models import write_model


def mix_of(base: Path, lines: dict[str, Path]) -> Overlay:
    """Base with modules by glob -> file."""
    sources = ", ".join(f"{{id: {n}, model_dir: {path}}}" for n, path in enumerate(lines.values()))
    overrides = ", ".join(f"{{key: '{key}', source: {n}}}" for n, key in enumerate(lines))
    return build_overlay(open_checkpoint(base), parse_recipe(f"sources: [{sources}]\noverrides: [{overrides}]\n"))


def test_tensors_and_keys_are_byte_for_byte(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q4_0")
    mix = mix_of(a, {"blk.0.*": b, "model.layers.1.self_attn.q_proj.weight": b})
    plan = plan_gguf(mix, tmp_path / "mix.gguf")
    steps = list(execute_gguf(plan))
    assert steps[-1].done_bytes == plan.data_bytes
    out, left, right = open_gguf(tmp_path / "mix.gguf"), open_gguf(a), open_gguf(b)
    assert (tmp_path / "mix.gguf").stat().st_size == plan.needed_bytes
    assert list(out.tensors) == list(left.tensors)
    taken = {name for name in out.tensors if name.startswith("blk.0.") or name == "blk.1.attn_q.weight"}
    for name, tensor in out.tensors.items():
        source = right if name in taken else left
        assert (tensor.type, tensor.ne) == (source.tensors[name].type, source.tensors[name].ne)
        assert out.read(name) == source.read(name)
    same = [key for key in left.keys if key != "general.file_type"]
    assert all(out.record(key) == left.record(key) for key in same)
    assert list(out.keys)[: len(left.keys)] == list(left.keys)
    assert out.value("general.file_type") == 7  # Q8_0 fills most bytes
    assert out.value("general.quantization_version") == 2
    assert "blk.0.*" in out.value("recompile.recipe")
    assert set(check_hashes(tmp_path / "mix.gguf").values()) == {True}  # type: ignore[union-attr]
    assert verify_gguf(plan).ok
    assert not list(tmp_path.glob("*.recompile-partial"))


def test_a_mix_is_what_its_overlay_says(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q4_0")
    mix = mix_of(a, {"*.attn_q.*": b})
    list(execute_gguf(plan_gguf(mix, tmp_path / "mix.gguf")))
    written = open_checkpoint(tmp_path / "mix.gguf")
    for name in mix.base.tensors:
        assert torch.equal(mix.load(name), written.load(name)), name
    assert mix.accounting.total_bytes == sum(module.size_bytes for module in written.modules.values())


def test_the_same_inputs_give_the_same_file(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q4_0")
    mix = mix_of(a, {"blk.1.*": b})
    for name, workers in (("x.gguf", 1), ("y.gguf", 4)):
        list(execute_gguf(plan_gguf(mix, tmp_path / name), workers=workers))
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


def test_a_plain_copy_is_the_same_file_again(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a.gguf")
    list(execute_gguf(plan_gguf(build_overlay(open_checkpoint(a), None), tmp_path / "copy.gguf")))
    copy, source = open_gguf(tmp_path / "copy.gguf"), open_gguf(a)
    assert all(copy.record(key) == source.record(key) for key in source.keys)
    assert all(copy.read(name) == source.read(name) for name in source.tensors)
    assert set(copy.keys) - set(source.keys) == {"general.quantization_version"}


def test_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q4_0")
    mix = mix_of(a, {"blk.1.*": b})
    monkeypatch.setattr("recompile.merge.write_gguf.MB", 20_000)
    plan = plan_gguf(mix, tmp_path / "mix.gguf", split_mb=1)
    list(execute_gguf(plan))
    paths = sorted(path.name for path in tmp_path.glob("mix*"))
    assert len(paths) == len(plan.shards) > 2
    assert paths[0] == f"mix-00001-of-{len(paths):05d}.gguf"
    out = open_gguf(tmp_path / paths[-1])
    assert list(out.tensors) == list(open_gguf(a).tensors)
    assert out.read("blk.1.ffn_up.weight") == open_gguf(b).read("blk.1.ffn_up.weight")
    assert verify_gguf(plan).ok
    back = plan_gguf(build_overlay(open_checkpoint(tmp_path / paths[0]), None), tmp_path / "whole.gguf")
    list(execute_gguf(back))
    whole = open_gguf(tmp_path / "whole.gguf")
    assert not [key for key in whole.keys if key.startswith("split.")]
    assert all(whole.read(name) == out.read(name) for name in whole.tensors)


def test_experts_move_alone_where_types_agree(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a.gguf", "qwen3moe", experts=3)
    b = write_model(tmp_path / "b.gguf", "qwen3moe", experts=3)
    raw = bytearray(b.read_bytes())
    there = open_gguf(b).tensors["blk.0.ffn_up_exps.weight"]
    raw[there.offset : there.offset + there.size_bytes] = bytes(there.size_bytes)
    b.write_bytes(raw)
    mix = mix_of(a, {"model.layers.0.mlp.experts.1.up_proj.*": b})
    plan = plan_gguf(mix, tmp_path / "mix.gguf")
    list(execute_gguf(plan))
    size = there.size_bytes // 3
    want, have = open_gguf(a).read(there.name), open_gguf(tmp_path / "mix.gguf").read(there.name)
    assert have == want[:size] + bytes(size) + want[2 * size :]
    assert verify_gguf(plan).ok
    c = write_model(tmp_path / "c.gguf", "qwen3moe", kind="Q4_0", experts=3)
    with pytest.raises(UnsupportedError, match=r"experts of blk\.0\.ffn_up_exps\.weight would be Q8_0, Q4_0"):
        plan_gguf(mix_of(a, {"model.layers.0.mlp.experts.1.up_proj.*": c}), tmp_path / "no.gguf")
    whole = mix_of(a, {"blk.0.ffn_up_exps.weight": c})
    list(execute_gguf(plan_gguf(whole, tmp_path / "whole.gguf")))
    assert open_gguf(tmp_path / "whole.gguf").read(there.name) == open_gguf(c).read(there.name)


def test_a_head_that_only_the_source_has(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", head=True)
    mix = mix_of(a, {"output.weight": b})
    list(execute_gguf(plan_gguf(mix, tmp_path / "mix.gguf")))
    assert open_gguf(tmp_path / "mix.gguf").read("output.weight") == open_gguf(b).read("output.weight")
    assert open_checkpoint(tmp_path / "mix.gguf").config["tie_word_embeddings"] is False


def test_engines_types(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a.gguf")
    fork, new = write_model(tmp_path / "f.gguf", kind="Q6_0"), write_model(tmp_path / "n.gguf", kind="Q2_0")
    plan = plan_gguf(mix_of(a, {"blk.0.attn_q.weight": fork}), tmp_path / "mix.gguf")
    assert "Q6_0: loads in ik_llama.cpp only" in plan.warnings[0]
    with pytest.raises(UnsupportedError, match="only ik_llama"):
        plan_gguf(mix_of(a, {"blk.0.attn_q.weight": fork, "blk.0.attn_v.weight": new}), tmp_path / "mix.gguf")


def test_file_type_follows_the_bytes(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q6_0")
    list(execute_gguf(plan_gguf(mix_of(a, {"blk.*": b}), tmp_path / "mix.gguf")))
    assert open_gguf(tmp_path / "mix.gguf").value("general.file_type") == 135


def test_what_is_refused(tmp_path: Path) -> None:
    a = write_model(tmp_path / "a.gguf")
    plain = build_overlay(open_checkpoint(a), None)
    with pytest.raises(OutputError, match=r"name it out\.gguf"):
        plan_gguf(plain, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        list(execute_gguf(plan_gguf(plain, a)))
    with pytest.raises(OutputError, match="not a directory"):
        list(execute_gguf(plan_gguf(plain, tmp_path / "none" / "out.gguf")))
    other = write_model(tmp_path / "q.gguf", "qwen2")
    with pytest.raises(RecompileError, match=r"not a build of the same model|architecture qwen2"):
        plan_gguf(mix_of(a, {"blk.0.attn_q.weight": other}), tmp_path / "out.gguf")


def test_a_source_that_is_cut_while_it_is_copied_leaves_nothing(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q4_0")
    plan = plan_gguf(mix_of(a, {"blk.1.*": b}), tmp_path / "mix.gguf")
    b.write_bytes(b.read_bytes()[:9000])
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        list(execute_gguf(plan))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q4_0")
    plan = plan_gguf(mix_of(a, {"blk.1.*": b}), tmp_path / "mix.gguf")
    list(execute_gguf(plan))
    raw = bytearray(plan.out.read_bytes())
    raw[open_gguf(plan.out).tensors["blk.1.attn_v.weight"].offset] ^= 1
    plan.out.write_bytes(raw)
    assert [p for p in verify_gguf(plan).problems if "blk.1.attn_v.weight" in p]
    assert check_hashes(plan.out)["blk.1.attn_v.weight"] is False  # type: ignore[index]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command(tmp_path: Path) -> None:
    a, b = write_model(tmp_path / "a.gguf"), write_model(tmp_path / "b.gguf", kind="Q4_0")
    recipe = tmp_path / "overrides.yaml"
    recipe.write_text(f"sources: [{{id: 4, model_dir: {b}}}]\noverrides: [{{key: 'blk.0.ffn_*', source: 4}}]\n")
    mix = tmp_path / "mix.gguf"
    assert "blk.0.ffn_*" in run("-i", a, "-or", recipe, "--dry-run")
    out = run(
        "-i", a, "-o", mix, "-or", recipe, "--verify", "--no-probe", "--json", tmp_path / "report.json", "--quiet"
    )
    assert "all equal" in out
    assert json.loads((tmp_path / "report.json").read_text())["overridden"] == {str(b): 4}
    assert "no inconsistency" in run("--check", mix)
    assert "all equal" in run("--check", mix, "--verify")
    assert "exists" in run("-i", a, "-o", mix, "-or", recipe, code=1)
    assert "nothing to verify" in run("--check", a, "--verify", code=1)


def test_a_decoded_copy(tmp_path: Path) -> None:
    """--dense undoes the order of rows and what was added to norms."""
    a = write_model(tmp_path / "a.gguf", "gemma")
    run("-i", a, "-o", tmp_path / "dense", "--dense", "--quiet")
    dense, source = open_checkpoint(tmp_path / "dense"), open_checkpoint(a)
    assert isinstance(source, GgufCheckpoint)
    assert set(dense.tensors) == set(source.tensors)
    for name in source.tensors:
        assert torch.equal(dense.load(name).float(), source.load(name).float()), name
