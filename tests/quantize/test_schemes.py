"""Schemes other than packed integers: levels, scales, GPTQ on them, and variants that transformers loads."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import FormatError
from recompile.formats import FORMATS
from recompile.formats.fp4 import E2M1, pack_e2m1, round_e2m1, unpack_e2m1
from recompile.formats.mx import E2M3, pack_e2m3, unpack_e2m3
from recompile.formats.schemes import PRESETS, parse_scheme
from recompile.quantize.float_grids import fit_levels, global_scale, round_e2m3, round_e4m3
from recompile.quantize.gptq import proxy_error
from recompile.quantize.gptq_float import round_gptq
from recompile.quantize.pipeline import quantize_model
from recompile.quantize.scheme_encoder import SchemeEncoder, SchemeRule, SchemeVariant, uniform
from tests import tiny

FLOATS = ("w8a8", "fp8-tensor", "fp8-channel", "fp8-block", "nvfp4", "mxfp4", "mxfp6", "mxfp8")


def draw(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def decode(name: str, parts: dict[str, Tensor]) -> Tensor:
    scheme = parse_scheme(name)
    code = FORMATS[scheme.format].load_code()
    return code.dequantize(parts, code.read_scheme(scheme.weights))


@pytest.mark.parametrize(("round_", "levels"), [(round_e2m1, E2M1), (round_e2m3, E2M3)])
def test_rounding_to_small_floats_is_to_the_nearest_level(round_, levels) -> None:
    table = torch.tensor([*(-v for v in levels), *levels])
    values = torch.linspace(-9, 9, 4001)
    found = round_(values)
    assert bool(torch.isin(found, table).all())
    assert torch.equal((found - values).abs(), (values[:, None] - table).abs().amin(1))


def test_ties_go_to_the_even_level() -> None:
    assert round_e2m1(torch.tensor([0.25, 0.75, 1.25, 2.5, 3.5, 5.0])).tolist() == [0, 1, 1, 2, 4, 4]
    assert round_e4m3(torch.tensor([500.0, -1e9, 0.0])).tolist() == [448, -448, 0]


def test_packed_levels_by_hand() -> None:
    """1.5 is code 3, -0.5 is code 9: the even column in the low nibble."""
    assert pack_e2m1(torch.tensor([[1.5, -0.5]])).tolist() == [[0x93]]
    assert pack_e2m3(torch.tensor([[0.125, 0.0, 0.0, -7.5]])).tolist() == [[0x01, 0x00, 0xFC]]
    everything = torch.tensor([[*E2M1, *(-v for v in E2M1)]])
    assert torch.equal(unpack_e2m1(pack_e2m1(everything)), everything.abs() * everything.sign())
    everything = torch.tensor([[*E2M3, *(-v for v in E2M3)]])
    assert torch.equal(unpack_e2m3(pack_e2m3(everything)), everything)


def test_nvfp4_scales_by_hand() -> None:
    """Largest weight 6 in the first group, 3 in the second: global 448, group scales 448 and 224."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1], weight[0, 16] = 6.0, -1.0, 3.0
    grid = fit_levels(weight, parse_scheme("nvfp4"), "rtn")
    parts = grid.pack(grid.round(weight))
    assert parts["weight_global_scale"].tolist() == [448.0]
    assert parts["weight_scale"].float().tolist() == [[448.0, 224.0]]
    assert torch.equal(decode("nvfp4", parts), weight)
    assert global_scale([weight, 2 * weight]).tolist() == [224.0]


def test_mx_exponents_by_hand() -> None:
    """6.9 still rounds to 6 at scale 1; 7.0 is half-way to 8, which E2M1 lacks, and takes scale 2."""
    weight = torch.zeros(3, 32)
    weight[0, 0], weight[1, 0], weight[2, 0] = 6.9, 7.0, 0.75
    stored = fit_levels(weight, parse_scheme("mxfp4"), "rtn").scales["weight_scale"]
    assert stored.flatten().tolist() == [127, 128, 127 - 3]


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_packed_decodes_to_level_times_factor(name: str) -> None:
    weight = draw(136, 192)
    weight[3] = 0
    for method in ("rtn", "mse"):
        grid = fit_levels(weight, parse_scheme(name), method)
        levels = grid.round(weight)
        assert torch.equal(decode(name, grid.pack(levels)), levels * grid.spread(192))


@pytest.mark.parametrize("name", FLOATS)
def test_searched_scales_are_no_worse_and_gptq_is_better(name: str) -> None:
    weight = draw(96, 128, 1)
    inputs = draw(512, 128, 2) @ draw(128, 128, 3) + 0.01 * draw(512, 128, 4)
    hessian = inputs.T @ inputs
    scheme, importance = parse_scheme(name), hessian.diagonal() / hessian.diagonal().mean()

    def loss(grid, levels) -> float:
        return float(((weight - levels * grid.spread(128)).square() * importance).sum())

    plain, searched = fit_levels(weight, scheme, "rtn"), fit_levels(weight, scheme, "mse", importance)
    assert loss(searched, searched.round(weight)) <= loss(plain, plain.round(weight)) * (1 + 1e-6)
    (levels,) = round_gptq(weight, hessian, [searched])
    made = levels * searched.spread(128)
    nearest = searched.round(weight) * searched.spread(128)
    assert torch.equal(decode(name, searched.pack(levels)), made)
    assert float(proxy_error(weight, made, hessian)) < 0.8 * float(proxy_error(weight, nearest, hessian))


def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest() -> None:
    weight = draw(24, 64)
    grids = [fit_levels(weight, parse_scheme(name), "rtn") for name in ("nvfp4", "fp8-channel")]
    for grid, levels in zip(grids, round_gptq(weight, torch.eye(64), grids), strict=True):
        assert torch.equal(levels, grid.round(weight))


def test_names_of_schemes() -> None:
    assert parse_scheme("W4A16") is parse_scheme("w4a16-g128") or PRESETS["W4A16"] == "w4a16-g128"
    assert parse_scheme("w8a16").weights["strategy"] == "channel"
    assert parse_scheme("w4a16-g64-asym").weights["symmetric"] is False
    assert parse_scheme("NVFP4").input_activations["dynamic"] == "local"
    assert parse_scheme("fp8-dynamic").input_activations["strategy"] == "token"
    with pytest.raises(FormatError, match="did you mean nvfp4"):
        parse_scheme("nvpf4")
    with pytest.raises(FormatError, match="2 to 8"):
        parse_scheme("w9a16")


def test_the_library_accepts_every_group(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    config = importlib.import_module("compressed_tensors.quantization").QuantizationConfig
    names = [*FLOATS, *PRESETS.values(), "w8a16", "w3a16-g32-asym", "w8a8-static", "mxfp8-a8"]
    for name in names:
        group = {"targets": ["Linear"], **parse_scheme(name).group()}
        config(config_groups={"group_0": group}, quant_method="compressed-tensors", format=group["format"])


def build(base: Path, out: Path, variants: tuple[SchemeVariant, ...], rows: int = 4) -> dict[str, Path]:
    ids = tiny.rows(rows, 32)
    for _ in quantize_model(open_checkpoint(base), out, SchemeEncoder(variants), ids):
        pass
    return {variant.name: out / variant.name for variant in variants}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("w4a16-g32", "w8a16", "w8a8", "fp8-channel", "fp8-tensor", "fp8-block", "nvfp4", "mxfp4", "mxfp8")
    out = tmp_path_factory.mktemp("schemes")
    return build(tiny.base("llama-2"), out, tuple(uniform(parse_scheme(name)) for name in names))


@pytest.mark.parametrize("name", ["w4a16-g32", "w8a16", "fp8-channel", "fp8-tensor", "fp8-block", "nvfp4", "mxfp4"])
def test_variants_load_in_transformers_with_our_weights(name: str, built: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    ids = tiny.rows(2, 12)
    wanted = tiny.plain_model(tiny.dense_copy(open_checkpoint(built[name]), tmp_path / "dense", tiny.base("llama-2")))
    if name in ("nvfp4", "mxfp4"):  # the loader runs these in bfloat16 only
        wanted, dtype, near = wanted.bfloat16(), torch.bfloat16, 0.02
    else:
        dtype, near = torch.float32, 1e-5
    logits = tiny.plain_logits(wanted, ids).float()
    found = tiny.plain_logits(tiny.plain_model(built[name], dtype=dtype), ids).float()
    span = float(logits.max() - logits.min())
    assert float((found - logits).abs().max()) < near * span


def test_fused_projections_share_the_global_scale(built: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(built["nvfp4"])
    q, k, v, o = (
        checkpoint.read(f"model.layers.0.self_attn.{leaf}_proj.weight_global_scale").item() for leaf in "qkvo"
    )
    assert q == k == v != o


def test_bits_are_those_stored(built: dict[str, Path]) -> None:
    module = open_checkpoint(built["nvfp4"]).modules["model.layers.0.mlp.down_proj"]
    assert module.bits_per_weight == 4 + 8 / 16 + 32 / math.prod(module.shape or ())


def test_rules_of_one_variant(tmp_path: Path) -> None:
    rules = (
        SchemeRule(None, "rtn", ("*.o_proj",)),
        SchemeRule(parse_scheme("nvfp4-a4"), "gptq", ("*.self_attn.*",)),
        SchemeRule(parse_scheme("fp8-static"), "mse", (r"re:.*\.down_proj$",)),
        SchemeRule(parse_scheme("w4a16-g32"), "rtn"),
    )
    made = build(tiny.base("llama-2"), tmp_path, (SchemeVariant("mix", rules), uniform(parse_scheme("w8a16"), "rtn")))
    checkpoint = open_checkpoint(made["mix"])
    formats = {
        leaf: checkpoint.modules[f"model.layers.1.{leaf}_proj"].format for leaf in ("self_attn.o", "self_attn.q")
    }
    assert formats == {"self_attn.o": "dense", "self_attn.q": "nvfp4-pack-quantized"}
    down = checkpoint.modules["model.layers.1.mlp.down_proj"]
    assert (down.format, "input_scale" in down.parts) == ("float-quantized", True)
    assert checkpoint.modules["model.layers.1.mlp.up_proj"].format == "pack-quantized"
    config = checkpoint.quantization_config
    assert config["format"] == "mixed-precision"
    assert "model.layers.0.self_attn.o_proj" in config["ignore"]
    assert open_checkpoint(made["w8a16"]).modules["model.layers.1.self_attn.o_proj"].is_quantized
    report = json.loads((made["mix"] / "quantize_report.json").read_text())["variant"]["modules"]
    assert {m["note"] for m in report if m["module"].endswith("o_proj")} == {
        "no rule of the variant takes it, kept dense"
    }
