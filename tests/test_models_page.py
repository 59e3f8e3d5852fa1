"""What scripts/make_models_page.py says of a model type, tried the whole way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import UnsupportedError
from tests import tiny
from tests.conftest import load_script


@pytest.mark.parametrize(
    "types",
    [
        ("qwen3_moe", "lfm3", "rembert"),
        pytest.param(("phi4_multimodal", "longcat_flash", "camembert"), marks=pytest.mark.sweep),
    ],
)
def test_types_are_taken_the_whole_way(types: tuple[str, ...]) -> None:
    """Fused experts; a gate renamed by the loader; a head behind a transform, under a name of its own. Towers within
    the text model; a router of idle experts too; a head of which a bias alone is stored."""
    script = load_script("make_models_page")
    found = dict(script.try_all(types, 1))
    assert tuple(found) == types
    assert {row["class"] for row in found.values()} & {"Qwen3MoeForCausalLM", "LongcatFlashForCausalLM"}
    for name, row in found.items():
        assert {step: row[step] for step in script.STEPS[:-1]} == dict.fromkeys(script.STEPS[:-1], "yes"), name
    if "lfm3" in found:
        assert found["qwen3_moe"]["gguf"] == "yes"
        assert found["lfm3"]["gguf"] == "model_type 'lfm3' cannot be written as GGUF here"


def test_weights_that_layers_share_are_rounded_once() -> None:
    """Zamba 2 runs one block in several layers, with adapters whose names end in two numbers."""
    (row,) = dict(load_script("make_models_page").try_all(["zamba2"], 1)).values()
    assert {row[step] for step in ("logits", "quantize", "profile", "merge")} == {"yes"}, row
    assert "gives it to several layers, and stops where such a one is packed (8 modules like it)" in row["loads"]


def test_what_is_no_sequence_of_layers_runs_as_one_block() -> None:
    """Inkling keeps gate and up of its experts in turn; Inkling 2 mixes what its layers gave before its head."""
    types = ["inkling_mm_model", "inkling2_text"]
    for name, row in load_script("make_models_page").try_all(types, 1):
        assert {row[step] for step in ("logits", "quantize", "profile", "merge")} == {"yes"}, (name, row)


def test_what_predicts_no_next_token_is_refused() -> None:
    (found,) = dict(load_script("make_models_page").try_all(["diffusion_gemma"], 1)).values()
    refusal = (
        "model_type 'diffusion_gemma' denoises a canvas of random tokens and predicts no next one; it cannot be run"
    )
    assert found["logits"] == found["quantize"] == f"base/config.json: {refusal}"


def test_what_has_no_state_a_token_is_refused_whatever_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusion_gemma and prophetnet would be, were their types not known."""
    monkeypatch.setattr("recompile.model.stream.check_next_token", lambda config, place: None)
    for model_type, says in (
        ("diffusion_gemma", "its first layer takes nothing that follows from the token ids; not supported"),
        ("prophetnet", "has no axis of tokens; not supported"),
    ):
        load_script("tiny_configs").write(model_type, tmp_path / model_type)
        with pytest.raises(UnsupportedError, match=says):
            tiny.streamed_logits(open_checkpoint(tmp_path / model_type), torch.arange(5)[None])


def test_a_page_numbers_its_refusals() -> None:
    script = load_script("make_models_page")
    good = {"class": "A", **dict.fromkeys(script.STEPS, "yes")}
    page = script.page(
        {
            "transformers": "5",
            "date": "today",
            "types": {"a": good, "b": {**good, "gguf": "no <name>"}, "c": {"class": "not made: too large"}},
        }
    )
    assert "| a | A | yes | yes | yes | yes | yes | yes |" in page
    assert "| b | A | yes | yes | yes | yes | yes | no (1) |" in page
    assert "1. no &lt;name>" in page
    assert "- c: too large" in page


def test_types_come_from_transformers() -> None:
    found = load_script("make_models_page").listed_types()
    assert {"llama", "gemma3", "glm4_moe"} <= set(found)
    assert found == sorted(found)


def test_the_page_is_what_was_tried() -> None:
    script = load_script("make_models_page")
    results = json.loads(script.RESULTS.read_text())
    assert script.PAGE.read_text() == script.page(results)
    assert set(script.listed_types()) <= results["types"].keys()
    bad = ("TRACEBACK", "WRONG", "DIED", "unforeseen", "check found", "verify found")
    cells = [(name, step, said) for name, row in results["types"].items() for step, said in row.items()]
    assert [cell for cell in cells if any(word in cell[2] for word in bad)] == []
    assert len(cells) > 7 * 100
