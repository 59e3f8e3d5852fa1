"""Candidates made on the fly equal the variants that model_quantize writes; a mix made in one pass equals a merge."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.costs import Profile, load_profile
from recompile.errors import FormatError, RecipeError, UnsupportedError
from recompile.events import Progress
from recompile.formats.schemes import parse_scheme
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.quantize.calibrate import input_power
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.lazy_variant import make_variant, parse_candidates, read_importance, spec_of
from recompile.quantize.pipeline import quantize_model
from recompile.quantize.scheme_encoder import SchemeEncoder, uniform
from recompile.recipe.recipe import Override, Recipe, Source, dump_recipe, load_recipe, parse_recipe
from tests import tiny
from tests.commands import refusal, run

GROUP = tiny.GROUP_SIZE


def save_ids(ids: Tensor, path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"input_ids": ids}, path)
    return path


def spec(bits: int, symmetric: bool = True) -> dict[str, object]:
    return spec_of(str(bits), group_size=GROUP, symmetric=symmetric)[1]


def plain_variants(architecture: str, folder: Path, bits: tuple[int, ...], symmetric: bool = True) -> dict[int, Path]:
    """On disk, by method mse without importance."""
    encoder = IntEncoder(bits, GROUP, symmetric, "mse", importance=False)
    for _ in quantize_model(open_checkpoint(tiny.base(architecture)), folder, encoder, tiny.rows(1, 4)):
        pass
    return {rate: folder / f"{rate}bpw" for rate in bits}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("architecture", ["llama-bias", "qwen2-moe"])
def test_a_made_candidate_is_the_variant_on_disk(architecture: str, symmetric: bool, tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base(architecture))
    written = open_checkpoint(plain_variants(architecture, tmp_path, (3,), symmetric)[3])
    made = make_variant(base, spec(3, symmetric))
    assert set(made.modules) == set(written.modules)
    for name, module in written.modules.items():
        mine = made.modules[name]
        assert (mine.format, mine.size_bytes, mine.numel) == (module.format, module.size_bytes, module.numel), name
        assert {part: (i.dtype, i.shape) for part, i in mine.parts.items()} == {
            part: (i.dtype, i.shape) for part, i in module.parts.items()
        }
        for tensor in [f"{name}.weight", *([f"{name}.bias"] if "bias" in module.parts else [])]:
            assert torch.equal(made.load(tensor), written.load(tensor)), tensor


def test_importance_is_that_of_the_calibration_rows(tmp_path: Path) -> None:
    """With it a made candidate equals what the pipeline writes with method mse and importance."""
    base, ids = open_checkpoint(tiny.base("qwen3-moe")), tiny.rows(6, 32)
    encoder = IntEncoder((3,), GROUP, True, "mse", importance=True)
    for _ in quantize_model(base, tmp_path, encoder, ids):
        pass
    written = open_checkpoint(tmp_path / "3bpw")
    told: list[object] = []
    power = input_power(base, ids, on_event=told.append)
    depth = base.config["num_hidden_layers"]
    assert told == [Progress("calibrating", n + 1, depth, "layers") for n in range(depth)], "it may take half a minute"
    made, plain = make_variant(base, spec(3), power), make_variant(base, spec(3))
    assert made.fingerprint != plain.fingerprint
    differs = 0
    for name in made.made:
        value, wanted = made.load(f"{name}.weight"), written.load(f"{name}.weight")
        # the diagonal is summed in another order: a close call between two grids may fall the other way
        assert float((value == wanted).float().mean()) > 0.97, name
        differs += float((value == plain.load(f"{name}.weight")).float().mean()) < 0.9
    assert differs > len(made.made) / 2, "importance that changes nothing would prove nothing"


def test_a_profile_of_made_candidates_is_that_of_the_variants(tmp_path: Path) -> None:
    base, ids = open_checkpoint(tiny.base("llama-2")), tiny.rows(3, 16)
    found = plain_variants("llama-2", tmp_path, (2, 4))
    profiles = []
    for name, candidates in {
        "disk": [(bits, open_checkpoint(path)) for bits, path in found.items()],
        "made": [(bits, make_variant(base, spec(bits))) for bits in found],
    }.items():
        *_, profile = profile_exact(
            ProfileJob(base, 4, candidates, ids, tmp_path / name, ProfileOptions(level="tensor"))
        )
        assert isinstance(profile, Profile)
        profiles.append(profile)
    disk, made = profiles
    assert made.measurements == disk.measurements
    assert made.header.groups == disk.header.groups
    assert [candidate.spec for candidate in made.header.candidates] == [spec(2), spec(4)]
    assert load_profile(tmp_path / "made") == made
    assert max(m.mean for m in made.measurements.values()) > 1e-3


def test_what_is_stored_nowhere_cannot_be_read() -> None:
    made = make_variant(open_checkpoint(tiny.base("llama-2")), spec(3))
    with pytest.raises(UnsupportedError, match="made on the fly"):
        made.read("model.layers.0.mlp.up_proj.weight_packed")


def test_bad_candidates_are_named() -> None:
    assert parse_candidates(["2,3", "4"]) == ["2", "3", "4"]
    with pytest.raises(FormatError, match="4 is given twice"):
        parse_candidates(["4,4"])
    with pytest.raises(FormatError, match="Q9_Z"):
        spec_of("Q9_Z")
    base = open_checkpoint(tiny.base("llama-2"))
    with pytest.raises(FormatError, match="2 to 8"):
        make_variant(base, {"bits": 9})
    with pytest.raises(FormatError, match="nothing would be quantized"):
        make_variant(base, {"bits": 4, "group_size": 7})


# ---- one pass to the mix ---------------------------------------------------------------------------------------------

MIX = f"""
sources:
  - {{id: 6, bits: 6, group_size: {GROUP}}}
  - {{id: two, bits: 2, group_size: {GROUP}}}
overrides:
  - {{key: "*.v_proj.*", source: 6}}
  - {{key: "model.layers.1.mlp.*", source: two}}
base: {{bits: 3, group_size: {GROUP}}}
"""


def tensors_of(directory: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name) for name in sorted(checkpoint.tensors)}


@pytest.mark.parametrize("architecture", ["llama-2", "qwen2-moe"])
def test_a_mix_in_one_pass_is_the_merge_of_the_variants_byte_for_byte(architecture: str, tmp_path: Path) -> None:
    ids = save_ids(tiny.rows(4, 24), tmp_path / "ids.safetensors")
    base = tiny.base(architecture)
    common = ("-i", base, "--input-ids", ids, "-g", GROUP, "--quiet")
    run(model_quantize, *common, "-o", tmp_path / "v", "-b", 2, 3, 6)
    (tmp_path / "mix.yaml").write_text(MIX)
    run(model_quantize, *common, "-o", tmp_path / "mix", "-or", tmp_path / "mix.yaml")

    recipe = Recipe(
        (Source(6, str(tmp_path / "v/6bpw")), Source("two", str(tmp_path / "v/2bpw"))),
        load_recipe(tmp_path / "mix.yaml").overrides,
    )
    overlay = build_overlay(open_checkpoint(tmp_path / "v/3bpw"), recipe)
    for _ in execute(plan_write(overlay, tmp_path / "merged")):
        pass
    made, merged = tensors_of(tmp_path / "mix"), tensors_of(tmp_path / "merged")
    assert made.keys() == merged.keys()
    for name, value in merged.items():
        assert torch.equal(made[name], value), name
    checkpoint = open_checkpoint(tmp_path / "mix")
    widths = {
        checkpoint.scheme(module).bits: module.name for module in checkpoint.modules.values() if module.is_quantized
    }
    assert set(widths) == {2, 3, 6}
    report = json.loads((tmp_path / "mix" / "quantize_report.json").read_text())
    assert report["variant"]["bpw"] == pytest.approx(overlay.accounting.bpw)


def test_a_mix_is_made_again_only_where_the_recipe_changed(tmp_path: Path) -> None:
    ids = save_ids(tiny.rows(2, 16), tmp_path / "ids.safetensors")
    (tmp_path / "mix.yaml").write_text(MIX)
    command = ("-i", tiny.base("llama-2"), "--input-ids", ids, "-o", tmp_path / "mix", "-or", tmp_path / "mix.yaml")
    run(model_quantize, *command)
    run(model_quantize, *command)
    (tmp_path / "mix.yaml").write_text(MIX.replace("v_proj", "o_proj"))
    result = CliRunner().invoke(model_quantize, [str(argument) for argument in command])
    assert result.exit_code == 1
    assert "assignment was" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MIX.replace("bits: 6,", "model_dir: ./6bpw, bits: 6,"), '"model_dir" and "bits" exclude each other'),
        ("sources: [{id: 4, model_dir: x}]\noverrides: [{key: '*', source: 4}]", "x is a directory"),
        (MIX.replace("*.v_proj.*", "*.v_prj.*"), "matches no module to quantize"),
        (MIX.replace(f"bits: 6, group_size: {GROUP}", "scheme: w9a16"), "2 to 8"),
        ("sources: [{id: 4, group_size: 32, model_dir: x}]\noverrides: []", '"group_size" goes with "bits"'),
    ],
)
def test_recipes_that_cannot_be_made_say_why(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    ids = save_ids(tiny.rows(2, 16), tmp_path / "ids.safetensors")
    command = ("-i", tiny.base("llama-2"), "--input-ids", ids, "-o", tmp_path / "mix", "-or", tmp_path / "mix.yaml")
    result = CliRunner().invoke(model_quantize, [str(argument) for argument in command])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "mix").exists()


def test_other_commands_say_whom_such_a_recipe_is_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="model_quantize -i BASE -o OUT -or <string>"):
        build_overlay(open_checkpoint(tiny.variants("llama-2", (3,))[3]), parse_recipe(MIX))


def test_such_a_recipe_is_written_as_it_is_read() -> None:
    recipe = parse_recipe(MIX)
    again = parse_recipe(dump_recipe(recipe))
    assert [(s.id, s.spec) for s in again.sources] == [(s.id, s.spec) for s in recipe.sources]
    assert [(o.key, o.source) for o in again.overrides] == [(o.key, o.source) for o in recipe.overrides]
    assert again.base == recipe.base == {"bits": 3, "group_size": GROUP}
    assert recipe.overrides[0] == Override("*.v_proj.*", 6, recipe.overrides[0].line)


def test_profile_optimize_quantize_without_any_variant(tiny_models: Mapping[str, Path], tmp_path: Path) -> None:
    """The whole way by commands, on the trained MoE: what comes out has the size that the recipe promised."""
    base, profile, recipe = tiny_models["tiny-moe"], tmp_path / "p.jsonl", tmp_path / "mix.yaml"
    rows = ("-r", 2, "-l", 64, "--quiet")
    run(
        model_profile, "-mb", base, "--candidates", "2,4", "--importance-rows", 2, "--mode", "sketch", "--samples", 2,
        "--level", "expert", "-o", profile, *rows,
    )  # fmt: skip
    output = run(model_optimize, profile, "-b", 3, "-o", recipe, "--no-check")
    assert f"model_quantize -i {base} -o OUT -or {recipe}" in output
    run(model_quantize, "-i", base, "-o", tmp_path / "out", "-or", recipe, *rows)
    promised = load_recipe(recipe).provenance
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["variant"]["bpw"] == pytest.approx(promised["bpw"], abs=1e-4)
    assert 2.9 < promised["bpw"] <= 3
    assert open_checkpoint(tmp_path / "out").size_bytes == pytest.approx(promised["total_bytes"], rel=1e-6)


@pytest.mark.parametrize("rows", [("-r", 2), ("-r", "auto", "--max-rows", 2)])
def test_the_importance_beside_a_profile_is_that_of_its_candidates(
    tiny_models: Mapping[str, Path], rows: tuple[object, ...], tmp_path: Path
) -> None:
    """A file of the user's under its name stays, and so does that of a profile of other candidates."""
    profile, kept = tmp_path / "p.jsonl", tmp_path / "p.jsonl.importance.safetensors"
    words = (
        "-mb", tiny_models["tiny-dense"], "--candidates", "2,3", "--mode", "sketch", "--samples", 2, "-o", profile,
        *rows, "-l", 64, "--quiet", "--importance-rows",
    )  # fmt: skip
    kept.write_bytes(b"mine")
    said = refusal(model_profile, *words, 2)
    assert "p.jsonl.importance.safetensors: exists, and this tool did not make it" in said
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]
    kept.unlink()
    run(model_profile, *words, 2)
    made, whole = read_importance(kept), kept.read_bytes()
    assert made
    kept.unlink()
    run(model_profile, *words, 2)  # a finished one
    assert kept.read_bytes() == whole
    assert "p.jsonl" in refusal(model_profile, *words, 3)
    assert kept.read_bytes() == whole


# ---- schemes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w4a16-g32", "fp8-channel", "nvfp4", "mxfp4"])
def test_a_made_scheme_is_the_variant_on_disk(name: str, tmp_path: Path) -> None:
    """Bytes and values of what model_quantize writes by method mse; nvfp4's scale is one for q, k and v."""
    base = open_checkpoint(tiny.base("llama-bias"))
    encoder = SchemeEncoder((uniform(parse_scheme(name), "mse"),), importance=False)
    for _ in quantize_model(base, tmp_path, encoder, tiny.rows(1, 4)):
        pass
    written = open_checkpoint(tmp_path / name)
    source_id, made_spec = spec_of(name)
    made = make_variant(base, made_spec)
    assert (source_id, made_spec) == (name, {"scheme": name})
    assert set(made.modules) == set(written.modules)
    for module, stored in written.modules.items():
        assert made.modules[module].format == stored.format
        assert made.modules[module].size_bytes == stored.size_bytes, module
        tensor = f"{module}.weight"
        assert torch.equal(made.load(tensor).float(), written.load(tensor).float()), tensor


def test_names_that_schemes_and_types_share_are_told_by_case() -> None:
    assert spec_of("MXFP4") == ("MXFP4", {"type": "MXFP4"})
    assert spec_of("mxfp4") == ("mxfp4", {"scheme": "mxfp4"})
    assert spec_of("q4_k") == ("Q4_K", {"type": "Q4_K"})
    assert spec_of("W4A16-G32") == ("w4a16-g32", {"scheme": "w4a16-g32"})


def test_kinds_of_candidates_are_told_apart(tmp_path: Path) -> None:
    """Bits, schemes and GGUF types in one profile: a table of costs, with the word that no file holds all of them."""
    ids = save_ids(tiny.rows(2, 16), tmp_path / "ids.safetensors")
    profile = tmp_path / "p.jsonl"
    names = ("4", "nvfp4", "q8_0")
    output = run(
        model_profile, "-mb", tiny.base("llama-2"), "--candidates", *names, "--importance-rows", 0, "--level", "layer",
        "-g", GROUP, "-o", profile, "--input-ids", ids, "--quiet",
    )  # fmt: skip
    assert "never in one file" in output
    found = load_profile(profile)
    assert [candidate.label for candidate in found.header.candidates] == ["4", "nvfp4", "Q8_0"]
    bits = found.header.groups[0].bits
    assert bits["nvfp4"] < bits["Q8_0"]
    costs = [found.measurements[found.header.groups[0].name, label].mean for label in ("4", "nvfp4", "Q8_0")]
    assert min(costs) == costs[2] > 0


SCHEMES = f"""
sources:
  - {{id: nvfp4, scheme: nvfp4}}
  - {{id: 3, bits: 3, group_size: {GROUP}}}
  - {{id: w8a8, scheme: w8a8-static}}
overrides:
  - {{key: "*.self_attn.*", source: nvfp4}}
  - {{key: "model.layers.1.mlp.*", source: 3}}
  - {{key: "model.layers.0.mlp.down_proj.*", source: w8a8}}
base: {{scheme: w4a16-g{GROUP}}}
"""


def test_a_mix_of_schemes_in_one_pass_is_the_merge_of_the_variants(tmp_path: Path) -> None:
    """Bits and schemes in one recipe: scales of inputs, nvfp4's shared scale, the config groups."""
    ids = save_ids(tiny.rows(4, 24), tmp_path / "ids.safetensors")
    base, names = tiny.base("llama-2"), ("nvfp4", "w8a8-static", f"w4a16-g{GROUP}")
    common = ("-i", base, "--input-ids", ids, "--quiet")
    run(model_quantize, *common, "-o", tmp_path / "v", "--scheme", *names)
    run(model_quantize, *common, "-o", tmp_path / "v", "-b", 3, "-g", GROUP)
    (tmp_path / "mix.yaml").write_text(SCHEMES)
    run(model_quantize, *common, "-o", tmp_path / "mix", "-or", tmp_path / "mix.yaml")
    directories = {"nvfp4": names[0], 3: "3bpw", "w8a8": names[1]}
    sources = tuple(Source(key, str(tmp_path / "v" / name)) for key, name in directories.items())
    recipe = Recipe(sources, load_recipe(tmp_path / "mix.yaml").overrides)
    overlay = build_overlay(open_checkpoint(tmp_path / "v" / names[2]), recipe)
    for _ in execute(plan_write(overlay, tmp_path / "merged")):
        pass
    made, merged = tensors_of(tmp_path / "mix"), tensors_of(tmp_path / "merged")
    assert made.keys() == merged.keys()
    assert any(name.endswith("input_scale") for name in made)
    for name, value in merged.items():
        assert torch.equal(made[name].view(torch.uint8), value.view(torch.uint8)), name
    one, other = open_checkpoint(tmp_path / "mix"), open_checkpoint(tmp_path / "merged")
    for name, module in one.modules.items():
        assert module.format == other.modules[name].format
        assert not module.is_quantized or str(one.scheme(module)) == str(other.scheme(other.modules[name])), name
