"""Profiles that are damaged, cut off, or made up: refused by place, never solved as if they held costs."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_report import main as model_report
from recompile.costs import Candidate, Measurement, ProfileGroup, ProfileHeader, load_profile, open_journal
from recompile.errors import JournalError
from recompile.io.schema import read_as
from tests.hostile.refusals import refuses, run_on
from tests.journals import unsealed

GROUPS = tuple(
    ProfileGroup(f"model.layers.{n}", (f"model.layers.{n}.q_proj",), 100, {"2": 200, "4": 400}, n) for n in range(3)
)
HEADER = ProfileHeader(
    "exact", "clean", "layer", "base", "f0", "2", (Candidate(2, "2bpw", "f2"), Candidate(4, "4bpw", "f4")),
    GROUPS, 0, 0, 64, 8, 2, 16, "r0", "text", "float32", "cpu",
)  # fmt: skip


def write(path: Path) -> None:
    with open_journal(path, HEADER) as journal:
        journal.append([Measurement(None, None, (0.0, 0.0))])
        for group in GROUPS:
            journal.append([Measurement(group.name, source, (0.2 / int(source), 0.1)) for source in group.bits])


@pytest.fixture
def lines(tmp_path: Path) -> list[Any]:
    write(tmp_path / "p.jsonl")
    return [json.loads(line) for line in unsealed(tmp_path / "p.jsonl").read_text().splitlines()]


def set_in(*path: Any, to: Any) -> Callable[[list[Any]], None]:
    def change(lines: list[Any]) -> None:
        inside = lines
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = to

    return change


def removed(line: int, key: str) -> Callable[[list[Any]], None]:
    return lambda lines: lines[line].pop(key)


COUNTS = ("fixed_bits", "fixed_weights", "other_bits", "other_weights", "rows", "row_tokens")
WRONG = ("x", None, -5, [1], math.nan, 10**30, 1.5, True)
CASES: dict[str, Callable[[list[Any]], Any]] = {
    **{f"{field}={value!r}"[:40]: set_in(0, field, to=value) for field in COUNTS for value in WRONG},
    **{f"no {field}": removed(0, field) for field in ("groups", "candidates", "base", "rows", *COUNTS)},
    **{f"groups={value!r}": set_in(0, "groups", to=value) for value in ([], {}, 3, None)},
    **{f"candidates={value!r}": set_in(0, "candidates", to=value) for value in ([], {}, 3, None)},
    **{f"base={value!r}": set_in(0, "base", to=value) for value in ("9", None, 2, ["2"])},
    "no rows at all": set_in(0, "rows", to=0),
    "version": set_in(0, "version", to=2),
    "unknown field": set_in(0, "evil", to=1),
    "ids twice": set_in(0, "candidates", 1, "id", to=2),
    **{f"id={value!r}": set_in(0, "candidates", 1, "id", to=value) for value in ([1], {}, math.nan)},
    **{f"dir={value!r}": set_in(0, "candidates", 1, "model_dir", to=value) for value in (3, None)},
    "spec is text": set_in(0, "candidates", 1, "spec", to="x"),
    "group twice": lambda lines: lines[0]["groups"].append(lines[0]["groups"][0]),
    "module twice": set_in(0, "groups", 1, "modules", to=["model.layers.0.q_proj"]),
    **{
        f"group {field}={value!r}"[:50]: set_in(0, "groups", 1, field, to=value)
        for field, values in {
            "bits": (None, [1], {}, {"2": "x"}, {"2": -5}, {"2": math.nan}, {"2": 1.5}, {"2": 10**30}, {"9": 1}),
            "weights": (-5, "x", 10**40, None),
            "modules": ("abc", None, [1, 2]),
            "name": (3, None, ["a"]),
            "layer": ("x", -1, 10**20, 1.5),
        }.items()
        for value in values
    },
    **{
        f"kl={value!r}"[:40]: set_in(3, "kl_rows", to=value)
        for value in (
            [math.nan] * 2, [math.inf] * 2, [-1.0] * 2, ["a"] * 2, ["nan"] * 2, ["1.0"] * 2, [None] * 2, [0.1],
            [0.1] * 9, 3, {"a": 1}, [True] * 2, [10**400] * 2,
        )
    },
    "no kl": removed(3, "kl_rows"),
    **{f"measures {value!r}": set_in(3, "group", to=value) for value in ("nope", ["a"], 3)},
    **{f"from {value!r}": set_in(3, "source", to=value) for value in ("9", {}, 4)},
    "line is a list": set_in(3, to=[]),
    "line is null": set_in(3, to=None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_profile_that_is_no_profile(name: str, lines: list[Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(lines)
    CASES[name](changed)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    with pytest.raises(JournalError) as refused:
        load_profile(path)
    assert str(refused.value).startswith(f"{path}:")
    assert len(str(refused.value)) < 500


RAW = {
    "empty": b"",
    "newline": b"\n",
    "text": b"hello\n",
    "binary": bytes(range(256)) * 10 + b"\n",
    "list": b"[]\n",
    "deep": b"[" * 100_000 + b"\n",
    "digits": b'{"kind":' + b"9" * 5000 + b"}\n",
    "utf16": '{"kind": "recompile-profile"}\n'.encode("utf-16"),
}


@pytest.mark.parametrize("name", RAW)
def test_what_is_no_profile(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(RAW[name])
    refuses(tmp_path, model_optimize, path, "-b", "3", "-o", tmp_path / "o.yaml", "--no-check", names=str(path))
    refuses(tmp_path, model_report, path, "-o", tmp_path / "o.html", names=str(path))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"group": "a", "source"', "", '{"kl_rows": [' + "9" * 5000 + "]}"])
def test_a_damaged_line_has_a_number(line: str, lines: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    text = [json.dumps(one) for one in lines]
    path.write_text("\n".join([*text[:3], line, *text[4:]]) + "\n")
    refuses(tmp_path, model_optimize, path, "-b", "3", "-o", tmp_path / "o.yaml", "--no-check", names=f"{path}:4")


def test_a_last_line_that_is_cut_off(lines: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    refuses(
        tmp_path, model_optimize, path, "-b", "3", "-o", tmp_path / "o.yaml", "--no-check", names=f"{path}:8: the last"
    )
    with open_journal(path, HEADER) as journal:  # model_profile goes on from the line before
        assert len(journal.profile.measurements) == 5


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder", "missing"):
        arguments = (tmp_path / name, "-b", "3", "-o", tmp_path / "o.yaml", "--no-check")
        refuses(tmp_path, model_optimize, *arguments, names=str(tmp_path / name))


@pytest.mark.parametrize(
    "arguments",
    [
        *(["-b", value] for value in ("nan", "inf", "-1", "0", "x", "1e30", "")),
        *(["--size", value] for value in ("-4GiB", "0", "nan", "4,2GiB", "9" * 400 + "GiB", "4XiB", "", "\u0664GiB")),
        *(["--max-kl", value] for value in ("nan", "-1", "0")),
        *(["--max-ppl-increase", value] for value in ("nan%", "-200%", "x")),
        *(["-b", "3", "--minutes", value] for value in ("nan", "-3", "0")),
        *(["-b", "3", "-o", value] for value in ("", ".", "/", "p.jsonl")),
        *(["-b", "3", "--pin", value] for value in ("x", "=", "*=9")),
        ["--frontier", "nan:3:1"],
        ["--frontier", "2:4:0"],
        ["--frontier", "2:4:-1"],
        ["--frontier", "2:4:1e-300"],
    ],
    ids=" ".join,
)
def test_budgets_that_are_none(
    arguments: list[str], lines: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if "-o" in arguments else ["-o", "o.yaml"]
    refuses(tmp_path, model_optimize, "p.jsonl", *arguments, *out, "--no-check", names="")


@pytest.mark.parametrize(
    "name", ["a\nb: [", "\x1b[2J\x1b]0;x\x07", "\u202egnp", '", source: 4}\n  - {key: "*', "a" * 100_000]
)
def test_names_are_only_names(name: str, lines: list[Any], tmp_path: Path) -> None:
    import yaml

    changed = json.loads(json.dumps(lines).replace("model.layers.0", "@@"))
    text = "".join(json.dumps(line) + "\n" for line in changed).replace("@@", json.dumps(name)[1:-1])
    (tmp_path / "p.jsonl").write_text(text)
    code, _ = run_on(model_optimize, tmp_path / "p.jsonl", "-b", "3", "-o", tmp_path / "o.yaml", "--no-check")
    if code == 0:
        keys = [line["key"] for line in yaml.safe_load((tmp_path / "o.yaml").read_text())["overrides"]]
        assert "*" not in keys


def test_the_schema_reads_what_is_right() -> None:
    content = json.loads('{"name": "g", "modules": ["a"], "weights": 3, "bits": {"2": 6}, "layer": null}')
    assert read_as(ProfileGroup, content, "x", error=JournalError) == ProfileGroup("g", ("a",), 3, {"2": 6}, None)
    for made in (4, 2.5, "mine", True, None):
        entry = {"id": made, "model_dir": "d", "fingerprint": "f"}
        assert read_as(Candidate, entry, "x", error=JournalError) == Candidate(made, "d", "f")
