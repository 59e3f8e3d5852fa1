"""MLX without variants: candidates made on the fly are the files, mixes come in one pass and have the promised size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.costs import load_profile
from recompile.errors import FormatError
from recompile.formats.mlx_config import MlxScheme
from recompile.merge.check import check_engine
from recompile.quantize.fake_quant_mlx import MlxMaker
from recompile.quantize.lazy_variant import make_variant, maker_of, mlx_spec_of
from recompile.quantize.mlx_encoder import MlxEncoder
from recompile.recipe.recipe import load_recipe
from tests import tiny
from tests.commands import refusal, run

GROUP = 32


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    save_file({"input_ids": tiny.rows(3, 16)}, tmp_path / "ids.safetensors")
    return tmp_path / "ids.safetensors"


def check_same(made: Checkpoint, written: Checkpoint) -> None:
    """Modules, forms, dtypes, shapes, sizes and values."""
    assert set(made.modules) == set(written.modules)
    assert made.size_bytes == written.size_bytes
    for name, module in written.modules.items():
        mine = made.modules[name]
        assert (mine.format, mine.size_bytes, mine.shape) == (module.format, module.size_bytes, module.shape), name
        assert {part: (i.dtype, i.shape) for part, i in mine.parts.items()} == {
            part: (i.dtype, i.shape) for part, i in module.parts.items()
        }, name
        if module.is_quantized:
            assert torch.equal(made.load(f"{name}.weight"), written.load(f"{name}.weight").float()), name


@pytest.mark.parametrize(
    ("architecture", "names"),
    [("llama-2", "2 5 mxfp4 nvfp4"), ("llama-tied", "3 mxfp8"), ("llama-bias", "4"), ("qwen3-moe", "6")],
)
def test_a_made_candidate_is_the_variant_on_disk(architecture: str, names: str, ids: Path, tmp_path: Path) -> None:
    base = tiny.base(architecture)
    specs = [mlx_spec_of(name, GROUP) for name in names.split()]
    bits = [spec["bits"] for _, spec in specs if "bits" in spec]
    modes = [spec["scheme"] for _, spec in specs if "scheme" in spec]
    given = [*(["-b", *bits] if bits else []), *(["--scheme", *modes] if modes else [])]
    run(model_quantize, "-i", base, "-o", tmp_path / "made", "--format", "mlx", "-g", GROUP, *given, "--method", "mse",
        "--no-importance", "--input-ids", ids, "--quiet")  # fmt: skip
    for source_id, spec in specs:
        found = tmp_path / "made" / (f"{source_id}bpw" if "bits" in spec else str(source_id))
        made = make_variant(open_checkpoint(base), spec)
        check_same(made, open_checkpoint(found))
        assert made.modules["model.embed_tokens"].format == "mlx"


def test_importance_weighs_the_fit_and_an_encoding_is_made_once() -> None:
    base = open_checkpoint(tiny.base("llama-2"))
    name = "model.layers.0.mlp.up_proj"
    weight = base.load(f"{name}.weight").float()
    importance = torch.ones(weight.shape[1])
    importance[::4] = 100.0
    maker = MlxMaker(MlxScheme(2, GROUP))
    maker.shared.keep_bytes = 1 << 20
    maker.store(base)
    found = maker.round(base, name, weight, {name: importance})
    (wanted,) = MlxEncoder((MlxScheme(2, GROUP),), {}, method="mse").encode({name: weight}, torch.diag(importance), {})
    assert torch.equal(found, wanted[name].dense)
    (plain,) = MlxEncoder((MlxScheme(2, GROUP),), {}, method="mse").encode({name: weight}, None, {})
    assert not torch.equal(found, plain[name].dense)
    assert torch.equal(maker.round(base, name, torch.zeros_like(weight), None), found), "kept"
    assert maker.kept_bytes > 0


def test_from_the_base_to_a_mix_in_one_pass(ids: Path, tmp_path: Path) -> None:
    """Embedding and head are chosen too; the file has the bytes that the recipe promised, and mlx-lm would load it."""
    base, profile, recipe = tiny.base("llama-2"), tmp_path / "profile.jsonl", tmp_path / "mix.yaml"
    rows = ("--input-ids", ids, "--quiet")
    run(model_profile, "-mb", base, "--candidates", "2,3,4,6,mxfp8", "--format", "mlx", "-g", GROUP, "-o", profile,
        "--mode", "sketch", "--samples", 4, "--embedding", "--head", *rows)  # fmt: skip
    header = load_profile(profile).header
    assert {candidate.label for candidate in header.candidates} == {"2", "3", "4", "6", "mxfp8"}
    assert header.fixed_bits == 0
    assert {"model.embed_tokens", "lm_head"} <= {group.name for group in header.groups}
    run(model_optimize, profile, "--size", "60KiB", "-o", recipe, "--solver", "exact", "--no-check", "--quiet")
    loaded = load_recipe(recipe)
    specs = [source.spec for source in loaded.sources]
    assert all(spec is not None and spec["format"] == "mlx" for spec in specs)
    assert loaded.base == {"bits": 4, "group_size": GROUP, "format": "mlx"}
    run(model_quantize, "-i", base, "-o", tmp_path / "mix", "-or", recipe, *rows)
    mix = open_checkpoint(tmp_path / "mix")
    assert 57 * 1024 < mix.size_bytes <= 60 * 1024
    quantized = [module for module in mix.modules.values() if module.is_quantized]
    bits = 8 * sum(module.size_bytes for module in quantized) / sum(module.numel for module in quantized)
    assert bits == pytest.approx(loaded.provenance["bpw"], abs=1e-4)
    entries = json.loads((tmp_path / "mix" / "config.json").read_text())["quantization"]
    assert len({(entry["bits"], entry["mode"]) for entry in entries.values() if isinstance(entry, dict)}) > 1
    assert check_engine(tmp_path / "mix", "mlx") == []


def test_what_is_no_group_counts_at_the_width_of_the_base(ids: Path, tmp_path: Path) -> None:
    """Without --embedding a tied embedding is stored as the base says, and counted so."""
    base, profile, recipe = tiny.base("llama-tied"), tmp_path / "profile.jsonl", tmp_path / "mix.yaml"
    rows = ("--input-ids", ids, "--quiet")
    run(model_profile, "-mb", base, "--candidates", "2,3,6", "--format", "mlx", "-g", GROUP, "-o", profile, "--mode",
        "sketch", "--samples", 4, *rows)  # fmt: skip
    header = load_profile(profile).header
    made = make_variant(open_checkpoint(base), {"bits": 3, "group_size": GROUP, "format": "mlx"})
    grouped = sum(group.bits["3"] for group in header.groups)
    assert header.fixed_bits + header.other_bits == 8 * made.size_bytes - grouped
    run(model_optimize, profile, "-b", 4.2, "-o", recipe, "--solver", "exact", "--no-check", "--quiet")
    run(model_quantize, "-i", base, "-o", tmp_path / "mix", "-or", recipe, *rows)
    entries = json.loads((tmp_path / "mix" / "config.json").read_text())["quantization"]
    assert entries["model.embed_tokens"]["bits"] == 3
    assert "lm_head" not in entries


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("2.5",), "--candidates 2.5: mlx candidates are whole bits, such as 3, or mxfp4, mxfp8, nvfp4"),
        (("Q4_K",), "--candidates Q4_K: mlx candidates are whole bits"),
        (("7",), "bits: found 7, wanted 2, 3, 4, 5, 6, 8 for mode affine"),
        (("4", "-g", 48), "MLX has 32, 64, 128"),
        (("4", "-g", "channel"), "--group-size channel: MLX has 32, 64, 128"),
        (("4", "--asym"), "--asym: of compressed-tensors; --format mlx has a bias in every group anyway"),
    ],
)
def test_what_mlx_does_not_have_is_refused(given: tuple[object, ...], message: str, tmp_path: Path) -> None:
    said = refusal(model_profile, "-mb", tiny.base("llama-2"), "--format", "mlx", "-o", tmp_path / "p.jsonl",
                   "--candidates", *given)  # fmt: skip
    assert message in said
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("spec", [{"format": "mlx"}, {"bits": 4, "scheme": "mxfp4", "format": "mlx"},
                                  {"bits": 4, "symmetric": True, "format": "mlx"}])  # fmt: skip
def test_a_spec_says_bits_or_a_scheme(spec: dict[str, object]) -> None:
    with pytest.raises(FormatError, match=r"wanted bits \(and optionally group_size\) or a scheme, and format"):
        maker_of(spec)
