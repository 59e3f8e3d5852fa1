"""Every architecture runs as transformers runs it, with every stored tensor random: nothing of it stays unread."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eval.diff import DiffOptions, DiffReport, compare
from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from eval.profile.sketch import SketchOptions, profile_sketch
from recompile.checkpoint.checkpoint import Checkpoint, StoredModule, open_checkpoint
from recompile.costs import Profile
from recompile.errors import CheckpointError, MissingWeight, UnsupportedError
from recompile.merge.overlay import build_overlay
from recompile.model.stream import LayeredModel
from recompile.quantize.lazy_variant import make_variants, spec_of
from tests import tiny
from tests.conftest import load_script
from tests.stream import architectures

CLOSE = 1e-5  # of the range of the logits; most are equal to the last bit


@pytest.mark.parametrize("name", architectures.TYPES)
def test_logits_are_those_of_transformers(name: str) -> None:
    directory, ids = architectures.checkpoint(name), architectures.rows(3, 13)
    wanted = tiny.plain_logits(architectures.plain_model(directory), ids, 2)
    found = tiny.streamed_logits(open_checkpoint(directory), ids)
    assert wanted.std() > 0.05, "a model that predicts nothing would pass anything"
    assert float((found - wanted).abs().max()) <= CLOSE * float(wanted.max() - wanted.min())


@dataclass(frozen=True)
class Changed:
    """A checkpoint with one tensor changed."""

    base: Checkpoint
    name: str

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def modules(self) -> Mapping[str, StoredModule]:
        return self.base.modules

    def has(self, tensor: str) -> bool:
        return self.base.has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        value = self.base.load(tensor, device=device)
        return changed(value) if tensor == self.name else value


def changed(value: Tensor) -> Tensor:
    """So that a router's choice moves as well."""
    return value.flip(-1) * 1.5 + 0.25 if value.is_floating_point() else value + 1


QUICK = ("glm4-moe", "gemma4", "qwen2-vl", "hrm-text")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in architectures.TYPES]


@pytest.mark.parametrize("name", EVERY)
def test_a_changed_tensor_changes_the_logits_where_it_changes_those_of_transformers(name: str) -> None:
    directory, ids = architectures.checkpoint(name), architectures.rows(1, 9)
    base = open_checkpoint(directory).whole  # experts as they are stored
    model = LayeredModel.of(base, dtype=torch.float32)
    before = tiny.streamed_logits(base, ids, model=model)
    stored = load_file(directory / "model.safetensors")
    plain = architectures.plain_model(directory)
    kind_of_model, config = type(plain), plain.config
    seen = set()
    for tensor, value in stored.items():
        kind = ".".join("N" if part.isdigit() else part for part in tensor.split("."))
        if kind in seen and "correction_bias" not in kind:  # one of every kind of tensor
            continue
        seen.add(kind)
        theirs = kind_of_model.from_pretrained(None, config=config, state_dict={**stored, tensor: changed(value)})
        wanted = tiny.plain_logits(theirs.float().eval(), ids)
        found = tiny.streamed_logits(Changed(base, tensor), ids, model=model)
        scale = CLOSE * float(wanted.max() - wanted.min())
        assert float((found - wanted).abs().max()) <= scale, tensor
        assert torch.equal(found, before) == (float((wanted - before).abs().max()) == 0), tensor


@pytest.mark.parametrize("name", ["glm4-moe", "gemma4", "gemma3n", "glm-5", "hrm-text"])
def test_a_model_against_itself_has_kl_zero(name: str) -> None:
    base = open_checkpoint(architectures.checkpoint(name))
    *_, report = compare(base, base, architectures.rows(2, 9), DiffOptions(dtype=torch.float32))
    assert isinstance(report, DiffReport)
    assert report.identical
    assert report.kl.mean == 0
    assert {stage.drift.relative_error for stage in report.layers} == {0.0}


@pytest.mark.parametrize(
    "name", ["gpt2", "hrm-text", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("gemma4", "glm-5", "dory"))]
)
def test_swaps_of_few_bits_are_seen_by_both_profiles(name: str, tmp_path: Path) -> None:
    """GPT-2's weights lie the other way round, Gemma 4 shares keys between layers, GLM-5 an indexer's choice; Dory and
    HRM run their layers in rounds, of which the latter trains the last ones alone."""
    base = open_checkpoint(architectures.checkpoint(name))
    candidates = make_variants(base, [spec_of("6", group_size=8, symmetric=False)])
    found = []
    for number, profile in enumerate((profile_exact, lambda job: profile_sketch(job, SketchOptions(64)))):
        options = ProfileOptions(dtype=torch.float32)
        job = ProfileJob(base, candidates[0][0], candidates, architectures.rows(2, 9), tmp_path / f"{number}", options)
        *_, made = profile(job)
        assert isinstance(made, Profile)
        moved = [sum(swap.kl_rows) > 0 for swap in made.measurements.values() if swap.reached]
        assert any(moved) if name == "glm-5" else all(moved)  # an indexer may choose the same
        found.append(sum(sum(swap.kl_rows) for swap in made.measurements.values()))
    assert name == "glm-5" or 0.3 < found[1] / found[0] < 3  # routing flips are in no quadratic form


def test_a_narrow_head_takes_states_that_stay_in_float32() -> None:
    """Mamba 2 keeps what layers add to in float32, whatever the weights are."""
    model = LayeredModel.of(open_checkpoint(architectures.checkpoint("mamba2")), dtype=torch.bfloat16)
    states = model.normed(architectures.rows(1, 7), 1)
    assert states.dtype == torch.float32
    model.load_head()
    assert model.head_is_linear(states)


def test_text_runs_without_the_weights_of_a_tower(tmp_path: Path) -> None:
    directory = tiny.copy_of(architectures.checkpoint("gemma3-vision"), tmp_path / "text")
    ids = architectures.rows(2, 7)
    whole = tiny.streamed_logits(open_checkpoint(directory), ids)
    stored = load_file(directory / "model.safetensors")
    save_file({n: v for n, v in stored.items() if "vision" not in n}, directory / "model.safetensors")
    assert torch.equal(tiny.streamed_logits(open_checkpoint(directory), ids), whole)


# ---- what is refused -------------------------------------------------------------------------------------------------


def edit(directory: Path, drop: str = "", add: Mapping[str, Tensor] | None = None) -> Checkpoint:
    stored = load_file(directory / "model.safetensors")
    stored = {name: value for name, value in stored.items() if name != drop} | dict(add or {})
    save_file(stored, directory / "model.safetensors")
    return open_checkpoint(directory)


def test_a_buffer_that_nothing_fills_is_named(tmp_path: Path) -> None:
    directory = tiny.copy_of(architectures.checkpoint("glm4-moe"), tmp_path / "damaged")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    with pytest.raises(MissingWeight, match=name.replace(".", r"\.")):
        LayeredModel.of(edit(directory, drop=name))


def test_a_tensor_that_nothing_reads_is_named(tmp_path: Path) -> None:
    directory = tiny.copy_of(architectures.checkpoint("llama"), tmp_path / "more")
    said = r"more/model\.safetensors: LlamaForCausalLM reads model\.layers\.1\.mlp\.extra nowhere"
    with pytest.raises(MissingWeight, match=said):
        LayeredModel.of(edit(directory, add={"model.layers.1.mlp.extra": torch.zeros(3)}))


def test_a_tensor_under_a_wrong_name_is_told_with_what_is_missing(tmp_path: Path) -> None:
    directory = tiny.copy_of(architectures.checkpoint("llama"), tmp_path / "named")
    name = "model.layers.1.mlp.up_proj.weight"
    value = load_file(directory / "model.safetensors")[name]
    said = r"named/model\.safetensors: LlamaForCausalLM reads other\.weight nowhere, and finds no " + re.escape(name)
    checkpoint = edit(directory, drop=name, add={"other.weight": value})
    for source in (checkpoint, build_overlay(checkpoint, None)):
        with pytest.raises(MissingWeight, match=said):
            LayeredModel.of(source)


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    directory = tiny.copy_of(architectures.checkpoint("glm4-moe"), tmp_path / "mtp")
    ids = architectures.rows(1, 5)
    before = tiny.streamed_logits(open_checkpoint(directory), ids)
    more = {"model.layers.2.eh_proj.weight": torch.zeros(32, 64), "model.layers.2.enorm.weight": torch.zeros(32)}
    assert torch.equal(tiny.streamed_logits(edit(directory, add=more), ids), before)


@pytest.mark.parametrize(
    ("model_type", "error", "says"),
    [("t5", UnsupportedError, "encoder and a decoder"), ("vit", UnsupportedError, "no model that makes text")],
)
def test_types_that_cannot_be_run_are_refused_in_a_sentence(
    tmp_path: Path, model_type: str, error: type[Exception], says: str
) -> None:
    directory = tiny.copy_of(architectures.checkpoint("llama"), tmp_path / "other")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(error, match=says) as caught:
        LayeredModel.of(open_checkpoint(directory))
    assert len(str(caught.value)) < 300


@pytest.fixture(scope="module")
def reformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "reformer"
    load_script("tiny_configs").write("reformer", directory)
    return directory


def test_random_numbers_of_a_seed_in_the_config_are_those_of_transformers(reformer: Path) -> None:
    """Reformer hashes with random rotations. torch's generator is left where it was."""
    ids, before = architectures.rows(2, 24), torch.get_rng_state()
    found = tiny.streamed_logits(open_checkpoint(reformer), ids)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = tiny.plain_logits(architectures.plain_model(reformer), ids)
    assert float((found - wanted).abs().max()) <= CLOSE * float(wanted.max() - wanted.min())


def test_what_transformers_writes_over_a_loaded_value_is_followed(tmp_path: Path) -> None:
    """-1 over the last balancing bias of Zaya's routers: that of the expert that is none. With another all tokens would
    go there, or none."""
    load_script("tiny_configs").write("zaya", tmp_path / "zaya")
    names = [f"model.layers.{layer}.mlp.gate.balancing_biases" for layer in range(2)]
    state = load_file(tmp_path / "zaya" / "model.safetensors")
    for last in (5.0, -5.0):
        biases = {name: state[name].clone() for name in names}
        for value in biases.values():
            value[-1] = last
        checkpoint = edit(tmp_path / "zaya", add=biases)
        ids = architectures.rows(2, 24)
        model = LayeredModel.of(checkpoint, dtype=torch.float32)
        assert [float(model.load_parameter(name)[-1]) for name in names] == [-1.0, -1.0]
        assert [float(checkpoint.load(name)[-1]) for name in names] == [last, last]
        for name in names:
            assert torch.equal(model.load_parameter(name)[:-1], biases[name][:-1].float())
        found = tiny.streamed_logits(checkpoint, ids)
        wanted = tiny.plain_logits(architectures.plain_model(tmp_path / "zaya"), ids)
        assert float((found - wanted).abs().max()) <= CLOSE * float(wanted.max() - wanted.min())


def test_models_that_are_others_in_every_run_are_refused(
    reformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their type where that tells, and whatever it is when they run."""
    directory = tiny.copy_of(reformer, tmp_path / "unseeded")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hash_seed": None}))
    with pytest.raises(UnsupportedError, match="hashes with other random numbers in every run"):
        tiny.streamed_logits(open_checkpoint(directory), architectures.rows(1, 24))
    monkeypatch.setattr("recompile.model.stream.check_next_token", lambda config, place: None)
    with pytest.raises(UnsupportedError, match="ReformerModelWithLMHead draws other random numbers in every run"):
        tiny.streamed_logits(open_checkpoint(directory), architectures.rows(1, 24))


def test_a_model_without_gradients_is_referred_to_exact_swaps(reformer: Path, tmp_path: Path) -> None:
    base = open_checkpoint(reformer)
    candidates = make_variants(base, [spec_of("4", group_size=8, symmetric=False)])
    options = ProfileOptions(dtype=torch.float32)
    job = ProfileJob(base, candidates[0][0], candidates, architectures.rows(2, 24), tmp_path / "p", options)
    with pytest.raises(UnsupportedError, match=r"no gradients where it does not train .* mode exact"):
        list(profile_sketch(job, SketchOptions(4)))


def test_infinities_as_transformers_writes_them_are_read(tmp_path: Path) -> None:
    directory = tiny.copy_of(architectures.checkpoint("falcon-h1"), tmp_path / "inf")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "time_step_limit": [0.0, {"__float__": "Infinity"}]}))
    ids = architectures.rows(1, 5)
    wanted = tiny.plain_logits(architectures.plain_model(directory), ids)
    assert torch.allclose(tiny.streamed_logits(open_checkpoint(directory), ids), wanted, atol=1e-5)
    path.write_text(json.dumps({**config, "hidden_size": {"__float__": "none"}}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        LayeredModel.of(open_checkpoint(directory))
