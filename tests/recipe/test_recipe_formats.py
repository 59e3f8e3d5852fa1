"""Recipes of llama-quantize, ik_llama.cpp and GGUF-Tool-Suite: read, resolved, written, and turned into ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from recompile.cli.recompile import main
from recompile.errors import RecipeError
from recompile.formats.gguf_types import TYPES
from recompile.gguf.container import GgufFile, NewTensor, encode_key, open_gguf, write_gguf
from recompile.merge.type_recipes import (
    DIALECTS,
    as_recipe,
    emit,
    load_type_recipe,
    looks_like_type_recipe,
    numbers_regex,
    open_type_sources,
    parse_type_recipe,
    spelled,
)
from tests.gguf_models import write_model

DATA = Path(__file__).parent.parent / "data" / "thireus"
KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down", "ffn_gate", "ffn_up")

# ubergarm's style, as in a model card of GLM-4.5: comments, searches without anchors, order matters
CUSTOM_Q = r"""
# Attention
blk\..*\.attn_q.*=iq5_ks
blk\..*\.attn_output.*=iq5_ks
# Routed Experts Layers [3-19]
blk\.[3-9]\.ffn_(gate|up)_exps\.weight=iq3_ks
blk\.[1-1][0-9]\.ffn_(gate|up)_exps\.weight=iq3_ks
# Routed Experts Layers [20-80]
blk\..*\.ffn_(gate|up)_exps\.weight=iq2_kl
token_embd\.weight=iq4_k
output\.weight=iq6_k
"""


def test_a_custom_q_list_in_lines_and_in_one() -> None:
    lines = parse_type_recipe(CUSTOM_Q)
    assert lines.dialect == "ik-custom-q"
    joined = ",".join(line for line in CUSTOM_Q.split("\n") if line and not line.startswith("#"))
    one = parse_type_recipe(f'--custom-q "{joined}"')
    assert [(r.pattern, r.type) for r in one.rules] == [(r.pattern, r.type) for r in lines.rules]
    found = lines.resolve(
        [
            "blk.7.attn_q_norm.weight",
            "blk.3.ffn_up_exps.weight",
            "blk.20.ffn_up_exps.weight",
            "blk.92.attn_output.weight",
        ]
    )
    assert list(found.values()) == ["IQ5_KS", "IQ3_KS", "IQ2_KL", "IQ5_KS"]
    assert lines.rule_of("blk.3.ffn_down_exps.weight") is None


def test_rules_are_searched_and_the_first_wins() -> None:
    """`output\\.weight` without an anchor is found in attn_output, too: the tools' own trap."""
    found = parse_type_recipe("output\\.weight=q6_K,attn_output=q4_K", dialect="ik-custom-q")
    assert found.resolve(["blk.0.attn_output.weight", "output.weight"]) == {
        "blk.0.attn_output.weight": "Q6_K",
        "output.weight": "Q6_K",
    }


def test_llama_quantize_words_and_its_lower_case() -> None:
    command = '--tensor-type "BLK\\.0\\.FFN_down=Q6_K" --tensor-type attn_v=iq4_xs'
    found = parse_type_recipe(command)
    assert found.dialect == "llama-quantize"
    assert [(r.pattern, r.type) for r in found.rules] == [("blk\\.0\\.ffn_down", "Q6_K"), ("attn_v", "IQ4_XS")]
    assert parse_type_recipe("ffn_down=q6_k\nattn_v=iq4_xs\n").dialect == "llama-quantize"


def test_a_published_recipe_of_the_tool_suite() -> None:
    path = DATA / "Qwen3-4B-Instruct-2507" / "published_3.6081bpw.recipe"
    found = load_type_recipe(path)
    assert found.dialect == "thireus"
    assert looks_like_type_recipe(path)
    names = [f"blk.{n}.{kind}.weight" for n in range(36) for kind in (*KINDS, "attn_norm")] + ["token_embd.weight"]
    types = found.resolve(names)
    assert set(types) == set(names)
    assert types["blk.35.ffn_up.weight"] == types["blk.30.ffn_down.weight"] == "IQ4_KT"
    assert types["blk.31.ffn_down.weight"] == types["blk.34.ffn_up.weight"] == "IQ3_KT"
    assert types["token_embd.weight"] == "Q5_0"
    for dialect in DIALECTS:
        assert parse_type_recipe(emit(types, dialect), dialect=dialect).resolve(names) == types


def test_a_published_custom_q_list() -> None:
    """Downtown-Case's for GLM-4.5 (its first line names the source): dense layers, experts by depth, the MTP layer."""
    path = DATA.parent / "recipes" / "ikcustomq_downtowncase_glm45_base.txt"
    found = load_type_recipe(path)
    assert (found.dialect, len(found.rules)) == ("ik-custom-q", 23)
    assert looks_like_type_recipe(path)
    types = found.resolve([f"blk.{n}.ffn_down_exps.weight" for n in range(3, 93)])
    low = [int(name.split(".")[1]) for name, type_name in types.items() if type_name == "IQ2_KL"]
    assert low == list(range(20, 81))
    assert found.resolve(["blk.92.nextn.eh_proj.weight", "output.weight"]) == {
        "blk.92.nextn.eh_proj.weight": "Q8_0",
        "output.weight": "IQ6_K",
    }


NAMES = st.lists(
    st.one_of(
        st.builds("blk.{}.{}.weight".format, st.integers(0, 130), st.sampled_from(KINDS)),
        st.sampled_from(["token_embd.weight", "output.weight", "output_norm.weight", "blk.3.ffn_down_exps.weight"]),
    ),
    min_size=1,
    max_size=60,
    unique=True,
)
MADE = NAMES.flatmap(
    lambda names: st.fixed_dictionaries(
        {name: st.sampled_from(["Q4_K", "Q6_K", "IQ4_XS", "IQ4_KSS"]) for name in names}
    )
)


@given(MADE, st.sampled_from(DIALECTS))
def test_what_is_emitted_resolves_to_the_same(types: dict[str, str], dialect: str) -> None:
    text = emit(types, dialect, "a comment with = and , in it")
    assert parse_type_recipe(text, dialect=dialect).resolve(types) == types
    near = [name.replace(".weight", ".bias") for name in types] + [f"x{name}" for name in types]
    assert parse_type_recipe(text, dialect=dialect).resolve(near) == {}


@given(st.sets(st.integers(0, 1500), min_size=1, max_size=80))
def test_a_regex_of_numbers_means_exactly_these(numbers: set[int]) -> None:
    regex = re.compile(numbers_regex(sorted(numbers)))
    assert {n for n in range(1600) if regex.fullmatch(str(n))} == numbers


def test_types_are_spelled_as_ggml_does() -> None:
    assert [spelled(t) for t in ("Q4_K", "Q8_0", "IQ4_XS", "IQ4_KSS", "BF16", "Q6_0")] == [
        "q4_K",
        "q8_0",
        "iq4_xs",
        "iq4_kss",
        "bf16",
        "q6_0",
    ]
    assert all(spelled(name).upper() == name for name in TYPES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no rule in it"),
        ("# only a comment\n", "no rule in it"),
        ("attn_q\n", r":1: .*wanted REGEX=TYPE"),
        ("a=q4_K\nattn_q=q4_Kx\n", r":2: .*q4_Kx.*did you mean Q4_K"),
        ("blk\\.(0=q4_K", r":1: .*is no regular expression"),
        ("(?<=a)b=q4_K", "have no"),
        ("a++=q4_K", "have no"),
    ],
)
def test_what_cannot_be_read_says_where(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_type_recipe(text)


def test_names_that_a_dialect_cannot_write() -> None:
    with pytest.raises(RecipeError, match="lower-cases"):
        emit({"blk.0.Attn.weight": "Q4_K"}, "llama-quantize")
    with pytest.raises(RecipeError, match="comma"):
        emit({"a,b": "Q4_K"}, "ik-custom-q")
    with pytest.raises(RecipeError, match="no recipe format"):
        emit({"a": "Q4_K"}, "yaml")


# ---- as a recipe over files ------------------------------------------------------------------------------------------


def gguf_of(path: Path, types: dict[str, str]) -> GgufFile:
    def tensor(name: str, type_name: str) -> NewTensor:
        new = NewTensor(name, TYPES[type_name], (256, 2))
        return NewTensor(name, TYPES[type_name], (256, 2), lambda: [bytes(new.size_bytes)])

    write_gguf(path, [encode_key("general.architecture", "llama")], [tensor(*item) for item in types.items()])
    return open_gguf(path)


def test_types_become_sources(tmp_path: Path) -> None:
    names = [f"blk.{n}.{kind}.weight" for n in range(2) for kind in ("attn_q", "ffn_down")]
    base = gguf_of(tmp_path / "base.gguf", dict.fromkeys(names, "Q3_K"))
    gguf_of(tmp_path / "q6.gguf", dict.fromkeys(names, "Q6_K"))
    fallback = dict.fromkeys(names, "IQ4_XS") | {names[0]: "IQ4_NL"}
    gguf_of(tmp_path / "iq4.gguf", fallback)
    types = parse_type_recipe("ffn_down=q6_K\nblk\\.1=q3_K\nattn_q=iq4_xs\n")
    sources = open_type_sources([f"q6_K={tmp_path / 'q6.gguf'}", f"IQ4_XS={tmp_path / 'iq4.gguf'}"])
    recipe = as_recipe(types, base, sources)
    assert [(o.key, o.source) for o in recipe.overrides] == [
        ("blk.0.attn_q.weight", "IQ4_XS"),
        ("blk.0.ffn_down.weight", "Q6_K"),
        ("blk.1.ffn_down.weight", "Q6_K"),
    ]
    assert "blk.0.attn_q.weight: IQ4_XS is asked for" in recipe.warnings[0]
    assert "has IQ4_NL" in recipe.warnings[0]
    with pytest.raises(RecipeError, match=r"no source for IQ4_XS \(<string>:3\); sources given: Q6_K"):
        as_recipe(types, base, sources[:1])
    with pytest.raises(RecipeError, match="is found in no tensor name"):
        as_recipe(parse_type_recipe("attn_z=q6_K"), base, sources)


def test_a_directory_of_files_by_their_types(tmp_path: Path) -> None:
    for type_name in ("Q4_K", "Q6_K"):
        gguf_of(tmp_path / f"model-{type_name}.gguf", {"blk.0.attn_q.weight": type_name, "output.weight": "Q6_K"})
    with pytest.raises(RecipeError, match="both stand for"):
        open_type_sources([str(tmp_path), f"Q6_K={tmp_path / 'model-Q6_K.gguf'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="no GGUF file in this directory"):
        open_type_sources([str(tmp_path / "empty")])
    with pytest.raises(RecipeError, match=r"wanted TYPE=FILE\.gguf"):
        open_type_sources(["Q9_K=x.gguf"])


def test_the_command_reads_what_it_emits(tmp_path: Path) -> None:
    """A mix by an override file; the same mix again from each of the three recipes that are emitted for it."""
    low, high = write_model(tmp_path / "low.gguf", kind="Q4_0"), write_model(tmp_path / "high.gguf", kind="Q8_0")
    ours = tmp_path / "overrides.yaml"
    ours.write_text(
        f"sources: [{{id: 8, model_dir: {high}}}]\n"
        "overrides: [{key: blk.1.ffn_down.weight, source: 8}, {key: '*.0.attn_*', source: 8}]\n"
    )

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    def stored(path: Path) -> dict[str, tuple[str, bytes]]:
        file = open_gguf(path)
        return {name: (tensor.type.name, file.read(name)) for name, tensor in file.tensors.items()}

    run("-i", low, "-o", tmp_path / "mix.gguf", "-or", ours, "--no-probe", "--quiet")
    wanted = stored(tmp_path / "mix.gguf")
    assert {type_name for type_name, _ in wanted.values()} == {"F32", "Q4_0", "Q8_0"}
    for dialect in DIALECTS:
        recipe, again = tmp_path / f"{dialect}.txt", tmp_path / f"{dialect}.gguf"
        printed = run("-i", low, "-or", ours, "--emit", dialect)
        run("-i", low, "-or", ours, "--emit", dialect, "-o", recipe)
        assert recipe.read_text() == printed
        run(
            *("-i", low, "-o", again, "-or", recipe, "--type-sources", f"q8_0={high}", f"Q4_0={low}"),
            *("--no-probe", "--quiet"),
        )
        assert stored(again) == wanted
    message = run("-i", low, "-o", tmp_path / "x.gguf", "-or", recipe, code=1)
    assert "say which files hold them: --type-sources" in message
