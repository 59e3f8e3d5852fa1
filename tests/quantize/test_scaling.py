"""AWQ and SmoothQuant: folds found by running, exact before rounding, better after it, and merges that stay exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.diff import DiffOptions, DiffReport, compare_many
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.coupled_modules import read_scaled_sets
from recompile.cli.model_profile import main as model_profile
from recompile.cli.recompile import main as recompile_command
from recompile.errors import FormatError, MismatchError
from recompile.formats.schemes import parse_scheme
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.model.stream import LayeredModel
from recompile.model.texts import default_text
from recompile.model.tokenizer import load_tokenizer
from recompile.model.tokens import make_rows
from recompile.quantize.calibrate import InputStatistics
from recompile.quantize.modifiers import load_modifiers
from recompile.quantize.pipeline import Encoded, quantize_model
from recompile.quantize.scheme_encoder import SchemeEncoder, SchemeVariant, uniform
from recompile.quantize.smoothing_mappings import Fold, find_folds
from recompile.quantize.smoothing_scales import awq_scale, powers_of_two, smoothquant_scale
from tests import mixes, tiny


def folds_of(architecture: str, layer: int) -> dict[str, Fold]:
    model = LayeredModel.of(open_checkpoint(tiny.base(architecture)))
    model.model.set_experts_implementation("eager")
    with torch.inference_mode():
        (state,) = model.embed(tiny.rows(1, 16), 1)
        for index in range(layer):
            with model.layer(index):
                state = model.run_layer(index, state)
        with model.layer(layer):
            before = {name: value.clone() for name, value in model.layers[layer].named_parameters()}
            found = find_folds(model, layer, state)
            assert all(torch.equal(before[name], value) for name, value in model.layers[layer].named_parameters())
    prefix = f"{model.prefix_of_layer(layer)}."
    return {fold.producer.removeprefix(prefix): fold for fold in found}


def leaves(fold: Fold) -> set[str]:
    return {".".join(name.split(".")[4:]) or name.split(".")[-1] for name in fold.consumers}


def test_folds_of_a_llama_layer() -> None:
    found = folds_of("llama-2", 1)
    assert {name: leaves(fold) for name, fold in found.items()} == {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "post_attention_layernorm": {"gate_proj", "up_proj"},
        "mlp.up_proj": {"down_proj"},
        "self_attn.v_proj": {"o_proj"},
    }
    assert [fold.offset for fold in found.values()] == [0, 0, None, None]
    heads = found["self_attn.v_proj"].channels.tolist()  # 4 query heads of 16 over 2 value heads
    assert heads == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


def test_folds_of_experts_take_the_router_and_the_experts_that_no_token_reached() -> None:
    found = folds_of("qwen3-moe", 1)
    readers = leaves(found["post_attention_layernorm"])
    assert readers == {"gate"} | {f"experts.{n}.{leaf}_proj" for n in range(tiny.EXPERTS) for leaf in ("gate", "up")}
    assert {f"mlp.experts.{n}.up_proj" for n in range(tiny.EXPERTS)} < set(found)
    shared = leaves(folds_of("qwen2-moe", 0)["post_attention_layernorm"])
    assert {"gate", "shared_expert_gate", "shared_expert.up_proj", "shared_expert.gate_proj"} < shared


def test_norms_that_add_one_and_norms_after_a_map() -> None:
    found = folds_of("gemma2", 0)
    norms = {name for name, fold in found.items() if fold.from_norm}
    assert norms == {"input_layernorm", "pre_feedforward_layernorm"}
    assert {found[name].offset for name in norms} == {1.0}


# ---- the function stays the same -------------------------------------------------------------------------------------


class Unrounded:
    """An encoder that scales by random numbers and rounds nothing."""

    names = ("scaled",)
    scales_inputs = True

    def __init__(self, dense: tuple[str, ...] = ()) -> None:
        self.dense = dense
        self.asked: list[str] = []

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        return self.why_not_in(0, module, shape)

    def why_not_in(self, variant: int, module: str, shape: tuple[int, int]) -> str | None:
        return "kept" if module.endswith(self.dense) and self.dense else None

    def only(self, variants: Sequence[int]) -> Any:
        return self

    def scale_of(
        self,
        variant: int,
        fold: Fold,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, InputStatistics],
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        self.asked.append(fold.producer)
        generator = torch.Generator().manual_seed(len(self.asked))
        return finish(torch.exp(torch.randn(int(fold.channels.max()) + 1, generator=generator)))

    def encode_observed(
        self,
        weights: Mapping[str, Tensor],
        hessian: Tensor | None,
        biases: Mapping[str, Tensor],
        largest: Tensor | None,
    ) -> list[dict[str, Encoded]]:
        made = {}
        for name, weight in weights.items():
            if self.why_not_in(0, name, (0, 0)) is None:
                bias = {"bias": biases[name]} if name in biases else {}
                made[name] = Encoded({"weight": weight, **bias}, weight)
        return [made]

    def encode(self, weights: Any, hessian: Any, biases: Any) -> list[dict[str, Encoded]]:
        return self.encode_observed(weights, hessian, biases, None)

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored

    def quantization_config(self, variant: int, report: Any, dense: Any) -> dict[str, Any]:
        return {}

    def description(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("architecture", "dense", "folds"),
    [
        ("llama", (), 16),
        ("llama", ("v_proj", "up_proj"), 16),  # powers of two for what reads or makes them
        ("llama-bias", (), 16),
        ("qwen3-moe", (), 8 + tiny.EXPERTS - 1),
        ("gemma2", (), 12),
        ("gemma2", ("k_proj",), 12),  # 1 + weight is not rounded to what k_proj could be multiplied by: not scaled
    ],
)
def test_scales_of_any_size_leave_the_logits_alone(
    architecture: str, dense: tuple[str, ...], folds: int, tmp_path: Path
) -> None:
    """bf16 norms are stored rounded, so their readers must be multiplied by what the rounded norm really divides by."""
    base, encoder, ids = tiny.base(architecture), Unrounded(dense), tiny.rows(2, 12)
    for _ in quantize_model(open_checkpoint(base), tmp_path, encoder, tiny.rows(4, 16)):
        pass
    assert len(encoder.asked) == folds
    made = open_checkpoint(tmp_path / "scaled")
    unscaled = 3 if architecture == "gemma2" and dense else 0
    assert len(read_scaled_sets(made.path)) == folds - unscaled
    norm = f"model.layers.1.{'pre_feedforward' if architecture == 'gemma2' else 'input'}_layernorm.weight"
    assert made.tensors[norm].dtype == "BF16"
    assert float((made.read(norm).float() - open_checkpoint(base).read(norm).float()).abs().max()) > 0.5
    wanted = tiny.plain_logits(tiny.plain_model(base), ids)
    found = tiny.plain_logits(tiny.plain_model(tmp_path / "scaled"), ids)
    assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.max() - wanted.min())


# ---- scales ----------------------------------------------------------------------------------------------------------


def one_fold(width: int, *consumers: str) -> Fold:
    return Fold("norm", consumers, torch.arange(width), 0.0)


def statistics(inputs: Tensor, name: str) -> InputStatistics:
    found = InputStatistics([name])
    found.add(inputs)
    return found


def test_smoothquant_by_hand() -> None:
    """max|x| = 8, 1 and max|W| = 2, 4 over both readers: (8/2)^.5 and (1/4)^.5."""
    inputs = torch.tensor([[8.0, -1.0], [-2.0, 0.5]])
    weights = {"a": torch.tensor([[2.0, -1.0]]), "b": torch.tensor([[0.5, 4.0]])}
    stats = {name: statistics(inputs, name) for name in weights}
    assert smoothquant_scale(one_fold(2, "a", "b"), weights, stats, 0.5).tolist() == [2.0, 0.5]
    assert smoothquant_scale(one_fold(2, "a", "b"), weights, stats, 1.0).tolist() == [8.0, 1.0]


def test_awq_finds_the_salient_channel_and_is_never_worse_than_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 64, generator=generator)
    inputs[:, 5] *= 30
    weights = {"a": torch.randn(48, 64, generator=generator) * 0.05}
    scheme = parse_scheme("w4a16-g32")
    encoder = SchemeEncoder((uniform(scheme, "awq"),))
    stats = {"a": statistics(inputs, "a")}

    def rounded(name: str, weight: Tensor) -> Tensor:
        return encoder._nearest(0, "model.layers.0.a", weight)

    chosen = awq_scale(one_fold(64, "a"), weights, stats, rounded)
    assert chosen is not None
    assert int(chosen.scale.argmax()) == 5
    assert 0 < chosen.exponent < 1
    assert len(chosen.losses) == 20
    assert chosen.losses[0] == 1
    assert min(chosen.losses) < 0.6

    def output_error(made: Tensor) -> float:
        return float(((made - weights["a"]) @ inputs.T).square().sum())

    scaled = rounded("a", weights["a"] * chosen.scale) / chosen.scale
    assert output_error(scaled) == pytest.approx(
        min(chosen.losses) * output_error(rounded("a", weights["a"])), rel=1e-3
    )
    assert powers_of_two(torch.tensor([3.0, 0.7, 1.0])).tolist() == [4.0, 0.5, 1.0]


# ---- variants --------------------------------------------------------------------------------------------------------


def build(base: Path, out: Path, variants: Sequence[SchemeVariant], ids: Tensor) -> list[Path]:
    for _ in quantize_model(open_checkpoint(base), out, SchemeEncoder(tuple(variants)), ids):
        pass
    return [out / variant.name for variant in variants]


def kl(base: Path, made: Path, ids: Tensor, quantized_inputs: frozenset[int] = frozenset()) -> float:
    options = DiffOptions(quantized_inputs=quantized_inputs)
    *_, report = compare_many([build_overlay(open_checkpoint(made), None)], open_checkpoint(base), ids, options)
    assert isinstance(report, DiffReport)
    return report.kl.mean


def test_awq_is_better_than_rounding_on_a_trained_model(tiny_models: Mapping[str, Path], tmp_path: Path) -> None:
    base = tiny_models["tiny-dense"]
    text, tokenizer = default_text(), load_tokenizer(base)
    calibrate, report = (make_rows(text, tokenizer, 8, 64, role).ids for role in ("calibrate", "report"))
    scheme = parse_scheme("w3a16-g128")
    made = build(base, tmp_path, [replace(uniform(scheme, name), name=name) for name in ("rtn", "awq")], calibrate)
    found = {path.name: kl(base, path, report) for path in made}
    assert found["awq"] < 0.85 * found["rtn"]  # 0.60


def with_a_large_channel(folder: Path) -> Path:
    """The same function as its original, with one input channel 40 times as large as the others in every layer."""
    base = tiny.copy_of(tiny.base("llama-2"), folder / "base")
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("layernorm.weight"):
            value[7] *= 40
        elif name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            value[:, 7] /= 40
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def test_awq_keeps_small_weights_of_large_inputs(tmp_path: Path) -> None:
    """Rounded to nearest, columns 40 times as small as their group come out as next to nothing."""
    base, scheme = with_a_large_channel(tmp_path), parse_scheme("w4a16-g32")
    variants = [replace(uniform(scheme, name), name=name) for name in ("rtn", "awq+rtn")]
    found = {path.name: kl(base, path, tiny.rows(2, 24)) for path in build(base, tmp_path, variants, tiny.rows(4, 32))}
    assert found["awq+rtn"] < 0.5 * found["rtn"]


def test_activations_of_a_smoothed_model_round_better(tmp_path: Path) -> None:
    """A large channel makes int8 inputs of all others coarse; SmoothQuant evens it out."""
    base, scheme, ids = with_a_large_channel(tmp_path), parse_scheme("w8a8-static"), tiny.rows(4, 32)
    variants = [replace(uniform(scheme, name), name=name) for name in ("mse", "smoothquant")]
    found = {}
    for path in build(base, tmp_path, variants, ids):
        found[path.name] = kl(base, path, tiny.rows(2, 24), frozenset({0}))
    assert found["smoothquant"] < 0.3 * found["mse"]
    assert {entry.producer.rpartition(".")[2] for entry in read_scaled_sets(tmp_path / "smoothquant")} == {
        "input_layernorm",
        "post_attention_layernorm",
    }


# ---- merges ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def awq_and_plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("awq")
    variants = [replace(uniform(parse_scheme("w3a16-g32"), "awq"), name="awq"), uniform(parse_scheme("w8a16"), "rtn")]
    awq, plain = build(tiny.base("llama"), out, variants, tiny.rows(4, 32))
    return awq, plain


def test_an_unscaled_variant_of_the_same_pass_is_untouched(awq_and_plain: tuple[Path, Path], tmp_path: Path) -> None:
    awq, plain = awq_and_plain
    (alone,) = build(tiny.base("llama"), tmp_path, [uniform(parse_scheme("w8a16"), "rtn")], tiny.rows(4, 32))
    assert (alone / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert read_scaled_sets(plain) == ()
    assert len(read_scaled_sets(awq)) > 8


def merged(folder: Path, base: Path, taken: dict[str, Path]) -> Any:
    return build_overlay(open_checkpoint(base), mixes.recipe(folder / "mix.yaml", taken))


@pytest.mark.parametrize("scaled_base", [False, True])
def test_a_norm_goes_where_all_its_readers_come_from(
    scaled_base: bool, awq_and_plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """The mix is the same function as a model whose weights are the unscaled equivalents of every module."""
    base, other = awq_and_plain if scaled_base else reversed(awq_and_plain)
    overlay = merged(tmp_path, base, {"*.1.self_attn.*": other, "*.2.mlp.*": other})
    assert any("norms come from" in warning for warning in overlay.warnings)
    for name, from_other in (("1.input", True), ("1.post_attention", False), ("2.post_attention", True)):
        placed = overlay.placements[f"model.layers.{name}_layernorm"].checkpoint.path
        assert (placed == other) == from_other
    for _ in execute(plan_write(overlay, tmp_path / "out")):
        pass
    sets = {entry.producer for entry in read_scaled_sets(tmp_path / "out")}
    assert ("model.layers.1.input_layernorm" in sets) != scaled_base
    assert ("model.layers.0.input_layernorm" in sets) == scaled_base
    ids = tiny.rows(2, 24)
    loss = kl(tiny.base("llama"), tmp_path / "out", ids)
    whole = {path: kl(tiny.base("llama"), path, ids) for path in awq_and_plain}
    assert whole[awq_and_plain[1]] < loss < 1.5 * whole[awq_and_plain[0]]
    again = merged(tmp_path, tmp_path / "out", {"*.3.*": awq_and_plain[1]})  # a mix is a base like any other
    assert {entry.producer for entry in again.scaled_sets} == {name for name in sets if ".3." not in name}


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ({"*.1.self_attn.q_proj.*": 1}, "input_layernorm and the 3 maps that read it"),
        ({"*.1.input_layernorm.*": 1}, "take all of them from one source"),
        ({"*.1.self_attn.*": 1, "*.1.input_layernorm.*": 0}, "belong together"),
        ({"*.2.mlp.down_proj.*": 1}, "mlp.up_proj and the 1 maps that read it"),
        ({"*.2.self_attn.v_proj.*": 1, "*.2.self_attn.q_proj.*": 1, "*.2.self_attn.k_proj.*": 1}, "o_proj"),
    ],
)
@pytest.mark.parametrize("scaled_base", [False, True])
def test_splits_that_would_be_another_function_are_refused(
    taken: dict[str, int], message: str, scaled_base: bool, awq_and_plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base, other = awq_and_plain if scaled_base else reversed(awq_and_plain)
    again = tiny.copy_of(base, tmp_path / "again")
    with pytest.raises(MismatchError, match=message):
        merged(tmp_path, base, {key: (again, other)[which] for key, which in taken.items()})


def test_scalings_of_one_norm_have_to_agree(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        'modifiers:\n- {method: awq, scheme: w4a16-g32, targets: "*.q_proj"}\n- {method: smoothquant, scheme: w8a16}\n'
    )
    variant, _ = load_modifiers(recipe)
    with pytest.raises(FormatError, match=r"input_layernorm have one scale.*awq for .*q_proj"):
        build(tiny.base("llama-2"), tmp_path / "out", [variant], tiny.rows(2, 16))


def test_one_recipe_of_awq_smoothquant_and_gptq(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "modifiers:\n"
        '- {method: awq, scheme: w4a16-g32, targets: "*.self_attn.*"}\n'
        '- {method: smoothquant, strength: 0.8, targets: "*.mlp.*"}\n'
        '- {method: gptq, scheme: w8a8, targets: "*.mlp.*"}\n'
    )
    variant, notes = load_modifiers(recipe)
    assert notes == []
    (made,) = build(tiny.base("llama-2"), tmp_path / "out", [variant], tiny.rows(4, 32))
    checkpoint = open_checkpoint(made)
    assert set(checkpoint.formats) == {"pack-quantized", "int-quantized"}
    producers = {entry.producer.partition("layers.1.")[2] for entry in read_scaled_sets(made)} - {""}
    assert "post_attention_layernorm" in producers
    assert "mlp.up_proj" not in producers, "SmoothQuant scales what norms give"
    assert kl(tiny.base("llama-2"), made, tiny.rows(2, 24)) < 0.2


def test_commands_on_a_scaled_variant(awq_and_plain: tuple[Path, Path], tmp_path: Path) -> None:
    """recompile keeps it exact through the command's own path, probe included; model_profile says why not."""
    awq, plain = awq_and_plain
    runner = CliRunner()
    recipe = mixes.recipe(tmp_path / "mix.yaml", {"*.1.self_attn.*": awq})
    arguments = ["-i", plain, "-o", tmp_path / "out", "-or", recipe, "--verify", "--quiet"]
    result = runner.invoke(recompile_command, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "1 norms come from" in result.output
    for name, source in (("input", awq), ("post_attention", plain)):
        tensor = f"model.layers.1.{name}_layernorm.weight"
        assert torch.equal(open_checkpoint(tmp_path / "out").read(tensor), open_checkpoint(source).read(tensor))
    mixes.recipe(tmp_path / "mix.yaml", {"*.1.self_attn.q_proj.*": awq})
    result = runner.invoke(
        recompile_command, [*map(str, arguments[:2]), "-o", str(tmp_path / "two"), "-or", str(recipe)]
    )
    assert (result.exit_code, result.output.count("Error")) == (1, 1), result.output
    assert "take all of them from one source" in result.output
    assert not (tmp_path / "two").exists()
    profile = ["-mb", tiny.base("llama"), "-i", plain, "-s", awq, "-o", tmp_path / "p.jsonl", "-r", 1, "-l", 8]
    result = runner.invoke(model_profile, [*map(str, profile), "--mode", "sketch", "--quiet"])
    assert result.exit_code == 1
    assert "scales were moved between its modules" in result.output


def test_a_scaled_variant_loads_in_transformers_with_our_logits(
    awq_and_plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """Scales are folded into stored tensors, so a loader need not know of them."""
    pytest.importorskip("compressed_tensors")
    awq, ids = awq_and_plain[0], tiny.rows(2, 12)
    wanted = tiny.plain_logits(
        tiny.plain_model(tiny.dense_copy(open_checkpoint(awq), tmp_path / "dense", tiny.base("llama"))), ids
    )
    found = tiny.plain_logits(tiny.plain_model(awq), ids)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.max() - wanted.min())
