"""A Recipe to an override file, one line an override."""

from __future__ import annotations

from collections.abc import Mapping

from recompile.recipe.precedence import Recipe
from recompile.recipe.spelling import comment_text, describe_spec, dump_value, note_text, scalar_text

_ALIGN_UP_TO = 88  # columns: comments of longer lines follow after two blanks


def dump_recipe(recipe: Recipe, comments: Mapping[str, str] | None = None, header: str | None = None) -> str:
    """The recipe as YAML, one line an override; reading it back resolves every name the same.

    comments: by key, set behind its line. header: comment lines above everything. `provenance` and whatever else the
    recipe carries must be plain YAML values (yaml.YAMLError if not).
    """
    lines = [f"# {comment_text(line)}".rstrip() for line in (header or "").splitlines()]

    lines.append("sources:" if recipe.sources else "sources: []")
    for source in recipe.sources:
        where = f"model_dir: {scalar_text(source.model_dir)}" if source.spec is None else describe_spec(source.spec)
        lines.append(f"  - {{id: {scalar_text(source.id)}, {where}{note_text(source.note)}}}")

    lines.append("overrides:" if recipe.overrides else "overrides: []")
    rows = [
        (
            f"  - {{key: {scalar_text(line.key, quoted=True)}, source: {scalar_text(line.source)}"
            f"{note_text(line.note)}}}",
            comment_text((comments or {}).get(line.key, "")),
        )
        for line in recipe.overrides
    ]
    column = max((len(row) for row, comment in rows if comment and len(row) <= _ALIGN_UP_TO), default=0)
    lines += [f"{row:<{column}}  # {comment}" if comment else row for row, comment in rows]

    ours = {"base": recipe.base, "budget": recipe.budget, "provenance": recipe.provenance}
    rest = {key: value for key, value in ours.items() if value is not None} | dict(recipe.other)
    if rest:  # in one piece: its anchors must not repeat
        lines.append(dump_value(rest, default_flow_style=False, sort_keys=False).rstrip("\n"))
    return "\n".join(lines) + "\n"
