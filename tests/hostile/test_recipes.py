"""Recipes, modifiers and type recipes that hang, explode or lie: refused by line, in bounded time and memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from recompile.errors import RecipeError
from recompile.merge.type_recipes import parse_type_recipe
from recompile.model.texts import text_from_file
from recompile.quantize.modifiers import load_modifiers
from recompile.recipe import read_yaml
from recompile.recipe.precedence import Recipe
from recompile.recipe.recipe import load_recipe, parse_recipe

SOURCE = "sources:\n  - {id: 4, %s}\noverrides:\n  - {key: '*.mlp.*', source: 4}\n"


@pytest.mark.parametrize(
    "made",
    ["bits: .nan", "bits: .inf", "bits: x", "bits: [4]", "bits: true", "bits: 1.0e+30", "scheme: 4",
     "scheme: 2001-01-01", "type: 8", "bits: 4, group_size: 0", "bits: 4, group_size: -32", "bits: 4, group_size: x",
     "bits: 4, group_size: .nan", "bits: 4, group_size: 99999999999999", "bits: 4, symmetric: maybe",
     "bits: 4, symmetric: 1", "bits: 4, format: 3", "bits: 4, model_dir: x", "bits: " + "9" * 300],
)  # fmt: skip
def test_a_source_that_is_none(made: str) -> None:
    with pytest.raises(RecipeError, match=r"^r\.yaml:2: ") as refused:
        parse_recipe(SOURCE % made, "r.yaml")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "nothing", "large"])
def test_files_that_are_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/urandom")
    elif kind == "directory":
        path.mkdir()
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(33 * 2**20)
    for read in (load_recipe, load_modifiers):
        with pytest.raises(RecipeError, match=r"r\.yaml: "):
            read(path)


TWO = "sources:\n  - {id: 4, model_dir: a}\n  - {id: 6, model_dir: b}\n"
TEXTS = {
    "lines": TWO + "overrides:\n  - {key: 'ä𝄞', source: 4}\n  - key: >-\n      ab\n      c\n    source: 0x4\n",
    "returns": TWO + "overrides:\r\n  - {key: a, source: 4, key: b}\r\n  - {key: c, source: 6, nte: x}\r\n",
    "aliases": TWO + "overrides: [{key: &x 'a', source: 4}, {key: *x, source: 6}, {<<: {key: a}, source: 4}]\n",
    "mark": "\ufeff" + TWO + "overrides: []\nbase: 1_000\nprovenance: {a: .inf, b: ~, c: 2024-01-01}\n...\n",
    "number": TWO + "overrides:\n  - {key: 5, source: 4}\n",
    "unknown": TWO + "overrides:\n  - {key: a, source: 4}\n  - {key: a, source: 5}\n",
    "timestamp": TWO + "overrides: []\nbase: 2001-99-99\n",
    "nul": TWO + "overrides: []\nbase: \0\n",
    "tag": TWO + "overrides: !!python/object/apply:os.system [ls]\n",
    "second": TWO + "overrides: []\n---\na: 1\n",
    "deep": "[" * 5_000,
    "deep blocks": "- " * 5_000,
    "anchor": TWO + "overrides:\n  - {key: *.mlp, source: 4}\n",
    "end": TWO + "overrides:\n  - {key: a\n",
}


def _read(text: str) -> tuple[Recipe | None, str]:
    try:
        return parse_recipe(text, "r.yaml"), ""
    except RecipeError as error:
        return None, str(error)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_long_recipes_are_read_as_short_ones_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By libyaml: the same values, lines and warnings; errors at the same place, in its words where it is the YAML."""
    short, problem = _read(text)
    monkeypatch.setattr(read_yaml, "LONG_TEXT", 0)
    long, other = _read(text)
    assert long == short
    assert other.partition(": not YAML")[0] == problem.partition(": not YAML")[0]
    assert (long is None) == bool(other)


def test_a_long_recipe_is_not_read_by_python() -> None:
    import yaml

    short, long = TWO, TWO + "#" * read_yaml.LONG_TEXT
    assert isinstance(read_yaml.yaml_loader(short), yaml.SafeLoader)
    assert isinstance(read_yaml.yaml_loader(long), yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)


def merge_bomb(levels: int) -> str:
    lines = ["m0: &m0 {" + ", ".join(f"k{n}: 1" for n in range(9)) + "}"]
    lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def test_merge_keys_do_not_explode(tmp_path: Path) -> None:
    assert parse_recipe(merge_bomb(9) + "overrides: []\n").overrides == ()


MODIFIERS = {
    "deep": "modifiers: " + "[" * 4_000,
    "scheme of a number": "modifiers:\n  - {method: gptq, scheme: 3, targets: '*'}",
    "unknown scheme": "modifiers:\n  - {method: gptq, scheme: evil, targets: '*'}",
    "bad pattern": "modifiers:\n  - {method: gptq, scheme: w4a16-g64, targets: 're:(['}",
    "pattern that never ends": "modifiers:\n  - {method: gptq, scheme: w4a16-g64, targets: 're:(?!x)(a+)+$'}",
    "code": "modifiers: !!python/object/apply:os.system ['false']",
    "strength": "modifiers:\n  - {method: smoothquant, strength: .nan, targets: '*'}",
    "a list": "[]",
    "a date": "2001-01-01: 3",
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_modifiers_that_are_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MODIFIERS[name])
    with pytest.raises(RecipeError, match=r"r\.yaml: ") as refused:
        load_modifiers(path)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("text", ["", "([=q4_0", "blk", r"blk\..*=q99_z", "(?!x)(a+)+$=q4_0", "a" * 1_000_000, "\0=x"])
def test_type_rules_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^q\.txt") as refused:
        parse_type_recipe(text, "q.txt")
    assert len(str(refused.value)) < 600


def test_many_type_rules_are_read_in_time() -> None:
    types = parse_type_recipe("\n".join(f"blk\\.{n}\\.x=q4_0" for n in range(4_000)), "q.txt")
    assert types.rule_of("blk.3999.x.weight") is types.rules[-1]
    assert len(types.unmatched(["blk.0.x.weight"])) == 3_999


def test_a_type_rule_that_never_decides_is_told() -> None:
    types = parse_type_recipe("output.weight=q6_K,attn_output.weight=q4_K", "q.txt", "ik-custom-q")
    names = ["output.weight", "blk.0.attn_output.weight"]
    ((hidden, winner),) = types.shadowed(names)
    assert (hidden.pattern, winner.pattern) == ("attn_output.weight", "output.weight")
    assert types.shadowed(["output.weight"]) == []


def test_records_that_are_not_closed_are_searched_once(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("<doc id='1'>one</doc> x <doc>two\n</doc><docs>no</doc><doc>")
    assert [document.text for document in text_from_file(path).documents] == ["one", "two"]
    for text in ("<doc " * 300_000, "<doc>" * 300_000):  # no records: one running text
        path.write_text(text)
        assert "".join(document.text for document in text_from_file(path).documents) == text.strip("\n")
