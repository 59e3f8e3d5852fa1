"""Merges of several schemes: GPTQ, AWQ and DeepSeek fp8 re-expressed exactly, one global scale, engines asked first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.recompile import main as recompile_command
from recompile.errors import UnsupportedError
from recompile.formats.fp4 import pack_e2m1, round_e2m1
from recompile.formats.schemes import parse_scheme
from recompile.merge.check import check_checkpoint, check_plan
from recompile.merge.convert import reciprocal
from recompile.merge.engine_rules import findings, kind_of_scheme, tied_sets, why_not
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from tests import mixes, tiny
from tests.formats.test_checkpoints import (
    CASES,
    GPTQ,
    Packer,
    awq,
    compressed,
    fp8,
    gptq,
    nvfp4,
    streamed_logits,
    write_pair,
)


def variant(folder: Path, name: str, packer: Packer, quantization: dict[str, Any], base: str = "llama-2") -> Path:
    (folder / name).mkdir(parents=True)
    return write_pair(tiny.base(base), folder / name, lambda module: packer, quantization)[0]


def case(folder: Path, name: str, base: str = "llama-2") -> Path:
    return variant(folder, name.replace(",", "").replace(" ", "_"), *CASES[name], base)


def merge(folder: Path, base: Path, taken: dict[str, Path], **how: Any) -> tuple[Checkpoint, Any]:
    overlay = build_overlay(open_checkpoint(base), mixes.recipe(folder / "mix.yaml", taken))
    plan = plan_write(overlay, folder / "out", **how)
    for _ in execute(plan):
        pass
    return open_checkpoint(folder / "out"), overlay


def test_five_families_in_one_directory(tmp_path: Path) -> None:
    """What was measured is what is written, to the last bit, and every byte of a copied module is its source's."""
    taken = {
        "*.self_attn.*": case(tmp_path, "gptq, asymmetric v1, 3 bits"),
        "*.0.mlp.gate_proj.*": case(tmp_path, "awq"),
        "*.0.mlp.up_proj.*": case(tmp_path, "fp8-deepseek"),
        "*.down_proj.*": case(tmp_path, "fp8-channel, naive"),
    }
    made, overlay = merge(tmp_path, case(tmp_path, "nvfp4"), taken)
    assert set(made.formats) == {"pack-quantized", "float-quantized", "nvfp4-pack-quantized"}
    for name, module in overlay.modules.items():
        if module.is_quantized:
            assert torch.equal(made.load(f"{name}.weight"), overlay.load(f"{name}.weight")), name
    ids = tiny.rows(2, 12)
    assert float(streamed_logits(tmp_path / "out", ids).std()) > 0
    down = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(
        made.read(down).view(torch.uint8), overlay.sources[str(taken["*.down_proj.*"])].read(down).view(torch.uint8)
    )
    config = made.quantization_config
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "mixed-precision")
    assert not {"bits", "desc_act", "weight_block_size"} & config.keys()
    assert not [problem for problem in check_checkpoint(tmp_path / "out") if problem.severity == "error"]


@pytest.mark.parametrize(
    ("name", "bits", "symmetric"),
    [
        ("gptq", 4, True),
        ("gptq, no g_idx", 8, True),
        ("gptq, asymmetric v2, 2 bits", 2, False),
        ("gptq, planes, 5 bits", 5, False),
        ("gptq, whole columns", 4, True),
        ("auto-round", 4, False),
    ],
)
def test_gptq_modules_become_packed_integers(name: str, bits: int, symmetric: bool, tmp_path: Path) -> None:
    base = mixes_base(tmp_path)
    made, overlay = merge(tmp_path, base, {"*.self_attn.*": case(tmp_path, name)})
    module = made.modules["model.layers.0.self_attn.q_proj"]
    assert module.format == "pack-quantized"
    assert ("weight_zero_point" in module.parts) is not symmetric
    assert module.parts["weight_scale"].dtype == "F16"
    assert made.scheme(module).bits == bits
    assert torch.equal(made.load(f"{module.name}.weight"), overlay.load(f"{module.name}.weight"))
    manifest = json.loads((tmp_path / "out" / "recompile_manifest.json").read_text())
    assert manifest["modules"][module.name]["converted_from"] == "gptq"


def mixes_base(folder: Path) -> Path:
    return variant(folder, "base", fp8(1, 0), compressed("float-quantized", strategy="channel", type="float"))


def test_by_hand_the_codes_of_a_converted_module(tmp_path: Path) -> None:
    """u = 0..15 with zero 8: signed -8..7, the first code in the lowest nibble."""
    base, source = mixes_base(tmp_path), case(tmp_path, "gptq")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    words = torch.tensor([0x76543210, 0xFEDCBA98 - (1 << 32)], dtype=torch.int32)
    tensors[f"{name}.qweight"] = words.repeat(4)[:, None].repeat(1, 64).contiguous()
    save_file(tensors, source / "model.safetensors")
    made, _ = merge(tmp_path, base, {f"{name}.*": source})
    assert made.read(f"{name}.weight_packed")[0, :2].tolist() == words.tolist()
    assert torch.equal(made.read(f"{name}.weight_scale"), tensors[f"{name}.scales"].t())
    assert made.read(f"{name}.weight_shape").tolist() == [64, 64]


def test_activation_order_is_refused_with_its_reason(tmp_path: Path) -> None:
    source = case(tmp_path, "gptq, activation order")
    with pytest.raises(UnsupportedError, match="activation order"):
        merge(tmp_path, mixes_base(tmp_path), {"*.q_proj.*": source})
    assert not (tmp_path / "out").exists()


def test_a_trivial_g_idx_of_desc_act_is_no_obstacle(tmp_path: Path) -> None:
    source = variant(tmp_path, "trivial", gptq(4, 32, True), GPTQ | {"desc_act": True})
    made, _ = merge(tmp_path, mixes_base(tmp_path), {"*.q_proj.*": source})
    assert made.modules["model.layers.0.self_attn.q_proj"].format == "pack-quantized"


def test_nvfp4_global_scales_of_a_fused_set(tmp_path: Path) -> None:
    base, other = case(tmp_path, "nvfp4"), tmp_path / "other"
    quantization = CASES["nvfp4"][1]
    variant(tmp_path, "other", lambda weight: nvfp4(weight * 1.01), quantization)
    taken = {"*.q_proj.*": other / "packed"}
    with pytest.raises(UnsupportedError, match="with reencode"):
        merge(tmp_path, base, taken)
    made, overlay = merge(tmp_path, base, taken, reencode=True)
    for layer in (0, 1):
        names = [f"model.layers.{layer}.self_attn.{leaf}_proj" for leaf in "qkv"]
        scales = {made.read(f"{name}.weight_global_scale").item() for name in names}
        assert scales == {min(overlay.placements[n].checkpoint.read(f"{n}.weight_global_scale").item() for n in names)}
        for name in names:
            wanted, found = overlay.load(f"{name}.weight"), made.load(f"{name}.weight")
            assert float((found - wanted).norm() / wanted.norm()) < 0.05
    untouched = "model.layers.0.mlp.up_proj.weight_packed"
    assert torch.equal(made.read(untouched), overlay.base.read(untouched))


def test_an_engine_is_asked_before_writing(tmp_path: Path) -> None:
    base = case(tmp_path, "gptq")
    source = variant(tmp_path, "w8", gptq(8, 32, True), GPTQ | {"bits": 8})
    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.q_proj.*": source})
    plan = plan_write(build_overlay(open_checkpoint(base), recipe), tmp_path / "out")
    assert any("one set" in problem.message for problem in check_plan(plan, "vllm"))
    assert not [p for p in check_plan(plan, "transformers") if p.severity == "error"]
    arguments = ["-i", str(base), "-o", str(tmp_path / "out"), "-or", str(recipe), "--quiet", "--no-probe"]
    refused = CliRunner().invoke(recompile_command, [*arguments, "--engine", "vllm"])
    assert refused.exit_code == 1
    assert "in one set" in refused.output
    assert not (tmp_path / "out").exists()
    written = CliRunner().invoke(recompile_command, [*arguments, "--engine", "transformers"])
    assert written.exit_code == 0, written.output
    checked = CliRunner().invoke(recompile_command, ["--check", str(tmp_path / "out"), "--engine", "vllm"])
    assert (checked.exit_code, "one set" in checked.output) == (1, True)


def test_what_engines_refuse() -> None:
    def why(engine: str, scheme: str, role: str = "layer", expert: bool = False) -> str | None:
        return why_not(engine, kind_of_scheme(parse_scheme(scheme)), role, expert=expert)

    for engine in ("vllm", "transformers", "sglang"):
        for scheme in ("w4a16-g64", "w8a16", "w8a8", "fp8-channel", "fp8-dynamic", "fp8-block", "nvfp4", "mxfp4"):
            assert why(engine, scheme) is None, (engine, scheme)
    assert "mxfp6" in str(why("vllm", "mxfp6"))
    assert why("vllm", "w3a16-g64") is None
    assert "4 or 8 bits" in str(why("sglang", "w3a16-g64"))
    assert "asymmetric" in str(why("transformers", "w4a16-g64-asym"))
    assert "global scale" in str(why("transformers", "nvfp4", expert=True))
    assert "embedding" in str(why("transformers", "w8a16", "embedding"))
    with pytest.raises(ValueError, match="one of vllm"):
        why("tgi", "nvfp4")


def test_sets_that_share_a_scheme() -> None:
    layer = "model.layers.0.self_attn"
    names = [f"{layer}.{leaf}_proj" for leaf in "qkvo"]
    experts = [f"model.layers.{n}.mlp.experts.{e}.down_proj" for n in (0, 1) for e in (0, 1)]
    assert tied_sets("vllm", [*names, *experts]) == [tuple(names[:3]), tuple(experts[:2]), tuple(experts[2:])]
    assert tied_sets("transformers", [*names, *experts]) == [tuple(experts)]


def test_findings_on_finished_checkpoints(tmp_path: Path) -> None:
    def errors(engine: str, directory: Path) -> str:
        return " ".join(f.message for f in findings(engine, open_checkpoint(directory)) if f.severity == "error")

    assert "activation order" in errors("vllm", case(tmp_path, "gptq, activation order"))
    assert "not 3" in errors("vllm", case(tmp_path, "gptq, asymmetric v1, 3 bits"))
    assert "int-quantized" in errors("vllm", case(tmp_path, "int8-channel, naive"))
    assert errors("vllm", case(tmp_path, "awq")) == ""
    assert "planar" in errors("transformers", case(tmp_path, "gptq, planes, 5 bits"))
    assert "weight_g_idx" in errors("transformers", case(tmp_path, "pack-quantized, g_idx"))
    rules = GPTQ | {"dynamic": {r"+:.*\.down_proj$": {"bits": 8}}}
    assert "dynamic" in errors("transformers", variant(tmp_path, "rules", awq, rules))
    assert "drops the global scale" in errors("transformers", case(tmp_path, "nvfp4", "qwen3-moe"))


# ---- ModelOpt --------------------------------------------------------------------------------------------------------


def modelopt(folder: Path, name: str, packer: Packer) -> Path:
    return variant(folder, name, packer, {"quant_method": "modelopt", "quant_algo": name})


def modelopt_fp8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Scalars without axes, as ModelOpt writes them."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.03)}, codes.float() * scale


def test_fp8_of_modelopt_merges_exactly_with_its_input_scale(tmp_path: Path) -> None:
    source = modelopt(tmp_path, "FP8", modelopt_fp8)
    made, overlay = merge(tmp_path, case(tmp_path, "nvfp4"), {"*.down_proj.*": source})
    for name, module in overlay.modules.items():
        if module.is_quantized:
            assert torch.equal(made.load(f"{name}.weight"), overlay.load(f"{name}.weight")), name
    down = made.modules["model.layers.1.mlp.down_proj"]
    assert (down.format, down.parts["weight_scale"].shape, down.parts["input_scale"].shape) == (
        "float-quantized",
        (1,),
        (1,),
    )
    groups = made.quantization_config["config_groups"].values()
    (inputs,) = (group["input_activations"] for group in groups if group["format"] == "float-quantized")
    assert inputs == {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    assert check_checkpoint(tmp_path / "out") == []


def modelopt_nvfp4(global_scale: float | None) -> Packer:
    """weight_scale_2 = max|w| / 2688 as ModelOpt has it, or a number given."""

    def packer(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        whole = weight.abs().max() / 2688 if global_scale is None else torch.tensor(global_scale)
        groups = weight.unflatten(1, (-1, 16))
        scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
        step = scale.float() * whole
        levels = round_e2m1(groups / step[..., None])
        parts = {"weight": pack_e2m1(levels.flatten(1)), "weight_scale": scale, "weight_scale_2": whole}
        return parts | {"input_scale": torch.tensor(0.01)}, (levels * step[..., None]).flatten(1)

    return packer


def test_nvfp4_of_modelopt_merges_exactly_or_only_when_asked(tmp_path: Path) -> None:
    """2^-12 has an exact reciprocal; what max|w| / 2688 comes to has none, as a rule."""
    exact = modelopt(tmp_path, "NVFP4", modelopt_nvfp4(2.0**-12))
    base = case(tmp_path, "fp8-channel, naive")
    made, overlay = merge(tmp_path, base, {"*.mlp.*": exact, "*.self_attn.*": exact})
    for name, module in overlay.modules.items():
        if module.is_quantized:
            assert torch.equal(made.load(f"{name}.weight"), overlay.load(f"{name}.weight")), name
    down = "model.layers.0.mlp.down_proj"
    assert made.modules[down].format == "nvfp4-pack-quantized"
    assert made.read(f"{down}.weight_global_scale").tolist() == [4096.0]
    assert made.read(f"{down}.input_global_scale").tolist() == pytest.approx([100.0])
    assert check_checkpoint(tmp_path / "out") == []

    rounded = modelopt(tmp_path, "NVFP4-own-scale", modelopt_nvfp4(None))
    (tmp_path / "out").rename(tmp_path / "first")
    with pytest.raises(UnsupportedError, match=r"weight_scale_2 .* multiplies.*with reencode"):
        merge(tmp_path, base, {"*.down_proj.*": rounded, "*.o_proj.*": rounded})
    made, overlay = merge(tmp_path, base, {"*.down_proj.*": rounded, "*.o_proj.*": rounded}, reencode=True)
    for name in (down, "model.layers.1.self_attn.o_proj"):
        found, wanted = made.load(f"{name}.weight"), overlay.load(f"{name}.weight")
        assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())
    assert any(
        "nearest global scale" in warning for warning in plan_write(overlay, tmp_path / "x", reencode=True).warnings
    )


def test_nvfp4_of_modelopt_beside_compressed_tensors_in_one_fused_set(tmp_path: Path) -> None:
    """q from one, k and v from the other: engines run them as one matrix with one scale."""
    source = modelopt(tmp_path, "NVFP4", modelopt_nvfp4(2.0**-12))
    base = case(tmp_path, "nvfp4")
    with pytest.raises(UnsupportedError, match="different weight_global_scale"):
        merge(tmp_path, base, {"*.q_proj.*": source})
    made, overlay = merge(tmp_path, base, {"*.q_proj.*": source}, reencode=True)
    layer = "model.layers.0.self_attn"
    assert len({float(made.read(f"{layer}.{leaf}_proj.weight_global_scale")) for leaf in "qkv"}) == 1
    for leaf in "qkv":
        found, wanted = (source.load(f"{layer}.{leaf}_proj.weight") for source in (made, overlay))
        assert float((found - wanted).norm()) < 0.1 * float(wanted.norm())


@settings(deadline=None, max_examples=200)
@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_reciprocals_are_exact_or_next_to_it(scale: float) -> None:
    divisor, exact = reciprocal(scale)
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    divided, multiplied = every / torch.tensor(divisor), every * torch.tensor(scale)
    assert torch.equal(divided, multiplied) == exact
    assert bool(((divided - multiplied).abs() <= 3e-7 * multiplied).all())


def test_parts_that_compressed_tensors_lacks_are_named(tmp_path: Path) -> None:
    def packer(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        parts, dense = modelopt_nvfp4(2.0**-12)(weight)
        return parts | {"pre_quant_scale": torch.ones(weight.shape[1])}, dense

    source = modelopt(tmp_path, "NVFP4_AWQ", packer)
    with pytest.raises(UnsupportedError, match="pre_quant_scale"):
        merge(tmp_path, case(tmp_path, "nvfp4"), {"*.down_proj.*": source})
