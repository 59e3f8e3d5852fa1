"""Who wins: precedence, globs and typed ids, against an oracle that is written straight from the rules."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.recipe.recipe import (
    Decision,
    Glob,
    Override,
    Recipe,
    Source,
    load_recipe,
    parse_recipe,
    suggest,
)

SOURCES = "sources: [{id: 4, model_dir: ./4bpw}, {id: 5, model_dir: ./5bpw}, {id: 6, model_dir: ./6bpw}]\n"


read_yaml = functools.lru_cache(maxsize=1)(yaml.safe_load)


def oracle(text: str, name: str) -> str | None:
    """The rules, step by step and slowly."""
    data = read_yaml(text)
    directory_of = {}
    for source in data.get("sources", []):
        directory_of[source["id"]] = source["model_dir"]
    directory_of_key = {}
    for override in data["overrides"]:
        directory_of_key[override["key"]] = directory_of[override["source"]]
    groups: list[str] = []
    for directory in directory_of_key.values():
        if directory not in groups:
            groups.append(directory)
    for directory in reversed(groups):
        for key, of in directory_of_key.items():
            regex = ".*".join(re.escape(part) for part in key.strip().split("*"))
            if of == directory and re.fullmatch(regex, name, re.DOTALL):
                return directory
    return None


def overrides(*pairs: tuple[str, object]) -> str:
    return SOURCES + "overrides:\n" + "".join(f'  - {{key: "{key}", source: {source}}}\n' for key, source in pairs)


Q = "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("pairs", "name", "directory"),
    [
        # nothing, one, base
        ((), Q, None),
        ((("*", 4),), Q, "./4bpw"),
        ((("lm_head.*", 4),), Q, None),
        # the directory first mentioned last is asked first
        ((("*", 4), ("model.layers.3.*", 5)), Q, "./5bpw"),
        ((("model.layers.3.*", 5), ("*", 4)), Q, "./4bpw"),  # not: the most specific
        ((("*self_attn*", 4), ("*.3.*", 5), ("*q_proj*", 4)), Q, "./5bpw"),  # not: the last line
        ((("a", 4), ("*", 5), ("*", 4)), Q, "./4bpw"),  # one key "*", source 4; "a" mentions it first
        ((("lm_head.*", 5), ("*q_proj*", 4), ("*", 5)), Q, "./4bpw"),
        ((("x", 6), ("*", 4), ("*", 5), ("*.3.*", 6)), Q, "./5bpw"),
        ((("x", 4), ("x", 5), ("*", 4)), Q, "./4bpw"),
        # a repeated key keeps its first position and takes its last source
        ((("*", 4), ("*", 5)), Q, "./5bpw"),
        ((("*", 4), ("*.3.*", 5), ("*", 6)), Q, "./5bpw"),  # "*" stays in front, now 6bpw; 5bpw is mentioned last
        ((("*", 4), ("*.3.*", 5), ("*", 5)), Q, "./5bpw"),
        ((("*", 5), ("*.3.*", 4), ("*", 4)), "lm_head.weight", "./4bpw"),
        # keys are the same only to the letter
        ((("*", 4), ("*.3.*", 5), ("**", 6)), Q, "./6bpw"),
        ((("*", 4), ("*.3.*", 5), (" *", 6)), Q, "./6bpw"),
        # the pattern
        ((("model.layers.3.self_attn.q_proj", 4),), Q, None),  # the whole tensor name must match
        ((("model.layers.3.self_attn.q_proj.*", 4),), Q, "./4bpw"),
        (((Q, 4),), Q, "./4bpw"),
        ((("layers.3.*", 4),), Q, None),
        ((("*.weight", 4),), Q, "./4bpw"),
        ((("*weigh", 4),), Q, None),
        ((("model.*.weight", 4),), Q, "./4bpw"),  # crosses dots
        ((("model.layers.3*.self_attn.*", 4),), Q, "./4bpw"),  # may match nothing
        ((("model.layers.3*.self_attn.*", 4),), Q.replace("3", "30"), "./4bpw"),
        ((("model.layers.3.*", 4),), Q.replace("3", "30"), None),
        ((("model.**.weight", 4),), Q, "./4bpw"),
        ((("***", 4),), Q, "./4bpw"),
        ((("  model.layers.3.*\\t", 4),), Q, "./4bpw"),
        ((("model. *", 4),), Q, None),  # blanks inside are literal
        ((("Model.*", 4),), Q, None),
        ((("model.layers.?.*", 4),), Q, None),
        ((("model.layers.[0-9].*", 4),), Q, None),
        ((("model.layers.[0-9].*", 4),), "model.layers.[0-9].x", "./4bpw"),
        ((("model.layers.(3|4).*", 4),), Q, None),
        ((("model.layers.3.self_attn.{q,k}_proj.*", 4),), Q, None),
        ((("model+layers.3.*", 4),), Q, None),
        ((("model\\\\.layers.*", 4),), Q, None),
        ((("^model.*", 4),), Q, None),
        ((("model*l*3*w*t", 4),), Q, "./4bpw"),
        ((("model.layers.3.self_attn.q_proj.weight*weight", 4),), Q, None),  # two ends may not share their text
        ((("*q_proj*q_proj*", 4),), Q, None),
        ((("*ab*b", 4),), "aab", None),
        ((("*ab*b", 4),), "abab", "./4bpw"),
    ],
)
def test_precedence_and_globs(pairs, name, directory):
    text = overrides(*pairs) if pairs else SOURCES + "overrides: []\n"
    assert parse_recipe(text).source_dir(name) == directory
    assert oracle(text, name) == directory


@pytest.mark.parametrize(
    ("sources", "source", "directory"),
    [
        ("{id: 8, model_dir: a}, {id: '8', model_dir: b}", "8", "a"),
        ("{id: 8, model_dir: a}, {id: '8', model_dir: b}", "'8'", "b"),
        ("{id: 8, model_dir: a}", "0x8", "a"),  # YAML 1.1 numbers
        ("{id: 8, model_dir: a}", "010", "a"),
        ("{id: 8, model_dir: a}", "8.0", "a"),
        ("{id: 90, model_dir: a}", "1:30", "a"),  # base 60
        ("{id: true, model_dir: a}", "yes", "a"),
        ("{id: on, model_dir: a}", "1", "a"),  # as Python compares them
        ("{id: null, model_dir: a}", "~", "a"),
        ("{id: , model_dir: a}", "null", "a"),
        ("{id: 1.5, model_dir: a}", "1.50", "a"),
        ("{id: 2024-01-01, model_dir: a}, {id: '2024-01-01', model_dir: b}", "2024-01-01", "a"),
        ("{id: 2024-01-01, model_dir: a}, {id: '2024-01-01', model_dir: b}", "'2024-01-01'", "b"),
        ("{id: 4bpw, model_dir: a}", '"4bpw"', "a"),
        ("{id: !!str 8, model_dir: a}", "'8'", "a"),
        ("{id: !!binary aGk=, model_dir: a}", "!!binary aGk=", "a"),
        ("{id: '', model_dir: a}", "''", "a"),
        ("{id: .nan, model_dir: a}", ".NaN", "a"),  # safe_load gives one object, which Python finds by identity
        ("{id: .inf, model_dir: a}", "+.inf", "a"),
        ("{id: 4, model_dir: a}, {id: 4, model_dir: b}", "4", "b"),  # the later directory
        ("{id: 1, model_dir: a}, {id: true, model_dir: b}", "1", "b"),
        ("{id: 4, model_dir: ' a '}", "4", " a "),  # as written
        ("{id: 4, model_dir: ./a/}", "4", "./a/"),
    ],
)
def test_ids_compare_as_yaml_values(sources, source, directory):
    text = f'sources: [{sources}]\noverrides: [{{key: "*", source: {source}}}]\n'
    assert parse_recipe(text).source_dir("x") == directory
    assert oracle(text, "x") == directory


def test_two_ids_of_one_directory_string_are_one_group():
    text = (
        "sources: [{id: a, model_dir: d}, {id: b, model_dir: e}, {id: c, model_dir: d}]\n"
        "overrides: [{key: x, source: a}, {key: '*', source: b}, {key: 'y*', source: c}]\n"
    )
    assert parse_recipe(text).source_dir("yes") == oracle(text, "yes") == "e"
    apart = text.replace("{id: c, model_dir: d}", "{id: c, model_dir: ./d}")
    assert parse_recipe(apart).source_dir("yes") == oracle(apart, "yes") == "./d"


YAML_FORMS = {
    "block": "sources:\n- id: 4\n  model_dir: a\noverrides:\n-\n  key: 'x*'\n  source: 4\n",
    "json": '{"sources": [{"id": 4, "model_dir": "a"}], "overrides": [{"key": "x*", "source": 4}]}',
    "overrides first": "overrides: [{key: x*, source: 4}]\nsources: [{id: 4, model_dir: a}]\n",
    "marked document": "%YAML 1.1\n---\nsources: [{id: 4, model_dir: a}]\noverrides: [{key: x*, source: 4}]\n...\n",
    "byte order mark": "\ufeffsources: [{id: 4, model_dir: a}]\noverrides: [{key: x*, source: 4}]\n",
    "crlf": "sources:\r\n- {id: 4, model_dir: a}\r\noverrides:\r\n- {key: x*, source: 4}\r\n",
    "aliases": "d: &d a\nsources: [&s {id: &i 4, model_dir: *d}]\noverrides: [{key: x*, source: *i}]\n",
    "aliased list": "s: &s [{id: 4, model_dir: a}]\nsources: *s\noverrides: [{key: x*, source: 4}]\n",
    "merge": "o: &o {source: 4, key: y}\nsources: [{id: 4, model_dir: a}]\noverrides: [{<<: *o, key: x*}]\n",
    "merge of two": (
        # no key in both: which of the two counts depends on the version of PyYAML (6.0.4 reads them the other way)
        "o: &o {source: 4}\np: &p {key: x*}\nsources: [{id: 4, model_dir: a}]\noverrides: [{<<: [*o, *p]}]\n"
    ),
    "merge at the top": (
        "t: &t\n  sources: [{id: 4, model_dir: a}]\n  overrides: []\n<<: *t\noverrides: [{key: x*, source: 4}]\n"
    ),
    "folded": "sources: [{id: 4, model_dir: a}]\noverrides:\n  - key: >-\n      x*\n    source: 4\n",
    "literal, with its newline": "sources: [{id: 4, model_dir: a}]\noverrides:\n  - key: |\n      x*\n    source: 4\n",
    "written twice": "sources: []\nsources: [{id: 4, model_dir: a}]\noverrides: [{key: y, key: x*, source: 4}]\n",
    "tags": "sources: !!seq [!!map {id: !!int '4', model_dir: a}]\noverrides: [{key: x*, source: !!int 4}]\n",
}


@pytest.mark.parametrize("form", YAML_FORMS)
def test_every_way_to_write_it_reads_as_safe_load_reads_it(form):
    text = YAML_FORMS[form]
    recipe = parse_recipe(text)
    assert recipe.source_dir("xyz") == oracle(text, "xyz") == "a"
    assert recipe.source_dir("zyx") is None
    data = yaml.safe_load(text)
    assert [(s.id, s.model_dir) for s in recipe.sources] == [(s["id"], s["model_dir"]) for s in data["sources"]]
    assert [(o.key, o.source) for o in recipe.overrides] == [(o["key"], o["source"]) for o in data["overrides"]]


def test_other_tools_keys_and_ours_are_carried_as_parsed():
    text = (
        "base: 3bpw\nbudget: 3.5\nprovenance: {rows: [1, 2]}\nauthor: me\n"
        "sources: [{id: 4, model_dir: a, note: good}]\noverrides: [{key: x, source: 4, note: 7}]\n"
    )
    recipe = parse_recipe(text)
    assert (recipe.base, recipe.budget, recipe.provenance) == ("3bpw", 3.5, {"rows": [1, 2]})
    assert recipe.other == {"author": "me"}
    assert (recipe.sources[0].note, recipe.overrides[0].note) == ("good", "7")
    assert recipe.sources[0].line == 5
    assert recipe.overrides[0].line == 6


def test_a_plain_copy_needs_no_sources():
    recipe = parse_recipe("overrides: []")
    assert recipe == Recipe(sources=(), overrides=(), name="<string>")
    assert recipe.source_dir(Q) is None


# ---------------------------------------------------------------------------------------- against the oracle, at random

words = st.sampled_from(["a", "b", "ab", "layers", "1", "11", "", "q_proj", "weight", "layersab", "zebra.aaab"])
names = st.lists(words, min_size=1, max_size=5).map(".".join)
keys = st.one_of(
    st.text(alphabet="ab.* ", min_size=1, max_size=8),
    st.lists(st.one_of(words, st.sampled_from(["*", "**", "a*", "*b", "laye*b"])), min_size=1, max_size=5).map(
        ".".join
    ),
).filter(str.strip)
ids = st.sampled_from([1, 2, "1", "2", True, None, 1.5])
directories = st.sampled_from(["d", "e", "./d", "f"])


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    sources = draw(st.lists(st.builds(Source, id=ids, model_dir=directories), min_size=1, max_size=5))
    known = st.sampled_from([source.id for source in sources])
    return Recipe(tuple(sources), tuple(draw(st.lists(st.builds(Override, key=keys, source=known), max_size=12))))


def as_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(
        {
            "sources": [{"id": source.id, "model_dir": source.model_dir} for source in recipe.sources],
            "overrides": [{"key": override.key, "source": override.source} for override in recipe.overrides],
        }
    )


@settings(max_examples=120, deadline=None)
@given(recipes(), st.lists(names, min_size=1, max_size=8))
def test_random_recipes_resolve_as_the_oracle_says(recipe, tensor_names):
    text = as_yaml(recipe)
    parsed = parse_recipe(text)
    for name in tensor_names:
        assert parsed.source_dir(name) == recipe.source_dir(name) == oracle(text, name)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="ab.*", max_size=8), st.text(alphabet="ab.\n", max_size=10))
def test_random_globs_match_as_the_regex_does(key, name):
    regex = ".*".join(map(re.escape, key.split("*")))
    assert Glob.parse(key).matches(name) == bool(re.fullmatch(regex, name, re.DOTALL))


@settings(max_examples=120, deadline=None)
@given(recipes(), st.lists(names, min_size=1, max_size=8))
def test_explain_shadowed_and_unmatched_agree_with_a_plain_count(recipe, tensor_names):
    def matches(override: Override, name: str) -> bool:
        return Glob.parse(override.key).matches(name)

    # lines are told apart by their number
    recipe = Recipe(recipe.sources, tuple(Override(o.key, o.source, n) for n, o in enumerate(recipe.overrides, 1)))
    directory_of = {source.id: source.model_dir for source in recipe.sources}
    decisions = [recipe.explain(name) for name in tensor_names]
    for name, decision in zip(tensor_names, decisions, strict=True):
        assert (decision.tensor_name, decision.directory) == (name, recipe.source_dir(name))
        hits = [override for override in recipe.overrides if matches(override, name)]
        if decision.override is None:
            assert hits == []
            assert decision.directory is None
        else:
            assert decision.directory == directory_of[decision.override.source]
            assert list(decision.beaten) == [override for override in hits if override != decision.override]
    deciding = {decision.override for decision in decisions}
    matched = [override for override in recipe.overrides if any(matches(override, name) for name in tensor_names)]
    shadowed = recipe.shadowed(tensor_names)
    assert [line for line, _ in shadowed] == [override for override in matched if override not in deciding]
    for line, winner in shadowed:
        assert any(line in decision.beaten and decision.override == winner for decision in decisions)
    assert recipe.unmatched(tensor_names) == [override for override in recipe.overrides if override not in matched]


# --------------------------------------------------------------------------------------------------- what it tells us


def test_explain_names_the_line_that_decided_and_those_it_beat():
    recipe = parse_recipe(overrides(("*", 4), ("*.3.*", 5), ("lm_head.*", 5), ("*q_proj*", 4)))
    line_3, line_4, _, line_6 = recipe.overrides
    assert (line_3.line, line_4.line, line_6.line) == (3, 4, 6)
    assert recipe.explain(Q) == Decision(Q, "./5bpw", line_4, (line_3, line_6))
    assert recipe.explain("q_proj") == Decision("q_proj", "./4bpw", line_3, (line_6,))  # the first of its directory
    assert parse_recipe(overrides(("a", 4))).explain(Q) == Decision(Q, None, None, ())


def test_of_a_repeated_key_the_last_line_decides():
    recipe = parse_recipe(overrides(("*", 4), ("*", 5)))
    assert recipe.explain(Q) == Decision(Q, "./5bpw", recipe.overrides[1], (recipe.overrides[0],))


def test_shadowed_pairs_a_line_with_the_one_that_beats_it_most():
    recipe = parse_recipe(overrides(("*.3.*", 4), ("*.3.a", 5), ("*", 6), ("lm_head", 4)))
    tensor_names = ["m.3.a", "m.3.b", "norm"]
    first, second, third, _ = recipe.overrides
    assert recipe.shadowed(tensor_names) == [(first, third), (second, third)]
    assert recipe.unmatched(tensor_names) == [recipe.overrides[3]]
    assert recipe.location(recipe.overrides[3]) == "<string>:6: overrides[3]"
    assert recipe.location(recipe.sources[1]) == "<string>:1: sources[1]"


NAMES = [
    f"model.layers.{layer}.{module}.{part}"
    for layer in range(12)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.experts.7.up_proj")
    for part in ("weight_packed", "weight_scale")
] + ["lm_head.weight", "model.norm.weight"]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.q_proj.*"),
        ("lm_head", "lm_head.*"),
        ("model.layers.2.", "model.layers.2.*"),
        ("layers.2.self_attn.*", "*.layers.2.self_attn.*"),
        ("self_attn", "*.self_attn.*"),
        ("gate_proj.weight_packed", "*.gate_proj.weight_packed"),
        (r"^model\.layers\.2\.mlp\..*$", "model.layers.2.mlp.*"),
        (r"model\.norm\.weight", "model.norm.weight"),
        ("model.layers.2.self_atn.q_proj.*", "model.layers.2.self_attn.q_proj.*"),
        ("model.layers.*.self_attn.qproj.*", "model.layers.*.self_attn.q_proj.*"),
        ("model.layers.2.mlp.expert.7.up_proj.*", "model.layers.2.mlp.experts.7.up_proj.*"),
        ("model.layers.*.mlp.expert.7.up_proj.*", "model.layers.*.mlp.experts.7.up_proj.*"),
        ("Model.Layers.2.MLP.gate_proj.*", "model.layers.2.mlp.gate_proj.*"),
        ("model.layers.99.self_attn.q_proj.*", "model.layers.*.self_attn.q_proj.*"),
        ("*.mlp.switch_mlp.up_proj.*", "*.mlp.experts.*.up_proj.*"),
        ("language_model.lm_head", "lm_head.*"),
        ("zzzzz", None),
        ("?", None),
    ],
)
def test_suggest(key, suggestion):
    assert suggest(key, NAMES) == suggestion


@settings(max_examples=200, deadline=None)
@given(st.one_of(keys, st.text(max_size=12), st.text(alphabet="model.layers\\^$*2", max_size=20)))
def test_what_is_suggested_matches_something(key):
    suggestion = suggest(key, NAMES)
    assert suggestion is None or any(Glob.parse(suggestion).matches(name) for name in NAMES)
    assert suggest(key, []) is None


def test_stars_cannot_make_a_pattern_slow():
    recipe = parse_recipe(overrides(("*a" * 30 + "*b", 4)))
    assert recipe.source_dir("a" * 5000) is None  # a backtracking regex would not come back


def test_2000_patterns_and_many_names_agree_with_one_pattern_at_a_time():
    """The index holds every kind of pattern back to back; its answers are those of a plain walk."""
    kinds = (
        "model.layers.{}.mlp.experts.{}.*",
        "*.{}.*.experts.{}.up_proj.*",
        "*layers.{}.*experts.{}.*",
        "*{}*{}*",
        "model.layers.{}.mlp.experts.{}.up_proj.weight",
        "*zzz{}-{}*",
        "model.layers.*.mlp.{}.{}*",
        "*.s.{}.mlp*{}",
    )
    written = tuple(Override(kinds[n % 8].format(n % 31, n // 31), n % 5) for n in range(2000))
    recipe = Recipe(tuple(Source(n, f"d{n}") for n in range(5)), written)
    globs = [(override, Glob.parse(override.key)) for override in written]
    for layer, expert in ((0, 0), (3, 17), (30, 63), (7, 40), (12, 5)):
        for name in (f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", f"x.{layer}.{expert}"):
            decision = recipe.explain(name)
            hits = {override.key for override, glob in globs if glob.matches(name)}
            found = {override.key for override in decision.beaten} | {decision.override.key} if hits else set()
            assert found == hits
            assert decision.directory == recipe.source_dir(name)


def test_reading_a_recipe_imports_no_torch_and_opens_no_checkpoint(tmp_path: Path):
    path = tmp_path / "mix.yaml"
    path.write_text(overrides(("*", 4)))  # none of the directories exists
    assert load_recipe(path).source_dir("x") == "./4bpw"
    code = "import recompile.recipe.recipe, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
