"""Expressions from files end, and mean what Python's engine says they mean."""

from __future__ import annotations

import re
import time

import pytest

from recompile.errors import RecipeError
from recompile.io.patterns import compile_regex

NAMES = [
    "model.layers.0.mlp.up_proj",
    "model.layers.10.self_attn.q_proj",
    "lm_head",
    "",
    "blk.3.ffn_down.weight",
    "a" * 300,
]


@pytest.mark.parametrize(
    "pattern",
    [
        ".*proj",
        r"model\.layers\.(0|1[0-9])\..*",
        "lm_head$",
        "^blk",
        r"(?i)LM_HEAD",
        "(?!.*lm_head).*proj$",
        "^(?!.*mlp).*$",
        r"(\w)\1",
        "a{250,}",
        "[a-z_]+",
        "",
        "(?:blk|model).*",
    ],
)
def test_as_pythons_engine_says(pattern: str) -> None:
    ours, theirs = compile_regex(pattern, "x"), re.compile(pattern)
    for name in NAMES:
        assert ours.match(name) == (theirs.match(name) is not None)
        assert ours.search(name) == (theirs.search(name) is not None)
        assert ours.fullmatch(name) == (theirs.fullmatch(name) is not None)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(.*)*!", "^(([a-z_.0-9])+)+!$", "(x+x+)+y", "a?" * 40 + "a" * 40]
)
def test_what_never_ends_elsewhere(pattern: str) -> None:
    began = time.process_time()
    compile_regex(pattern, "x").match("a" * 5000 + "!!")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("([", "is no regular expression"),
        ("*", "is no regular expression"),
        ("(?!x)(a+)+$", "a repeat inside a repeat"),
        (r"(a)\1" + ".*" * 7, "7 unbounded repeats"),
        ("(?=x(?:y|(?:a*)*))", "a repeat inside a repeat"),
        ("a" * 1_000_001, "at most"),
        ("(" * 50_000, "is no regular expression"),
    ],
)
def test_what_is_refused(pattern: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as refused:
        compile_regex(pattern, "q.txt:3", error=RecipeError)
    assert str(refused.value).startswith("q.txt:3: ")
    assert len(str(refused.value)) < 400
