"""Recipes that we write: readable, and read back the same."""

from __future__ import annotations

import datetime
import math
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.recipe.recipe import Override, Recipe, Source, dump_recipe, parse_recipe


def test_the_form_is_one_line_an_override():
    recipe = Recipe(
        sources=(Source(4, "./4bpw"), Source("8", "8 bpw: best", note="slow")),
        overrides=(
            Override("model.layers.3.mlp.*", 4),
            Override("model.layers.11.self_attn.*", "8", note="first"),
            Override("lm_head.*", 4),
            Override("model.layers.1.self_attn.q_proj.a_long_name_that_a_person_would_not_like_to_read.weight*", 4),
        ),
        base="./3bpw",
        budget=3.5,
        provenance={"rows": 64, "seeds": [1, 2], "hash": "1.5"},
        other={"author": "José"},
    )
    comments = {
        "model.layers.3.mlp.*": "KL -0.0123, +1.2 Mbit",
        "model.layers.11.self_attn.*": "KL -0.0007,\n+0.1 Mbit",
        recipe.overrides[3].key: "far out",
        "not there": "never written",
    }
    assert dump_recipe(recipe, comments, header="Made by model_optimize\n\n3.5 bits") == (
        "# Made by model_optimize\n"
        "#\n"
        "# 3.5 bits\n"
        "sources:\n"
        "  - {id: 4, model_dir: ./4bpw}\n"
        '  - {id: "8", model_dir: "8 bpw: best", note: slow}\n'
        "overrides:\n"
        '  - {key: "model.layers.3.mlp.*", source: 4}                        # KL -0.0123, +1.2 Mbit\n'
        '  - {key: "model.layers.11.self_attn.*", source: "8", note: first}  # KL -0.0007, +0.1 Mbit\n'
        '  - {key: "lm_head.*", source: 4}\n'
        '  - {key: "model.layers.1.self_attn.q_proj.a_long_name_that_a_person_would_not_like_to_read.weight*", '
        "source: 4}  # far out\n"
        "base: ./3bpw\n"
        "budget: 3.5\n"
        "provenance:\n"
        "  rows: 64\n"
        "  seeds:\n"
        "  - 1\n"
        "  - 2\n"
        "  hash: '1.5'\n"
        "author: José\n"
    )


def test_a_plain_copy():
    assert dump_recipe(Recipe((), ())) == "sources: []\noverrides: []\n"


def without_lines(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        sources=tuple(replace(source, line=0) for source in recipe.sources),
        overrides=tuple(replace(override, line=0) for override in recipe.overrides),
        name="<recipe>",
        warnings=(),
    )


@pytest.mark.parametrize(
    "source_id",
    [
        *(
            8,
            "8",
            True,
            "true",
            "yes",
            None,
            "null",
            "~",
            "",
            1.5,
            "1.5",
            -0.0,
            1e300,
            math.inf,
            10**30,
            "0x8",
            "1:30",
            90,
        ),
        *(datetime.date(2024, 1, 2), "2024-01-02", datetime.datetime(2024, 1, 2, 3, 4, 5, 678), b"\x00\xff", "=", "<<"),
        datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.timezone(datetime.timedelta(hours=5, minutes=30))),
        *(
            "a b",
            " a ",
            "a: b",
            "a #b",
            "- a",
            "{a}",
            "a, b",
            "*a",
            "&a",
            "!a",
            "|",
            ">",
            "%a",
            "@a",
            "`a",
            "'",
            '"',
            "\\",
        ),
        *(
            "a\nb",
            "\n",
            "\r\n",
            "\t",
            "\x00",
            "\x85",
            "\u2028",
            "\ufeff",
            "é",
            "日本",
            "🙂",
            "\ud800",
            "a\u200bb",
            "---",
            "...",
        ),
    ],
    ids=repr,
)
def test_ids_keep_their_type_and_text_its_every_character(source_id):
    text = source_id if isinstance(source_id, str) else "x"
    key = f"{text}*"
    recipe = Recipe(
        sources=(Source(source_id, text + "/d", note=text),),
        overrides=(Override(key, source_id, note=text),),
        provenance={text: [text, source_id]},
    )
    written = dump_recipe(recipe, {key: text}, header=text)
    again = parse_recipe(written)
    assert without_lines(again) == recipe
    assert type(again.sources[0].id) is type(source_id)
    assert again.sources[0].id == source_id
    assert again.overrides[0] == replace(recipe.overrides[0], line=again.overrides[0].line)
    assert [override.line - again.sources[0].line for override in again.overrides] == [2]  # one line each


def test_not_a_number_equals_itself_once_it_was_read():
    recipe = Recipe((Source(math.nan, "a"),), (Override("x", math.nan),))
    assert parse_recipe(dump_recipe(recipe)).source_dir("x") == "a"


def test_shared_values_and_circles_in_the_provenance():
    shared = [1, 2]
    circle: list[object] = []
    circle.append(circle)
    recipe = Recipe((), (), budget=shared, provenance={"a": shared, "b": circle}, other={"also": shared})
    again = parse_recipe(dump_recipe(recipe))
    assert again.budget == again.provenance["a"] == again.other["also"] == [1, 2]
    assert again.provenance["b"][0] is again.provenance["b"]


any_text = st.one_of(st.text(max_size=12), st.text(alphabet="ab.*#:'\"{}[],&!|>%@` \n\t\\-?", max_size=12))
any_id = st.one_of(
    any_text,
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.dates(min_value=datetime.date(1000, 1, 1)),
    st.binary(max_size=6),
)


@st.composite
def hostile_recipes(draw: st.DrawFn) -> Recipe:
    directory = any_text.filter(str.strip)
    note = st.one_of(st.none(), any_text)
    sources = draw(st.lists(st.builds(Source, id=any_id, model_dir=directory, note=note), min_size=1, max_size=4))
    known = st.sampled_from([source.id for source in sources])
    lines = draw(st.lists(st.builds(Override, key=any_text.filter(str.strip), source=known, note=note), max_size=6))
    carried = st.recursive(
        any_id, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3)
    )
    return Recipe(tuple(sources), tuple(lines), provenance=draw(carried))


@settings(max_examples=70, deadline=None)
@given(hostile_recipes(), st.lists(st.text(alphabet="ab.*", max_size=6), max_size=6), any_text, st.data())
def test_what_was_written_resolves_every_name_the_same(recipe, names, comment, data):
    written = dump_recipe(recipe, {override.key: comment for override in recipe.overrides}, header=comment)
    again = parse_recipe(written)
    assert without_lines(again) == recipe
    assert [override.line for override in again.overrides] == list(
        range(again.overrides[0].line, again.overrides[0].line + len(recipe.overrides)) if recipe.overrides else ()
    )
    for name in [*names, *(override.key for override in recipe.overrides)]:
        assert again.source_dir(name) == recipe.source_dir(name)
    plain = yaml.safe_load(written)  # and for the other tool
    assert [(line["key"], line["source"]) for line in plain["overrides"]] == [
        (line.key, line.source) for line in recipe.overrides
    ]
