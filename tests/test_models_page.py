"""What scripts/make_models_page.py says of a model type, tried the whole way."""

from __future__ import annotations

import pytest

from tests.conftest import load_script


@pytest.mark.parametrize("model_type", ["qwen3_moe"])
def test_a_type_is_taken_the_whole_way(model_type: str) -> None:
    script = load_script("make_models_page")
    ((name, row),) = script.try_all([model_type], 1)
    assert name == model_type
    assert row.pop("class") == "Qwen3MoeForCausalLM"
    assert row == dict.fromkeys(script.STEPS, "yes")


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
