"""What scripts/modelopt_choice.py asks of modelopt and reads from it; modelopt itself is in no test environment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / "modelopt_choice.py"
    spec = importlib.util.spec_from_file_location("modelopt_choice", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_choice_is_read_from_the_entries_of_weight_quantizers(script: ModuleType) -> None:
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "layers.0.q.input_quantizer", "cfg": {"num_bits": 8}, "enable": False},
            {"quantizer_name": "layers.0.q.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 64}}},
            {"quantizer_name": "layers.0.k.weight_quantizer", "cfg": {"num_bits": 2}},
            {"quantizer_name": "lm_head.weight_quantizer", "cfg": {"num_bits": 6}},
        ]
    }
    assert script.choice_of(config, ["layers.0.q", "layers.0.k"]) == {"layers.0.q": "4", "layers.0.k": "2"}
    with pytest.raises(SystemExit, match=r"no format to 1 modules, first layers\.0\.v"):
        script.choice_of(config, ["layers.0.q", "layers.0.v"])


def test_a_format_is_weights_alone_and_counts_what_is_stored(script: ModuleType) -> None:
    made = script.make_format(3, 64, 3.25)
    off, on = made["quant_cfg"]
    assert (off["quantizer_name"], off["enable"]) == ("*", False)
    assert on["cfg"] == {"num_bits": 3, "block_sizes": {-1: 64}, "effective_bits": 3.25}
    assert made["effective_bits"] == 3.25
