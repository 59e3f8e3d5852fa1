"""Bad recipes: one message each, with the line and the way out."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.errors import RecipeError
from recompile.recipe.recipe import Override, Recipe, Source, load_recipe, parse_recipe, resolve_dir

# line 1 is "sources:", the sources are lines 2 and 3, "overrides:" is line 4, and what is tried starts on line 5
HEAD = "sources:\n  - {id: 4, model_dir: ./4bpw}\n  - {id: 5, model_dir: ./5bpw}\noverrides:\n"
FOUR_LINES = "".join(f'  - {{key: "{letter}.*", source: 4}}\n' for letter in "abcd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # ids
        (
            HEAD + FOUR_LINES + '  - {key: x, source: "4"}\n',
            'mix.yaml:9: overrides[4].source: unknown source id "4" (text); did you mean 4 (number)? known: 4, 5',
        ),
        (
            HEAD + "  - key: x\n    source: 7\n",
            "mix.yaml:6: overrides[0].source: unknown source id 7 (number); known: 4, 5",
        ),
        (
            HEAD + "  - {key: x, source: ./5bpw}\n",
            'mix.yaml:5: overrides[0].source: unknown source id "./5bpw" (text); '
            "did you mean 5 (number), the id of that directory? known: 4, 5",
        ),
        (
            HEAD + "  - {key: x, source: 4bpw}\n",
            'mix.yaml:5: overrides[0].source: unknown source id "4bpw" (text); did you mean 4 (number)? known: 4, 5',
        ),
        (
            HEAD + "  - {key: x, source: }\n",
            "mix.yaml:5: overrides[0].source: unknown source id null; known: 4, 5",
        ),
        (
            "sources: [{id: '4', model_dir: a}, {id: four, model_dir: b}]\noverrides: [{key: x, source: 4}]",
            "mix.yaml:2: overrides[0].source: unknown source id 4 (number); "
            'did you mean "4" (text)? known: "4", "four"',
        ),
        (
            "sources: [{id: yes, model_dir: a}]\noverrides: [{key: x, source: 'yes'}]",
            'mix.yaml:2: overrides[0].source: unknown source id "yes" (text); did you mean true (boolean)? known: true',
        ),
        (
            "sources: [{id: 2024-01-02, model_dir: a}]\noverrides: [{key: x, source: '2024-01-02'}]",
            'mix.yaml:2: overrides[0].source: unknown source id "2024-01-02" (text); '
            "did you mean 2024-01-02 (date)? known: 2024-01-02",
        ),
        (
            "sources: [{id: fuor, model_dir: a}]\noverrides: [{key: x, source: four}]",
            'mix.yaml:2: overrides[0].source: unknown source id "four" (text); did you mean "fuor" (text)? '
            'known: "fuor"',
        ),
        (
            "sources: []\noverrides: [{key: x, source: 4}]",
            'mix.yaml:2: overrides[0].source: unknown source id 4 (number); "sources" is empty',
        ),
        (
            f"sources: [{', '.join(f'{{id: {n}, model_dir: a}}' for n in range(20))}]\n"
            "overrides: [{key: x, source: 30}]",
            "mix.yaml:2: overrides[0].source: unknown source id 30 (number); "
            "known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... (20 in all)",
        ),
        (
            "sources:\n  - id: [4]\n    model_dir: a\noverrides: []",
            "mix.yaml:2: sources[0].id: a list cannot be a source id; wanted text or a number",
        ),
        (
            HEAD + "  - {key: x, source: {id: 4}}\n",
            "mix.yaml:5: overrides[0].source: a mapping cannot be a source id; wanted text or a number",
        ),
        # keys that are missing
        (
            "overrides: []\nsources:\n  - {id: 4}\n",
            'mix.yaml:3: sources[0]: "model_dir" is missing',
        ),
        (
            "overrides: []\nsources:\n  - {id: 4, model-dir: a}\n",
            'mix.yaml:3: sources[0]: "model_dir" is missing; "model-dir" is not known: did you mean "model_dir"?',
        ),
        ("overrides: []\nsources:\n- model_dir: a\n", 'mix.yaml:3: sources[0]: "id" is missing'),
        (HEAD + "  - {source: 4}\n", 'mix.yaml:5: overrides[0]: "key" is missing'),
        (
            HEAD + "  - {key: x}\n  - {key: y, sorce: 4}\n",
            'mix.yaml:5: overrides[0]: "source" is missing',
        ),
        (
            HEAD + "  - {key: x, source: 4}\n  - {key: y, sorce: 4}\n",
            'mix.yaml:6: overrides[1]: "source" is missing; "sorce" is not known: did you mean "source"?',
        ),
        (HEAD + "  - {}\n", 'mix.yaml:5: overrides[0]: "key" is missing'),
        ("sources: []\n", 'mix.yaml:1: "overrides" is missing'),
        (
            "\nsources: []\noverride: []\n",
            'mix.yaml:2: "overrides" is missing; "override" is not known: did you mean "overrides"?',
        ),
        ("overrides: [{key: x, source: 4}]", 'mix.yaml:1: "sources" is missing'),
        (
            "overrides: [{key: x, source: 4}]\nsource: []",
            'mix.yaml:1: "sources" is missing; "source" is not known: did you mean "sources"?',
        ),
        # shapes
        ("sources: []\noverrides:\n", 'mix.yaml:2: overrides: null is not a list; write "overrides: []" for none'),
        ("overrides: []\nsources:\n", 'mix.yaml:2: sources: null is not a list; write "sources: []" for none'),
        ("sources: []\noverrides: {x: 4}\n", "mix.yaml:2: overrides: a mapping is not a list"),
        ("sources: []\noverrides: x\n", 'mix.yaml:2: overrides: "x" (text) is not a list'),
        ("sources: {4: a}\noverrides: []\n", "mix.yaml:1: sources: a mapping is not a list"),
        ("sources: !!set {a}\noverrides: []\n", "mix.yaml:1: sources: a set is not a list"),
        (
            HEAD + "  - x: 4\n  - \n",
            "mix.yaml:6: overrides[1]: null is not a mapping; wanted {key: ..., source: ...}",
        ),
        (
            HEAD + "  - model.*\n",
            'mix.yaml:5: overrides[0]: "model.*" (text) is not a mapping; wanted {key: ..., source: ...}',
        ),
        (
            "overrides: []\nsources: [./4bpw]",
            'mix.yaml:2: sources[0]: "./4bpw" (text) is not a mapping; wanted {id: ..., model_dir: ...}',
        ),
        (
            "sources: []\noverrides: !!pairs [key: x]",
            "mix.yaml:2: overrides[0]: a value is not a mapping; wanted {key: ..., source: ...}",
        ),
        # values
        (
            HEAD + "  - {key: 12, source: 4}\n",
            'mix.yaml:5: overrides[0].key: 12 (number) is not text; put it in quotes: "12"',
        ),
        (
            HEAD + "  - {key: on, source: 4}\n",
            'mix.yaml:5: overrides[0].key: true (boolean) is not text; put it in quotes: "on"',
        ),
        (HEAD + "  - {key: , source: 4}\n", "mix.yaml:5: overrides[0].key: null is not text"),
        (HEAD + "  - key: [a, b]\n    source: 4\n", "mix.yaml:5: overrides[0].key: a list is not text"),
        (
            HEAD + "  - source: 4\n    key: ' '\n",
            'mix.yaml:6: overrides[0].key: an empty pattern matches nothing; write "*" for every tensor, '
            "or drop the line",
        ),
        (
            "overrides: []\nsources:\n  - id: 4\n    model_dir: 4\n",
            'mix.yaml:4: sources[0].model_dir: 4 (number) is not text; put it in quotes: "4"',
        ),
        (
            "overrides: []\nsources: [{id: 4, model_dir: ''}]",
            "mix.yaml:2: sources[0].model_dir: is blank; wanted a directory",
        ),
        (
            "overrides: []\nsources: [{id: 4, model_dir: ~}]",
            'mix.yaml:2: sources[0].model_dir: null is not text; put it in quotes: "~"',
        ),
        # the whole file
        ("", 'mix.yaml: is empty; wanted a mapping with "sources:" and "overrides:"'),
        ("# nothing\n\n", 'mix.yaml: is empty; wanted a mapping with "sources:" and "overrides:"'),
        ("null\n", 'mix.yaml: is empty; wanted a mapping with "sources:" and "overrides:"'),
        ("\n- a\n", 'mix.yaml:2: a list is not a mapping; wanted "sources:" and "overrides:"'),
        ("hello", 'mix.yaml:1: "hello" (text) is not a mapping; wanted "sources:" and "overrides:"'),
        (
            HEAD + "  []\n---\nsources: []\n",
            'mix.yaml:6:1: a second YAML document starts here ("---"); a recipe is one document',
        ),
        (
            HEAD + "  - {key: *.mlp.*, source: 4}\n",
            "mix.yaml:5:12: not YAML: expected alphabetic or numeric character, but found '.'; "
            'a pattern that starts with "*" needs quotes',
        ),
        (
            HEAD + "  - {key: *mlp, source: 4}\n",
            "mix.yaml:5:11: not YAML: found undefined alias 'mlp'; a pattern that starts with \"*\" needs quotes",
        ),
        (HEAD + "  - {key: x, source: 4\n", "mix.yaml:6:1: not YAML: expected ',' or '}', but got '<stream end>'"),
        (HEAD + '  - {key: "x, source: 4}\n', "mix.yaml:6:1: not YAML: found unexpected end of stream"),
        (
            HEAD + "\t- {key: x, source: 4}\n",
            "mix.yaml:5:1: not YAML: found character '\\t' that cannot start any token; indent with blanks, not tabs",
        ),
        ("a: 1\n b: 2\n", "mix.yaml:2:3: not YAML: mapping values are not allowed here"),
        (
            "overrides: !!python/object/apply:os.system [ls]",
            "mix.yaml:1:12: not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("? [a]\n: b\noverrides: []", "mix.yaml:1:3: not YAML: found unhashable key"),
        (
            "overrides: []\nsources: [{id: 2024-99-99, model_dir: a}]",
            'mix.yaml:2:16: not YAML: "2024-99-99" cannot be read as timestamp; quote it if it is meant as text',
        ),
        (
            "overrides: []\nsources: [{id: !!int four, model_dir: a}]",
            'mix.yaml:2:16: not YAML: "four" cannot be read as int; quote it if it is meant as text',
        ),
        (
            "overrides: []\nsources: [{id: !!bool four, model_dir: a}]",
            'mix.yaml:2:16: not YAML: "four" cannot be read as bool; quote it if it is meant as text',
        ),
        ("overrides: []\na: \x00\n", "mix.yaml:2: not YAML: the character U+0000 is not allowed"),
        ("[" * 600, "mix.yaml: not a recipe: the YAML is nested too deeply"),
    ],
)
def test_one_message_each(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mix.yaml").write_bytes(text.encode())
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        load_recipe("mix.yaml")
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        parse_recipe(text, "mix.yaml")


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    Path("latin.yaml").write_bytes("overrides: []\nauthor: Jos\xe9\n".encode("latin-1"))
    Path("utf16.yaml").write_bytes("overrides: []".encode("utf-16"))
    for name, message in {
        "none.yaml": "none.yaml: no such file; wanted an override file (YAML)",
        "none/mix.yaml": "none/mix.yaml: no such file; wanted an override file (YAML)",
        "folder.yaml": "folder.yaml: is a directory; wanted an override file (YAML)",
        "latin.yaml/mix.yaml": "latin.yaml/mix.yaml: cannot be read: Not a directory",
        "latin.yaml": "latin.yaml:2: not UTF-8 (byte 0xe9); save the file as UTF-8",
        "utf16.yaml": "utf16.yaml:1: not UTF-8 (byte 0xff); save the file as UTF-8",
        "mix\0.yaml": "mix\0.yaml: cannot be read: no file can have this name (embedded null byte)",
    }.items():
        with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
            load_recipe(name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("overrides: []")
    path.chmod(0)
    with pytest.raises(RecipeError, match=r"mix\.yaml: cannot be read: Permission denied$"):
        load_recipe(path)


def test_messages_stay_short_whatever_the_file_holds():
    laughs = "a: &a [1]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(20)
    )
    for text in (
        laughs + "overrides: *u\n",
        HEAD + f"  - {{key: x, source: {'9' * 4000}}}\n",
        HEAD + f"  - {{key: x, source: {'z' * 40000}}}\n",
        HEAD + f"  - {'z' * 40000}\n",
        "overrides: []\nsources: [{id: &x [*x], model_dir: a}]",
    ):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(text, "mix.yaml")
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


def test_hugest_number():
    with pytest.raises(RecipeError, match=r"^mix.yaml:5:22: not YAML: .* cannot be read as int") as caught:
        parse_recipe(HEAD + f"  - {{key: x, source: {'9' * 5000}}}\n", "mix.yaml")
    assert len(str(caught.value)) < 300


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="sources: overrides: [{]}idkey,model_dir&*a-\n\t|>'\"#!%@`4~<=?", max_size=60), st.booleans())
def test_any_text_is_a_recipe_or_one_line(text, headed):
    text = HEAD + "  - {key: x, source: 4}\n" + text if headed else text
    message = "<string>"
    try:
        recipe = parse_recipe(text)
    except RecipeError as error:
        message = str(error)
    else:
        read = yaml.safe_load(text)["overrides"]
        assert [(line.key, line.source) for line in recipe.overrides] == [
            (line["key"], line["source"]) for line in read
        ]
    assert message.startswith("<string>")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        (HEAD + "  - {key: x, source: 4, note: why}\n", []),
        (
            HEAD + "  - key: x\n    source: 4\n    sources: 5\n",
            ['mix.yaml:7: overrides[0]: unknown key "sources" is ignored; did you mean "source"?'],
        ),
        (
            "source: []\n" + HEAD + "  []\n",
            ['mix.yaml:1: unknown key "source" is ignored; did you mean "sources"?'],
        ),
        (
            "overrides: []\nmeta: 1\n3: x\n",
            [
                'mix.yaml:2: unknown key "meta" is ignored',
                "mix.yaml:1: unknown key 3 is ignored",
            ],
        ),
        (
            HEAD + "  - {key: x, source: 4}\nsources:\n- {id: 4, model_dir: a}\n- {id: 4, model_dir: b}\n",
            [
                'mix.yaml:6: "sources" is written again (before: line 1); the last one counts',
                "mix.yaml:8: sources[1].id: 4 (number) is the id of line 7 again (4 (number)); "
                'the last directory counts: "b"',
            ],
        ),
        (
            HEAD + "  - key: x\n    source: 4\n    source: 5\n    source: 4\n",
            ['mix.yaml:8: overrides[0]: "source" is written again (before: line 6, 7); the last one counts'],
        ),
        (
            "overrides: []\nsources: [{id: 1, model_dir: a}, {id: true, model_dir: b}]",
            [
                "mix.yaml:2: sources[1].id: true (boolean) is the id of line 2 again (1 (number)); "
                'the last directory counts: "b"'
            ],
        ),
        (
            "d: &d {id: 4, model_dir: a}\noverrides: []\nsources: [{<<: *d, id: 5}]\n",
            ['mix.yaml:1: unknown key "d" is ignored'],
        ),
    ],
)
def test_warnings(text, warnings):
    assert list(parse_recipe(text, "mix.yaml").warnings) == warnings


def test_a_recipe_made_in_python_is_checked_too():
    with pytest.raises(RecipeError, match=r"^<recipe>: overrides\[0\]\.source: unknown source id \"a\" \(text\)"):
        Recipe((Source("b", "d"),), (Override("x", "a"),))
    with pytest.raises(RecipeError, match=r"^<recipe>: overrides\[0\]\.key: an empty pattern"):
        Recipe((Source("b", "d"),), (Override(" ", "b"),))
    assert hash(Recipe((), (), provenance={"a": []}, budget={})) == hash(Recipe((), ()))


def test_resolve_dir(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "near").mkdir(parents=True)
    (tmp_path / "recipes" / "both").mkdir()
    (tmp_path / "work" / "both").mkdir(parents=True)
    (tmp_path / "recipes" / "mix.yaml").write_text(
        "overrides: []\nsources:\n  - {id: 1, model_dir: ./near}\n  - {id: 2, model_dir: none}\n"
        "  - {id: 3, model_dir: ~/x}\n"
    )
    monkeypatch.chdir(tmp_path / "work")
    recipe = load_recipe("../recipes/mix.yaml")
    assert recipe.path == Path("../recipes/mix.yaml")
    assert resolve_dir(recipe, "both") == (Path("both"), None)
    assert resolve_dir(recipe, str(tmp_path / "recipes")) == (tmp_path / "recipes", None)
    assert resolve_dir(recipe, "./near") == (
        Path("../recipes/near"),
        '../recipes/mix.yaml:3: sources[0].model_dir: "./near" is not in the working directory; '
        "taken beside the recipe: ../recipes/near",
    )
    message = (
        '../recipes/mix.yaml:4: sources[1].model_dir: "none" does not exist; '
        f"looked for {tmp_path}/work/none and {tmp_path}/recipes/none"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        resolve_dir(recipe, "none")
    with pytest.raises(RecipeError, match=r'; "~" is not expanded here$'):
        resolve_dir(recipe, "~/x")
    with pytest.raises(RecipeError, match=r"looked for /no/where$"):
        resolve_dir(recipe, "/no/where")
    with pytest.raises(RecipeError, match=f"looked for {re.escape(str(tmp_path))}/work/near$"):
        resolve_dir(parse_recipe("overrides: []"), "near")  # no file to look beside
