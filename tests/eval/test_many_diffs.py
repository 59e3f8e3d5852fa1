"""Several candidates side by side: each as if it were alone, every two paired over the same rows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import recompile
from eval.metrics import paired_difference
from eval.run_diff import ManyDiffs
from recompile.cli.model_diff import main
from recompile.errors import ArgumentError
from tests import tiny


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "ids.safetensors"
    save_file({"input_ids": tiny.rows(3, 16)}, path)
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "mix.yaml"
    four = tiny.variants("llama-tied", (3, 4))[4]
    path.write_text(f"sources: [{{id: 4, model_dir: '{four}'}}]\noverrides: [{{key: '*v_proj*', source: 4}}]\n")
    return path


@pytest.fixture(scope="module")
def many(ids: Path, recipe: Path) -> ManyDiffs:
    three, four = tiny.variants("llama-tied", (3, 4)).values()
    return recompile.diff_many([three, (three, recipe), four], tiny.base("llama-tied"), input_ids=ids)


def test_each_is_what_it_is_alone(many: ManyDiffs, ids: Path, recipe: Path) -> None:
    three, four = tiny.variants("llama-tied", (3, 4)).values()
    for found, (model, lines) in zip(many.diffs, [(three, None), (three, recipe), (four, None)], strict=True):
        alone = recompile.diff(model, tiny.base("llama-tied"), recipe=lines, input_ids=ids)
        assert found.as_dict() == alone.as_dict()


def test_pairs_are_those_of_the_rows_and_turn_round(many: ManyDiffs) -> None:
    rows = [torch.tensor(found.report.kl_rows) for found in many.diffs]
    for left in range(3):
        for right in range(3):
            if left != right:
                mean, (low, high) = paired_difference(rows[left], rows[right])
                pair = many.pair(left, right)
                assert pair.difference.mean == pytest.approx(mean.mean, abs=1e-12)
                assert pair.interval == pytest.approx((low, high))
                assert pair.is_clear == (low > 0 or high < 0)
    assert many.best == 2
    assert many.names[1] == f"{Path(many.names[0]).name} + mix.yaml"
    with pytest.raises(KeyError):
        many.pair(1, 1)


def test_one_row_has_no_interval(ids: Path, tmp_path: Path) -> None:
    save_file({"input_ids": tiny.rows(1, 16)}, tmp_path / "one.safetensors")
    models = list(tiny.variants("llama-tied", (3, 4)).values())
    found = recompile.diff_many(models, tiny.base("llama-tied"), input_ids=tmp_path / "one.safetensors")
    assert found.pair(0, 1).interval is None
    assert not found.pair(0, 1).is_clear
    assert math.isfinite(found.pair(1, 0).difference.mean)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_command_prints_a_table_and_json(ids: Path, recipe: Path, tmp_path: Path) -> None:
    three, four = tiny.variants("llama-tied", (3, 4)).values()
    out = tmp_path / "many.json"
    given = ["-mb", tiny.base("llama-tied"), "--input-ids", ids, "--json", out, "--quiet"]
    code, said = run("-ma", three, "-ma", four, *given)
    assert code == 0, said
    assert "paired over rows" in said
    assert said.index(four.name) < said.index(three.name)  # the nearest to B comes first
    content = json.loads(out.read_text())
    assert content["best"] == 1
    assert [found["candidate_dir"] for found in content["candidates"]] == [str(three), str(four)]
    code, said = run("-ma", three, "-or", recipe, "-or", recipe, *given)
    assert code == 0, said
    assert "mix.yaml (1)" in said
    assert "mix.yaml (2)" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-or", "RECIPE"], "1 for 2 -ma"),
        (["--activations"], "--activations goes with one -ma"),
        (["-sla", "x.safetensors"], "--save-logits-a goes with one -ma"),
        (["--engine", "llama.cpp"], "one candidate with --engine"),
        (["--divergence", "3by4"], "--divergence: .*is not PROMPTSxTOKENS"),
    ],
)
def test_what_one_candidate_alone_can_have(options: list[str], says: str, ids: Path, recipe: Path) -> None:
    three, four = tiny.variants("llama-tied", (3, 4)).values()
    given = [recipe if option == "RECIPE" else option for option in options]
    code, said = run("-ma", three, "-ma", four, "-mb", tiny.base("llama-tied"), "--input-ids", ids, *given)
    assert code in (1, 2)
    assert re.search(says, said), said


def test_the_library_says_the_same(ids: Path) -> None:
    three, four = tiny.variants("llama-tied", (3, 4)).values()
    with pytest.raises(ArgumentError, match="divergence"):
        recompile.diff_many([three, four], tiny.base("llama-tied"), input_ids=ids, divergence="0x9")
