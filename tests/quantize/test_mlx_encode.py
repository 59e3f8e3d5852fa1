"""MLX variants: grids with a float bias, rounding on them, what `model_quantize --format mlx` writes; in mlx-lm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.diff import DiffReport, compare
from eval.heal import HealOptions, HealReport, heal
from eval.heal_rows import HealRows
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.errors import FormatError
from recompile.formats import mlx
from recompile.formats.mlx_config import EXPERTS, MlxScheme, loader_fields, rotary_fields
from recompile.formats.packed_int import IntScheme
from recompile.merge.check import check_checkpoint, check_engine
from recompile.model.known_types import PUBLISHED_AS
from recompile.model.stream import LayeredModel
from recompile.quantize.affine_grids import fit_affine
from recompile.quantize.gptq import factor_hessian, quantize_gptq
from recompile.quantize.int_grids import dequantize_codes, fit_grid, quantize_to_grid
from recompile.quantize.mlx_encoder import MlxEncoder, fit_small_floats
from recompile.quantize.two_sided import RoundingGrid, grid_of_integers, round_two_sided
from tests import mixes, mlx_engine, tiny
from tests.commands import refusal, run
from tests.formats.test_checkpoints import streamed_logits

BITS = (2, 3, 4, 5, 6, 8)


def weights(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    """With groups off zero, where a zero point could not follow."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(rows, columns, generator=generator) * 0.1
    value[:, :32] += 0.7
    return value


def inputs(columns: int = 128, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x.T @ x / len(x)


def decoded(weight: Tensor, bits: int, **how: Any) -> Tensor:
    grid, scheme = fit_affine(weight, bits, 32, **how), IntScheme(bits, 32, symmetric=False)
    integers = grid.as_integers(scheme)
    return dequantize_codes(quantize_to_grid(weight, integers, scheme), integers, scheme)


# ---- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_undone_by_reading(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, 96), generator=torch.Generator().manual_seed(bits))
    words = mlx.pack_codes(codes, bits)
    assert words.dtype == torch.uint32
    assert words.shape == (5, 3 * bits)
    assert torch.equal(mlx.unpack_codes(words, bits).long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_float_bias_is_better_than_the_ends_of_a_group_and_than_zero_points(bits: int) -> None:
    weight, scheme = weights(), IntScheme(bits, 32, symmetric=False)
    zero_points = fit_grid(weight, scheme, "mse")
    errors = {
        "fitted": decoded(weight, bits),
        "ends": decoded(weight, bits, method="rtn"),
        "zero points": dequantize_codes(quantize_to_grid(weight, zero_points, scheme), zero_points, scheme),
    }
    found = {name: float((value - weight).square().mean()) for name, value in errors.items()}
    assert found["fitted"] < found["ends"]
    assert found["fitted"] < found["zero points"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_grids_hold_numbers_of_the_stored_dtype_and_the_same_levels_as_integers(dtype: torch.dtype) -> None:
    weight, scheme = weights(), IntScheme(3, 32, symmetric=False)
    grid = fit_affine(weight, 3, 32, scale_dtype=dtype)
    for value in (grid.scale, grid.bias):
        assert torch.equal(value, value.to(dtype).float())
    integers = grid.as_integers(scheme)
    codes = quantize_to_grid(weight, integers, scheme)
    q = (codes.float() - scheme.code_min).unflatten(1, (-1, 32))
    wanted = (q * grid.scale[..., None] + grid.bias[..., None]).flatten(1)
    assert torch.allclose(dequantize_codes(codes, integers, scheme), wanted, atol=1e-6)
    nearest = ((weight.unflatten(1, (-1, 32)) - grid.bias[..., None]) / grid.scale[..., None]).round().clamp(0, 7)
    assert (q != nearest).float().mean() < 0.001  # ties, rounded either way


def test_columns_that_count_more_get_less_error() -> None:
    weight, importance = weights(), torch.ones(128)
    importance[::4] = 100.0
    plain, weighed = (decoded(weight, 2, importance=value) - weight for value in (None, importance))
    assert float((weighed.square() * importance).mean()) < 0.8 * float((plain.square() * importance).mean())


def test_equal_weights_are_kept_exactly() -> None:
    weight = torch.full((2, 64), 0.375)
    weight[1] = 0
    assert torch.equal(decoded(weight, 2), weight)


def test_numbers_beyond_the_dtype_are_refused() -> None:
    with pytest.raises(FormatError, match=r"whose scale or bias torch\.float16 \(at most 6\.55e\+04\) cannot hold"):
        fit_affine(torch.full((1, 32), 1e5), 4, 32, scale_dtype=torch.float16)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_small_floats_decode_to_their_levels(mode: str) -> None:
    weight = weights() * 0.02  # nvfp4 scales below 2^-6, which are subnormal
    encoded = MlxEncoder(
        (MlxScheme(8 if mode == "mxfp8" else 4, 16 if mode == "nvfp4" else 32, mode),), {}, method="mse"
    )
    (made,) = encoded.encode({"m": weight}, None, {})
    grid = fit_small_floats(weight, mode, "mse", None)
    assert torch.equal(made["m"].dense, grid.round(weight) * grid.spread(128))
    assert float((made["m"].dense - weight).norm() / weight.norm()) < (0.04 if mode == "mxfp8" else 0.2)


# ---- rounding --------------------------------------------------------------------------------------------------------


def plain_gptq(weight: Tensor, scale: Tensor, bias: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Codes, one column after another in float64, with the decoded value of every column."""
    order = torch.argsort(hessian.diagonal().double(), descending=True, stable=True)
    upper = factor_hessian(hessian, order, 0.01).double()
    weight, error, codes = weight.double()[:, order], torch.zeros_like(weight).double(), torch.zeros_like(weight)
    for at, column in enumerate(order.tolist()):
        s, b = (value[:, column // 32].double() for value in (scale, bias))
        target = weight[:, at] + error[:, :at] @ upper[:at, at]
        code = ((target - b) / s).round().clamp(0, steps)
        error[:, at] = weight[:, at] - (code * s + b)
        codes[:, column] = code.float()
    return codes


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_makes_up_for_what_a_reader_decodes(bits: int) -> None:
    weight, hessian, scheme = weights(), inputs(), IntScheme(bits, 32, symmetric=False)
    grid = fit_affine(weight, bits, 32)
    (made,) = quantize_gptq(weight, hessian, [scheme], act_order="static", grids=[grid.as_integers(scheme)])
    wanted = plain_gptq(weight, grid.scale, grid.bias, hessian, (1 << bits) - 1)
    assert float((made.codes.float() - scheme.code_min != wanted).float().mean()) < 0.01  # ties in float32


def test_an_offset_moves_weights_and_nothing_else() -> None:
    weight, hin, hout, scheme = weights(), inputs(), inputs(24, 5), IntScheme(3, 32, symmetric=False)
    grid = fit_affine(weight, 3, 32).as_integers(scheme)
    assert grid.offset is not None
    (made,) = quantize_gptq(weight, hin, [scheme], act_order="static", grids=[grid])
    with_offset = grid_of_integers(made)
    without = RoundingGrid(with_offset.scale, with_offset.group, with_offset.low, with_offset.high)
    moved = weight - grid.offset.repeat_interleave(32, 1)
    found, wanted = (
        round_two_sided(value, hin, hout, [own])[0] for value, own in ((weight, with_offset), (moved, without))
    )
    assert torch.equal(found, wanted)


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlx")
    save_file({"input_ids": tiny.rows(4, 32)}, folder / "ids.safetensors")
    run(model_quantize, "-i", tiny.base("llama-2"), "-o", folder / "made", *args(folder), "-b", 2, 3, 6, "--scheme",
        "mxfp4", "mxfp8", "nvfp4")  # fmt: skip
    return folder


def args(folder: Path) -> tuple[object, ...]:
    return ("--format", "mlx", "-g", 32, "--input-ids", folder / "ids.safetensors", "--quiet")


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def test_variants_are_whole_mlx_checkpoints(made: Path) -> None:
    base = load_file(tiny.base("llama-2") / "model.safetensors")
    names = {"2bpw": (2, 32, "affine"), "3bpw": (3, 32, "affine"), "6bpw": (6, 32, "affine")}
    names |= {"mxfp4": (4, 32, "mxfp4"), "mxfp8": (8, 32, "mxfp8"), "nvfp4": (4, 16, "nvfp4")}
    assert {path.name for path in (made / "made").iterdir()} == names.keys()
    for name, (bits, group_size, mode) in names.items():
        path = made / "made" / name
        entry = {"group_size": group_size, "bits": bits, "mode": mode}
        assert config(path)["quantization"] == entry
        assert config(path)["quantization_config"] == entry
        with safe_open(path / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "mlx"}
        checkpoint = open_checkpoint(path)
        assert {m for m, stored in checkpoint.modules.items() if not stored.is_quantized} == {
            n.removesuffix(".weight") for n, value in base.items() if value.dim() == 1
        }, "embedding and head as well"
        report = json.loads((path / "quantize_report.json").read_text())["variant"]["modules"]
        for module in report:
            weight = base[f"{module['module']}.weight"].float()
            error = checkpoint.load(f"{module['module']}.weight").float() - weight
            assert float(error.norm() / weight.norm()) == pytest.approx(module["relative_error"], rel=1e-4)
        assert [problem for problem in check_checkpoint(path) if problem.severity == "error"] == []


def test_a_mix_straight_from_the_base_is_the_merge_of_variants(made: Path, tmp_path: Path) -> None:
    variants = made / "made"
    taken = {"*.v_proj.*": variants / "6bpw", "*embed_tokens*": variants / "mxfp8"}
    recipe = mixes.recipe(tmp_path / "merge.yaml", taken)
    run(recompile, "-i", variants / "3bpw", "-o", tmp_path / "merged", "-or", recipe, "--quiet")
    (tmp_path / "mix.yaml").write_text(
        "sources:\n  - {id: 6, bits: 6, format: mlx}\n  - {id: e, scheme: mxfp8, format: mlx}\n"
        'overrides:\n  - {key: "*.v_proj.*", source: 6}\n  - {key: "*embed_tokens*", source: e}\n'
        "base: {bits: 3, format: mlx}\n"
    )
    run(model_quantize, "-i", tiny.base("llama-2"), "-o", tmp_path / "mix", "-or", tmp_path / "mix.yaml", *args(made))
    merged, mixed = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "mix"))
    assert merged.keys() == mixed.keys()
    for name, value in merged.items():
        assert torch.equal(value.view(torch.uint8), mixed[name].view(torch.uint8)), name
    assert config(tmp_path / "merged")["quantization"] == config(tmp_path / "mix")["quantization"]
    entries = config(tmp_path / "mix")["quantization"]
    assert entries["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert entries["lm_head"] == {"group_size": 32, "bits": 3, "mode": "affine"}


def test_a_mix_of_a_size_comes_out_of_a_profile(made: Path, tmp_path: Path) -> None:
    variants, profile, recipe = made / "made", tmp_path / "profile.jsonl", tmp_path / "mix.yaml"
    rows = ("--input-ids", made / "ids.safetensors", "--quiet")
    others = [variants / name for name in ("2bpw", "6bpw", "mxfp4")]
    run(model_profile, "-mb", tiny.base("llama-2"), "-i", variants / "3bpw", "-s", *others, "-o", profile,
        "--mode", "sketch", "--embedding", "--head", *rows)  # fmt: skip
    run(model_optimize, profile, "--size", "60KiB", "-o", recipe, "--solver", "exact", "--no-check", "--quiet")
    run(recompile, "-i", variants / "3bpw", "-o", tmp_path / "mix", "-or", recipe, "--engine", "mlx", "--quiet")
    mix = open_checkpoint(tmp_path / "mix")
    assert 57 * 1024 < mix.size_bytes <= 60 * 1024
    assert len({(scheme["bits"], scheme["mode"]) for scheme in config(tmp_path / "mix")["quantization"].values()
                if isinstance(scheme, dict)}) > 1  # fmt: skip
    assert check_engine(tmp_path / "mix", "mlx") == []


def test_a_tied_embedding_is_stored_once_and_kept_on_request(made: Path, tmp_path: Path) -> None:
    base = tiny.base("llama-tied")
    run(model_quantize, "-i", base, "-o", tmp_path / "tied", "-b", 4, *args(made))
    checkpoint = open_checkpoint(tmp_path / "tied" / "4bpw")
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.modules["model.embed_tokens"].is_quantized
    assert "lm_head" not in checkpoint.modules
    run(model_quantize, "-i", base, "-o", tmp_path / "kept", "-b", 4, *args(made), "--keep", "*embed_tokens")
    assert not open_checkpoint(tmp_path / "kept" / "4bpw").modules["model.embed_tokens"].is_quantized


def test_a_tied_embedding_is_rounded_for_the_head_that_it_is_as_well(made: Path, tmp_path: Path) -> None:
    base, name = tiny.base("llama-tied"), "model.embed_tokens"
    run(model_quantize, "-i", base, "-o", tmp_path / "tied", "-b", 2, *args(made))
    path = tmp_path / "tied" / "2bpw"
    report = json.loads((path / "quantize_report.json").read_text())["variant"]["modules"]
    (found,) = (module for module in report if module["module"] == name)
    assert found["note"] == "made with the inputs of lm_head, which it is as well"
    assert found["tokens"] == 4 * 32

    inputs_of_head = hidden(base, tiny.rows(4, 32))
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].float()
    (nearest,) = MlxEncoder((MlxScheme(2, 32),), {}).encode({name: weight}, None, {})
    for_head, to_nearest = (
        float((inputs_of_head @ (value - weight).T).square().mean())
        for value in (open_checkpoint(path).load(f"{name}.weight"), nearest[name].dense)
    )
    assert for_head < 0.6 * to_nearest


def hidden(base: Path, ids: Tensor) -> Tensor:
    """What the head reads, [tokens, hidden]."""
    return LayeredModel.of(open_checkpoint(base)).normed(ids, len(ids)).float().flatten(0, 1)


def test_rounding_is_two_sided_on_request(made: Path, tmp_path: Path) -> None:
    run(model_quantize, "-i", tiny.base("llama-2"), "-o", tmp_path / "two", "-b", 3, "--scheme", "mxfp4", *args(made),
        "--rounding", "two-sided")  # fmt: skip
    for name in ("3bpw", "mxfp4"):
        report = json.loads((tmp_path / "two" / name / "quantize_report.json").read_text())["variant"]["modules"]
        notes = [module["rounding"] for module in report if module["quantized"]]
        assert any(note.startswith("two-sided") for note in notes), name
        one, two = (load_file(path / name / "model.safetensors") for path in (made / "made", tmp_path / "two"))
        assert any(not torch.equal(one[key], two[key]) for key in one if key.endswith(".weight"))
        assert all(torch.equal(one[key], two[key]) for key in one if key.endswith(("scales", "biases", "norm.weight")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-b", 7), "bits: found 7, wanted 2, 3, 4, 5, 6, 8 for mode affine"),
        (("-b", 2.5), "bits: found 2.5"),
        (("-b", 4, "-g", 48), "MLX has 32, 64, 128"),
        (("--scheme", "fp8-channel"), "MLX has mxfp4, mxfp8, nvfp4"),
        (("-b", 4, "--method", "awq"), "awq: wanted rtn, mse or gptq"),
    ],
)
def test_what_mlx_does_not_have_is_refused(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    said = refusal(model_quantize, "-i", tiny.base("llama-2"), "-o", tmp_path / "out", "--format", "mlx", *arguments)
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4", "nemotron_h", "granitemoe", "qwen3_vl_moe"])
def test_stacks_of_any_layout_are_checked_against_their_model(made: Path, model_type: str, tmp_path: Path) -> None:
    """Maps [in, out], gate and up in turn, other names: with experts narrower than the model, and an entry a path."""
    narrow = {"moe_intermediate_size": 32, "intermediate_size": 32}
    base = mixture(model_type, tmp_path / "base", **narrow)
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 3, 6, *args(made))
    low, high = tmp_path / "made" / "3bpw", tmp_path / "made" / "6bpw"
    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.experts.*.down_proj.*": high, "*.experts.*.w2.*": high})
    run(recompile, "-i", low, "-o", tmp_path / "mix", "-or", recipe, "--quiet", "--allow-unmatched")
    settings = config(tmp_path / "mix")
    bits = {path: entry["bits"] for path, entry in settings["quantization"].items() if isinstance(entry, dict)}
    assert set(bits.values()) == {3, 6}
    assert check_engine(tmp_path / "mix", "mlx") == []
    stacks = [path for path in bits if path.endswith(("up_proj", "fc1")) and ".shared" not in path]
    path = next(path for path in stacks if bits[path] == 3 and ("switch" in path or "experts" in path))
    settings["quantization"][path]["bits"] = 4
    (tmp_path / "mix" / "config.json").write_text(json.dumps(settings))
    assert [finding.where for finding in check_engine(tmp_path / "mix", "mlx")] == [path]


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "llama4"])
def test_a_head_inside_a_language_model_is_a_head(made: Path, model_type: str, tmp_path: Path) -> None:
    base, name = mixture(model_type, tmp_path / "base"), "language_model.lm_head"
    run(model_quantize, "-i", base, "-o", tmp_path / "mlx", "-b", 3, "-hb", 6, *args(made))
    head = open_checkpoint(tmp_path / "mlx" / "3bpw").modules[name]
    assert (head.format, head.parts["weight"].shape) == ("mlx", (256, 12))
    assert check_engine(tmp_path / "mlx" / "3bpw", "mlx") == []
    rows = ("-g", 32, "--input-ids", made / "ids.safetensors", "--quiet")
    run(model_quantize, "-i", base, "-o", tmp_path / "ct", "-b", 4, "-hb", 6, *rows)
    path = tmp_path / "ct" / "4bpw"
    assert not any(stored.startswith("lm_head") for stored in open_checkpoint(path).tensors)
    assert open_checkpoint(path).modules[name].is_quantized
    assert [problem for problem in check_checkpoint(path) if problem.severity == "error"] == []


def test_a_hybrid_without_experts_of_which_mlx_lm_splits_maps_is_refused(tmp_path: Path) -> None:
    base = mixture("granitemoehybrid", tmp_path / "base", num_local_experts=0, num_experts_per_tok=0)
    said = refusal(model_quantize, "-i", base, "-o", tmp_path / "out", "--format", "mlx", "-b", 4)
    assert "the tensors of model_type 'granitemoehybrid'" in said


def test_settings_that_mean_something_else_in_mlx_lm_are_told(made: Path, tmp_path: Path) -> None:
    base, path = mixture("granitemoehybrid", tmp_path / "base"), tmp_path / "made" / "6bpw"
    settings = config(base) | {"position_embedding_type": None, "layer_types": ["linear_attention", "full_attention"]}
    (base / "config.json").write_text(json.dumps(settings))
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 6, *args(made))
    written = config(path)
    assert (written["position_embedding_type"], written["layer_types"]) == ("nope", ["mamba", "attention"])
    plain = {"position_embedding_type": None, "layer_types": ["linear_attention", "full_attention"]}
    (path / "config.json").write_text(json.dumps(written | plain))
    said = {finding.message for finding in check_engine(path, "mlx")}
    assert any(each.startswith("position_embedding_type is None there, and mlx-lm") for each in said)
    assert any("layer_types is ['linear_attention', 'full_attention'] there" in each for each in said)


def test_models_that_mlx_lm_changes_are_refused(tmp_path: Path) -> None:
    base = tiny.copy_of(tiny.base("llama-2"), tmp_path / "base")
    settings = config(base) | {"model_type": "olmo"}
    (base / "config.json").write_text(json.dumps(settings))
    said = refusal(model_quantize, "-i", base, "-o", tmp_path / "out", "--format", "mlx", "-b", 4)
    assert "mlx-lm may rename, stack or change the tensors of model_type 'olmo'" in said


def test_experts_are_stacked_as_mlx_lm_has_them(made: Path, tmp_path: Path) -> None:
    base = tiny.base("qwen3-moe")
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 3, 4, *args(made))
    low, high = tmp_path / "made" / "3bpw", tmp_path / "made" / "4bpw"
    stored = load_file(low / "model.safetensors")
    prefix, one = "model.layers.1.mlp.switch_mlp.up_proj", "model.layers.1.mlp.experts.{}.up_proj"
    assert {key: list(value.shape) for key, value in stored.items() if key.startswith(prefix)} == {
        f"{prefix}.weight": [4, 64, 6], f"{prefix}.scales": [4, 64, 2], f"{prefix}.biases": [4, 64, 2]
    }  # fmt: skip
    assert not any(".experts." in key for key in stored)
    checkpoint = open_checkpoint(low)
    weights_of_base = load_file(base / "model.safetensors")
    for number in range(4):
        name = one.format(number)
        parts = {part: stored[f"{prefix}.{part}"][number] for part in ("weight", "scales", "biases")}
        found = checkpoint.load(f"{name}.weight")
        assert torch.equal(found, mlx.dequantize(parts, MlxScheme(3, 32)))
        weight = weights_of_base[f"{name}.weight"].float()
        assert float((found - weight).norm() / weight.norm()) < 0.4
    assert [problem for problem in check_checkpoint(low) if problem.severity == "error"] == []

    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.experts.*.down_proj.*": high, "*.q_proj.*": high})
    run(recompile, "-i", low, "-o", tmp_path / "mix", "-or", recipe, "--verify", "--shard-size", 1, "--quiet")
    mixed, other = load_file(tmp_path / "mix" / "model.safetensors"), load_file(high / "model.safetensors")
    for key, value in mixed.items():
        wanted = (other if ("down_proj" in key and "switch_mlp" in key) or "q_proj" in key else stored)[key]
        assert torch.equal(value.view(torch.uint8), wanted.view(torch.uint8)), key
    entries = config(tmp_path / "mix")["quantization"]
    assert entries["model.layers.1.mlp.switch_mlp.down_proj"]["bits"] == 4
    assert entries[prefix]["bits"] == 3
    assert not any(".experts." in key for key in entries)


def test_experts_of_a_stack_have_one_source(made: Path, tmp_path: Path) -> None:
    run(model_quantize, "-i", tiny.base("qwen3-moe"), "-o", tmp_path / "made", "-b", 3, 4, *args(made))
    low, high = tmp_path / "made" / "3bpw", tmp_path / "made" / "4bpw"
    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.experts.2.down_proj.*": high})
    said = refusal(recompile, "-i", low, "-o", tmp_path / "mix", "-or", recipe)
    assert "the engine loads all 4 experts as one tensor, and expert 2 is U32" in said
    assert not (tmp_path / "mix").exists()


def test_a_rotary_base_is_said_where_mlx_lm_looks_for_it(made: Path, tmp_path: Path) -> None:
    """Where only transformers 5's rope_parameters has it, mlx-lm's Llama would take 10000."""
    assert rotary_base(made, tmp_path)["rope_theta"] == 777.0


def rotary_base(made: Path, folder: Path) -> dict[str, Any]:
    base = tiny.copy_of(tiny.base("llama-2"), folder / "base")
    settings = {key: value for key, value in config(base).items() if key != "rope_theta"}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 777.0}
    (base / "config.json").write_text(json.dumps(settings))
    run(model_quantize, "-i", base, "-o", folder / "rotary", "-b", 6, *args(made))
    return config(folder / "rotary" / "6bpw")


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0}),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, {}),
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 3.0}}},
            {"rope_theta": 5.0, "rope_local_base_freq": 3.0},
        ),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}},
         {"rope_theta": 5.0, "partial_rotary_factor": 0.5}),
        ({"rope_parameters": None}, {}),
    ],
)  # fmt: skip
def test_rotary_fields(given: dict[str, Any], added: dict[str, Any]) -> None:
    assert rotary_fields(given) == added


# ---- names and values of mlx-lm's own --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe", "qwen3_next"])
def changed(request: pytest.FixtureRequest, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and variants of it of 3 and 6 bits, of a type whose tensors mlx-lm keeps with other names and values."""
    folder = tmp_path_factory.mktemp(request.param)
    mixture(request.param, folder / "base")
    run(model_quantize, "-i", folder / "base", "-o", folder / "made", "-b", 3, 6, *args(made))
    return folder


def test_tensors_lie_in_the_file_as_mlx_lm_has_them(changed: Path) -> None:
    base, path = load_file(changed / "base" / "model.safetensors"), changed / "made" / "6bpw"
    stored, settings = load_file(path / "model.safetensors"), config(path)
    text = "model.language_model" if "text_config" in settings else "model"
    own = "language_model.model" if "text_config" in settings else "model"
    names = [f"layers.{n}.{end}" for n in (0, 1) for end in ("input_layernorm", "post_attention_layernorm")]
    names += ["layers.1.self_attn.q_norm", "layers.1.self_attn.k_norm", "norm"]
    for name in names:
        assert torch.equal(stored[f"{own}.{name}.weight"], base[f"{text}.{name}.weight"] + 1), name
    gated = "layers.0.linear_attn.norm.weight"
    assert torch.equal(stored[f"{own}.{gated}"], base[f"{text}.{gated}"]), "which mlx-lm takes as it is"
    turned = stored[f"{own}.layers.0.linear_attn.conv1d.weight"]
    assert torch.equal(turned, base[f"{text}.layers.0.linear_attn.conv1d.weight"].transpose(1, 2))
    assert "lm_head.scales" in stored or "language_model.lm_head.scales" in stored
    assert not any(name.startswith("model.language_model.") for name in stored)
    if text != own:
        assert {name for name in base if "visual" in name} <= stored.keys(), "the tower as it was"
    opened = open_checkpoint(path)
    for name in names:
        wanted = (base[f"{text}.{name}.weight"] + 1).float() - 1
        assert torch.equal(opened.load(f"{text}.{name}.weight").float(), wanted)
    assert opened.tensors[f"{text}.layers.0.linear_attn.conv1d.weight"].shape == (128, 1, 4)
    assert [problem for problem in check_checkpoint(path) if problem.severity == "error"] == []
    assert check_engine(path, "mlx") == []


def test_mixes_and_decoded_copies_of_such_a_model(changed: Path, tmp_path: Path) -> None:
    low, high = changed / "made" / "3bpw", changed / "made" / "6bpw"
    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.v_proj.*": high, "*embed_tokens*": high})
    run(recompile, "-i", low, "-o", tmp_path / "mix", "-or", recipe, "--verify", "--quiet")
    files = [load_file(path / "model.safetensors") for path in (tmp_path / "mix", low, high)]
    for name, value in files[0].items():
        taken = files[2] if "v_proj" in name or "embed_tokens" in name else files[1]
        assert torch.equal(value.view(torch.uint8), taken[name].view(torch.uint8)), name
    entries = config(tmp_path / "mix")["quantization"]
    assert {name.rpartition(".")[2] for name, entry in entries.items() if isinstance(entry, dict)
            and entry["bits"] == 6} == {"v_proj", "embed_tokens"}  # fmt: skip
    assert check_engine(tmp_path / "mix", "mlx") == []

    run(recompile, "-i", tmp_path / "mix", "-o", tmp_path / "dense", "--dense", "--quiet")
    dense, mix = open_checkpoint(tmp_path / "dense"), open_checkpoint(tmp_path / "mix")
    assert dense.tensors.keys() == open_checkpoint(changed / "base").tensors.keys(), "transformers' names"
    for name in dense.tensors:
        assert torch.equal(dense.load(name), mix.load(name).to(dense.load(name).dtype)), name


def test_dense_checkpoints_of_either_kind_go_with_such_a_model(changed: Path, tmp_path: Path) -> None:
    """transformers' with MLX modules in it becomes MLX's; MLX's own without quantized modules stays so when copied."""
    base, high = changed / "base", changed / "made" / "6bpw"
    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.v_proj.*": high})
    run(recompile, "-i", base, "-o", tmp_path / "mix", "-or", recipe, "--verify", "--quiet")
    assert check_engine(tmp_path / "mix", "mlx") == []
    mix, built = (load_file(path / "model.safetensors") for path in (tmp_path / "mix", high))
    vectors = [name for name, value in built.items() if value.dim() == 1]
    assert all(torch.equal(mix[name], built[name]) for name in vectors)

    run(recompile, "-i", tmp_path / "mix", "-o", tmp_path / "hf", "--dense", "--quiet")
    folder = tiny.copy_of(tmp_path / "mix", tmp_path / "dense")  # as mlx_lm.convert without -q leaves it
    settings = {key: value for key, value in config(folder).items() if not key.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    decoded = {name: value for name, value in mix.items() if ".v_proj." not in name}
    (text,) = {name.partition(".layers.")[0] for name in weights if ".layers.1.self_attn.v_proj" in name}
    (own,) = {name.partition(".layers.")[0] for name in mix if ".layers.1.self_attn.v_proj" in name}
    decoded[f"{own}.layers.1.self_attn.v_proj.weight"] = weights[f"{text}.layers.1.self_attn.v_proj.weight"]
    save_file(decoded, folder / "model.safetensors", {"format": "mlx"})
    run(recompile, "-i", folder, "-o", tmp_path / "copy", "--verify", "--quiet")
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == decoded.keys()
    assert all(torch.equal(copied[name], value) for name, value in decoded.items())
    ids = tiny.rows(2, 12)
    assert torch.equal(streamed_logits(folder, ids), streamed_logits(tmp_path / "hf", ids))


def test_a_norm_that_heals_is_written_with_what_mlx_lm_adds(changed: Path, tmp_path: Path) -> None:
    build, base = open_checkpoint(changed / "made" / "3bpw"), open_checkpoint(changed / "base")
    choose, accept, report_rows, second = (tiny.rows(6, 24, seed=10 + n) for n in range(4))
    rows = HealRows(tiny.rows(64, 24, seed=3), choose, accept, report_rows, second, "random", "others")
    options = HealOptions(1536, batch_tokens=96, check_every=4, learning_rate=0.003, dtype=torch.float32)
    *_, report = heal(build, base, tmp_path / "healed", rows, options)
    assert isinstance(report, HealReport)
    assert report.kept
    before, after = (load_file(path / "model.safetensors") for path in (build.path, tmp_path / "healed"))
    (norm,) = (name for name in before if name.endswith("layers.1.input_layernorm.weight"))
    assert not torch.equal(before[norm], after[norm])
    assert float((before[norm] - after[norm]).abs().max()) < 0.2, "moved by some steps and not by 1"
    *_, found = compare(open_checkpoint(tmp_path / "healed"), base, rows.report)
    assert isinstance(found, DiffReport)
    assert found.kl.mean == pytest.approx(report.report.after, rel=1e-3)


def test_what_such_a_checkpoint_cannot_be_is_told(changed: Path, tmp_path: Path) -> None:
    path = tiny.copy_of(changed / "made" / "6bpw", tmp_path / "copy")
    settings, held = config(path), load_file(path / "model.safetensors")
    own = "language_model.model.norm.weight" if "text_config" in settings else "model.norm.weight"
    entry = {"bits": 6, "group_size": 32}
    strange = settings["quantization"] | {"model.language_model.layers.1.self_attn.o_proj": entry}
    (path / "config.json").write_text(json.dumps(settings | {"quantization": strange}))
    assert "o_proj: is not stored" in refusal(recompile, "--check", path, "--engine", "mlx")
    (path / "config.json").write_text(json.dumps(settings))
    if settings["model_type"] == "qwen3_next":
        save_file({**held, "mtp.fc.weight": torch.zeros(64, 128)}, path / "model.safetensors", {"format": "mlx"})
        (found,) = check_engine(path, "mlx")
        assert "mtp.fc" in found.where
        assert "layer for later tokens" in found.message
    else:
        twice = own.replace("language_model.model", "model.language_model")
        save_file({**held, twice: held[own].clone()}, path / "model.safetensors", {"format": "mlx"})
        assert f"holds {own}, as mlx-lm calls it, and {twice}" in refusal(recompile, "--check", path)


def test_layers_for_later_tokens_at_which_mlx_lm_stops_are_left_out(made: Path, tmp_path: Path) -> None:
    base = mixture("qwen3_next", tmp_path / "base")
    held = load_file(base / "model.safetensors")
    held |= {"mtp.norm.weight": torch.zeros(64), "mtp.fc.weight": torch.zeros(64, 128)}
    save_file(held, base / "model.safetensors", {"format": "pt"})
    said = run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 6, *args(made))
    assert not any("mtp" in name for name in load_file(tmp_path / "made" / "6bpw" / "model.safetensors"))
    assert check_engine(tmp_path / "made" / "6bpw", "mlx") == [], said


def by_head(build: Path, folder: Path, bits: int) -> Path:
    """The build as mlx_lm.convert leaves it: keys' and values' maps of heads in two stacks, quantized."""
    path, scheme = tiny.copy_of(build, folder), MlxScheme(bits, 32)
    settings, held = config(path), load_file(path / "model.safetensors")
    for layer in range(2):
        block = f"model.layers.{layer}.self_attn"
        whole = held.pop(f"{block}.kv_b_proj.weight").float().unflatten(0, (4, 64))
        for name, maps in (("embed_q", whole[:, :32].transpose(1, 2)), ("unembed_out", whole[:, 32:])):
            weights = {f"{block}.{name}.{head}": value.contiguous() for head, value in enumerate(maps)}
            (made,) = MlxEncoder((scheme,), {}).encode(weights, None, {})
            for part in ("weight", "scales", "biases"):
                held[f"{block}.{name}.{part}"] = torch.stack([made[own].parts[part] for own in weights])
            settings["quantization"][f"{block}.{name}"] = {**scheme.entry()}
    settings["quantization_config"] = settings["quantization"]
    (path / "config.json").write_text(json.dumps(settings))
    save_file(held, path / "model.safetensors", {"format": "mlx"})
    return path


def test_maps_of_heads_stay_whole_where_mlx_lm_would_round_them_anew(made: Path, tmp_path: Path) -> None:
    base = mixture("deepseek_v3", tmp_path / "base")
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 6, *args(made))
    path, name = tmp_path / "made" / "6bpw", "model.layers.1.self_attn.kv_b_proj"
    assert not open_checkpoint(path).modules[name].is_quantized
    report = json.loads((path / "quantize_report.json").read_text())["variant"]["modules"]
    (found,) = (module for module in report if module["module"] == name)
    assert "would round it anew" in found["note"]
    assert [problem for problem in check_engine(path, "mlx") if problem.severity == "error"] == []

    held, settings = load_file(path / "model.safetensors"), config(path)
    (own,) = MlxEncoder((MlxScheme(6, 32),), {}).encode({name: held.pop(f"{name}.weight").float()}, None, {})
    held |= {f"{name}.{part}": value for part, value in own[name].parts.items()}
    save_file(held, path / "model.safetensors", {"format": "mlx"})
    settings["quantization"][name] = MlxScheme(6, 32).entry()
    (path / "config.json").write_text(json.dumps(settings | {"quantization_config": settings["quantization"]}))
    assert "decodes it, splits it by heads and rounds it anew" in refusal(recompile, "--check", path, "--engine", "mlx")


def test_maps_that_mlx_lm_keeps_by_heads_are_read(made: Path, tmp_path: Path) -> None:
    base = mixture("deepseek_v3", tmp_path / "base")
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 3, 6, *args(made))
    low, high = (by_head(tmp_path / "made" / f"{bits}bpw", tmp_path / f"{bits}", bits) for bits in (3, 6))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    opened, weight = open_checkpoint(high), load_file(base / "model.safetensors")[name].float()
    assert opened.modules["model.layers.1.self_attn.embed_q.3"].shape == (32, 32)
    assert float((opened.load(name) - weight).norm() / weight.norm()) < 0.03
    assert check_engine(high, "mlx") == []
    assert [problem for problem in check_checkpoint(high) if problem.severity == "error"] == []

    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.embed_q.*": high, "*.q_b_proj.*": high})
    run(recompile, "-i", low, "-o", tmp_path / "mix", "-or", recipe, "--verify", "--quiet")
    files = [load_file(path / "model.safetensors") for path in (tmp_path / "mix", low, high)]
    for key, value in files[0].items():
        taken = files[2] if ".embed_q." in key or ".q_b_proj." in key else files[1]
        assert torch.equal(value.view(torch.uint8), taken[key].view(torch.uint8)), key
    assert check_engine(tmp_path / "mix", "mlx") == []
    assert "give all heads" in refusal(
        recompile, "-i", low, "-o", tmp_path / "parted", "-or",
        mixes.recipe(tmp_path / "parted.yaml", {"*.embed_q.2.*": high}),
    )  # fmt: skip

    run(recompile, "-i", tmp_path / "mix", "-o", tmp_path / "dense", "--dense", "--quiet")
    dense, mix = open_checkpoint(tmp_path / "dense"), open_checkpoint(tmp_path / "mix")
    assert dense.tensors.keys() == open_checkpoint(base).tensors.keys()
    assert torch.equal(dense.load(name), mix.load(name).to(dense.load(name).dtype))
    for damage, says in (
        (lambda held: held.pop("model.layers.1.self_attn.unembed_out.weight"), "4 of embed_q and 0 of unembed_out"),
        (lambda held: held.update({name: weight}), f"holds {name} and, by heads, "),
    ):
        path = tiny.copy_of(high, tmp_path / says[:4])
        held = load_file(path / "model.safetensors")
        damage(held)
        save_file(held, path / "model.safetensors", {"format": "mlx"})
        assert says in refusal(recompile, "-i", path, "-o", tmp_path / "none", "--dense")
    ids = tiny.rows(2, 12)
    apart = streamed_logits(tmp_path / "mix", ids) - streamed_logits(tmp_path / "dense", ids)
    assert float(apart.abs().median()) < 0.02, "decoded weights are rounded to bfloat16"
    rows = HealRows(tiny.rows(64, 24, seed=3), *(tiny.rows(6, 24, seed=10 + n) for n in range(4)), "random", "others")
    options = HealOptions(768, batch_tokens=96, check_every=4, learning_rate=0.003, dtype=torch.float32)
    *_, healed = heal(open_checkpoint(low), open_checkpoint(base), tmp_path / "healed", rows, options)
    assert isinstance(healed, HealReport)
    profile = tmp_path / "profile.jsonl"
    run(model_profile, "-mb", base, "-i", low, "-s", high, "-o", profile, "--mode", "sketch",
        "--input-ids", made / "ids.safetensors", "--quiet")  # fmt: skip
    for bits in (4, 4.5, 5):
        recipe, mix = tmp_path / f"{bits}.yaml", tmp_path / f"chosen-{bits}"
        run(model_optimize, profile, "-b", bits, "-o", recipe, "--no-check", "--quiet")
        run(recompile, "-i", low, "-o", mix, "-or", recipe, "--quiet")


# ---- in mlx-lm, where a Python has it --------------------------------------------------------------------------------


def test_mlx_lm_runs_variants_and_a_mix_with_our_logits(made: Path, tmp_path: Path) -> None:
    mlx_engine.python()
    variants = made / "made"
    recipe = mixes.recipe(tmp_path / "merge.yaml", {"*.1.*": variants / "nvfp4", "*.v_proj.*": variants / "6bpw"})
    run(recompile, "-i", variants / "3bpw", "-o", tmp_path / "mix", "-or", recipe, "--quiet")
    run(model_quantize, "-i", tiny.base("llama-tied"), "-o", tmp_path / "tied", "-b", 5, *args(made))
    rotary_base(made, tmp_path)
    models = [*sorted(variants.iterdir()), tmp_path / "mix", tmp_path / "tied" / "5bpw", tmp_path / "rotary" / "6bpw"]
    ids = tiny.rows(2, 12)
    for path, found in zip(models, mlx_engine.engine_logits(models, ids, tmp_path), strict=True):
        mlx_engine.assert_same_logits(found, streamed_logits(path, ids))


ROUTED = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "head_dim": 16,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
SLIDING: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 16}
SEEING: dict[str, dict[str, Any]] = {  # what of a config is not of its text model
    "qwen3_5": {"vision_config": VISION},
    "qwen3_5_moe": {"vision_config": VISION},
    "qwen3_vl": {"vision_config": {**VISION, "deepstack_visual_indexes": [0]}},
    "qwen3_vl_moe": {"vision_config": {**VISION, "deepstack_visual_indexes": [0]}},
    "llama4": {
        "vision_config": {**EYES, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    },
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", **EYES}, "mm_tokens_per_image": 4},
    "gemma4": {"vision_config": EYES},
    "mistral3": {"vision_config": {"model_type": "pixtral", "head_dim": 16, **EYES}},
    "mistral4": {"vision_config": {"model_type": "pixtral", "head_dim": 16, **EYES}},
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 32,
    "beta_slow": 1, "original_max_position_embeddings": 32,
}  # fmt: skip
BY_HEAD = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4, **{key: value for key, value in ROUTED.items() if key != "head_dim"},
    "first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
INDEXED = {**BY_HEAD, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 64}
SIZES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "deepseek_v3": BY_HEAD,
    "deepseek_v32": INDEXED,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 1},
    "exaone4": SLIDING,
    "exaone_moe": {
        **ROUTED,
        **SLIDING,
        "num_experts": 4,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "glm4_moe_lite": BY_HEAD,
    "glm_moe_dsa": INDEXED,
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "kimi_k2": BY_HEAD,
    "laguna": {**ROUTED, "num_experts": 4},
    "mamba": {"state_size": 16, "conv_kernel": 4, "expand": 2, "time_step_rank": 4},
    "mistral4": {"model_type": "mistral4", **BY_HEAD, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "olmoe": {"num_experts": 4},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True},
    "mellum": {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16},
    "minimax_m2": {"num_local_experts": 4, "head_dim": 16, "rotary_dim": 8},
    "solar_open": ROUTED,
    "helium": {"head_dim": 16},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "phi": {},
    "afmoe": {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_dense_layers": 1,
        "moe_intermediate_size": 64,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "num_shared_experts": 1,
    },
    "deepseek_v2": {
        **ROUTED,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "rope_parameters": YARN,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
    "dots1": {**ROUTED, "first_k_dense_replace": 1},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": {
        "num_local_experts": 4,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_experts": 4,
        "num_dense_layers": 1,
        "moe_intermediate_size": 64,
        "tie_word_embeddings": True,
    },
    "llama4": {
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "head_dim": 16,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
    },
    "mamba2": {
        "num_heads": 4,
        "head_dim": 32,
        "state_size": 16,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 64,
        "head_dim": 16,
        "num_hidden_layers": 4,
    },
    "qwen3_next": {**LINEAR, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3_5": LINEAR,
    "qwen3_vl": {"head_dim": 16, "rope_parameters": MROPE},
    "qwen3_vl_moe": {"head_dim": 16, "rope_parameters": MROPE, "num_experts": 4, "moe_intermediate_size": 32},
    "gemma3": {**SLIDING, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "gemma4": {
        **SLIDING,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": tiny.VOCAB,
        "num_kv_shared_layers": 0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "mistral3": {"model_type": "ministral3", "head_dim": 16},
    "qwen3_5_moe": {**LINEAR, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


OTHERS = (  # that mlx-lm's loader changes
    "apertus", "deepseek_v3", "deepseek_v32", "exaone_moe", "glm4_moe_lite", "glm_moe_dsa", "gptj",
    "granitemoe", "granitemoehybrid", "laguna", "lfm2", "lfm2_moe", "mamba", "mamba2", "nemotron_h",
)  # fmt: skip


def mixture(model_type: str, folder: Path, **more: Any) -> Path:
    """A tiny model of transformers' with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    fields: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": tiny.VOCAB, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, **ends, **SIZES[model_type], **more,
    }  # fmt: skip
    sees = SEEING.get(model_type)
    if sees is not None:
        fields = {"text_config": fields, "tie_word_embeddings": fields["tie_word_embeddings"], **sees}
    model_type = {"mistral4": "mistral3"}.get(model_type, model_type)
    kind = AutoModelForImageTextToText if sees is not None else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = AutoConfig.for_model(PUBLISHED_AS.get(model_type, model_type), **fields)
        model = kind.from_config(settings).bfloat16()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn(value.shape, generator=generator) * (0.1 if value.dim() > 1 else 0.02)
    model.save_pretrained(str(folder))
    tiny.write_tokenizer(folder)
    if model_type in PUBLISHED_AS:
        (folder / "config.json").write_text(json.dumps(config(folder) | {"model_type": model_type}))
    return as_published(folder)


def as_published(folder: Path) -> Path:
    """Experts and rotary settings as the models' own checkpoints have them; transformers 5 writes them otherwise."""
    settings, path = config(folder), folder / "model.safetensors"
    if settings["model_type"] == "qwen3_5_moe":
        held = load_file(path)
        for layer in range(2):
            block = f"model.language_model.layers.{layer}.mlp.experts"
            maps = {
                leaf: [held.pop(f"{block}.{expert}.{leaf}_proj.weight") for expert in range(4)]
                for leaf in ("gate", "up", "down")
            }
            held[f"{block}.gate_up_proj"] = torch.cat([torch.stack(maps["gate"]), torch.stack(maps["up"])], dim=1)
            held[f"{block}.down_proj"] = torch.stack(maps["down"])
        save_file(held, path, {"format": "pt"})
    if settings["model_type"] == "qwen3_vl_moe":  # its experts lie [in, out]
        held = {
            name: value.transpose(1, 2).contiguous() if ".experts." in name else value
            for name, value in load_file(path).items()
        }
        save_file(held, path, {"format": "pt"})
    if settings["model_type"] == "ernie4_5_moe":  # mlx-lm drops what corrects its router
        held = load_file(path)
        held |= {name: value * 0 for name, value in held.items() if name.endswith("e_score_correction_bias")}
        save_file(held, path, {"format": "pt"})
    if settings["model_type"] in {"qwen3_next", *SEEING, *OTHERS}:
        (folder / "config.json").write_text(json.dumps(settings | loader_fields(settings)))
    return folder


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"model_type": "llama"}, {}),
        ({"model_type": "glm4_moe", "rope_theta": 1.0}, {"rope_scaling": None}),
        ({"model_type": "glm4_moe", "rope_scaling": {"factor": 2.0}}, {}),
        ({"model_type": "mellum", "num_local_experts": 8}, {"num_experts": 8}),
        (
            {"model_type": "minimax_m2", "head_dim": 128, "rope_parameters": {"partial_rotary_factor": 0.5}},
            {"shared_intermediate_size": 0, "rotary_dim": 64, "partial_rotary_factor": 0.5},
        ),
        ({"model_type": "minimax_m2", "head_dim": 8, "rotary_dim": 4, "shared_intermediate_size": 9}, {}),
        ({"model_type": "gemma3", "text_config": {"vocab_size": 262208, "rope_theta": 1.0}}, {}),
        (
            {"model_type": "gemma3", "text_config": {"vocab_size": 9, "rope_parameters": {"rope_theta": 3.0}}},
            {
                "vocab_size": 9,
                "text_config": {"vocab_size": 9, "rope_parameters": {"rope_theta": 3.0}, "rope_theta": 3.0},
            },
        ),
        ({"model_type": "gemma4", "text_config": {"per_layer_config": {"1": {"head_dim": 512}}}}, {}),
        (
            {"model_type": "gemma4", "text_config": {"per_layer_config": {"1": {"head_dim": 8}}}},
            {"text_config": {"per_layer_config": {"1": {"head_dim": 8}}, "global_head_dim": 8}},
        ),
        (
            {"model_type": "qwen3_vl_moe", "text_config": {"num_local_experts": 4, "norm_topk_prob": False}},
            {"text_config": {"num_local_experts": 4, "norm_topk_prob": False, "num_experts": 4}},
        ),
    ],
)
def test_what_mlx_lm_wants_and_transformers_leaves_out(config: dict[str, Any], added: dict[str, Any]) -> None:
    assert loader_fields(config) == added


def test_experts_that_mlx_lm_would_choose_otherwise_are_told(made: Path, tmp_path: Path) -> None:
    base = mixture("glm4_moe", tmp_path / "base", n_group=2)
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 6, *args(made))
    assert "n_group is 2" in run(recompile, "--check", tmp_path / "made" / "6bpw", "--engine", "mlx")


def test_a_rotary_setting_that_mlx_lm_does_not_read_is_told(made: Path, tmp_path: Path) -> None:
    """gpt-oss as it is published: yarn over a range that is not rounded."""
    rotary = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
              "original_max_position_embeddings": 4096, "truncate": False}  # fmt: skip
    base, path, ids = (
        mixture("gpt_oss", tmp_path / "base", rope_parameters=rotary),
        tmp_path / "made" / "6bpw",
        tiny.rows(2, 12),
    )
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 6, *args(made))
    assert "which mlx-lm 0.32.2 does not read" in run(recompile, "--check", path, "--engine", "mlx")
    mlx_engine.python()
    (found,) = mlx_engine.engine_logits([path], ids, tmp_path)
    apart = (found - streamed_logits(path, ids)).abs().amax((0, 2))
    assert float(apart[0]) < 1e-4, "the first token has no position to speak of"
    assert 1e-4 < float(apart[1:].max()) < 0.1


@pytest.mark.parametrize("model_type", ["qwen3_next", *SEEING, *OTHERS])
def test_what_mlx_lm_makes_of_a_model_is_read(model_type: str, tmp_path: Path) -> None:
    """Its own conversion: names, values and stacks that are its work."""
    mlx_engine.python()
    base, out = mixture(model_type, tmp_path / "base"), tmp_path / "converted"
    ended = mlx_engine.run(_CONVERT, {"base": str(base), "out": str(out)}, tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, out / name)
    ids = tiny.rows(2, 12)
    assert [problem for problem in check_engine(out, "mlx") if problem.severity == "error"] == []
    (found,) = mlx_engine.engine_logits([out], ids, tmp_path)
    mlx_engine.assert_same_logits(found, streamed_logits(out, ids))


_CONVERT = """
import json, sys
from pathlib import Path
from mlx_lm import convert
job = json.loads(Path(sys.argv[1]).read_text())
convert(job["base"], job["out"], quantize=True, q_bits=6, q_group_size=32)
"""


GEMMAS: dict[str, dict[str, Any]] = {
    "experts, keys that are values": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64,
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    },
    "keys of earlier layers": {
        "num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", GEMMAS)
def test_mlx_lm_runs_what_gemmas_of_other_sizes_have(made: Path, kind: str, tmp_path: Path) -> None:
    mlx_engine.python()
    base, path, ids = mixture("gemma4", tmp_path / "base", **GEMMAS[kind]), tmp_path / "made" / "6bpw", tiny.rows(2, 12)
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 6, *args(made))
    run(recompile, "--check", path, "--engine", "mlx")
    (found,) = mlx_engine.engine_logits([path], ids, tmp_path)
    mlx_engine.assert_same_logits(found, streamed_logits(path, ids))


@pytest.mark.parametrize("model_type", sorted(EXPERTS.keys() | SIZES.keys()))
def test_mlx_lm_runs_every_mixture_and_what_was_added_since(made: Path, model_type: str, tmp_path: Path) -> None:
    mlx_engine.python()
    own = model_type in SIZES
    base = mixture(model_type, tmp_path / "base") if own else tiny.base(model_type.replace("_", "-"))
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "-b", 6, *args(made))
    ids, path = tiny.rows(2, 12), tmp_path / "made" / "6bpw"
    run(recompile, "--check", path, "--engine", "mlx")
    (found,) = mlx_engine.engine_logits([path], ids, tmp_path)
    mlx_engine.assert_same_logits(found, streamed_logits(path, ids))
