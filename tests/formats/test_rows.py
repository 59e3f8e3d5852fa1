"""What the rows of formats say of themselves, against the code that reads it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from eval.search.optimize import engine_of_format
from recompile.formats import CANDIDATE_FORMATS, FORMATS, VARIANT_FORMATS
from recompile.formats.schemes import PRESETS, parse_scheme, stored_format
from recompile.optimize.engine_constraints import loaded_together
from recompile.quantize.float_grids import LEVELS

FLOATS = [row for row in FORMATS.values() if row.levels is not None]


def test_what_is_made_and_what_is_offered_on_the_fly() -> None:
    assert VARIANT_FORMATS == ("compressed-tensors", "exl2", "exl3", "gguf", "mlx")
    assert CANDIDATE_FORMATS == ("compressed-tensors", "exl2", "exl3", "mlx")


@pytest.mark.parametrize("row", FLOATS, ids=lambda row: row.name)
def test_codes_of_levels_are_in_the_dtype_that_marks_the_format(row) -> None:
    levels = LEVELS[row.levels]
    values = levels.round(torch.linspace(-1, 1, 64).reshape(2, 32) * levels.largest)
    name = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}[levels.codes(values).dtype]
    assert name in row.marks[1]


def test_files_of_formats_name_their_row() -> None:
    named = {row.name for row in FORMATS.values() if hasattr(load(row.code), "FORMAT")}
    assert named == {"exl2", "exl3", "pack-quantized"}
    assert all(name == load(FORMATS[name].code).FORMAT for name in named)


def load(code: str | None) -> object:
    return importlib.import_module(f"recompile.formats.{code}") if code is not None else None


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_config_group_is_stored_as_the_scheme_of_its_name(preset: str) -> None:
    scheme = parse_scheme(preset)
    name, scale_dtype = stored_format(scheme.weights, has_inputs=scheme.input_activations is not None)
    assert name == scheme.format
    assert scale_dtype in (None, scheme.weights.get("scale_dtype"))


@pytest.mark.parametrize(
    ("formats", "engine"),
    [
        ([["exl2", "dense"]], None),
        ([["exl3"]], "exllamav3"),
        ([["gguf", "dense"]], "llama.cpp"),
        ([["pack-quantized"], ["nvfp4-pack-quantized", "dense"]], "vllm"),
        ([["mlx"]], "mlx-lm"),
        ([["pack-quantized"], ["gguf"]], "llama.cpp"),
        ([], "vllm"),
    ],
)
def test_experts_share_sources_as_the_engine_of_the_format_loads_them(
    formats: list[list[str]], engine: str | None
) -> None:
    checkpoints = {str(n): SimpleNamespace(formats=frozenset(names)) for n, names in enumerate(formats)}
    assert engine_of_format(checkpoints) == engine


def test_mlx_s_stacks_are_of_one_projection_each() -> None:
    """Unlike vLLM's, where gate and up of all experts are one; other modules go as they please."""
    experts = [f"m.0.mlp.experts.{n}.{leaf}" for n in range(2) for leaf in ("gate_proj", "up_proj")]
    found = loaded_together("mlx-lm", [*experts, "m.0.mlp.shared_expert.up_proj"])
    assert sorted(sorted(members) for members in found) == [sorted(experts[::2]), sorted(experts[1::2])]
    heads = [f"m.0.self_attn.{own}.{n}" for own in ("embed_q", "unembed_out") for n in range(3)]
    assert loaded_together("mlx-lm", [*heads, "m.0.self_attn.o_proj"]) == [tuple(heads[:3]), tuple(heads[3:])]
