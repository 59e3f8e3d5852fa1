"""EXL2 and EXL3 without variants: candidates made on the fly have the files' sizes, mixes are those of a merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.model_auto import main as model_auto
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.costs import load_profile
from recompile.errors import FormatError
from recompile.formats import exl3
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.quantize.encoders import Exl2Encoder, Exl3Encoder
from recompile.quantize.exl3 import quantize_exl3
from recompile.quantize.fake_quant_exl import Exl3StandIn
from recompile.quantize.lazy_variant import exl_spec_of, make_variant, maker_of
from recompile.quantize.pipeline import BuildOptions, quantize_model
from recompile.recipe.recipe import Recipe, Source, dump_recipe, load_recipe, parse_recipe
from tests import tiny
from tests.commands import refusal, run


def save_ids(ids: Tensor, path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"input_ids": ids}, path)
    return path


def check_sizes(made: Checkpoint, written: Checkpoint) -> None:
    assert set(made.modules) == set(written.modules)
    for name, module in written.modules.items():
        mine = made.modules[name]
        assert (mine.format, mine.size_bytes) == (module.format, module.size_bytes), name
        assert {part: (i.dtype, i.shape) for part, i in mine.parts.items()} == {
            part: (i.dtype, i.shape) for part, i in module.parts.items()
        }, name


@pytest.mark.parametrize("architecture", ["llama-bias", "llama-tied", "qwen2-moe", "llama-ragged"])
def test_a_made_exl2_candidate_is_the_variant_on_disk(architecture: str, tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base(architecture))
    for _ in quantize_model(base, tmp_path, Exl2Encoder([2.5], method="rtn"), tiny.rows(1, 4), BuildOptions(head=True)):
        pass
    written = open_checkpoint(tmp_path / "2.5bpw")
    made = make_variant(base, exl_spec_of("2.5", "exl2")[1])
    check_sizes(made, written)
    layers = [name for name, module in written.modules.items() if module.is_quantized and name != "lm_head"]
    for name in layers:
        value, wanted = made.load(f"{name}.weight"), written.load(f"{name}.weight").float()
        assert torch.equal(value, wanted[: len(value)]), name  # EXL2 pads rows of zeros
    head = "model.embed_tokens" if architecture == "llama-tied" else "lm_head"
    assert torch.equal(made.load("lm_head.weight"), base.load(f"{head}.weight")), "counted, not rounded"
    assert made.config["tie_word_embeddings"] is False
    assert (architecture == "llama-ragged") == any(
        name.endswith("down_proj") for name in set(made.modules) - set(layers)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", ["1", "3"])
@pytest.mark.usefixtures("quick_exl3")
def test_an_exl3_stand_in_has_the_size_of_the_file(bits: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base("llama-bias", dtype=dtype))
    made = make_variant(base, exl_spec_of(bits, "exl3")[1])
    for _ in quantize_model(base, tmp_path, Exl3Encoder([int(bits)]), tiny.rows(1, 4), BuildOptions(head=True)):
        pass
    check_sizes(made, open_checkpoint(tmp_path / f"{bits}bpw"))


@pytest.mark.parametrize("bits", [2, pytest.param(3, marks=pytest.mark.sweep)])
def test_a_stand_in_errs_as_the_encoder_does(bits: int) -> None:
    """Size of the error, of its share along the weight, and where it lies; heavy tails and uneven channels."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 256, generator=generator) * torch.rand(256, generator=generator).exp()
    weight *= torch.rand(256, 1, generator=generator).mul(2).exp()
    weight[torch.rand(weight.shape, generator=generator) < 1e-3] *= 8
    coded = exl3.dequantize(quantize_exl3(weight, None, bits, codebook="mul1"))
    stand_in = Exl3StandIn(bits).round(open_checkpoint(tiny.base("llama-2")), "a", weight, None)
    errors = [(coded - weight), (stand_in - weight)]
    power = weight.square().sum()
    whole = [float(e.square().sum() / power) for e in errors]
    along = [float((e * weight).sum() / power) for e in errors]
    assert whole[1] == pytest.approx(whole[0], rel=0.1)
    assert along[1] == pytest.approx(along[0], rel=0.15)
    for side in (0, 1):
        by_channel = torch.stack([e.square().mean(side).log() for e in errors])
        assert float(torch.corrcoef(by_channel)[0, 1]) > 0.9
    other = Exl3StandIn(bits).round(open_checkpoint(tiny.base("llama-2")), "b", weight, None)
    assert not torch.equal(other, stand_in), "every module has noise of its own"


def test_importance_orders_the_rows_of_exl2() -> None:
    """The wide rows of a layout go to the inputs that count."""
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(256, 512, generator=generator), torch.ones(512)
    importance[-32:] = 100.0
    maker, base = maker_of({"bits": 3.5, "format": "exl2"}), open_checkpoint(tiny.base("llama-2"))
    plain, weighed = (maker.round(base, "a", weight, given) for given in (None, {"a": importance}))
    costs = [float(((made - weight).square() * importance).sum()) for made in (plain, weighed)]
    assert costs[1] < 0.5 * costs[0]


# ---- one pass to the mix ---------------------------------------------------------------------------------------------


def mix_of(format_name: str, rates: tuple[object, object, object], said: bool) -> str:
    form = f", format: {format_name}" if said else ""
    low, base, high = rates
    return f"""
sources:
  - {{id: {high}, bits: {high}{form}}}
  - {{id: few, bits: {low}{form}}}
overrides:
  - {{key: "*.v_proj.*", source: {high}}}
  - {{key: "model.layers.0.mlp.*", source: few}}
base: {{bits: {base}{form}}}
"""


@pytest.mark.parametrize(
    ("format_name", "architecture", "rates", "said"),
    [
        ("exl2", "llama-2", (2.5, 3, 5), True),
        ("exl2", "qwen2-moe", (2.5, 3, 5), False),
        pytest.param("exl2", "llama-tied", (2.5, 3.5, 5), True, marks=pytest.mark.sweep),
        ("exl3", "llama-1", (3, 1, 2), True),
    ],
)
@pytest.mark.usefixtures("quick_exl3")
def test_a_mix_in_one_pass_is_the_merge_of_the_variants_byte_for_byte(
    format_name: str, architecture: str, rates: tuple[object, object, object], said: bool, tmp_path: Path
) -> None:
    ids = save_ids(tiny.rows(4, 24), tmp_path / "ids.safetensors")
    common = ("-i", tiny.base(architecture), "--input-ids", ids, "--quiet")
    run(model_quantize, *common, "-o", tmp_path / "v", "--format", format_name, "-b", *dict.fromkeys(rates))
    (tmp_path / "mix.yaml").write_text(mix_of(format_name, rates, said))
    form = () if said else ("--format", format_name)
    run(model_quantize, *common, *form, "-o", tmp_path / "mix", "-or", tmp_path / "mix.yaml")
    low, middle, high = (tmp_path / f"v/{rate}bpw" for rate in rates)
    sources = (Source(rates[2], str(high)), Source("few", str(low)))  # type: ignore[arg-type]
    recipe = Recipe(sources, load_recipe(tmp_path / "mix.yaml").overrides)
    for _ in execute(plan_write(build_overlay(open_checkpoint(middle), recipe), tmp_path / "merged")):
        pass
    made, merged = open_checkpoint(tmp_path / "mix"), open_checkpoint(tmp_path / "merged")
    assert made.tensors.keys() == merged.tensors.keys()
    assert "lm_head" in made.modules
    for name in merged.tensors:
        assert torch.equal(made.read(name), merged.read(name)), name
    assert made.config == merged.config
    sizes = {module.size_bytes for name, module in made.modules.items() if name.endswith(("v_proj", "k_proj"))}
    assert len(sizes) > 1, "a mix, not one bitrate"


def test_the_head_is_what_the_recipe_or_the_option_says(tmp_path: Path) -> None:
    ids = save_ids(tiny.rows(2, 16), tmp_path / "ids.safetensors")
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("sources: []\noverrides: []\nbase: {bits: 3, format: exl2}\n")
    named = tmp_path / "named.yaml"
    named.write_text(
        'sources: [{id: 4, bits: 4, format: exl2}]\noverrides: [{key: "lm_head.*", source: 4}]\n'
        "base: {bits: 3, format: exl2}\n"
    )
    common = ("-i", tiny.base("llama-2"), "--input-ids", ids, "--quiet")
    run(model_quantize, *common, "-o", tmp_path / "8", "-or", recipe, "-hb", 8)
    run(model_quantize, *common, "-o", tmp_path / "4", "-or", named)
    run(model_quantize, *common, "-o", tmp_path / "6", "-or", recipe)
    sizes = [open_checkpoint(tmp_path / name).modules["lm_head"].size_bytes for name in "468"]
    assert sizes == sorted(set(sizes))
    whole = tmp_path / "whole.yaml"
    whole.write_text("sources: []\noverrides: []\nbase: {bits: 3}\n")
    told = refusal(model_quantize, *common, "-g", 32, "-o", tmp_path / "no", "-or", whole, "-hb", 8)
    assert "a line for lm_head.* says what the head is" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (mix_of("exl2", (2, 3, 4), True).replace("bits: 2, format: exl2", "bits: 2"), "sources of several formats"),
        (mix_of("exl4", (2, 3, 4), True), "sources of format exl4"),
        (mix_of("exl2", (2, 3, 4), True).replace("bits: 3, format", "format"), "wanted bits or a scheme"),
        (mix_of("exl2", (2, 3, 4), True).replace("bits: 2, format", "format"), '"format" goes with "bits"'),
        (mix_of("exl2", (2, 3, 4), True).replace("bits: 2,", "scheme: nvfp4,"), '"format" goes with "bits"'),
    ],
)
def test_recipes_that_cannot_be_made_say_why(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    ids = save_ids(tiny.rows(2, 16), tmp_path / "ids.safetensors")
    command = ("-i", tiny.base("llama-2"), "--input-ids", ids, "-o", tmp_path / "mix", "-or", tmp_path / "mix.yaml")
    assert message in refusal(model_quantize, *command)
    assert not (tmp_path / "mix").exists()


def test_such_a_recipe_is_written_as_it_is_read() -> None:
    recipe = parse_recipe(mix_of("exl2", (2.5, 3, 4), True))
    again = parse_recipe(dump_recipe(recipe))
    assert [(s.id, s.spec) for s in again.sources] == [(s.id, s.spec) for s in recipe.sources]
    assert again.sources[1].spec == {"bits": 2.5, "format": "exl2"}
    assert again.base == {"bits": 3, "format": "exl2"}


def test_bad_candidates_are_named() -> None:
    assert exl_spec_of("2.5", "exl2") == (2.5, {"bits": 2.5, "format": "exl2"})
    assert exl_spec_of("3.0", "exl3") == (3, {"bits": 3, "format": "exl3"})
    base = open_checkpoint(tiny.base("llama-2"))
    for wrong, says in (
        ({"bits": 9, "format": "exl2"}, "2 to 8 bits"),
        ({"bits": 2.7, "format": "exl3"}, "found 2.7"),
        ({"bits": 3, "format": "exl9"}, "wanted exl2 or exl3"),
        ({"bits": 3, "format": "exl2", "group_size": 32}, "wanted bits and format alone"),
    ):
        with pytest.raises(FormatError, match=says):
            make_variant(base, wrong)
    with pytest.raises(FormatError, match="candidates are bits"):
        exl_spec_of("Q4_K", "exl2")


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format_name", "architecture", "rates"), [("exl2", "llama-tied", "2.5,5"), ("exl3", "llama-1", "1,2,3")]
)
@pytest.mark.usefixtures("quick_exl3")
def test_profile_optimize_quantize_give_the_size_that_was_promised(
    format_name: str, architecture: str, rates: str, tmp_path: Path
) -> None:
    base, profile, recipe = tiny.base(architecture), tmp_path / "p.jsonl", tmp_path / "mix.yaml"
    rows = ("-r", 2, "-l", 32, "--quiet")
    output = run(
        model_profile, "-mb", base, "--candidates", rates, "--format", format_name, "--importance-rows", 2,
        "--mode", "sketch", "--samples", 4, "-o", profile, *rows,
    )  # fmt: skip
    assert ("stand-ins" in output) == (format_name == "exl3")
    header = load_profile(profile).header
    assert {c.spec["format"] for c in header.candidates if c.spec is not None} == {format_name}
    low, high = (sum(g.bits[label] for g in header.groups) / header.group_weights for label in (
        header.candidates[0].label, header.candidates[-1].label))  # fmt: skip
    budget = (low + high) / 2
    report = tmp_path / "report.json"
    run(
        model_optimize, profile, "-b", budget, "-o", recipe, "--solver", "refine", "--steps", 1, "--json", report, *rows
    )
    written = load_recipe(recipe)
    assert json.loads(report.read_text())["verdict"]["contenders"][0]["kl"]["mean"] > 0
    run(model_quantize, "-i", base, "-o", tmp_path / "out", "-or", recipe, *rows)
    made = open_checkpoint(tmp_path / "out")
    assert {m.format for m in made.modules.values() if m.is_quantized} == {format_name}
    assert made.size_bytes == written.provenance["total_bytes"]
    quantized = json.loads((tmp_path / "out" / "quantize_report.json").read_text())["variant"]
    assert quantized["bpw"] == pytest.approx(written.provenance["bpw"], abs=1e-4)
    assert 0.9 * budget < quantized["bpw"] <= budget


@pytest.mark.parametrize(
    ("format_name", "rates", "budget"),
    [pytest.param("exl2", "2.5,3,5", 3.6, marks=pytest.mark.sweep), ("exl3", "1,2,3", 7.5)],
)
@pytest.mark.usefixtures("quick_exl3")
def test_model_auto_makes_the_mix_and_goes_on(format_name: str, rates: str, budget: float, tmp_path: Path) -> None:
    words = (
        "-i", tiny.base("llama-1"), "-o", tmp_path / "mix", "-b", budget, "--format", format_name,
        "--candidates", rates, "-r", 2, "-l", 32, "--calibration-rows", 2, "--samples", 2, "--solver", "exact",
        "--quiet",
    )  # fmt: skip
    report = tmp_path / "report.json"
    run(model_auto, *words, "--json", report)
    told = json.loads(report.read_text())
    made = open_checkpoint(tmp_path / "mix")
    assert {m.format for m in made.modules.values() if m.is_quantized} == {format_name}
    assert all(build["bpw"] <= budget for build in told["builds"])
    assert len(told["builds"]) == 2
    assert "profile: done before" in run(model_auto, *words)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    base = tiny.base("llama-2")
    told = refusal(
        model_profile, "-mb", base, "--candidates", "3,4", "--format", "exl2", "--head", "-o", tmp_path / "p"
    )
    assert "one head of 6 bits" in told
    told = refusal(model_auto, "-i", base, "-o", tmp_path / "m", "-b", 3, "--format", "exl2", "--variants", base, base)
    assert "leave --format out" in told
    told = refusal(
        model_profile, "-mb", base, "--candidates", "3,4", "--format", "exl2", "-g", 32, "-o", tmp_path / "p"
    )
    assert "--group-size: of integers; --format exl2 has groups of its own" in told
    told = refusal(model_auto, "-i", base, "-o", tmp_path / "m", "-b", 3, "--format", "exl3", "--asym")
    assert "--asym: of integers" in told
