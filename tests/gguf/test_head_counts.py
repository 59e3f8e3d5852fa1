"""Numbers of heads in a GGUF file: one, or a list by layer, as llama.cpp reads them; never a guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recompile.errors import CheckpointError
from recompile.gguf.config import config_of
from recompile.gguf.container import GgufFile, open_gguf
from tests import gguf_models


def read(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: Any) -> dict[str, Any]:
    """The config of a model of two layers in which one key has another value."""
    value, changed = GgufFile.value, f"llama.attention.{name}"

    def other(file: GgufFile, key: str, *more: Any) -> Any:
        return number if key == changed else value(file, key, *more)

    monkeypatch.setattr(GgufFile, "value", other)
    return config_of(open_gguf(gguf_models.write_model(folder / "x.gguf")))[0]


@pytest.mark.parametrize(("number", "found"), [(4, 4), ([4, 4], 4), ([4, 0], 4), ([0, 4], 4)])
@pytest.mark.parametrize("name", ["head_count", "head_count_kv"])
def test_a_list_of_equal_numbers_is_that_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: Any, found: int
) -> None:
    key = {"head_count": "num_attention_heads", "head_count_kv": "num_key_value_heads"}[name]
    assert read(tmp_path, monkeypatch, name, number)[key] == found


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ([4, 2], r"x\.gguf: key llama\.attention\.{} differs from layer to layer, wanted one number \(\[4, 2\]\)"),
        ([4], "key llama.attention.{} has 1 numbers, wanted one for each of the 2 layers"),
        ([4, 4, 4], "has 3 numbers"),
        ([], "has 0 numbers"),
    ],
)
@pytest.mark.parametrize("name", ["head_count", "head_count_kv"])
def test_other_lists_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: Any, says: str
) -> None:
    with pytest.raises(CheckpointError, match=says.format(name)):
        read(tmp_path, monkeypatch, name, number)
