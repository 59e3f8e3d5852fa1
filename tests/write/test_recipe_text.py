"""The recipe's text in a manifest is what was resolved."""

from __future__ import annotations

from pathlib import Path

import pytest

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import RecipeError
from recompile.merge.manifest import recipe_text
from recompile.merge.overlay import build_overlay
from tests import tiny


def test_a_recipe_is_read_twice_only_where_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest holds the text that was resolved; of 250,000 lines the reading is most of the work."""
    path = tmp_path / "mix.yaml"
    base = tiny.variants("llama-2", (3,))[3]
    lines = f'sources:\n  - {{id: 3, model_dir: {base}}}\noverrides:\n  - {{key: "*.mlp.*", source: 3}}\n'
    path.write_bytes(lines.replace("\n", "\r\n").encode())
    overlay = build_overlay(open_checkpoint(base), path)
    with monkeypatch.context() as once:
        once.setattr("recompile.merge.manifest.parse_recipe", lambda *_: pytest.fail("read again"))
        assert recipe_text(overlay) == lines
    path.write_text(lines + "# a comment\n")
    assert recipe_text(overlay) == lines + "# a comment\n"
    path.write_text(lines.replace("mlp", "self_attn"))
    with pytest.raises(RecipeError, match=r"mix\.yaml: changed while this command was reading it; start again"):
        recipe_text(overlay)
