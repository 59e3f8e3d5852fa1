"""Traces of other tools: JSON, JSON lines and parquet, their roles, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import recompile
from recompile.cli.model_diff import main as model_diff
from recompile.errors import MismatchError, RecompileError
from recompile.model.rows import RowOptions
from recompile.model.texts import ROLE_SHARES
from recompile.model.trace import read_trace
from tests import tiny, traces
from tests.commands import refusal

ROLES = list(ROLE_SHARES)


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"input_ids": [60, 10 + number, 62], "response_ids": [20, 21, 22 + number], **more}


def written(path: Path, rows: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(one) for one in rows) + "\n")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet")
        from pyarrow import parquet

        columns = {name: [one.get(name) for one in rows] for name in dict.fromkeys(key for one in rows for key in one)}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["t.json", "t.jsonl", "t.parquet"])
def test_rows_roles_and_masks_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    rows = [row(n, role=ROLES[n % 4], kind="code" if n % 2 else "prose") for n in range(8)]
    rows[2] = {"input_ids": [60, 12, 62, 20, 21, 5, 24], "loss_mask": [0, 0, 0, 1, 1, 0, 1], "role": "accept"}
    trace = read_trace(written(tmp_path / name, rows))
    assert trace.about.roles == tuple(ROLES[n % 4] for n in range(8))
    assert trace.about.kinds[:4] == ("prose", "code", "rows", "code")
    assert trace.lengths.tolist() == [6, 6, 7, *[6] * 5]
    assert trace.ids[1].tolist() == [60, 11, 62, 20, 21, 23, 0]
    assert trace.response[1].tolist() == [False] * 3 + [True] * 3 + [False]
    assert trace.response[2].tolist() == [False, False, False, True, True, False, True]
    assert trace.counted("response")[2].tolist() == [False, False, True, True, False, True, False]


def test_the_form_of_exllamav3_is_read(tmp_path: Path) -> None:
    """Turns of one conversation, and the same one sampled again, are in one role; without roles a hash decides."""
    rows = [
        {"conversation": c, "turn": t, "input_ids": [60, 10 + c, 62, *[7] * t], "response_ids": [20 + e, 21]}
        for e in range(2)
        for c in range(30)
        for t in range(2)
    ]
    whole = {"model": "models/foo/6.00bpw", "vocab_size": 128, "meta": {}, "rows": rows}
    trace = read_trace(written(tmp_path / "t.json", whole))
    roles = dict[int, set[str]]()
    for asked, role in zip(rows, trace.about.roles, strict=True):
        roles.setdefault(asked["conversation"], set()).add(role)
    assert all(len(found) == 1 for found in roles.values())
    assert {role for found in roles.values() for role in found} == set(ROLES)
    assert trace.about.origin == "of another tool, written by 6.00bpw"
    assert trace.about.vocab == 128
    for one in rows:
        del one["conversation"]
    again = read_trace(written(tmp_path / "u.json", rows))
    assert again.about.roles == trace.about.roles  # a later turn begins with the turn before it


def test_rows_without_a_mask_count_whole_and_stand_for_themselves(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, *range(10 + n, 30 + n)]} for n in range(40)]
    trace = read_trace(written(tmp_path / "t.jsonl", rows))
    assert set(trace.about.roles) == set(ROLES)
    assert trace.response.sum(1).tolist() == [20] * 40


BAD = [
    ([row(0), {"response_ids": [1]}], "row 1: wanted an object with input_ids"),
    ([row(0), "x"], "row 1: wanted an object with input_ids"),
    ([{"input_ids": [1, 2.5], "response_ids": [1]}], "row 0: input_ids: wanted a list of whole numbers"),
    ([{"input_ids": [1, [2]], "response_ids": [1]}], "row 0: input_ids: wanted a list of whole numbers"),
    ([{"input_ids": [1, True], "response_ids": ["1"]}], "row 0: response_ids: wanted a list of whole numbers"),
    ([{"input_ids": [1, -2], "response_ids": [1]}], "row 0: input_ids: wanted a list of whole numbers, 0 or more"),
    ([{"input_ids": [], "response_ids": [1]}], "row 0: input_ids: wanted a list"),
    ([{"input_ids": [1, 2**40], "response_ids": [1]}], f"row 0: input_ids: {2**40} is no token"),
    ([row(0, loss_mask=[1, 1, 1])], "row 0: has response_ids and loss_mask"),
    ([{"input_ids": [1, 2, 3], "response": [0, 1]}], "row 0: response is no list of 3 of 0 and 1"),
    ([{"input_ids": [1, 2, 3], "response": [0, 0, 0]}], "row 0: wanted a token before the response"),
    ([{"input_ids": [1, 2, 3], "response": [1, 0, 0]}], "row 0: wanted a token before the response"),
    ([{"input_ids": [1, 2, 3], "loss_mask": 1}], "row 0: loss_mask: wanted a list of whole numbers"),
    ([row(0, role="train")], 'row 0: role is the text "train", wanted one of calibrate, choose, accept, report'),
    ([row(0, role=["report"])], "row 0: role is a list, wanted one of calibrate"),
    ([row(0, role={"a": 1})], "row 0: role is an object, wanted one of calibrate"),
    ([row(0, role="report"), row(1)], "row 1 has no role, and others have one"),
    ([row(0, role="report"), row(1, role="choose"), row(0, role="accept")], "rows 0 and 2 answer the same prompt"),
    ([row(0, role="report", conversation=3), row(1, role="choose", conversation=3)], "rows 0 and 1 answer the same"),
    ([], "holds no rows"),
    ({"data": []}, 'wanted a list of rows, or an object with the key "rows"'),
    ({"vocab_size": 24, "rows": [row(0), row(3)]}, "row 0 has token 60 at place 0, and the vocabulary 24 tokens"),
]


@pytest.mark.parametrize(("rows", "said"), BAD)
def test_what_is_no_trace_is_refused(tmp_path: Path, rows: Any, said: str) -> None:
    path = written(tmp_path / "t.json", rows)
    with pytest.raises(RecompileError, match=f"t.json.*{said}".replace("(", r"\(")):
        read_trace(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(row(0)) + "\n{\n")
    with pytest.raises(RecompileError, match=r"t\.jsonl:2:2: not JSON"):
        read_trace(tmp_path / "t.jsonl")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecompileError, match=r"not a readable parquet file|pip install 'recompile\[parquet\]'"):
        read_trace(tmp_path / "t.parquet")
    with pytest.raises(RecompileError, match="cannot be read"):
        read_trace(tmp_path / "none.json")


def test_a_small_file_that_stands_for_many_values_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "t.parquet", [{"input_ids": [7] * 3000} for _ in range(4)])
    assert path.stat().st_size < 4000
    assert len(read_trace(path).ids) == 4
    monkeypatch.setattr("recompile.model.published_trace.MOST_TOKENS", 11_999)
    with pytest.raises(RecompileError, match=r"t\.parquet: holds 12000 values, at most 11999 are read"):
        read_trace(path)


def test_commands_take_them_and_refuse_tokens_of_another_vocabulary(tmp_path: Path) -> None:
    rows = [row(n, role=ROLES[n % 4]) for n in range(16)]
    path = written(tmp_path / "t.jsonl", rows)
    base, build = traces.model(), tiny.variants("llama-2", (3,))[3]
    found = recompile.diff(build, base, trace=path)
    assert (found.report.rows, found.report.rows_role, found.report.tokens) == (4, "report", 12)
    assert found.report.rows_source == "t.jsonl, of another tool"
    read, vocab = RowOptions(None, 64, trace=path).read([base], "choose")
    assert read.ids[:, 1].tolist() == [11, 15, 19, 23]
    assert vocab is not None
    rows[5]["input_ids"][2] = vocab
    said = refusal(model_diff, "-ma", build, "-mb", base, "--trace", written(path, rows))
    assert f"t.jsonl: row 5 has token {vocab} at place 2, and the vocabulary {vocab} tokens" in said
    assert "of another model" in said


def test_a_row_moved_to_another_role_is_refused_by_what_was_made_of_it(tmp_path: Path) -> None:
    """Another version of a publisher's file: what was profiled on is now to be verified on."""
    first = [row(n, role="choose" if n % 2 else "accept") for n in range(12)]
    profile = tmp_path / "p.jsonl"
    how: dict[str, Any] = {"candidates": ["3,4"], "group_size": tiny.GROUP_SIZE, "importance_rows": 0, "samples": 2}
    recompile.profile(traces.model(), out=profile, mode="sketch", trace=written(tmp_path / "t.jsonl", first), **how)
    found = recompile.optimize(profile, tmp_path / "r.yaml", bits=4, solver="exact", trace=tmp_path / "t.jsonl")
    assert found.verdict is not None
    assert (found.verdict.rows, found.verdict.rows_role) == (6, "accept")
    moved = [{**one, "role": "accept"} for one in first]
    written(tmp_path / "t.jsonl", moved)
    with pytest.raises(MismatchError, match="used in the role choose; a row has one role"):
        recompile.optimize(profile, tmp_path / "r.yaml", bits=4, solver="exact", check=True, trace=tmp_path / "t.jsonl")
